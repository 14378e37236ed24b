"""The limit of what is left after each round of iterative pruning."""

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from tyro.conf import arg

from jaxlimit import baselines, plots
from jaxlimit.application.options import shown
from jaxlimit.application.presets import build_network
from jaxlimit.baselines.network import SparseNetwork, subfolder
from jaxlimit.core.checks import require_count
from jaxlimit.core.trees import PyTree, combine, flatten, partition
from jaxlimit.experiments.experiment import Experiment
from jaxlimit.experiments.methods import settings_of
from jaxlimit.experiments.study import OwnNetworks
from jaxlimit.experiments.subject import Task, values
from jaxlimit.experiments.tables import Results, by_variant, cell, curve, limit, markdown, tally

# Up to so many weights an exact limit costs no more than one from probes.
SMALL = 2_000
WHICH = ("one_shot", "width")


def plan(
    study: Annotated[OwnNetworks, arg(name="")] = OwnNetworks(),
    *,
    rounds: int = 8,
    learning_rate: Annotated[float | None, shown("the recipe's", "FLOAT")] = None,
) -> Experiment:
    """The limit after each round of iterative pruning: does it rise?

    Two trainings: the recipe of iterative pruning, and the preset's with its L1 term. After each round the
    limit is that of the survivors; with what was removed before, it is a share of all weights. `--epochs` are
    those of both trainings.

    Args:
        study: see `OwnNetworks`.
        rounds: each removes a fifth of the survivors.
        learning_rate: of the recipe's training. Its .1 is made for networks with batch norm.
    """
    task = study.task()
    require_count("rounds", rounds)
    changes = {} if learning_rate is None else {"learning_rate": learning_rate}
    # Refuses what is out of range.
    settings_of("imp", task.preset, len(task.train[1]), study.epochs, learning_rate)
    variants = {
        "recipe": {"l1": False, "rounds": rounds, "epochs": study.epochs, **changes},
        "l1": {"l1": True, "rounds": rounds, "epochs": task.preset.recipe.epochs},
    }
    return study.experiment("gradual", task, variants, _run, table, figure)


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

    def predict_kept(kept: PyTree, inputs: jax.Array) -> jax.Array:
        whole = jnp.zeros_like(flat).at[indices].set(kept["kept"][:, 0])
        return predict(combine(unravel(whole), rest), inputs)

    return predict_kept, {"kept": flat[indices][:, None]}


def _run(task: Task, seed: int, variant: Any) -> dict[str, Any]:
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
        **task.training_options(),
    )
    return {"rounds": [_round(task, network, seed, number) for number, network in enumerate(networks)]}


def _round(task: Task, network: SparseNetwork, seed: int, number: int) -> dict[str, Any]:
    whole = task.subject(network.model, seed)
    predict, kept = survivors(network.predict, network.params, network.mask)
    probes = None if network.num_kept <= SMALL else whole.num_probes
    checkpoint = subfolder(task.checkpoint, f"limit-{number}")
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


def table(results: Results) -> str:
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


def figure(results: Results) -> Any:
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
