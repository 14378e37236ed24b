"""Orders of removal: magnitude, OBD, Taylor, Wanda, Lookahead, and shares of the layers."""

from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import jax
import numpy as np
from flax import nnx
from tyro.conf import arg

from jaxlimit import baselines, plots
from jaxlimit.core.checks import require_count
from jaxlimit.core.trees import PyTree
from jaxlimit.experiments.experiment import Experiment
from jaxlimit.experiments.study import Study
from jaxlimit.experiments.subject import Subject, Task, values
from jaxlimit.experiments.tables import (
    Results,
    by_variant,
    cell,
    limit_cells,
    markdown,
    over_seeds,
    threshold_cells,
)
from jaxlimit.pruning.attained import attained_limit
from jaxlimit.pruning.result import Ending
from jaxlimit.training.losses import cross_entropy

ANEW = "magnitude, anew"
ORDERS = ("magnitude", ANEW, "obd", "taylor", "wanda", "lookahead", "erk", "uniform+")
# Where the test accuracy of the cut network is measured; the table shows the two of SHOWN.
GRID = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98)
SHOWN = (0.8, 0.9)


def plan(
    study: Annotated[Study, arg(name="")] = Study(),
    *,
    orders: tuple[str, ...] = ORDERS,
    max_products: int = 600,
) -> Experiment:
    """Which order of the weights lets a network be pruned furthest, cut at once or with readjusted weights.

    Of every order: the predicted and the measured sparsity of the cut, the test accuracy after it, and the
    sparsest network that `attained_limit` finds. Scores are taken once, of the trained network; "magnitude,
    anew" looks at the magnitudes again after every step of readjusting.

    Args:
        study: see `Study`.
        orders: magnitude, "magnitude, anew", obd, taylor, wanda, lookahead, erk, uniform+.
        max_products: budget of `attained_limit` for each order, in products with all examples.
    """
    unknown = [name for name in orders if name not in ORDERS]
    if unknown or not orders or len({*orders}) != len(orders):
        raise ValueError(f"orders must be some of {', '.join(ORDERS)}, each once, got {', '.join(orders)}.")
    require_count("max_products", max_products)
    run = partial(_run, max_products)
    found = study.experiment("orders", study.task(), {name: name for name in orders}, run, table, figure)
    return replace(found, config=found.config | {"max_products": max_products})


def order_scores(name: str, subject: Subject, model: nnx.Module) -> PyTree | None:
    """The scores of an order of `ORDERS`; None for the magnitudes as they are when a cut is made."""
    weights = subject.weights
    match name:
        case "magnitude":
            return jax.tree.map(np.abs, weights)
        case "obd":
            diagonal = baselines.gauss_newton_diagonal(
                subject.outputs, _loss, subject.params, subject.batches
            )
            return baselines.obd_scores(weights, diagonal)
        case "taylor":
            return baselines.taylor_scores(subject.curvature())
        case "wanda":
            return baselines.wanda_scores(subject.outputs, subject.params, subject.batches)
        case "lookahead":
            return baselines.lookahead_scores(weights, baselines.lookahead_layers(model))
        case "erk":
            return baselines.share_scores(weights, name)
        case "uniform+":
            return baselines.share_scores(weights, "uniform", reserved=baselines.uniform_plus(model))
    return None


def _run(max_products: int, task: Task, seed: int, name: str) -> dict[str, Any]:
    model = task.network(seed)
    subject = task.subject(model, seed)
    task.note(f"scores, {name}")
    scores = order_scores(name, subject, model)
    found = subject.limit(("one_shot",), scores=scores)
    attained = attained_limit(
        subject.outputs,
        _loss,
        subject.params,
        subject.batches,
        loss_tolerance=subject.statistics.batch_std,
        scores=scores,
        max_products=max_products,
        unpruned=False,
        checkpoint=None if task.checkpoint is None else task.checkpoint / "attained",
        progress=lambda at: task.note(f"attained, {at.num_products:.0f} of {max_products} products"),
    )
    return {
        "limit": values(found),
        "measured": {
            "loss": subject.loss_threshold(scores),
            "accuracy": subject.accuracy_threshold(scores),
        },
        "test_accuracy": dict(zip(map(str, GRID), subject.test_accuracy(GRID, scores), strict=True)),
        "attained": {
            "sparsity": attained.sparsity,
            "code": attained.code.value,
            "products": attained.num_products,
            "test_accuracy": replace(subject, params=attained.pruned.params).test_accuracy([0.0])[0],
        },
        "dense_test_accuracy": subject.test_accuracy([0.0])[0],
    }


def _loss(logits: jax.Array, batch: Any) -> jax.Array:
    return cross_entropy(logits, batch[1])


def table(results: Results) -> str:
    """Markdown: predicted and measured cut, accuracy after it, and what is attained, for each order."""
    rows = []
    for name, pieces in by_variant(results).items():
        rows.append(
            [
                name,
                *limit_cells(pieces, ("one_shot",)),
                *threshold_cells(pieces),
                *(cell(pieces, lambda p, s=s: p["test_accuracy"][str(s)], ".1%") for s in SHOWN),
                cell(pieces, lambda p: p["attained"]["sparsity"]),
                cell(pieces, lambda p: p["attained"]["test_accuracy"], ".1%"),
            ]
        )
    heads = ["order", "one_shot", "measured loss", "1 point less", *(f"accuracy at {s:g}" for s in SHOWN)]
    text = markdown([*heads, "attained", "its accuracy"], rows)
    ended = [piece["attained"]["code"] == Ending.OUT_OF_PRODUCTS.value for piece in results.values()]
    dense = cell(next(iter(by_variant(results).values())), lambda p: p["dense_test_accuracy"], ".1%")
    return (
        f"{text}\nTest accuracy without pruning: {dense} %. The budget ended {sum(ended)} of {len(ended)} "
        "searches of attained networks.\n"
    )


def figure(results: Results) -> Any:
    """Test accuracy of the cut network against sparsity, a line for each order."""
    curves = {
        name: over_seeds(GRID, [list(piece["test_accuracy"].values()) for piece in pieces])
        for name, pieces in by_variant(results).items()
        if name != ANEW
    }
    return plots.plot_methods(curves)
