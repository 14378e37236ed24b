"""LOMP against the methods it is compared with: test accuracy against sparsity, on one network."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

import jax
from tyro.conf import arg

from jaxlimit import baselines, plots
from jaxlimit.application.options import shown
from jaxlimit.application.presets import Arrays, build_network
from jaxlimit.baselines.masks import kept_counts
from jaxlimit.baselines.network import kernels
from jaxlimit.baselines.ratios import layer_sizes
from jaxlimit.core.batches import batched
from jaxlimit.experiments.experiment import Experiment
from jaxlimit.experiments.methods import METHODS, settings_of
from jaxlimit.experiments.study import Trainings
from jaxlimit.experiments.subject import Task
from jaxlimit.experiments.tables import Results, by_variant, cell, markdown, over_seeds
from jaxlimit.measuring.sweeps import sparsity_sweep
from jaxlimit.training.losses import classification_metrics


def plan(
    trainings: Annotated[Trainings, arg(name="")] = Trainings(),
    *,
    methods: tuple[str, ...] = tuple(METHODS),
    sparsities: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95, 0.98),
    learning_rate: Annotated[float | None, shown("each recipe's", "FLOAT")] = None,
) -> Experiment:
    """Compare LOMP with other pruning methods: accuracy against sparsity, as a table and a figure.

    The preset says how LOMP and the controls, dense and random, are trained; the other methods have recipes
    of their own. `--epochs` are those of every training of every method, and `--l1` is the lambda of LOMP.
    After Ctrl-C the same command goes on with what is missing.

    Args:
        trainings: see `Trainings`.
        methods: dense, lomp, imp, rare-gems, hybrid, smart-ratio, greg-1, greg-2, prune (from LOMP),
            prune-dense, random.
        sparsities: shares of the weights to remove, each from 0 to below 1.
        learning_rate: of every training of weights. The recipes' .1 is made for networks with batch norm.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown or len({*methods}) != len(methods) or not methods:
        raise ValueError(
            f"methods must be some of {', '.join(METHODS)}, each once, got {' '.join(methods) or 'none'}."
        )
    sparsities = tuple(sorted({*sparsities}))
    if not {"lomp", "prune"} & {*methods} and trainings.l1 is not None:
        raise ValueError("l1 is of lomp and prune, which are not among the methods: leave it out.")
    task = trainings.load(learning_rate=learning_rate)
    size = len(task.train[1])
    settings = {
        name: settings_of(name, task.preset, size, trainings.epochs, learning_rate) for name in methods
    }
    _check(settings, sparsities, build_network(task.preset, 0))
    config = {
        "preset": task.preset.to_json(),
        "sparsities": sparsities,
        "seeds": trainings.seeds,
        "settings": {name: asdict(value) for name, value in settings.items()},
    }
    return Experiment(
        "compare",
        trainings.folder("compare"),
        config,
        trainings.pieces(task, settings, partial(_run, sparsities), label="method"),
        partial(table, sparsities=sparsities),
        {"accuracy.png": figure},
    )


def _check(settings: Mapping[str, Any], sparsities: Sequence[float], model: Any) -> None:
    """Refuses what a method would refuse, before any of them begins."""
    for num_kept in kept_counts(kernels(model), sparsities):
        for name in {"hybrid", "smart-ratio"} & settings.keys():
            layer_sizes(model, num_kept, settings[name])


def _run(sparsities: Sequence[float], task: Task, seed: int, name: str, settings: Any) -> dict[str, Any]:
    """What one method with one seed finds, at all sparsities."""
    asked = [0.0] if name == "dense" else sparsities
    try:
        networks = METHODS[name].run(
            build_network(task.preset, seed),
            task.train,
            jax.random.key(seed),
            asked,
            settings,
            checkpoint=task.checkpoint,
            **task.training_options(),
        )
    except FloatingPointError as error:  # a result, too
        return {"diverged": str(error), "networks": []}
    found = zip(asked, networks, strict=True)
    return {"networks": [{"sparsity": s} | _measure(network, task.test) for s, network in found]}


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
    """The accuracy of one method at one sparsity; None: the dense network, which is the same at all."""
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
