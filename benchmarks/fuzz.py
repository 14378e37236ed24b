"""Random problems, small and mean: no crash, no NaN, no interval without the truth.

    python benchmarks/fuzz.py [--problems 2000]

The problems and the checks are those of tests/test_robustness.py, which looks at fewer of them. A problem
that fails a check is counted and kept with what went wrong, and the others go on; with a failure the exit
code is 1.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import common
from test_robustness import problems, solved_and_checked  # pyright: ignore[reportMissingImports]

NAME = "fuzz"


def main() -> int:
    """As typed on the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--problems", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    failures: list[dict[str, str]] = []

    @seed(options.seed)
    @settings(
        max_examples=options.problems,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(problem=problems())
    def solve(problem: tuple) -> None:
        counts["problems"] += 1
        try:
            limit = solved_and_checked(problem)
        except Exception as error:  # whatever it is, it is one failure
            failures.append({"problem": repr(problem), "error": f"{type(error).__name__}: {error}"})
            return
        counts[limit.method] += 1
        counts["Gauss-Newton" if limit.positive_semidefinite else "Hessian"] += 1
        counts["without a whole basis"] += not limit.reorthogonalized
        counts["limits"] += len(limit.estimates())
        counts[limit.status.split(":")[0]] += 1

    solve()
    command = f"python benchmarks/fuzz.py --problems {options.problems} --seed {options.seed}"
    found = {**counts, "failures": len(failures), "failed": failures}
    common.write(NAME, {"command": command, **found})
    print(dict(counts), f"{len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
