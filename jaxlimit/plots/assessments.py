"""The figure of an assessment: loss and error against sparsity, as cut and as attained, below the limits."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxlimit.plots.measurements import draw_limits
from jaxlimit.plots.style import COLOURS, GREEN, GREY, Curve, Limits, first_sparsity, legend_below, new_figure
from jaxlimit.training.losses import TITLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Beyond this sparsity the axis is logarithmic in the density, 1 - s; and it ends at this one, or further.
OPEN, END = 0.9, 0.999
# The first ones have precedence where labels would run into each other: nearer than APART of the axis.
TICKS, APART = (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.95, 0.995, 0.98, *np.arange(9) / 10), 0.06
STYLED = {"cut": ("-", "#000000"), "attained": ("o", GREEN)}


def plot_assessment(
    panels: Mapping[str, Mapping[str, Curve]],
    *,
    limits: Limits,
    measured: Mapping[str, float],
    bounds: Mapping[str, tuple[float, str]],
) -> "Figure":
    """Metrics of the network as cut and as attained, with the predicted limits above them.

    Args:
        panels: by the label of the vertical axis: (sparsities, values) of "cut" and "attained". The first
            panel, of losses, has a logarithmic axis.
        limits: predicted, by curvature and name.
        measured: sparsities by label: where the cut network leaves the tolerance, attained, certified.
        bounds: by the label of the axis, a horizontal line: its value and label.
    """
    marked = {TITLES[name]: (COLOURS[name], found) for name, found in limits.items()}
    strip = 0.26 * (len(marked) + 1)
    figure, rows = new_figure(6.4, strip + 2.9 * len(panels) + 0.4, strip, *[2.9] * len(panels))
    values = [limit.value for found in limits.values() for limit in found.values()] + list(measured.values())
    start, end = first_sparsity(values), last_sparsity(values)
    for row, (ylabel, curves) in zip(rows[1:], panels.items(), strict=True):
        for label, (sparsity, found) in curves.items():
            style, colour = STYLED[label]
            row.plot(sparsity, found, style, color=colour, label=label, linewidth=1.4, markersize=4)
        if ylabel in bounds:
            value, label = bounds[ylabel]
            row.axhline(value, color=GREY, linestyle="--", linewidth=1, label=label)
        row.set_ylabel(ylabel)
        _fit(row, curves, start, logarithmic=row is rows[1])
        _open(row, start, end)
        row.tick_params(labelbottom=row is rows[-1])
    rows[-1].set_xlabel("sparsity")
    _open(rows[0], start, end)
    draw_limits(rows[0], rows[1:], marked, measured)
    legend_below(figure, *rows)
    return figure


def _fit(axes: "Axes", curves: Mapping[str, Curve], start: float, *, logarithmic: bool) -> None:
    """Fits the vertical axis to what is in sight, but for the end, where nothing is left of the network."""
    seen = np.concatenate(
        [np.asarray(y)[(np.asarray(x) >= start) & (np.asarray(x) < 1)] for x, y in curves.values()]
    )
    seen = seen[np.isfinite(seen) & ((seen > 0) | (not logarithmic))]
    if logarithmic:
        axes.set_yscale("log")
    if len(seen):
        low, high = seen.min(), seen.max()
        margin = 0.05 * (high - low) + 1e-9
        axes.set_ylim((low / 1.4, high * 1.4) if logarithmic else (low - margin, high + margin))


def _open(axes: "Axes", start: float, end: float) -> None:
    """The sparsity axis: beyond OPEN logarithmic in the density, where something lies there."""
    if end <= OPEN:
        axes.set_xlim(start, 1)
        return
    position = partial(opened_out, end=end)
    axes.set_xscale("function", functions=opened_axis(end))
    start = min(start, OPEN - 0.1)
    axes.set_xlim(start, end)
    ticks, apart = [end], APART * (position(end) - position(start))
    for tick in TICKS:
        if start - 1e-9 <= tick < end and np.min(np.abs(position(ticks) - position(tick))) > apart:
            ticks.append(tick)
    axes.set_xticks(ticks, [f"{END:g}" if end == END else "1", *(f"{tick:g}" for tick in ticks[1:])])


def last_sparsity(values: Sequence[float]) -> float:
    """Where the axis ends so that these sparsities are seen: OPEN, END, or as much further as they lie.

    Beyond END it ends in 1, which stands where the density is at most half that of the others.

    Examples:
        >>> [round(last_sparsity([value]), 9) for value in (0.5, 0.98, 0.9997, 1.0)]
        [0.9, 0.999, 0.9999, 0.9999]
    """
    if max(values) <= OPEN:
        return OPEN
    if max(values) < END:
        return END
    density = min([1 - END, *(1 - value for value in values if value < 1)])
    return float(1 - 10 ** np.floor(np.log10(density / 2)))


def opened_axis(end: float) -> tuple[Callable[[ArrayLike], NDArray], Callable[[ArrayLike], NDArray]]:
    """The `functions` of a "function" scale of matplotlib: `opened_out`, and its inverse."""
    return partial(opened_out, end=end), _closed


def opened_out(sparsity: ArrayLike, end: float = 1 - 1e-6) -> NDArray[np.float64]:
    """The sparsity up to .9; beyond, logarithmic in the density, and at first as steep as before.

    What lies beyond `end` stands at the end.

    Examples:
        >>> opened_out([0.5, 0.9, 0.99, 0.999]).round(3).tolist()
        [0.5, 0.9, 1.13, 1.361]
    """
    s = np.asarray(sparsity, np.float64)
    density = np.maximum(1 - s, 1 - end)
    return np.where(s <= OPEN, s, OPEN + (1 - OPEN) * np.log((1 - OPEN) / density))


def _closed(position: ArrayLike) -> NDArray[np.float64]:
    x = np.asarray(position, np.float64)
    beyond = np.clip(x - OPEN, 0, 2) / (1 - OPEN)
    return np.where(x <= OPEN, x, 1 - (1 - OPEN) * np.exp(-beyond))
