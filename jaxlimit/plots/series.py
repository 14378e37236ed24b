"""Figures over seeds: methods against sparsity, and means with their spreads against any variable."""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from jaxlimit.plots.style import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, legend_below, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# x, means and spreads
Series = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


def plot_methods(curves: Mapping[str, Series]) -> "Figure":
    """Test accuracy of pruning methods against sparsity, on an axis that opens towards 1.

    Args:
        curves: by label: (sparsities, means, spreads), the spreads drawn as bars. A curve at sparsity 0 only
            is a level that the others are measured by.
    """
    figure, (axes,) = new_figure(6.4, 4.6)
    colours = itertools.cycle((ORANGE, BLUE, GREEN, PURPLE, SKY, GREY, "#E69F00"))
    markers = itertools.cycle("osD^vXP*<>p")  # as many as make other pairs with the colours
    ticks: set[float] = set()
    for label, (sparsities, means, spreads) in curves.items():
        if not np.any(sparsities):
            axes.axhline(100 * means[0], color="black", linewidth=1, label=label)
            ends = [100 * (means[0] + sign * spreads[0]) for sign in (-1, 1)]
            axes.axhspan(*ends, color="black", alpha=0.1, linewidth=0)
            continue
        colour, density = next(colours), 1 - np.asarray(sparsities)
        style = {"fmt": next(markers) + "-", "color": colour, "markersize": 4, "elinewidth": 1, "capsize": 2}
        axes.errorbar(density, 100 * means, 100 * spreads, label=label, **style)
        ticks |= {float(sparsity) for sparsity in sparsities}
    axes.set(xscale="log", xlabel="sparsity", ylabel="test accuracy (%)")
    axes.set_xticks([1 - s for s in sorted(ticks)], [f"{s:g}" for s in sorted(ticks)])
    axes.minorticks_off()
    axes.invert_xaxis()
    legend_below(figure, axes)
    return figure


def plot_series(
    panels: Mapping[str, Mapping[str, Series]],
    *,
    xlabel: str,
    logarithmic: Sequence[str] = (),
    ticks: Sequence[str] | None = None,
    joined: bool = True,
) -> "Figure":
    """Means with their spreads against one variable, in panels one below the other.

    Args:
        panels: by the label of the vertical axis: by label, (x, means, spreads). A label keeps its colour in
            all panels. A spread of nan is not drawn.
        xlabel: of the horizontal axis, which the panels share.
        logarithmic: labels of the axes that are; a vertical one only where its values span a decade, and
            without those that are not positive.
        ticks: texts in the place of x = 0, 1, ...
        joined: as lines with bands; otherwise, for what has no order, as points with bars.
    """
    figure, axes = new_figure(6.4, 2.6 * len(panels) + 0.8, *[2.6] * len(panels))
    colours = (BLUE, ORANGE, GREEN, PURPLE, SKY, GREY, "#E69F00", "#000000")
    labels = dict.fromkeys(label for curves in panels.values() for label in curves)
    style = {label: (colours[i % 8], "osD^vXP*"[i % 8]) for i, label in enumerate(labels)}
    for row, (ylabel, curves) in zip(axes, panels.items(), strict=True):
        drawn = np.concatenate([means for _, means, _ in curves.values()])
        positive = drawn[drawn > 0]
        if ylabel in logarithmic and np.any(positive >= 10 * np.min(positive, initial=np.inf)):
            row.set_yscale("log")
        for label, curve in curves.items():
            x, means, spreads = (np.asarray(column)[np.argsort(curve[0])] for column in curve)
            means = np.where((means > 0) | (row.get_yscale() == "linear"), means, np.nan)
            colour, marker = style[label]
            marker = marker if len(x) < 30 else ""
            shared = {"color": colour, "label": label, "markersize": 4, "linewidth": 1.4}
            if joined:
                row.plot(x, means, marker + "-", **shared)
                row.fill_between(x, means - spreads, means + spreads, color=colour, alpha=0.15, linewidth=0)
            else:
                row.errorbar(x, means, spreads, fmt=marker, capsize=3, **shared)
        row.set_ylabel(ylabel)
        if xlabel in logarithmic:
            row.set_xscale("log")
        if ticks is not None:
            row.set_xticks(range(len(ticks)), ticks)
        row.tick_params(labelbottom=row is axes[-1])
    axes[-1].set_xlabel(xlabel)
    legend_below(figure, *axes)
    return figure
