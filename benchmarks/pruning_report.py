"""Tables and the figure of benchmarks/pruning.py, and the names of the methods."""

from collections.abc import Mapping, Sequence
from typing import Any

import common
import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from pruning_methods import Variant

from jaxlimit.plots import style

NAME = "pruning"
# Full-batch Adam, SGD with momentum, Adam: the best of three, which one is chosen by the loss.
RATES = {"full_batch_adam": (1e-3, 3e-3, 1e-2), "sgd": (0.01, 0.03, 0.1), "adam": (1e-3, 3e-3, 1e-2)}

TRAINED = ("adam", "sgd", "full_batch_adam", "adam_gradual")
# Biases and norms move in minibatches, as usual; without them on the smallest network alone.
KERNELS_ALONE = ("adam_kernels", "sgd_kernels")
DEFAULT = "jaxlimit"
DEFAULT_SHARE = Variant().curvature_share
# What jaxlimit does in the first comparison, and what it might do instead.
METHODS = {
    DEFAULT: Variant(),
    "jaxlimit, all curvature": Variant(curvature_share=1.0),
    "jaxlimit, all parameters": Variant(everything=True),
}
# Where examples are too few to take a part of them, steps are dear and a path of eleven stages is, too.
WITH_FEW = {
    "jaxlimit, one cut": Variant(kept=0.0),
    "jaxlimit, stages of .6": Variant(kept=0.6),
}
CHOICES = {
    "kept .6": Variant(kept=0.6),
    "kept .9": Variant(kept=0.9),
    "one cut": Variant(kept=0.0),
    "10 products a step": Variant(step_products=10),
    "a tenth for all": Variant(gradient_share=0.1),
    "a tenth for all, all parameters": Variant(gradient_share=0.1, everything=True),
    "|w| sqrt(G_ii)": Variant(second_order=True),
}
TITLES = {
    "cut": "cut alone",
    "reconstruction": "layer-wise reconstruction",
    "full_batch_adam": "full-batch Adam",
    "sgd": "minibatch SGD",
    "adam": "minibatch Adam",
    "adam_gradual": "minibatch Adam, gradual masks",
    "sgd_kernels": "minibatch SGD, kernels",
    "adam_kernels": "minibatch Adam, kernels",
}


def optimizer_of(method: str) -> str:
    """The key of its learning rates."""
    return method.removesuffix("_kernels").removesuffix("_gradual")


def at_cost(curves: Sequence[Mapping[str, Any]], cost: float, *, exact: bool) -> Mapping[str, float] | None:
    """The network of the lowest loss among the rates; of a path, the last one that is paid for."""
    points = []
    for curve in curves:
        known = [p for p in curve["curve"] if (p["cost"] == cost if exact else p["cost"] <= cost)]
        points += known[-1:]
    return min(points, key=lambda point: point["loss"]) if points else None


def rows(network: Mapping[str, Any], stage: str, sparsity: float) -> dict[str, list[Mapping[str, Any]]]:
    """The curves of each method at a sparsity."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for part in network[stage]:
        if part["sparsity"] == sparsity:
            found.setdefault(part["method"], []).append(part)
    return found


def _cell(point: Mapping[str, float] | None) -> str:
    if point is None:
        return "-"
    loss = f"{point['loss']:.4f}" if point["loss"] < 100 else "diverged"
    return f"{loss}, {100 * point['test_accuracy']:.1f} %"


def methods_table(name: str, network: Mapping[str, Any]) -> str:
    """Loss and test accuracy of each method at each sparsity and cost."""
    costs, lines = network["costs"], []
    for sparsity in network["sparsities"]:
        methods = rows(network, "methods", sparsity)
        for method in sorted(methods, key=[*METHODS, *WITH_FEW, *TITLES].index):
            exact = optimizer_of(method) in RATES
            cells = [_cell(at_cost(methods[method], cost, exact=exact)) for cost in costs]
            lines.append([f"{name}, {sparsity:g}", TITLES.get(method, method), *cells])
    return common.markdown(["network, sparsity", "method", *(f"{cost} gradients" for cost in costs)], lines)


def choices_table(networks: Mapping[str, Any]) -> str:
    """Loss and test accuracy of jaxlimit with other settings, at a cost of 100 gradients."""
    columns = [
        (name, sparsity)
        for name, network in networks.items()
        for sparsity in network["sparsities"]
        if network["choices"]
    ]
    lines = []
    for method in (*METHODS, *CHOICES):
        cells = []
        for name, sparsity in columns:
            known = rows(networks[name], "methods", sparsity) | rows(networks[name], "choices", sparsity)
            cells.append(_cell(at_cost(known.get(method, []), 100, exact=False)))
        lines.append([method.replace("|", "\\|"), *cells])
    heads = ["at 100 gradients", *(f"{name}, {sparsity:g}" for name, sparsity in columns)]
    return common.markdown(heads, lines)


def shares_table(networks: Mapping[str, Any]) -> str:
    """Processor time in that of a gradient."""
    columns = {
        "product": "product",
        "on a tenth": "product_with_a_tenth",
        "not linearised before": "product_alone",
        "loss": "loss",
        "epoch of minibatches": "minibatch_epoch",
    }
    lines = []
    for name, network in networks.items():
        found = network["shares"][0]["seconds_of"]
        shares = [found[key] / found["gradient"] for key in columns.values()]
        lines.append([name, f"{1e3 * found['gradient']:.3g}", *(f"{share:.2f}" for share in shares)])
    return common.markdown(["in gradients", "a gradient, ms", *columns], lines)


def attained_table(networks: Mapping[str, Any]) -> str:
    """Sparsities that were attained, with the cost of the search."""
    heads = ["network", "cut", "attained_limit", "sweep, 400 steps", "sweep", "minibatch Adam"]
    lines = []
    for name, network in networks.items():
        parts = network["attained"]
        ours = [part for part in parts if "pruned" in part]
        sweeps = [part for part in parts if "num_steps" in part]
        minibatches = [part for part in parts if "epochs" in part]
        if ours and sweeps and minibatches:
            found = [
                ours[0],
                _furthest([part for part in sweeps if part["num_steps"] == 400]),
                _furthest([part for part in sweeps if part["num_steps"] != 400]),
                _furthest(minibatches),
            ]
            cells = [f"{part['sparsity']:.3f} ({part['cost']:.0f})" for part in found]
            lines.append([name, f"{sweeps[0]['cut']:.3f}", *cells])
    return common.markdown(heads, lines)


def _furthest(parts: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return max(parts, key=lambda part: part["sparsity"])


def tables(document: Mapping[str, Any]) -> dict[str, str]:
    """Each as results/NAME.md; that of the attained sparsities only where there are some."""
    networks = document["networks"]
    methods = "\n".join(methods_table(name, network) for name, network in networks.items())
    found = {
        NAME: methods,
        f"{NAME}_choices": choices_table(networks),
        f"{NAME}_shares": shares_table(networks),
    }
    if any(network["attained"] for network in networks.values()):
        found[f"{NAME}_attained"] = attained_table(networks)
    return found


# Colours and lines of the figure.
LINES: dict[str, dict[str, Any]] = {
    DEFAULT: {"color": style.BLUE},
    "jaxlimit, all curvature": {"color": style.BLUE, "linestyle": ":"},
    "jaxlimit, all parameters": {"color": style.SKY},
    "jaxlimit, one cut": {"color": style.SKY, "linestyle": "--"},
    "jaxlimit, stages of .6": {"color": style.BLUE, "linestyle": "--"},
    "full_batch_adam": {"color": style.GREY, "marker": "."},
    "sgd": {"color": style.ORANGE, "marker": "."},
    "adam": {"color": style.GREEN, "marker": "."},
    "adam_gradual": {"color": style.GREEN, "marker": ".", "linestyle": "--"},
    "reconstruction": {"color": style.PURPLE, "marker": "D", "linestyle": ""},
}


def figure(document: Mapping[str, Any]) -> Figure:
    """Loss and test accuracy against cost, a column for each sparsity."""
    networks = document["networks"]
    with mpl.rc_context(style.STYLES):
        found = Figure(figsize=(9, 3.8 * len(networks) + 0.6), dpi=150, layout="constrained")
        panels = found.subplots(2 * len(networks), 3, squeeze=False, sharex=True)
    for i, (name, network) in enumerate(networks.items()):
        for j, sparsity in enumerate(network["sparsities"]):
            loss, accuracy = panels[2 * i : 2 * i + 2, j]
            methods = rows(network, "methods", sparsity) | rows(network, "choices", sparsity)
            for method in [method for method in LINES if method in methods]:
                points = _line(method, methods[method])
                label = TITLES.get(method, method)
                costs = [point["cost"] for point in points]
                loss.plot(costs, [point["loss"] for point in points], label=label, **LINES[method])
                accuracy.plot(costs, [100 * point["test_accuracy"] for point in points], **LINES[method])
            height = methods["cut"][0]["curve"][0]["loss"]
            loss.axhline(height, color="#bbbbbb", linewidth=1, label="cut alone", zorder=0)
            # Networks just after a cut are far below all others.
            best = [max(line.get_ydata()) for line in accuracy.get_lines()]
            accuracy.set_ylim(max(min(best) - 1, max(best) - 8), max(best) + 0.5)
            loss.set(xscale="log", yscale="log", title=f"{name}, s = {sparsity:g}")
            loss.set_xlim(1.5, 500)
            loss.yaxis.set_minor_formatter(NullFormatter())
            if j == 0:
                loss.set_ylabel("loss")
                accuracy.set_ylabel("test accuracy in per cent")
    for panel in panels.flat:
        panel.set_visible(panel.has_data())
    for panel in panels[-1]:
        panel.set_xlabel("cost in gradients")
    style.legend_below(found, *panels.flat)
    return found


def _line(method: str, curves: Sequence[Mapping[str, Any]]) -> list[Mapping[str, float]]:
    """Points in the order of their cost; of training, the best rate at each cost."""
    if optimizer_of(method) not in RATES:
        return curves[0]["curve"]
    costs = sorted({point["cost"] for curve in curves for point in curve["curve"]})
    return [point for cost in costs if (point := at_cost(curves, cost, exact=True)) is not None]
