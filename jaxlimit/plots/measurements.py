"""Figures of what is measured: how a network does as it is pruned, beside the limits predicted for it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxlimit.plots.style import (
    COLOURS,
    GREY,
    MARKERS,
    MEASURED,
    Curve,
    Limits,
    first_sparsity,
    legend_below,
    new_figure,
)
from jaxlimit.training.losses import TITLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_sweep(
    curves: Mapping[str, Curve],
    *,
    ylabel: str,
    limits: Limits | None = None,
    measured: Mapping[str, float] | None = None,
    bound: tuple[float, str] | None = None,
    logarithmic: bool = False,
) -> "Figure":
    """A metric of the pruned network against sparsity, with predicted and measured limits above it.

    Args:
        curves: by label: (sparsities, values), drawn in black, green, purple, light blue.
        ylabel: what the values are.
        limits: predicted limits by curvature and name.
        measured: measured thresholds by label.
        bound: a horizontal line: its value and label.
        logarithmic: draw the values on a logarithmic axis.
    """
    marked = {TITLES[name]: (COLOURS[name], found) for name, found in (limits or {}).items()}
    rows = len(marked) + bool(measured)
    figure, panels = new_figure(6.4, 4.2 + 0.26 * rows, *([0.26 * rows] if rows else []), 4.2)
    axes = panels[-1]
    for colour, (label, (sparsity, values)) in zip(MEASURED, curves.items(), strict=False):
        style = "o-" if len(sparsity) < 100 else "-"
        axes.plot(sparsity, values, style, color=colour, label=label, linewidth=1.4, markersize=3)
    if bound is not None:
        axes.axhline(bound[0], color=GREY, linestyle="--", linewidth=1, label=bound[1])
    values = [limit.value for _, found in marked.values() for limit in found.values()]
    values += list((measured or {}).values())
    start = first_sparsity(values)
    axes.set(xlim=(start, 1), xlabel="sparsity s", ylabel=ylabel)
    if logarithmic:
        axes.set_yscale("log")
    _zoom(axes, curves, start, logarithmic)
    if rows:
        measured = {f"measured {label}": value for label, value in (measured or {}).items()}
        draw_limits(panels[0], [axes], marked, measured)
    legend_below(figure, *panels)
    return figure


def _zoom(axes: "Axes", curves: Mapping[str, Curve], start: float, logarithmic: bool) -> None:
    """Fits the vertical axis to what is in sight; the end, where nothing is left, may leave it."""
    seen = np.concatenate([y[(x >= start) & (x <= 0.99)] for x, y in curves.values()])
    seen = seen[seen > 0] if logarithmic else seen
    if len(seen) == 0:
        return
    low, high = seen.min(), seen.max()
    if logarithmic:
        axes.set_ylim(low / 1.6, high * 1.6)
    else:
        axes.set_ylim(low - 0.04 * (high - low), high + 0.06 * (high - low) + 1e-9)


def draw_limits(
    strip: "Axes", below: Sequence["Axes"], marked: Mapping[str, tuple], measured: Mapping[str, float]
) -> None:
    """Rows of predicted limits and of measured thresholds, above the axes they belong to."""
    labels = [*marked, "measured"] if measured else list(marked)
    shown: set[str] = set()
    for row, (colour, found) in enumerate(marked.values()):
        for name, limit in found.items():
            label = None if name in shown else name.replace("_", "-")
            shown.add(name)
            style = {"color": colour, "markersize": 5, "alpha": 0.85, "clip_on": False}
            strip.plot(limit.value, -row, MARKERS[name], label=label, **style)
    for (label, value), marker in zip(measured.items(), ("|", "x", "*"), strict=False):
        strip.plot(
            value,
            -len(marked),
            marker,
            color="black",
            markersize=9 if marker == "|" else 6,
            markeredgewidth=1.6,
            label=label,
            clip_on=False,
        )
        for axes in below:
            axes.axvline(value, color="black", linewidth=0.7, linestyle=":")
    strip.set(ylim=(-len(labels) + 0.4, 0.6), xlim=below[0].get_xlim(), yticks=-np.arange(len(labels)))
    strip.set_yticklabels(labels)
    strip.tick_params(length=0, labelbottom=False)
    for side in ("left", "bottom"):
        strip.spines[side].set_visible(False)
