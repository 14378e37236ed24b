"""Pruning in random order against the order of magnitude."""

from typing import Annotated, Any

import jax
import numpy as np
from tyro.conf import arg

from jaxlimit import plots
from jaxlimit.core.trees import flatten, unflatten
from jaxlimit.experiments.experiment import Experiment
from jaxlimit.experiments.study import Study
from jaxlimit.experiments.subject import DEFAULT_LIMITS, Task, values
from jaxlimit.experiments.tables import (
    Results,
    by_variant,
    is_less,
    limit,
    limit_cells,
    markdown,
    over_seeds,
    tally,
    threshold_cells,
)
from jaxlimit.measuring.sweeps import SPARSITIES


def plan(study: Annotated[Study, arg(name="")] = Study()) -> Experiment:
    """Random against magnitude order: limits and measured thresholds of the same network.

    Args:
        study: see `Study`.
    """
    task = study.task()
    variants = {"magnitude": False, "random": True}
    return study.experiment("order", task, variants, _run, table, figure)


def _run(task: Task, seed: int, random: bool) -> dict[str, Any]:
    subject = task.trained(seed)
    scores = None
    if random:
        key = jax.random.fold_in(jax.random.key(seed), 2)
        flat = jax.random.permutation(key, flatten(subject.weights).size)
        scores = unflatten(np.asarray(flat), subject.weights)
    found = subject.limit(scores=scores)
    sweep = subject.sweep(SPARSITIES, subject.batches, scores=scores)
    return {
        "limit": values(found),
        "measured": {
            "loss": sweep.first_crossing("loss", subject.statistics.mean + subject.statistics.batch_std),
            "accuracy": subject.accuracy_threshold(scores),
        },
        "sparsity": SPARSITIES[::4].tolist(),
        "removed_norm": found.curve(SPARSITIES[::4]).removed_norm.tolist(),
        "train_loss": sweep.metrics["loss"][::4].tolist(),
    }


def table(results: Results) -> str:
    """Markdown: limits and measured thresholds in both orders."""
    rows = []
    for name, pieces in by_variant(results).items():
        measured = threshold_cells(pieces)
        rows.append([name, *limit_cells(pieces, DEFAULT_LIMITS), *measured])
    text = markdown(["order", *DEFAULT_LIMITS, "measured loss", "1 point less"], rows)
    groups = by_variant(results)
    pairs = list(zip(groups["magnitude"], groups["random"], strict=True))
    below = {
        name: tally([is_less(limit(name)(b), limit(name)(a)) for a, b in pairs]) for name in DEFAULT_LIMITS
    }
    lower = ", ".join(f"{name} {count}" for name, count in below.items())
    return f"{text}\nRuns whose limit is lower in random order: {lower}.\n"


def figure(results: Results) -> Any:
    """R(s) and the training loss against sparsity, in both orders."""
    panels: dict[str, dict[str, Any]] = {"R(s)": {}, "training loss (nats)": {}}
    for name, pieces in by_variant(results).items():
        for panel, of in zip(panels.values(), ("removed_norm", "train_loss"), strict=True):
            panel[name] = over_seeds(pieces[0]["sparsity"], [piece[of] for piece in pieces])
    return plots.plot_series(panels, xlabel="sparsity s", logarithmic=["training loss (nats)"])
