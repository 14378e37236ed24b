"""What the limit of one trained network rests on: R(s) against the width, rows of H, and its weights.

crossing   R(s) of the weights against the radius that the width formula allows, and the two bounds
rows       L1 norms of the rows of the Hessian
distance   total variation between the weights of independent trainings
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr
from tyro.conf import arg

from jaxlimit import plots
from jaxlimit.core.trees import flatten
from jaxlimit.experiments.experiment import Experiment
from jaxlimit.experiments.study import Results, Study
from jaxlimit.experiments.subject import Task, values
from jaxlimit.experiments.tables import as_text, by_variant, cell, limit, markdown, over_seeds
from jaxlimit.geometry.magnitude import magnitude_order
from jaxlimit.reference.paper_code import ROW_NORM, row_norms

# Bins of weights: |w| in tenths of a decade from 1e-7 to 10, for either sign; one for all that are smaller.
_MAGNITUDES = np.geomspace(1e-7, 10, 81)
EDGES = np.concatenate([[-np.inf], -_MAGNITUDES[::-1], _MAGNITUDES, [np.inf]])
GRID = np.arange(2001) / 2000


def crossing(study: Annotated[Study, arg(name="")] = Study()) -> Experiment:
    """R(s) against the width curve with their crossing; the lower against the upper bound of the limit.

    The bounds are those of the kinematic formula at 5 %: with half the window h = sqrt(8 log(4 / .05) / D),
    they solve s = delta(s) / D - h and s = delta(s) / D + h.

    Args:
        study: see `Study`.
    """
    task = study.task()
    return study.experiment(
        "crossing", task, {"trained": None}, _crossing, table_crossing, {"crossing.png": figure_crossing}
    )


def crossing_point(sparsity: NDArray[np.float64], dimension: NDArray[np.float64]) -> float:
    """The s at which delta / D = s, interpolated linearly; delta falls, and s rises along the grid.

    Examples:
        >>> crossing_point(np.array([0.0, 0.5, 1.0]), np.array([1.0, 0.75, 0.0]))
        0.6
    """
    return float(np.interp(0.0, sparsity - dimension, sparsity))


def _crossing(task: Task, seed: int, _: Any) -> dict[str, Any]:
    subject = task.trained(seed)
    found = subject.limit(("width", "cone"))
    curve, h = found.curve(GRID), found.transition_halfwidth
    return {
        "limit": values(found),
        "bounds": [crossing_point(GRID, curve.width_dimension + sign * h) for sign in (-1, 1)],
        "sparsity": GRID[::20].tolist(),
        "removed_norm": curve.removed_norm[::20].tolist(),
        "width_dimension": curve.width_dimension[::20].tolist(),
    }


def table_crossing(results: Results) -> str:
    """Markdown: a row for each seed."""
    rows, apart = [], []
    for piece in results.values():
        found, (low, high) = piece["limit"], piece["bounds"]
        at = np.interp(found["width"]["value"], piece["sparsity"], piece["removed_norm"])
        ends = [*(f"{x:.3f}" for x in (low, found["width"]["value"], high)), cell([piece], limit("cone"))]
        h = found["transition_halfwidth"]
        apart.append(high - low)
        rows.append([str(piece["seed"]), f"{found['dim']:,}", f"{at:.3f}", *ends, f"{h:.3f}"])
    text = markdown(["seed", "D", "R at the crossing", "lower", "width", "upper", "cone", "h"], rows)
    return f"{text}\nUpper minus lower bound: {as_text(apart)}.\n"


def figure_crossing(results: Results) -> Any:
    """R(s), and the R at which the width formula's delta / D is s; shaded between the bounds."""
    pieces = list(results.values())
    x = np.array(pieces[0]["sparsity"])
    norms = np.array([piece["removed_norm"] for piece in pieces])
    # delta falls with R: read backwards it rises, as np.interp wants it. Below its last value any R will do.
    allowed = np.array(
        [np.interp(x, p["width_dimension"][::-1], p["removed_norm"][::-1], left=np.nan) for p in pieces]
    )
    curves = {
        "R(s) of the weights that go": over_seeds(x, norms),
        "R at which δ / D = s (width formula)": over_seeds(x, allowed),
    }
    figure = plots.plot_series({"R": curves}, xlabel="sparsity s")
    (axes,) = figure.axes
    low, high = (float(np.mean([piece["bounds"][i] for piece in pieces])) for i in (0, 1))
    axes.axvspan(low, high, color="black", alpha=0.08, linewidth=0)
    axes.set(xlim=(max(0.0, low - 0.25), 1), ylim=(0, float(np.interp(0.97, x, norms.mean(0)))))
    return figure


def rows(study: Annotated[Study, arg(name="")] = Study(), *, num_rows: int = 500) -> Experiment:
    """L1 norms of the rows of the Hessian, from the smallest weight to the largest, with and without L1 term.

    Args:
        study: see `Study`.
        num_rows: how many weights are looked at, evenly spaced in order of magnitude.
    """
    task = study.task()
    if num_rows < 20:
        raise ValueError(f"num_rows must be at least 20, got {num_rows}.")
    variants = {f"{l1:g}": {"l1": l1, "num_rows": num_rows} for l1 in sorted({0.0, task.preset.l1})}
    return study.experiment("rows", task, variants, _rows, table_rows, {"rows.png": figure_rows})


def _rows(task: Task, seed: int, variant: Any) -> dict[str, Any]:
    subject = task.trained(seed, l1=variant["l1"])
    found = subject.limit(("width",))
    ordered = magnitude_order(subject.weights)
    count = min(variant["num_rows"], ordered.dim)
    ranks = np.linspace(0, ordered.dim - 1, count).round().astype(int)
    norms = row_norms(
        subject.curvature(),
        ordered.order[ranks],
        progress=lambda done: task.note(f"rows, {done} of {count}"),
    )
    magnitudes = np.abs(flatten(subject.weights))[ordered.order[ranks]]
    return {
        "limit": values(found),
        "zero_rows": float(np.mean(norms < ROW_NORM)),
        "largest_row": float(norms.max()),
        "correlation": float(spearmanr(magnitudes, norms)[0]),  # pyright: ignore[reportArgumentType]
        "quantiles": [
            [float(q) for q in np.quantile(part, (0.25, 0.5, 0.75))] for part in np.array_split(norms, 20)
        ],
    }


def table_rows(results: Results) -> str:
    """Markdown: a row for each lambda."""
    found = []
    for name, pieces in by_variant(results).items():
        numbers = [cell(pieces, of) for of in (lambda p: p["zero_rows"], limit("width"))]
        norms = [cell(pieces, lambda p, i=i: p["quantiles"][i][1], ".2g") for i in (0, 9, 19)]
        ratio = cell(pieces, lambda p: p["largest_row"] / p["limit"]["largest_eigenvalue"], ".2f")
        found.append([name, *numbers, *norms, cell(pieces, lambda p: p["correlation"], ".2f"), ratio])
    heads = ["lambda", "rows of zeros", "width limit", "smallest 5 %", "median", "largest 5 %"]
    text = markdown([*heads, "rank correlation", "largest row / lambda_max"], found)
    # At the limit delta / D = s: the share of the directions that are free.
    explained = cell(list(results.values()), lambda p: p["zero_rows"] / p["limit"]["width"]["value"], ".0%")
    return f"{text}\nRows of zeros as a share of the directions that are free at the limit: {explained} %.\n"


def figure_rows(results: Results) -> Any:
    """Medians of the row norms of twentieths of the weights, in order of magnitude.

    One below the norm of a row of zeros is drawn there.
    """
    curves = {}
    for name, pieces in by_variant(results).items():
        medians = np.log10(np.maximum([[q[1] for q in piece["quantiles"]] for piece in pieces], ROW_NORM))
        curves[f"λ = {name}"] = over_seeds((np.arange(20) + 0.5) / 20, medians)
    return plots.plot_series(
        {"log₁₀ of the median row norm of H": curves}, xlabel="share of the weights that are smaller"
    )


def distance(study: Annotated[Study, arg(name="")] = Study()) -> Experiment:
    """Total variation between the weights of independent trainings: does the limit depend on the run?

    The weights of all kernels together, in bins of their sign and of a tenth of a decade of |w|. To compare
    with: the distance of two samples of one distribution, and that of trainings with and without L1 term.

    Args:
        study: see `Study`; 2 or more seeds.
    """
    task = study.task()
    if study.seeds < 2:
        raise ValueError(f"seeds must be at least 2, got {study.seeds}.")
    variants = {f"{l1:g}": l1 for l1 in sorted({0.0, task.preset.l1})}
    return study.experiment(
        "distance", task, variants, _distance, table_distance, {"distance.png": figure_distance}
    )


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


def _distance(task: Task, seed: int, l1: float) -> dict[str, Any]:
    subject = task.trained(seed, l1=l1)
    return {
        "limit": values(subject.limit(("width", "cone"))),
        "shares": shares(flatten(subject.weights)).tolist(),
    }


def table_distance(results: Results) -> str:
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


def figure_distance(results: Results) -> Any:
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
