"""The limit of the scores of Rare Gems, and what their L2 term is for."""

from dataclasses import replace
from typing import Annotated, Any

import jax
import numpy as np
from tyro.conf import arg

from jaxlimit import baselines, plots
from jaxlimit.application.presets import build_network
from jaxlimit.baselines.gems import recipe_l2, search, searchable, straight_through
from jaxlimit.baselines.masks import kept_counts
from jaxlimit.baselines.network import kernels, subfolder
from jaxlimit.core.trees import PyTree, combine, flatten, partition
from jaxlimit.experiments.experiment import Experiment
from jaxlimit.experiments.methods import CIFAR10, settings_of
from jaxlimit.experiments.study import OwnTrainings
from jaxlimit.experiments.subject import Subject, Task, trace, values
from jaxlimit.experiments.tables import (
    Results,
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
from jaxlimit.training.schedule import steps_per_epoch


def plan(
    study: Annotated[OwnTrainings, arg(name="")] = OwnTrainings(),
    *,
    sparsities: tuple[float, ...] = (0.9, 0.95),
) -> Experiment:
    """Rare Gems without its L2 term, with the recipe's, and with one that pulls as much as on CIFAR-10.

    Two things are looked at: the test accuracy of the recipe, and the width limit of the scores that a search
    without drops has found. For that limit the loss is a function of the scores, with the straight-through
    derivative, and is pruned in the order of the scores. It is about the search's model of the loss, not
    about what its cut does. There is none where the search turns so many scores off that all outputs, and
    with them the losses of all batches, are equal. `--epochs` are those of search and training.

    Args:
        study: see `OwnTrainings`.
        sparsities: shares of the weights to remove, each from 0 to below 1.
    """
    task = study.task()
    sparsities = tuple(sorted({*sparsities}))
    kept_counts(kernels(build_network(task.preset, 0)), sparsities)
    usual = settings_of("rare-gems", task.preset, len(task.train[1]), study.epochs)
    # The term pulls in every update: with fewer updates, so many times l2 pull as much.
    updates = usual.epochs * steps_per_epoch(len(task.train[1]), usual.batch_size)
    cifar10 = baselines.RareGems()
    longer = cifar10.epochs * steps_per_epoch(CIFAR10, cifar10.batch_size) / updates
    variants = {
        f"{name}-{sparsity:g}": {"arm": name, "times": times, "sparsity": sparsity, "epochs": study.epochs}
        for sparsity in sparsities
        for name, times in (("without", 0.0), ("recipe", 1.0), ("matched", longer))
    }
    return study.experiment("gems", task, variants, _run, table, figure)


def _run(task: Task, seed: int, variant: Any) -> dict[str, Any]:
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
        checkpoint=subfolder(task.checkpoint, "gems"),
        **task.training_options(),
    )
    subject = score_subject(task, model, seed, sparsity, settings)
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


def score_subject(task: Task, model: Any, seed: int, sparsity: float, settings: Any) -> Subject:
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
        checkpoint=subfolder(task.checkpoint, "scores"),
        **task.training_options(),
    )
    predict, params = from_nnx(model)
    weights, rest = partition(params)

    def predict_gated(scores: PyTree, inputs: jax.Array) -> jax.Array:
        gated = jax.tree.map(lambda w, p: w * straight_through(p), weights, scores)
        return predict(combine(gated, rest), inputs)

    return replace(task.subject(model, seed), predict=predict_gated, params=scores)


def table(results: Results) -> str:
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


def figure(results: Results) -> Any:
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
