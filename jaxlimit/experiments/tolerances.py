"""The limit for the test loss against that for the training loss, and the tolerances of both."""

from typing import Annotated, Any

import numpy as np
from tyro.conf import arg

from jaxlimit import plots
from jaxlimit.core.batches import batched
from jaxlimit.experiments.experiment import Experiment
from jaxlimit.experiments.study import Study
from jaxlimit.experiments.subject import DEFAULT_LIMITS, Task, values
from jaxlimit.experiments.tables import (
    Results,
    by_variant,
    cell,
    is_less,
    limit,
    limit_cells,
    markdown,
    over_seeds,
    tally,
    threshold_cells,
)
from jaxlimit.measuring.loss_statistics import loss_statistics
from jaxlimit.measuring.sweeps import SPARSITIES


def plan(study: Annotated[Study, arg(name="")] = Study()) -> Experiment:
    """Test loss against training loss: is the limit for one that for the other?

    The same network, with the loss over the training examples, its spread eps being the tolerance; with the
    loss over as many test examples, or all where there are fewer, and the same eps; and with the spread of
    the test batches as eps.

    Args:
        study: see `Study`.
    """
    task = study.task()
    # Which examples give the loss, and which the tolerance.
    variants = {"train": ["train", "train"], "test": ["test", "train"], "test, its eps": ["test", "test"]}
    names = {name.replace(", ", "-").replace(" ", "-"): value for name, value in variants.items()}
    return study.experiment("tolerances", task, names, _run, table, figure)


def _run(task: Task, seed: int, variant: Any) -> dict[str, Any]:
    subject = task.trained(seed)
    test = batched(tuple(array[: task.num_examples] for array in task.test), task.preset.recipe.batch_size)
    data = {"train": subject.batches, "test": test}
    statistics = {name: loss_statistics(subject.loss, subject.params, found) for name, found in data.items()}
    loss, tolerance = statistics[variant[0]].mean, statistics[variant[1]].batch_std
    found = subject.limit(batches=data[variant[0]], loss_tolerance=tolerance)
    sweep = subject.sweep(SPARSITIES, data[variant[0]])
    rise = (sweep.metrics["loss"] - loss) / tolerance
    return {
        "limit": values(found),
        "loss": loss,
        "measured": {
            "loss": sweep.first_crossing("loss", loss + tolerance),
            "accuracy": subject.accuracy_threshold(),
        },
        "rise": rise[::4].tolist(),
    }


def table(results: Results) -> str:
    """Markdown: loss, tolerance, limits and thresholds, a row for each loss."""
    rows = []
    for name, pieces in by_variant(results).items():
        rows.append(
            [
                _title(name),
                cell(pieces, lambda p: p["loss"], ".4f"),
                cell(pieces, lambda p: p["limit"]["loss_tolerance"], ".4f"),
                *limit_cells(pieces, DEFAULT_LIMITS),
                *threshold_cells(pieces),
            ]
        )
    text = markdown(["loss", "L", "eps", *DEFAULT_LIMITS, "measured loss", "1 point less"], rows)
    groups = by_variant(results)
    near = {
        name: tally([is_less(abs(limit("one_shot")(p) - p["measured"]["loss"]), 0.02) for p in pieces])
        for name, pieces in groups.items()
    }
    counts = "; ".join(f"{_title(name)} {count}" for name, count in near.items())
    return f"{text}\nRuns in which one_shot lies within .02 of the measured threshold: {counts}.\n"


def _title(name: str) -> str:
    return name.replace("-", ", ", 1).replace("-", " ")


def figure(results: Results) -> Any:
    """Rise of the loss in units of eps, against sparsity, around the thresholds."""
    thresholds = [piece["measured"]["loss"] for piece in results.values()]
    start, end = max(0.0, min(thresholds) - 0.1), min(1.0, max(thresholds) + 0.01)
    grid = SPARSITIES[::4]
    chosen = (grid >= start) & (grid <= end)
    curves = {
        _title(name): over_seeds(grid[chosen], [np.array(piece["rise"])[chosen] for piece in pieces])
        for name, pieces in by_variant(results).items()
    }
    figure = plots.plot_series({"rise of the loss / ε": curves}, xlabel="sparsity s")
    (axes,) = figure.axes
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_ylim(top=min(4, axes.get_ylim()[1]))
    return figure
