"""Limits along the way of methods that prune little by little: iterative pruning, scores of Rare Gems."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from tyro.conf import arg

from jaxlimit import baselines, plots
from jaxlimit.application.presets import build_network
from jaxlimit.baselines.gems import recipe_l2, search, searchable, straight_through
from jaxlimit.baselines.masks import kept_counts
from jaxlimit.baselines.network import SparseNetwork, kernels, stage
from jaxlimit.core.trees import combine, flatten, partition
from jaxlimit.experiments.experiment import Experiment, on_epoch
from jaxlimit.experiments.methods import CIFAR10, settings_of
from jaxlimit.experiments.study import Results, Study
from jaxlimit.experiments.subject import Subject, Task, trace, values
from jaxlimit.experiments.tables import (
    by_variant,
    cell,
    curve,
    is_less,
    limit,
    markdown,
    mean_and_spread,
    tally,
)
from jaxlimit.models import from_nnx

PyTree = Any
# Up to so many weights an exact limit costs no more than one from probes.
SMALL = 2_000
WHICH = ("one_shot", "width")


def gradual(
    study: Annotated[Study, arg(name="")] = Study(),
    *,
    rounds: int = 8,
    learning_rate: Annotated[
        float | None, arg(help_behavior_hint="(default: the recipe's)", metavar="FLOAT")
    ] = None,
) -> Experiment:
    """The limit after each round of iterative pruning: does it rise?

    Two trainings: the recipe of iterative pruning, and the preset's with its L1 term. After each round the
    limit is that of the survivors; with what was removed before, it is a share of all weights.

    Args:
        study: see `Study`; `--epochs` are those of both trainings.
        rounds: each removes a fifth of the survivors.
        learning_rate: of the recipe's training. Its .1 is made for networks with batch norm.
    """
    study.refuse("networks")
    task = study.task()
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}.")
    changes = {} if learning_rate is None else {"learning_rate": learning_rate}
    # Refuses what is out of range.
    settings_of("imp", task.preset, len(task.train[1]), study.epochs, learning_rate)
    variants = {
        "recipe": {"l1": False, "rounds": rounds, "epochs": study.epochs, **changes},
        "l1": {"l1": True, "rounds": rounds, "epochs": task.preset.epochs},
    }
    return study.experiment(
        "gradual", task, variants, _gradual, table_gradual, {"gradual.png": figure_gradual}
    )


def survivors(
    predict: Callable[..., jax.Array], params: PyTree, mask: PyTree
) -> tuple[Callable[..., jax.Array], dict[str, jax.Array]]:
    """A network as a function of the weights alone that a mask keeps.

    Args:
        predict: `predict(params, inputs) -> outputs`.
        params: its parameters; those that are not pruned are held fixed.
        mask: like the prunable weights of `params`, True = kept.

    Returns:
        `predict(kept, inputs)`, and `kept`: {"kept": (number of survivors, 1)}, in the order of the flattened
        weights.
    """
    weights, rest = partition(params)
    flat, unravel = ravel_pytree(weights)
    indices = np.flatnonzero(flatten(mask))

    def of(kept: PyTree, inputs: jax.Array) -> jax.Array:
        whole = jnp.zeros_like(flat).at[indices].set(kept["kept"][:, 0])
        return predict(combine(unravel(whole), rest), inputs)

    return of, {"kept": flat[indices][:, None]}


def _gradual(task: Task, seed: int, variant: Any) -> dict[str, Any]:
    num_examples, rate = len(task.train[1]), variant.get("learning_rate")
    settings = settings_of("imp", task.preset, num_examples, variant["epochs"], rate)
    if variant["l1"]:
        settings = replace(settings, recipe=settings_of("lomp", task.preset, num_examples))
    networks = baselines.iterative_pruning(
        build_network(task.preset, seed),
        task.train,
        jax.random.key(seed),
        [1 - (1 - settings.removed_share) ** number for number in range(variant["rounds"] + 1)],
        settings,
        checkpoint=task.checkpoint,
        augment=task.preset.augmentation(),
        on_epoch=on_epoch(task.note),
    )
    return {"rounds": [_round(task, network, seed, number) for number, network in enumerate(networks)]}


def _round(task: Task, network: SparseNetwork, seed: int, number: int) -> dict[str, Any]:
    whole = task.subject(network.model, seed)
    predict, kept = survivors(network.predict, network.params, network.mask)
    probes = None if network.num_kept <= SMALL else whole.num_probes
    checkpoint = stage(task.checkpoint, f"limit-{number}")
    subject = replace(whole, predict=predict, params=kept, num_probes=probes, checkpoint=checkpoint)
    found = values(subject.limit(WHICH))
    density = 1 - network.sparsity
    return {
        "sparsity": network.sparsity,
        "limit": found,
        "of_all": {name: 1 - density * (1 - found[name]["value"]) for name in WHICH if name in found},
        "train_loss": subject.statistics.mean,
        "test_accuracy": subject.test_accuracy([0.0])[0],
    }


def _by_round(pieces: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    return dict(enumerate(map(list, zip(*(p["rounds"] for p in pieces), strict=True))))


def table_gradual(results: Results) -> str:
    """Markdown: a row for each training and round."""
    lines, verdicts = [], []
    for name, pieces in by_variant(results).items():
        for found in _by_round(pieces).values():
            numbers = [cell(found, lambda p, w=which: p["of_all"].get(w)) for which in WHICH]
            own = cell(found, limit("width"))
            accuracy = cell(found, lambda p: p["test_accuracy"], ".1%")
            lines.append([name, f"{found[0]['sparsity']:.3f}", *numbers, own, accuracy])
        rises = [
            after["of_all"]["width"] > before["of_all"]["width"]
            for piece in pieces
            for before, after in zip(piece["rounds"], piece["rounds"][1:], strict=False)
        ]
        verdicts.append(f"{name} {tally(rises)}")
    heads = ["training", "pruned so far", *WHICH, "width, share of the survivors", "test accuracy"]
    text = markdown(heads, lines)
    return f"{text}\nRounds after which the width limit is higher than before: {', '.join(verdicts)}.\n"


def figure_gradual(results: Results) -> Any:
    """Limits against what is pruned already."""
    curves: dict[str, Any] = {}
    for name, pieces in by_variant(results).items():
        groups = _by_round(pieces)
        for which in WHICH:
            x = [found[0]["sparsity"] for found in groups.values()]
            curves[f"{which}, {name}"] = curve(groups, x, lambda p, w=which: p["of_all"].get(w))
    figure = plots.plot_series({"limit (sparsity)": curves}, xlabel="pruned so far (sparsity)")
    (axes,) = figure.axes
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle="--")
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    return figure


def gems(
    study: Annotated[Study, arg(name="")] = Study(), *, sparsities: tuple[float, ...] = (0.9, 0.95)
) -> Experiment:
    """Rare Gems without its L2 term, with the recipe's, and with one that pulls as much as on CIFAR-10.

    The test accuracy of the recipe; and, after a search without drops, the width limit of the scores: the
    loss as a function of the scores, with the straight-through derivative, pruned in the order of the scores.
    It is about the search's model of the loss, not about what its cut does. There is none where the search
    turns so many scores off that all outputs, and with them the losses of all batches, are equal.

    Args:
        study: see `Study`; `--epochs` are those of search and training.
        sparsities: shares of the weights to remove, each from 0 to below 1.
    """
    study.refuse("networks", "l1")
    task = study.task()
    sparsities = tuple(sorted({*sparsities}))
    kept_counts(kernels(build_network(task.preset, 0)), sparsities)
    usual = settings_of("rare-gems", task.preset, len(task.train[1]), study.epochs)
    longer = (
        150 * math.ceil(CIFAR10 / 128) / (usual.epochs * math.ceil(len(task.train[1]) / usual.batch_size))
    )
    variants = {
        f"{name}-{sparsity:g}": {"arm": name, "times": times, "sparsity": sparsity, "epochs": study.epochs}
        for sparsity in sparsities
        for name, times in (("without", 0.0), ("recipe", 1.0), ("matched", longer))
    }
    return study.experiment("gems", task, variants, _gems, table_gems, {"gems.png": figure_gems})


def _gems(task: Task, seed: int, variant: Any) -> dict[str, Any]:
    model, sparsity = build_network(task.preset, seed), variant["sparsity"]
    settings = settings_of("rare-gems", task.preset, len(task.train[1]), variant["epochs"])
    settings = replace(settings, l2=variant["times"] * recipe_l2(1 - sparsity))
    key = jax.random.key(seed)
    (network,) = baselines.rare_gems(
        model,
        task.train,
        key,
        [sparsity],
        settings,
        checkpoint=stage(task.checkpoint, "gems"),
        augment=task.preset.augmentation(),
        on_epoch=on_epoch(task.note),
    )
    subject = _score_subject(task, model, seed, sparsity, settings)
    resolution = np.finfo(np.float32).eps * subject.statistics.mean
    found = subject.limit(("width",)) if subject.statistics.batch_std > resolution else None
    flat = flatten(subject.weights)
    return {
        **variant,
        "l2": settings.l2,
        "test_accuracy": task.subject(network.model, seed).test_accuracy([0.0])[0],
        "limit": values(found) if found else {},
        "trace": trace(found) if found else None,
        "off": float(np.mean(flat <= 0.5)),
        "norm": float(np.linalg.norm(flat)),
        "loss": subject.statistics.mean,
    }


def _score_subject(task: Task, model: Any, seed: int, sparsity: float, settings: Any) -> Subject:
    """The loss as a function of the scores, at those that a search without drops has found."""
    model = searchable(model)
    (kept,) = kept_counts(kernels(model), [sparsity])
    settings = replace(settings, drop_every=settings.epochs)
    scores, _, model = search(
        model,
        task.train,
        jax.random.key(seed),
        kept,
        settings,
        checkpoint=stage(task.checkpoint, "scores"),
        augment=task.preset.augmentation(),
        on_epoch=on_epoch(task.note),
    )
    predict, params = from_nnx(model)
    weights, rest = partition(params)

    def of(scores: PyTree, inputs: jax.Array) -> jax.Array:
        gated = jax.tree.map(lambda w, p: w * straight_through(p), weights, scores)
        return predict(combine(gated, rest), inputs)

    return replace(task.subject(model, seed), predict=of, params=scores)


def table_gems(results: Results) -> str:
    """Markdown: a row for each sparsity and weight of the L2 term."""
    lines = []
    for pieces in by_variant(results).values():
        lines.append(
            [
                pieces[0]["arm"],
                f"{pieces[0]['sparsity']:g}",
                f"{pieces[0]['l2']:.2g}",
                cell(pieces, lambda p: p["test_accuracy"], ".1%"),
                cell(pieces, limit("width")),
                cell(pieces, lambda p: p["trace"], ".3g"),
                cell(pieces, lambda p: p["norm"], ".3g"),
                cell(pieces, lambda p: p["off"], ".1%"),
            ]
        )
    heads = ["L2 term", "sparsity", "l2", "test accuracy", "width", "tr H", "norm of the scores"]
    text = markdown([*heads, "scores at most .5 (%)"], lines)
    verdicts = []
    for arm in ("recipe", "matched"):
        pairs = [
            (piece, next(p for p in results.values() if _twin(p, piece)))
            for piece in results.values()
            if piece["arm"] == arm
        ]
        gain, _ = mean_and_spread(100 * (a["test_accuracy"] - b["test_accuracy"]) for a, b in pairs)
        higher = tally([is_less(limit("width")(b), limit("width")(a)) for a, b in pairs])
        verdicts.append(f"{arm} {gain:+.1f} points, width limit higher in {higher}")
    return f"{text}\nAgainst no L2 term: {'; '.join(verdicts)}.\n"


def _twin(other: dict[str, Any], piece: dict[str, Any]) -> bool:
    same = all(other[name] == piece[name] for name in ("seed", "sparsity"))
    return same and other["arm"] == "without"


def figure_gems(results: Results) -> Any:
    """Test accuracy and width limit of the scores, a line for each sparsity."""
    panels: dict[str, dict[str, Any]] = {"test accuracy (%)": {}, "width limit of the scores": {}}
    arms = dict.fromkeys(piece["arm"] for piece in results.values())
    for sparsity in dict.fromkeys(piece["sparsity"] for piece in results.values()):
        groups = {n: g for n, g in by_variant(results).items() if g[0]["sparsity"] == sparsity}
        x = range(len(groups))
        panels["test accuracy (%)"][f"s = {sparsity:g}"] = curve(
            groups, x, lambda p: 100 * p["test_accuracy"]
        )
        panels["width limit of the scores"][f"s = {sparsity:g}"] = curve(groups, x, limit("width"))
    return plots.plot_series(panels, xlabel="L2 term", ticks=list(arms))
