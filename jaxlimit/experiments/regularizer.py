"""The limit as a regulariser: training for flat directions, against training with an L1 term."""

from dataclasses import replace
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from tyro.conf import arg

from jaxlimit import plots
from jaxlimit.application.presets import build_network
from jaxlimit.baselines.masks import size
from jaxlimit.baselines.network import kernels
from jaxlimit.core.trees import PyTree, partition
from jaxlimit.experiments.experiment import Experiment, on_epoch
from jaxlimit.experiments.study import OwnNetworks
from jaxlimit.experiments.subject import Task, trace, values
from jaxlimit.experiments.tables import (
    Results,
    by_variant,
    cell,
    curve,
    limit,
    limit_cells,
    markdown,
    threshold_cells,
)
from jaxlimit.geometry.differentiable import width_dimension_of_params
from jaxlimit.spectrum.probes import rademacher
from jaxlimit.training.classifier import train
from jaxlimit.training.losses import Loss, classification_loss, cross_entropy

WHICH = ("one_shot", "width")
# In units of the preset's lambda, and of the loss.
MULTIPLES = (0.2, 1.0, 4.0)
WEIGHTS = (1.0, 3.0, 10.0)
# A solve in training need not be more exact than its one random probe. But its budget must not bind: ended
# early, it gives a gradient several times too large.
ACCURACY, MAX_MATVECS = 0.03, 300


class Flatness(NamedTuple):
    """The term weight * (1 - delta / D) with delta at R(sparsity) and this loss tolerance."""

    weight: float
    sparsity: float
    loss_tolerance: float


def plan(
    study: Annotated[OwnNetworks, arg(name="")] = OwnNetworks(),
    *,
    sparsity: float = 0.8,
    loss_tolerance: float = 0.01,
    weights: tuple[float, ...] = WEIGHTS,
) -> Experiment:
    """Train for many flat directions instead of an L1 term: which sparsity does it buy, at which accuracy?

    The term is w * (1 - delta / D), the share of directions that are not flat: of the Gauss-Newton matrix of
    each batch, at the ridge of the width formula, by one random probe.

    Args:
        study: see `OwnNetworks`.
        sparsity: s at which the removed norm R(s) is taken.
        loss_tolerance: eps of the ridge 2 eps / R(s)^2.
        weights: of the term, in units of the loss.
    """
    task = study.task()
    dim = size(kernels(build_network(task.preset, 0)))
    if not 1 / dim <= sparsity <= 1:
        raise ValueError(f"sparsity must remove one of the {dim:,} weights and be at most 1, got {sparsity}.")
    if not 0 < loss_tolerance < float("inf"):
        raise ValueError(f"loss_tolerance must be positive and finite, got {loss_tolerance}.")
    if not weights or not all(0 < value < float("inf") for value in weights):
        raise ValueError(f"weights must be one or more positive finite numbers, got {list(weights)}.")
    if task.preset.augment:
        raise ValueError(f"{task.preset.name} augments its data, which this training does not: take another.")
    variants: dict[str, Any] = {"neither": None}
    variants |= {f"L1 {m * task.preset.recipe.l1:g}": m * task.preset.recipe.l1 for m in MULTIPLES}
    variants |= {f"flat {value:g}": [value, sparsity, loss_tolerance] for value in sorted({*weights})}
    return study.experiment("regularizer", task, variants, _run, table, figure)


def flat_loss(predict: Any, flatness: Flatness, key: jax.Array) -> Loss:
    """Cross entropy plus the term, as a loss for `train`; every batch has a probe of its own."""
    loss = classification_loss(predict)

    def regularized(params: PyTree, batch: PyTree) -> jax.Array:
        images, labels = batch
        # `train` takes a loss without a key, so the probe comes from the examples of the batch, which change
        # with the epoch. An objective of `minimise` would be given a key, but would draw other probes than
        # those that the committed results rest on.
        total = jnp.sum(images.reshape(len(labels), -1) * (1 + labels[:, None]), dtype=jnp.float32)
        number = jax.lax.bitcast_convert_type(total, jnp.uint32)
        probe = rademacher(jax.random.fold_in(key, number), partition(params)[0], 1)
        delta = width_dimension_of_params(
            lambda params, batch: predict(params, batch[0]),
            lambda outputs, batch: cross_entropy(outputs, batch[1]),
            params,
            batch,
            probe,
            sparsity=flatness.sparsity,
            loss_tolerance=flatness.loss_tolerance,
            accuracy=ACCURACY,
            max_matvecs=MAX_MATVECS,
        )
        return loss(params, batch) + flatness.weight * (1 - delta)

    return regularized


def _run(task: Task, seed: int, variant: float | list[float] | None) -> dict[str, Any]:
    preset = task.preset
    start = task.subject(build_network(preset, seed), seed)
    loss = start.loss
    if isinstance(variant, (list, tuple)):
        loss = flat_loss(start.predict, Flatness(*variant), jax.random.fold_in(jax.random.key(seed), 2))
    params = train(
        loss,
        start.params,
        task.train,
        jax.random.fold_in(jax.random.key(seed), 0),
        epochs=preset.recipe.epochs,
        batch_size=preset.recipe.batch_size,
        learning_rate=preset.recipe.rate(len(task.train[1])),
        momentum=preset.recipe.momentum,
        l1=variant if isinstance(variant, float) else 0.0,
        on_epoch=on_epoch(task.note),
        checkpoint=task.checkpoint,
    )
    subject = replace(start, params=params)
    found = subject.limit(WHICH)
    magnitudes = jnp.concatenate([jnp.abs(jnp.ravel(x)) for x in jax.tree.leaves(subject.weights)])
    return {
        "limit": values(found),
        "trace": trace(found),
        "accuracy": subject.test_accuracy([0.0])[0],
        "loss_tolerance": subject.statistics.batch_std,
        "measured": subject.thresholds(),
        "median": float(jnp.median(magnitudes)),
        "norm": float(jnp.linalg.norm(magnitudes)),
    }


def table(results: Results) -> str:
    """Markdown: a row for each term and weight."""
    rows = [
        [
            name,
            cell(pieces, lambda p: p["accuracy"], ".1%"),
            *limit_cells(pieces, WHICH),
            *threshold_cells(pieces),
            cell(pieces, lambda p: p["trace"], ".3g"),
            cell(pieces, lambda p: p["median"], ".4f"),
            cell(pieces, lambda p: p["norm"], ".1f"),
        ]
        for name, pieces in by_variant(results).items()
    ]
    heads = [
        "term",
        "test accuracy",
        *WHICH,
        "measured loss",
        "1 point less",
        "tr H",
        "median weight",
        "norm",
    ]
    return markdown(heads, rows)


def figure(results: Results) -> Any:
    """Limits and thresholds, and test accuracy, of each term."""
    groups = by_variant(results)
    x = range(len(groups))
    sparsities = {name: curve(groups, x, limit(name)) for name in WHICH} | {
        "measured loss": curve(groups, x, lambda p: p["measured"]["loss"]),
        "1 point less": curve(groups, x, lambda p: p["measured"]["accuracy"]),
    }
    accuracy = {"unpruned": curve(groups, x, lambda p: 100 * p["accuracy"])}
    panels = {"sparsity": sparsities, "test accuracy (%)": accuracy}
    return plots.plot_series(panels, xlabel="term and its weight", ticks=list(groups), joined=False)
