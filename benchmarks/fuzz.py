"""Random problems, small and mean: no crash, no NaN, no interval without the truth.

    python benchmarks/fuzz.py [--problems 2000]

The problems and the checks are those of tests/test_robustness.py, which looks at fewer of them.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

from hypothesis import Phase, given, seed, settings

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import common
from test_robustness import problems, solved_and_checked  # pyright: ignore[reportMissingImports]

from jaxlimit.application import run_folder

NAME = "fuzz"


def main() -> None:
    """As typed on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--problems", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts: Counter[str] = Counter()

    @seed(options.seed)
    @settings(
        max_examples=options.problems,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
    )
    @given(problem=problems())
    def solve(problem: tuple) -> None:
        limit = solved_and_checked(problem)
        counts["problems"] += 1
        counts[limit.method] += 1
        counts["Gauss-Newton" if limit.positive_semidefinite else "Hessian"] += 1
        counts["without a whole basis"] += not limit.reorthogonalized
        counts["limits"] += len(limit.estimates())
        counts[limit.status.split(":")[0]] += 1

    solve()
    command = f"python benchmarks/fuzz.py --problems {options.problems} --seed {options.seed}"
    environment = common.environment()
    run_folder.write_json(
        common.RESULTS / f"{NAME}.json",
        {
            "format": run_folder.FORMAT,
            "command": command,
            **counts,
            "failures": 0,
            "environment": environment,
        },
    )
    print(dict(counts))


if __name__ == "__main__":
    main()
