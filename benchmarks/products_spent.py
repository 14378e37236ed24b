"""What does a pruning limit spend its products on?

    python benchmarks/products_spent.py --work DIR [--runs digits-l1-0-1438-hessian ...]

The runs of accuracy.json, at the tolerance of .001, each limit that products can give: all four for
Gauss-Newton, all but readjusted for the Hessian. Digits have a dense matrix; one probe is asked of them, so
that products do the work. Counted are

    spectrum    steps of the runs from random probes
    one_shot    points of the path
    cone        looks, and steps of the run from each removed vector
    readjusted  numbers of removals, and products of conjugate gradients at each

and how the limit of each stage was resolved by and by. "To spare" are steps of Lanczos behind the step count
from which on a run would have done at every later one.

DIR keeps one file for each run. What it does not hold stays as it is in results/products_spent.json, which
also holds, as "before", what commit c0c5bc5 spent.
"""

import argparse
import itertools
import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import accuracy
import common
import jax

import jaxlimit
from jaxlimit.limits import lanczos_source
from jaxlimit.limits.conjugate_gradients import ReadjustedLoss
from jaxlimit.limits.lanczos_blocks import INDEFINITE_STEPS, LanczosBlocks
from jaxlimit.spectrum.tridiagonal import Tridiagonal
from jaxlimit.training.losses import CURVATURES

NAME = "products_spent"
LIMITS = {"hessian": ("one_shot", "width", "cone"), "gauss_newton": jaxlimit.limits.estimate.LIMITS}
RUNS = {f"{network.label}-{kind}": (network, kind) for network in accuracy.NETWORKS for kind in CURVATURES}
DENSE_DIM = 5_000
EVERY = 4  # step counts at which a run is asked whether it would have done


class Watch:
    """What the limits do with their products, while it is open."""

    def __init__(self) -> None:
        self.blocks: list[dict[str, Any]] = []
        self.path: list[int] = []
        self.solves: list[dict[str, Any]] = []
        self.trace: list[tuple[int, str, float]] = []

    def tell(self, progress: jaxlimit.Progress) -> None:
        """Products so far, stage, and how far its limit is resolved, wherever that has changed."""
        if math.isfinite(progress.spread) and (not self.trace or self.trace[-1][2] != progress.spread):
            self.trace.append((progress.num_matvecs, progress.stage, progress.spread))

    def __enter__(self) -> "Watch":
        self._stack = ExitStack()
        for owner, name, watched in (
            (LanczosBlocks, "extend", self._extend),
            (lanczos_source, "predicted_path", self._predicted_path),
            (ReadjustedLoss, "__call__", self._readjusted),
        ):
            original = getattr(owner, name)
            self._stack.enter_context(patch.object(owner, name, watched(original)))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _extend(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def extend(
            blocks: LanczosBlocks, name: str, starts: Any, resolved: Callable[..., bool], **options: Any
        ) -> tuple[list[Tridiagonal], Any]:
            runs, standing = original(blocks, name, starts, resolved, **options)
            state, steps = blocks.budget.state, max(run.num_steps for run in runs)
            least = EVERY if blocks.semidefinite else INDEFINITE_STEPS
            counts = range(steps - (steps - least) // EVERY * EVERY, steps, EVERY)
            does = (resolved([run.truncate(k) for run in runs]) for k in reversed(counts))
            needed = steps - EVERY * sum(itertools.takewhile(bool, does))
            self.blocks.append({"name": name, "runs": len(runs), "steps": steps, "needed": needed})
            blocks.budget.state = state
            return runs, standing

        return extend

    def _predicted_path(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def predicted_path(*arguments: Any) -> Any:
            path, start = original(*arguments)

            def point(n: int) -> Any:
                self.path.append(n)
                return path(n)

            return point, start

        return predicted_path

    def _readjusted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(loss: ReadjustedLoss, num_removed: int) -> tuple[float, float]:
            before = loss.budget.count
            lower, upper = original(loss, num_removed)
            products, eps = loss.budget.count - before, loss.problem.loss_tolerance
            self.solves.append(
                {"n": num_removed, "products": products, "lower": lower / eps, "upper": upper / eps}
            )
            return lower, upper

        return call


def count(network: accuracy.Network, kind: str) -> dict[str, Any]:
    """One limit, watched."""
    curvature = network.curvature(kind)
    with Watch() as watch:
        limit = jaxlimit.pruning_limit(
            curvature,
            jax.random.key(0),
            loss_tolerance=network.loss_tolerance,
            tolerance=accuracy.TOLERANCE,
            num_probes=1 if curvature.dim <= DENSE_DIM else None,
            which=LIMITS[kind],
            progress=watch.tell,
        )
    limits = {name: vars(getattr(limit, name)) for name in LIMITS[kind] if getattr(limit, name) is not None}
    found = {"limits": limits, "code": limit.code, "num_matvecs": limit.num_matvecs, "dim": limit.dim}
    return found | {"blocks": watch.blocks, "path": watch.path, "solves": watch.solves, "trace": watch.trace}


def spent(run: dict[str, Any]) -> dict[str, int]:
    """Products by what they were for; they sum up to those of the limit."""

    def steps(name: str) -> int:
        return sum(b["runs"] * b["steps"] for b in run["blocks"] if b["name"].startswith(name))

    found = {
        "spectrum": steps("probe"),
        "one_shot": len(run["path"]),
        "cone": steps("cone"),
        "readjusted": sum(solve["products"] for solve in run["solves"]),
    }
    assert sum(found.values()) == run["num_matvecs"]
    return found


def spare(run: dict[str, Any]) -> int:
    """Steps of Lanczos that came after the run would have done."""
    return sum(b["runs"] * (b["steps"] - b["needed"]) for b in run["blocks"])


def products_table(document: dict[str, Any]) -> str:
    """A row for each run: products before and after, and for what."""
    rows = []
    for name, run in document["runs"].items():
        before, cells = document["before"][name], []
        for part in ("spectrum", "one_shot", "cone", "readjusted"):
            old, new = spent(before)[part], spent(run)[part]
            cells.append("" if old == new == 0 else f"{old} to {new}")
        looks = [sum(b["runs"] for b in x["blocks"] if b["name"].startswith("cone")) for x in (before, run)]
        cells.insert(3, f"{looks[0]} to {looks[1]}")
        old, new = before["num_matvecs"], run["num_matvecs"]
        rows.append([name, *cells, str(spare(run)), f"{old:,} to {new:,}", f"{new / old:.2f}"])
    heads = ["run", "spectrum", "one_shot", "cone", "its looks", "readjusted", "to spare", "all", "ratio"]
    return common.markdown(heads, rows)


def intervals_table(document: dict[str, Any]) -> str:
    """The limits that changed, before and after."""
    rows = []
    for name, run in document["runs"].items():
        cells = []
        for limit in ("cone", "readjusted"):
            for found in (document["before"][name]["limits"], run["limits"]):
                x = found.get(limit)
                cells.append("" if x is None else f"{x['value']:.4f} [{x['lower']:.4f}, {x['upper']:.4f}]")
        rows.append([name, *cells])
    return common.markdown(["run", "cone before", "cone", "readjusted before", "readjusted"], rows)


def main() -> None:
    """As typed on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR")
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--before", action="store_true", help="keep the counts as those before a change")
    options = parser.parse_args()
    found = {
        name: common.step(options.work / f"{name}.json", lambda name=name: count(*RUNS[name]))
        for name in options.runs
    }
    document = {"command": "python benchmarks/products_spent.py --work DIR", "tolerance": accuracy.TOLERANCE}
    kept = common.read_document(NAME)
    part = "before" if options.before else "runs"
    for each in ("before", "runs"):
        merged = {**kept.get(each, {}), **(found if each == part else {})}
        document[each] = {name: merged[name] for name in RUNS if name in merged}
    common.write(NAME, document)
    document["runs"] = {name: run for name, run in document["runs"].items() if name in document["before"]}
    common.write_table(NAME, products_table(document))
    common.write_table(f"{NAME}_intervals", intervals_table(document))


if __name__ == "__main__":
    main()
