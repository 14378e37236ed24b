"""What does a pruning limit spend its products on?

    python benchmarks/products_spent.py --work DIR [--parts runs beside] [--runs digits-l1-0-1438-hessian ...]

The runs of accuracy.json, at the tolerance of .001, each limit that products can give: all four for
Gauss-Newton, all but readjusted for the Hessian. Digits have a dense matrix; one probe is asked of them, so
that products do the work. Counted are

    spectrum    steps of the runs from random probes
    one_shot    points of the path
    cone        looks, and steps of the run from each removed vector
    readjusted  numbers of removals, and products of conjugate gradients at each

and how the limit of each stage was resolved by and by. "To spare" are steps of Lanczos behind the step count
from which on a run would have done at every later one.

`beside` compares the ridges that looks at the cone tell beside themselves with the true ones, on digits, of
which the dense matrix knows them. It also tells d^T F d as a multiple of what its diagonal gives, as in
`limits.cone`.

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
import numpy as np

import jaxlimit
from jaxlimit.geometry.dimensions import LOG_INFINITE
from jaxlimit.geometry.magnitude import magnitude_order
from jaxlimit.limits import lanczos_source
from jaxlimit.limits.cone import Slope, look_at, points_beside
from jaxlimit.limits.conjugate_gradients import ReadjustedLoss
from jaxlimit.limits.lanczos_blocks import INDEFINITE_STEPS, LanczosBlocks
from jaxlimit.limits.problem import Problem
from jaxlimit.limits.pruning_limit import MAX_MATVECS
from jaxlimit.spectrum.bracket import SpectralBracket
from jaxlimit.spectrum.measure import SpectralMeasure
from jaxlimit.spectrum.tridiagonal import Tridiagonal
from jaxlimit.training.losses import CURVATURES

NAME = "products_spent"
LIMITS = {"hessian": ("one_shot", "width", "cone"), "gauss_newton": jaxlimit.limits.estimate.LIMITS}
RUNS = {f"{network.label}-{kind}": (network, kind) for network in accuracy.NETWORKS for kind in CURVATURES}
DENSE_DIM = 5_000
# Of products, where each takes a tenth of a second and more.
BUDGETS = {"lenet-cifar10": 3_000}
SMALL = [name for name in RUNS if name.startswith("digits")]
LOOKS = (0.72, 0.76, 0.8, 0.88, 0.9, 0.91, 0.93, 0.95)
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
            max_matvecs=BUDGETS.get(network.name, MAX_MATVECS),
            num_probes=1 if curvature.dim <= DENSE_DIM else None,
            which=LIMITS[kind],
            progress=watch.tell,
        )
    limits = {name: vars(getattr(limit, name)) for name in LIMITS[kind] if getattr(limit, name) is not None}
    found = {"limits": limits, "code": limit.code, "num_matvecs": limit.num_matvecs, "dim": limit.dim}
    return found | {"blocks": watch.blocks, "path": watch.path, "solves": watch.solves, "trace": watch.trace}


def beside(network: accuracy.Network, kind: str) -> dict[str, Any]:
    """The ridges a tolerance away from looks, as they tell them and as the dense matrix has them."""
    curvature = network.curvature(kind)
    problem = Problem(magnitude_order(curvature.weights), network.loss_tolerance)
    values, vectors = np.linalg.eigh(curvature.dense())
    vectors, weights = vectors[problem.order.order], problem.order.sort(curvature.weights).astype(np.float64)
    sizes, within, ridges = np.abs(values), round(accuracy.TOLERANCE * problem.dim), []

    def seen(n: int) -> tuple[Any, Any]:
        coordinates = weights[:n] @ vectors[:n]
        measure = SpectralMeasure(values, coordinates**2 / np.sum(coordinates**2))
        return coordinates, look_at(SpectralBracket.exact(measure), problem, n).point

    for n in (round(s * problem.dim) for s in LOOKS):
        coordinates, point = seen(n)
        if point.log_rho.value >= LOG_INFINITE:
            continue
        part = sizes / (sizes + problem.ridge(n) * np.exp(point.log_rho.value))
        energy = part * coordinates**2
        stiffening = float(energy @ (1 - part) / np.sum(energy))
        slope = Slope(vectors @ (part * coordinates), float(np.mean(part)), stiffening)
        for told in points_beside(point, slope, problem, within):
            span, log_rho = slice(*sorted((n, told.num_removed))), told.log_rho
            d = weights[span] @ vectors[span]
            ridges.append(
                {
                    "look": n,
                    "removals": told.num_removed,
                    "log_rho": seen(told.num_removed)[1].log_rho.value,
                    "told": [log_rho.lower, log_rho.value, log_rho.upper],
                    "second_order": float(d**2 @ part / (slope.mean * weights[span] @ weights[span])),
                }
            )
    return {"dim": problem.dim, "ridges": ridges}


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


def change(before: int | None, now: int) -> str:
    """Of a number, and nothing of 0; what was not measured before stands alone."""
    if not (before or now):
        return ""
    return f"{now:,}" if before is None else f"{before} to {now}"


def products_table(document: dict[str, Any]) -> str:
    """A row for each run: products before, where that was measured, and after, and for what."""
    rows = []
    for name, run in document["runs"].items():
        before, parts = document["before"].get(name), spent(run)
        old: dict[str, Any] = dict.fromkeys(parts) if before is None else spent(before)
        cells = [change(old[part], parts[part]) for part in ("spectrum", "one_shot", "cone", "readjusted")]
        cells.insert(3, change(None if before is None else looks(before), looks(run)))
        rows.append([name, *cells, str(spare(run)), f"{run['num_matvecs']:,}", ""])
        if before is not None:
            rows[-1][-2] = f"{before['num_matvecs']:,} to {rows[-1][-2]}"
            rows[-1][-1] = f"{run['num_matvecs'] / before['num_matvecs']:.2f}"
    heads = ["run", "spectrum", "one_shot", "cone", "its looks", "readjusted", "to spare", "all", "ratio"]
    return common.markdown(heads, rows)


def looks(run: dict[str, Any]) -> int:
    """At the cone."""
    return sum(b["runs"] for b in run["blocks"] if b["name"].startswith("cone"))


def intervals_table(document: dict[str, Any]) -> str:
    """The limits that changed, before and after."""
    rows = []
    for name, run in document["runs"].items():
        cells = []
        for limit in ("cone", "readjusted"):
            for found in (document["before"].get(name), run):
                x = None if found is None else found["limits"].get(limit)
                cells.append("" if x is None else f"{x['value']:.4f} [{x['lower']:.4f}, {x['upper']:.4f}]")
        rows.append([name, *cells])
    return common.markdown(["run", "cone before", "cone", "readjusted before", "readjusted"], rows)


def beside_table(document: dict[str, Any]) -> str:
    """A row for each matrix: how well the ridges beside looks are told."""
    rows = []
    for name, run in document["beside"].items():
        ridges = run["ridges"]
        inside = sum(x["told"][0] <= x["log_rho"] <= x["told"][2] for x in ridges)
        errors = [abs(x["told"][1] - x["log_rho"]) for x in ridges]
        shares = [x["second_order"] for x in ridges]
        cells = [
            f"{inside} of {len(ridges)}",
            f"{max(errors):.4f}",
            f"{min(shares):.2f} to {max(shares):.2f}",
        ]
        rows.append([name, *cells])
    return common.markdown(
        ["run", "within bounds", "largest error of log a", "second order by its diagonal"], rows
    )


def main() -> None:
    """As typed on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR")
    parser.add_argument("--parts", nargs="+", default=["runs", "beside"], choices=["runs", "beside"])
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--before", action="store_true", help="keep the counts as those before a change")
    options = parser.parse_args()
    found: dict[str, dict[str, Any]] = {"before": {}, "runs": {}, "beside": {}}
    for name in options.runs:
        if "runs" in options.parts:
            counted = common.step(options.work / f"{name}.json", lambda name=name: count(*RUNS[name]))
            found["before" if options.before else "runs"][name] = counted
        if "beside" in options.parts and name in SMALL:
            path = options.work / f"{name}-beside.json"
            found["beside"][name] = common.step(path, lambda name=name: beside(*RUNS[name]))
    document = {"command": "python benchmarks/products_spent.py --work DIR", "tolerance": accuracy.TOLERANCE}
    kept = common.read_document(NAME)
    for part, new in found.items():
        merged = {**kept.get(part, {}), **new}
        document[part] = {name: merged[name] for name in RUNS if name in merged}
    common.write(NAME, document)
    common.write_table(NAME, products_table(document))
    common.write_table(f"{NAME}_intervals", intervals_table(document))
    common.write_table(f"{NAME}_beside", beside_table(document))


if __name__ == "__main__":
    main()
