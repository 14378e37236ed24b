"""The L1 norms of the rows of the Hessian, in the order of the weights' magnitudes."""

from typing import Annotated, Any

import numpy as np
from scipy.stats import spearmanr
from tyro.conf import arg

from jaxlimit import plots
from jaxlimit.core.checks import require_count
from jaxlimit.core.trees import flatten
from jaxlimit.experiments.experiment import Experiment
from jaxlimit.experiments.study import Study
from jaxlimit.experiments.subject import Task, values
from jaxlimit.experiments.tables import Results, by_variant, cell, limit, markdown, over_seeds
from jaxlimit.geometry.magnitude import magnitude_order
from jaxlimit.reference.paper_code import ROW_NORM, row_norms


def plan(study: Annotated[Study, arg(name="")] = Study(), *, num_rows: int = 500) -> Experiment:
    """L1 norms of the rows of the Hessian, from the smallest weight to the largest, with and without L1 term.

    Args:
        study: see `Study`.
        num_rows: how many weights are looked at, evenly spaced in order of magnitude.
    """
    task = study.task()
    require_count("num_rows", num_rows, 20)
    variants = {f"{l1:g}": {"l1": l1, "num_rows": num_rows} for l1 in sorted({0.0, task.preset.recipe.l1})}
    return study.experiment("rows", task, variants, _run, table, figure)


def _run(task: Task, seed: int, variant: Any) -> dict[str, Any]:
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


def table(results: Results) -> str:
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


def figure(results: Results) -> Any:
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
