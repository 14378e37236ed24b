"""The distance between the weights of independent trainings, as total variation."""

from collections.abc import Sequence
from itertools import combinations
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from tyro.conf import arg

from jaxlimit import plots
from jaxlimit.core.trees import flatten
from jaxlimit.experiments.experiment import Experiment
from jaxlimit.experiments.study import Study
from jaxlimit.experiments.subject import Task, values
from jaxlimit.experiments.tables import Results, as_text, by_variant, cell, limit, markdown, over_seeds

# Bins of weights: |w| in tenths of a decade from 1e-7 to 10, for either sign; one for all that are smaller.
_MAGNITUDES = np.geomspace(1e-7, 10, 81)
EDGES = np.concatenate([[-np.inf], -_MAGNITUDES[::-1], _MAGNITUDES, [np.inf]])


def plan(study: Annotated[Study, arg(name="")] = Study()) -> Experiment:
    """Total variation between the weights of independent trainings: does the limit depend on the run?

    The weights of all kernels together, in bins of their sign and of a tenth of a decade of |w|. To compare
    with: the distance of two samples of one distribution, and that of trainings with and without L1 term.

    Args:
        study: see `Study`; 2 or more seeds.
    """
    task = study.task()
    if study.seeds < 2:
        raise ValueError(f"seeds must be at least 2, got {study.seeds}.")
    variants = {f"{l1:g}": l1 for l1 in sorted({0.0, task.preset.recipe.l1})}
    return study.experiment("distance", task, variants, _run, table, figure)


def shares(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shares of the weights in the bins between `EDGES`; they sum to 1."""
    return np.histogram(weights, EDGES)[0] / weights.size


def total_variation(first: Sequence[float], second: Sequence[float]) -> float:
    """Half the sum of |p - q| over the bins: from 0, the same shares, to 1, none in common.

    Examples:
        >>> total_variation([0.5, 0.5, 0.0], [0.5, 0.0, 0.5])
        0.5
    """
    return float(np.abs(np.subtract(first, second)).sum() / 2)


def sampling_distance(probabilities: Sequence[float], size: int) -> float:
    """Mean total variation between two samples of one distribution, in the normal approximation.

        E |p_i - q_i| = sqrt(4 P_i (1 - P_i) / (pi n)),   half of their sum

    Args:
        probabilities: P, of the bins.
        size: n, of each sample.

    Examples:
        >>> round(sampling_distance([0.5, 0.5], 100), 4)
        0.0564
    """
    p = np.asarray(probabilities, float)
    return float(np.sum(np.sqrt(p * (1 - p) / (np.pi * size))))


def _run(task: Task, seed: int, l1: float) -> dict[str, Any]:
    subject = task.trained(seed, l1=l1)
    return {
        "limit": values(subject.limit(("width", "cone"))),
        "shares": shares(flatten(subject.weights)).tolist(),
    }


def table(results: Results) -> str:
    """Markdown: distances within each lambda and across, with the limits of the runs."""
    groups = by_variant(results)

    def apart(pairs: Any) -> str:
        return as_text([total_variation(a["shares"], b["shares"]) for a, b in pairs])

    found = []
    for name, pieces in groups.items():
        pooled = np.mean([piece["shares"] for piece in pieces], axis=0)
        floor = sampling_distance(pooled, pieces[0]["limit"]["dim"])
        numbers = [apart(combinations(pieces, 2)), f"{floor:.3f}"]
        found.append([f"lambda = {name}", *numbers, *(cell(pieces, limit(w)) for w in ("width", "cone"))])
    for first, second in combinations(groups, 2):
        pairs = [(a, b) for a in groups[first] for b in groups[second]]
        found.append([f"lambda = {first} against {second}", apart(pairs), "-", "-", "-"])
    return markdown(["runs", "total variation", "of two samples", "width", "cone"], found)


def figure(results: Results) -> Any:
    """Shares of the weights in the bins, a line for each lambda."""
    centres = np.sqrt(_MAGNITUDES[1:] * _MAGNITUDES[:-1])
    curves = {}
    for name, pieces in by_variant(results).items():
        found = np.array([piece["shares"] for piece in pieces])
        # Both signs together: bins 1 ... 80 are negative, from -10 up; 82 ... 161 are positive.
        both = found[:, 1:81][:, ::-1] + found[:, 82:162]
        curves[f"λ = {name}"] = over_seeds(centres, both)
    figure = plots.plot_series({"share of the weights": curves}, xlabel="|w|", logarithmic=["|w|"])
    (axes,) = figure.axes
    axes.set_xlim(1e-7, 10)
    return figure
