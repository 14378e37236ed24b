"""R(s) of the weights against the radius that the width formula allows, and the two bounds of the limit."""

from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from tyro.conf import arg

from jaxlimit import plots
from jaxlimit.experiments.experiment import Experiment
from jaxlimit.experiments.study import Study
from jaxlimit.experiments.subject import Task, values
from jaxlimit.experiments.tables import Results, as_text, cell, limit, markdown, over_seeds

GRID = np.arange(2001) / 2000


def plan(study: Annotated[Study, arg(name="")] = Study()) -> Experiment:
    """R(s) against the width curve with their crossing; the lower against the upper bound of the limit.

    The bounds are those of the kinematic formula at 5 %: with half the window h = sqrt(8 log(4 / .05) / D),
    they solve s = delta(s) / D - h and s = delta(s) / D + h.

    Args:
        study: see `Study`.
    """
    task = study.task()
    return study.experiment("crossing", task, {"trained": None}, _run, table, figure)


def crossing_point(sparsity: NDArray[np.float64], dimension: NDArray[np.float64]) -> float:
    """The s at which delta / D = s, interpolated linearly; delta falls, and s rises along the grid.

    Examples:
        >>> crossing_point(np.array([0.0, 0.5, 1.0]), np.array([1.0, 0.75, 0.0]))
        0.6
    """
    return float(np.interp(0.0, sparsity - dimension, sparsity))


def _run(task: Task, seed: int, _: Any) -> dict[str, Any]:
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


def table(results: Results) -> str:
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


def figure(results: Results) -> Any:
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
