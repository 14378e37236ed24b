"""Which allocation of a sparsity over the layers costs least loss, on trained networks?

    python benchmarks/layer_shares.py --work DIR

Without retraining. Compared at equal total sparsity, each pruning a layer's smallest weights:

    uniform     the same share of every layer
    magnitude   the global magnitude cut
    curvature   `allocation.allocated_mask`: slope and mean curvature of each layer (Gauss-Newton)
    weights     the same with a curvature for every weight, from a dense matrix (digits only): not an
                allocation over layers, but what averaging over them gives away

Networks, data and training are those of predicted_vs_measured.py, whose --work this may be.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import common
import jax
import numpy as np
from predicted_vs_measured import CASES, Case, Problem, step, train

from jaxlimit import training
from jaxlimit.baselines.masks import layer_counts
from jaxlimit.core import trees, writing
from jaxlimit.geometry import magnitude
from jaxlimit.limits import allocation
from jaxlimit.measuring.loss_statistics import loss_statistics

NAME = "layer_shares"
COMMAND = f"python benchmarks/{NAME}.py --work DIR"
ALLOCATIONS = ("uniform", "magnitude", "curvature", "weights")
SPARSITIES = np.arange(100) / 100
TIMES = (1, 10)
DENSE_DIM, NUM_PROBES = 5_000, 16
SEEDS = {"digits": (0, 1, 2), "fc2-mnist": (0,)}


def cases() -> list[Case]:
    """Networks of predicted_vs_measured.py, at every weight of their L1 term."""
    chosen = [case for case in CASES if case.seed == 0 and case.preset.name in SEEDS]
    ordered = sorted(chosen, key=lambda case: (list(SEEDS).index(case.preset.name), case.preset.recipe.l1))
    return [replace(case, seed=seed) for case in ordered for seed in SEEDS[case.preset.name]]


def measured(case: Case, folder: Path) -> dict[str, Any]:
    """The rise of the loss under every allocation, as far as 10 tolerances, and where it crosses them."""
    problem = Problem(case)
    params = train(case, problem, folder)
    before = loss_statistics(problem.loss, params, problem.batches)
    curvature = training.classification_curvature("gauss_newton", problem.predict, params, problem.batches)
    weights = curvature.weights
    costs = allocation.layer_costs(curvature, jax.random.key(case.seed), num_probes=NUM_PROBES)
    masks: dict[str, Callable[[float], Any]] = {
        "uniform": partial(allocation.uniform_mask, weights),
        "magnitude": partial(magnitude.magnitude_mask, weights),
        "curvature": partial(allocation.allocated_mask, weights, costs),
    }
    if curvature.dim <= DENSE_DIM:
        diagonal = trees.unflatten(np.diag(curvature.dense()), weights)
        single = replace(costs, curvature=jax.tree.map(lambda x: np.maximum(x, 0), diagonal))
        masks["weights"] = partial(allocation.allocated_mask, weights, single)
    rises: dict[str, list[float]] = {}
    crossings: dict[str, list[float]] = {}
    kept: dict[str, Any] = {}
    for name, mask_of in masks.items():
        rises[name] = []
        for sparsity in SPARSITIES:
            mask = mask_of(float(sparsity))
            pruned = magnitude.apply_mask(params, mask)
            rises[name].append(loss_statistics(problem.loss, pruned, problem.batches).mean - before.mean)
            if rises[name][-1] > 2 * max(TIMES) * before.batch_std:
                break
        above = [np.flatnonzero(np.array(rises[name]) > times * before.batch_std) for times in TIMES]
        crossings[name] = [float(SPARSITIES[x[0] - 1]) if x.size else float(SPARSITIES[-1]) for x in above]
        kept[name] = layer_counts(mask_of(crossings[name][0]))
    return {
        "loss": before.mean,
        "loss_tolerance": before.batch_std,
        "slope": jax.tree.leaves(costs.slope),
        "curvature": jax.tree.leaves(costs.curvature),
        "curvature_error": jax.tree.leaves(costs.curvature_error),
        "crossings": crossings,
        "kept_at_crossing": kept,
        "rises": rises,
    }


def table(document: dict[str, Any]) -> str:
    """Means over the seeds of the last sparsity before the loss has risen by 1 and by 10 tolerances."""
    rows = []
    for (network, l1), group in groupby(document["cases"], key=lambda case: (case["network"], case["l1"])):
        found = list(group)
        cells = [
            f"{np.mean([case['crossings'][name][i] for case in found]):.3f}"
            if name in found[0]["crossings"]
            else "-"
            for i in range(len(TIMES))
            for name in ALLOCATIONS
        ]
        rows.append([network, f"{l1:g}", *cells])
    columns = [name if times == 1 else f"{name}, {times} eps" for times in TIMES for name in ALLOCATIONS]
    return common.markdown(["network", "L1", *columns], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of the cases")
    work, rows = parser.parse_args().work, []
    for case in cases():
        folder = work / case.name
        step(folder, NAME, partial(measured, case, folder))
        found = writing.read_json(folder / f"{NAME}.json")
        rows.append({"network": case.preset.name, "l1": case.preset.recipe.l1, "seed": case.seed} | found)
        print(f"{time.strftime('%H:%M:%S')} {case.name}: {found['crossings']}", flush=True)
    document = {"command": COMMAND, "num_probes": NUM_PROBES, "times": list(TIMES), "cases": rows}
    common.write(NAME, document, table(document))


if __name__ == "__main__":
    main()
