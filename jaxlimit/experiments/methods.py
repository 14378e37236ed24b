"""LOMP against the methods it is compared with: test accuracy against sparsity, on one network."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
from tyro.conf import Positional, arg

from jaxlimit import baselines, plots
from jaxlimit.baselines.masks import kept_counts
from jaxlimit.baselines.network import kernels
from jaxlimit.baselines.ratios import layer_sizes
from jaxlimit.batches import batched
from jaxlimit.experiments.experiment import Experiment, Note, on_epoch
from jaxlimit.losses import classification_metrics
from jaxlimit.measure import sparsity_sweep
from jaxlimit.presets import MILESTONES, Arrays, Options, Preset, build_network, find_preset, load_arrays

Results = Mapping[str, dict[str, Any]]
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
    "hybrid": Method("Smart-Ratio, hybrid", baselines.smart_ratio, "two an s"),
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
        epochs: of every training of every method; schedules are stretched.
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
        table,
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
    The others follow their papers, with what these change for VGG. Rewinding keeps its share of the training
    instead of its number of updates, and Rare Gems its number of drops when `epochs` is given. Smart-Ratio
    fixes the last dense layer only (see `baselines.SmartRatio`).

    Examples:
        >>> settings_of("imp", find_preset("digits"), 1438).rewind_steps
        31
    """
    vgg = preset.network.startswith("VGG")

    def changed(recipe: baselines.Recipe) -> baselines.Recipe:
        given = {"epochs": epochs, "learning_rate": learning_rate}
        return replace(recipe, **{key: value for key, value in given.items() if value is not None})

    if name in ("dense", "lomp", "random"):
        return baselines.Recipe(
            preset.epochs,
            preset.batch_size,
            preset.learning_rate,
            preset.schedule,
            milestones=MILESTONES,
            factor=0.5,
            warmup_epochs=preset.warmup_epochs,
            momentum=preset.momentum,
            weight_decay=0.0,
            l1=preset.l1 if name == "lomp" else 0.0,
        )
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


class Summary(NamedTuple):
    """Of one method, over its seeds.

    Attributes:
        sparsities: ascending.
        mean: of the test accuracy.
        spread: its standard deviation over seeds, 0 for one.
        collapsed: whether a layer kept nothing in any of the runs.
    """

    sparsities: np.ndarray
    mean: np.ndarray
    spread: np.ndarray
    collapsed: np.ndarray


def summarise(results: Results) -> dict[str, Summary]:
    """Means and spreads by method; without the methods of which a run diverged."""
    runs: dict[str, list[list[dict[str, Any]]]] = {}
    for piece in results.values():
        runs.setdefault(piece["method"], []).append(piece["networks"])
    summaries = {}
    for name, networks in runs.items():
        if not all(networks):
            continue
        accuracy = np.array([[row["test_accuracy"] for row in rows] for rows in networks])
        collapsed = np.array([[bool(row["collapsed"]) for row in rows] for rows in networks])
        summaries[name] = Summary(
            np.array([row["sparsity"] for row in networks[0]]),
            accuracy.mean(0),
            accuracy.std(0, ddof=1) if len(accuracy) > 1 else np.zeros(accuracy.shape[1]),
            np.asarray(collapsed.any(0)),
        )
    return summaries


def table(results: Results) -> str:
    """Markdown: test accuracy in per cent, mean and standard deviation over the seeds."""
    summaries = summarise(results)
    sparsities = sorted({float(s) for summary in summaries.values() for s in summary.sparsities if s > 0})
    heads = ["method", "trainings", *(f"{s:g}" for s in sparsities)]
    lines = [heads, ["---", "---", *["---:"] * len(sparsities)]]
    for name in dict.fromkeys(piece["method"] for piece in results.values()):
        method, summary = METHODS[name], summaries.get(name)
        cells = dict.fromkeys(sparsities, "-" if summary is not None else "diverged")
        if summary is not None:
            at = sparsities if name == "dense" else summary.sparsities
            texts = [
                f"{100 * mean:.1f} ± {100 * spread:.1f}{' †' if collapsed else ''}"
                for _, mean, spread, collapsed in zip(*summary, strict=True)
            ]
            cells |= dict(zip(at, texts * len(at) if name == "dense" else texts, strict=False))
        lines.append([method.title, method.trainings, *(cells[s] for s in sparsities)])
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"
    if any(summary.collapsed.any() for summary in summaries.values()):
        text += "\n† a layer kept nothing in at least one run\n"
    return text


def figure(results: Results) -> Any:
    """Accuracy against sparsity, a line for each method."""
    curves = {METHODS[name].title: summary[:3] for name, summary in summarise(results).items()}
    return plots.plot_methods(curves)
