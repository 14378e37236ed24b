"""LOMP against the methods it is compared with: test accuracy against sparsity, on one network."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
from tyro.conf import Positional, arg

from jaxlimit import baselines, plots
from jaxlimit.application.presets import Arrays, Options, Preset, build_network, find_preset, load_arrays
from jaxlimit.baselines.masks import kept_counts
from jaxlimit.baselines.network import kernels
from jaxlimit.baselines.ratios import layer_sizes
from jaxlimit.core.batches import batched
from jaxlimit.experiments.experiment import Experiment, Note, on_epoch
from jaxlimit.experiments.tables import Results, by_variant, cell, markdown, over_seeds
from jaxlimit.measuring.sweeps import sparsity_sweep
from jaxlimit.training.losses import classification_metrics

# Training examples of CIFAR-10, for which the recipes were made.
CIFAR10 = 50_000


class Method(NamedTuple):
    """A method, as the comparison shows it."""

    title: str
    run: Callable[..., tuple[baselines.SparseNetwork, ...]]
    trainings: str


METHODS = {
    "dense": Method("dense", baselines.dense, "one"),
    "lomp": Method("LOMP", baselines.lomp, "one for all s"),
    "imp": Method("iterative, rewound", baselines.iterative_pruning, "one a round"),
    "rare-gems": Method("Rare Gems", baselines.rare_gems, "two an s"),
    "hybrid": Method("Smart-Ratio, hybrid", baselines.smart_ratio, "one, and one an s"),
    "smart-ratio": Method("Smart-Ratio, random", baselines.smart_ratio, "one an s"),
    "random": Method("random", baselines.random_pruning, "one an s"),
}


def compare(
    preset: Annotated[Positional[str], arg(metavar="PRESET")] = "digits",
    *,
    methods: tuple[str, ...] = tuple(METHODS),
    sparsities: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95, 0.98),
    seeds: int = 3,
    epochs: Annotated[int | None, arg(help_behavior_hint="(default: each recipe's)", metavar="INT")] = None,
    learning_rate: Annotated[
        float | None, arg(help_behavior_hint="(default: each recipe's)", metavar="FLOAT")
    ] = None,
    l1: Annotated[float | None, arg(help_behavior_hint="(default: the preset's)", metavar="FLOAT")] = None,
    out: Annotated[
        Path | None, arg(help_behavior_hint="(default: results/compare-PRESET)", metavar="DIR")
    ] = None,
    data: Annotated[str | None, arg(help_behavior_hint="(default: $JAXLIMIT_DATA)", metavar="DIR")] = None,
) -> Experiment:
    """Compare LOMP with other pruning methods: accuracy against sparsity, as a table and a figure.

    After Ctrl-C the same command goes on with what is missing.

    Args:
        preset: network and data, and how LOMP and the controls are trained: see `jaxlimit presets`.
        methods: dense, lomp, imp, rare-gems, hybrid, smart-ratio, random.
        sparsities: shares of the weights to remove, each from 0 to below 1.
        seeds: how many independent runs, from other weights in another order; 3 or more give a spread. A
            folder of fewer goes on with the others.
        epochs: of every training of every method; schedules are stretched, and a warm-up takes at most half
            of them.
        learning_rate: of every training of weights. The recipes' .1 is made for networks with batch norm.
        l1: lambda of LOMP.
        out: folder of the results.
        data: folder that holds mnist/ or cifar10/; not needed for digits.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown or len({*methods}) != len(methods) or not methods:
        raise ValueError(
            f"methods must be some of {', '.join(METHODS)}, each once, got {' '.join(methods) or 'none'}."
        )
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}.")
    sparsities = tuple(sorted({*sparsities}))
    if l1 is not None and "lomp" not in methods:
        raise ValueError("l1 is of lomp, which is not among the methods: leave it out.")
    chosen = find_preset(preset, l1=l1, epochs=epochs, learning_rate=learning_rate)
    train, test = load_arrays(chosen, Options(), data)
    settings = {name: settings_of(name, chosen, len(train[1]), epochs, learning_rate) for name in methods}
    _check(settings, sparsities, build_network(chosen, 0))
    return Experiment(
        "compare",
        out or Path("results") / f"compare-{preset}",
        {
            "preset": asdict(chosen),
            "sparsities": sparsities,
            "seeds": seeds,
            "settings": {name: asdict(value) for name, value in settings.items()},
        },
        {
            f"{name}-seed{seed}": partial(_run, name, settings[name], chosen, seed, sparsities, train, test)
            for name in methods
            for seed in range(seeds)
        },
        partial(table, sparsities=sparsities),
        {"accuracy.png": figure},
    )


def settings_of(
    name: str,
    preset: Preset,
    num_examples: int,
    epochs: int | None = None,
    learning_rate: float | None = None,
) -> Any:
    """The recipe of a method for the network of a preset.

    LOMP, and dense and random as its controls, are trained as the preset says, the controls without L1 term.
    The others follow their papers, with what these change for VGG. Rewinding goes back to the recipe's share
    of its training on CIFAR-10. When `epochs` is given, Rare Gems drops about as often, 29 times, but with
    one epoch at least between two drops. Smart-Ratio fixes the last dense layer only (see
    `baselines.SmartRatio`).

    Examples:
        >>> settings_of("imp", find_preset("digits"), 1438).rewind_steps
        31
    """
    vgg = preset.network.startswith("VGG")

    def changed(recipe: baselines.Recipe) -> baselines.Recipe:
        given = {"epochs": epochs, "learning_rate": learning_rate}
        return replace(recipe, **{key: value for key, value in given.items() if value is not None})

    if name in ("dense", "lomp", "random"):
        return replace(preset.recipe, l1=preset.l1 if name == "lomp" else 0.0)
    if name == "imp":
        usual = baselines.IterativePruning()
        if vgg:
            longer = replace(usual.recipe, epochs=200, milestones=(80 / 200, 120 / 200))
            usual = replace(usual, rewind_steps=2000, recipe=longer)
        recipe = changed(usual.recipe)
        share = usual.rewind_steps / usual.recipe.updates(CIFAR10)
        return replace(usual, rewind_steps=round(share * recipe.updates(num_examples)), recipe=recipe)
    if name == "rare-gems":
        usual = baselines.RareGems()
        search = epochs or usual.epochs
        every = max(1, round(usual.drop_every * search / usual.epochs))
        return replace(usual, epochs=search, drop_every=every, finetune=changed(usual.finetune))
    usual = baselines.SmartRatio(hybrid=name == "hybrid", vgg=vgg, fixed="last")
    return replace(usual, recipe=changed(usual.recipe))


def _check(settings: Mapping[str, Any], sparsities: Sequence[float], model: Any) -> None:
    """Refuses what a method would refuse, before any of them begins."""
    for num_kept in kept_counts(kernels(model), sparsities):
        for name in {"hybrid", "smart-ratio"} & settings.keys():
            layer_sizes(model, num_kept, settings[name])


def _run(
    name: str,
    settings: Any,
    preset: Preset,
    seed: int,
    sparsities: Sequence[float],
    train: Arrays,
    test: Arrays,
    checkpoint: Path,
    note: Note,
) -> dict[str, Any]:
    """A piece: one method with one seed, at all sparsities."""
    found: dict[str, Any] = {"method": name, "seed": seed}
    asked = [0.0] if name == "dense" else sparsities
    try:
        networks = METHODS[name].run(
            build_network(preset, seed),
            train,
            jax.random.key(seed),
            asked,
            settings,
            checkpoint=checkpoint,
            augment=preset.augmentation(),
            on_epoch=on_epoch(note),
        )
    except FloatingPointError as error:  # a result, too
        return found | {"diverged": str(error), "networks": []}
    rows = [{"sparsity": s} | _measure(network, test) for s, network in zip(asked, networks, strict=True)]
    return found | {"networks": rows}


def _measure(network: baselines.SparseNetwork, test: Arrays) -> dict[str, Any]:
    metrics = classification_metrics(network.predict)
    measured = sparsity_sweep(metrics, network.params, batched(test, 1000), [0.0]).metrics
    return {
        "kept": network.num_kept,
        "layers": {name: list(counts) for name, counts in network.layers.items()},
        "collapsed": network.collapsed,
        "rounds": list(network.rounds),
        "test_accuracy": float(measured["accuracy"][0]),
        "test_loss": float(measured["loss"][0]),
    }


def table(results: Results, sparsities: Sequence[float]) -> str:
    """Markdown: test accuracy in per cent, mean and standard deviation over the seeds."""
    rows = []
    for name, pieces in by_variant(results, "method").items():
        cells = [_cell(pieces, None if name == "dense" else sparsity) for sparsity in sparsities]
        rows.append([METHODS[name].title, METHODS[name].trainings, *cells])
    heads = ["method", "trainings", *(f"{sparsity:g}" for sparsity in sparsities)]
    text = markdown(heads, rows, texts=2)
    if "†" in text:
        text += "\n† a layer kept nothing in at least one run\n"
    return text


def _cell(pieces: Sequence[dict[str, Any]], sparsity: float | None) -> str:
    """Of one method at one sparsity; None: the dense network, which is the same at all."""
    diverged = sum("diverged" in piece for piece in pieces)
    if diverged:
        return f"diverged in {diverged} of {len(pieces)}"
    rows = [row for piece in pieces for row in piece["networks"] if sparsity in (None, row["sparsity"])]
    text = cell(rows, lambda row: row["test_accuracy"], ".1%")
    return f"{text} †" if any(row["collapsed"] for row in rows) else text


def figure(results: Results) -> Any:
    """Accuracy against sparsity, a line for each method of which no run diverged."""
    curves = {}
    for name, pieces in by_variant(results, "method").items():
        rows = [piece["networks"] for piece in pieces]
        if all(rows):
            x = [row["sparsity"] for row in rows[0]]
            curves[METHODS[name].title] = over_seeds(
                x, [[row["test_accuracy"] for row in row_of] for row_of in rows]
            )
    return plots.plot_methods(curves)
