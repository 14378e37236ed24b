"""Figures of limits and sweeps, for reports and notebooks.

Every function takes plain arrays or results and returns a `matplotlib.figure.Figure` of its own; pyplot and
its global state are not touched. A notebook shows a returned figure; `figure.savefig(path)` writes it.
Curvatures go by their names "hessian" and "gauss_newton" and keep their colours in all figures.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jaxlimit.limits.result import LimitCurve, PruningLimit, Sensitivity
from jaxlimit.limits.roots import Estimate
from jaxlimit.spectrum.quadrature import SpectralMeasure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
Limits = Mapping[str, Mapping[str, Estimate]]
# x, means and spreads
Series = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]

# Okabe and Ito's colours, told apart with any colour vision.
BLUE, ORANGE, GREEN, PURPLE, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#666666"
COLOURS = {"hessian": BLUE, "gauss_newton": ORANGE}
TITLES = {"hessian": "Hessian |H|", "gauss_newton": "Gauss-Newton"}
MARKERS = {"one_shot": "o", "width": "s", "cone": "^", "readjusted": "D"}
MEASURED = ("#000000", GREEN, PURPLE, SKY)
# Eigenvalues below this share of the largest are zero to the rounding of float32 products.
ROUNDING = 1e-6
STYLES: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
}


def plot_limit(limit: PruningLimit) -> "Figure":
    """The phase transition of one limit: see `plot_transition`."""
    name = "gauss_newton" if limit.positive_semidefinite else "hessian"
    return plot_transition({name: limit.curve()}, {name: limit.estimates()}, limit.transition_halfwidth)


def plot_transition(curves: Mapping[str, LimitCurve], limits: Limits, halfwidth: float) -> "Figure":
    """delta(s) / D against s: the limit is where it meets the diagonal.

    Args:
        curves: by curvature, from `PruningLimit.curve`.
        limits: by curvature, then by limit; width and cone are marked.
        halfwidth: of the transition window, in sparsity.
    """
    figure, (axes,) = _figure(6.4, 4.6)
    start = _start([limit.value for found in limits.values() for limit in found.values()])
    lowest = min([start, *(float(np.min(curve.width_dimension)) for curve in curves.values())]) - 0.08
    axes.plot([0, 1], [0, 1], color="black", linewidth=1, label="δ / D = s")
    for row, (name, curve) in enumerate(curves.items()):
        colour, title = COLOURS[name], TITLES[name]
        axes.plot(curve.sparsity, curve.width_dimension, color=colour, label=f"width, {title}")
        if np.any(curve.upper - curve.lower > 1e-6):
            band = (curve.sparsity, curve.lower, curve.upper)
            axes.fill_between(*band, color=colour, alpha=0.15, linewidth=0, label=f"its bracket, {title}")
        if len(curve.cone_sparsity):
            cone = (curve.cone_sparsity, curve.cone_dimension)
            axes.plot(*cone, "^", color=colour, markersize=4, alpha=0.7, label=f"cone, {title}")
        for limit in ("width", "cone"):
            if limit in limits.get(name, {}):
                value = limits[name][limit].value
                axes.plot(value, value, MARKERS[limit], color=colour, markeredgecolor="black", zorder=4)
        if "width" in limits.get(name, {}):
            value, height = limits[name]["width"].value, lowest + 0.02 + 0.03 * row
            ends = [max(0.0, value - halfwidth), min(1.0, value + halfwidth)]
            label = f"transition window, {title}"
            axes.plot(ends, [height] * 2, color=colour, linewidth=5, alpha=0.4, label=label)
            axes.plot(value, height, "|", color=colour, markersize=9)
    axes.set(xlim=(start, 1), ylim=(lowest, 1.02))
    axes.set(xlabel="sparsity s", ylabel="statistical dimension δ(s) / D")
    _legend_below(figure, axes)
    return figure


def _start(values: Sequence[float]) -> float:
    """Left end of a sparsity axis on which these values are seen, with the descent before them."""
    return max(0.0, np.floor(10 * min(values) - 2.5) / 10) if values else 0.0


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
    figure, panels = _figure(6.4, 4.2 + 0.26 * rows, *([0.26 * rows] if rows else []), 4.2)
    axes = panels[-1]
    for colour, (label, (sparsity, values)) in zip(MEASURED, curves.items(), strict=False):
        style = "o-" if len(sparsity) < 100 else "-"
        axes.plot(sparsity, values, style, color=colour, label=label, linewidth=1.4, markersize=3)
    if bound is not None:
        axes.axhline(bound[0], color=GREY, linestyle="--", linewidth=1, label=bound[1])
    values = [limit.value for _, found in marked.values() for limit in found.values()]
    values += list((measured or {}).values())
    start = _start(values)
    axes.set(xlim=(start, 1), xlabel="sparsity s", ylabel=ylabel)
    if logarithmic:
        axes.set_yscale("log")
    _zoom(axes, curves, start, logarithmic)
    if rows:
        _strip(panels[0], axes, marked, measured or {})
    _legend_below(figure, *panels)
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


def _strip(strip: "Axes", axes: "Axes", marked: Mapping[str, tuple], measured: Mapping[str, float]) -> None:
    """Rows of predicted limits and of measured thresholds, above the axes they belong to."""
    labels = [*marked, "measured"] if measured else list(marked)
    shown: set[str] = set()
    for row, (colour, found) in enumerate(marked.values()):
        for name, limit in found.items():
            label = None if name in shown else name.replace("_", "-")
            shown.add(name)
            strip.plot(limit.value, -row, MARKERS[name], color=colour, markersize=5, label=label, alpha=0.85)
    for (label, value), marker in zip(measured.items(), ("|", "x"), strict=False):
        strip.plot(
            value,
            -len(marked),
            marker,
            color="black",
            markersize=9 if marker == "|" else 6,
            markeredgewidth=1.6,
            label=f"measured {label}",
        )
        axes.axvline(value, color="black", linewidth=0.7, linestyle=":")
    strip.set(ylim=(-len(labels) + 0.4, 0.6), xlim=axes.get_xlim(), yticks=-np.arange(len(labels)))
    strip.set_yticklabels(labels)
    strip.tick_params(length=0, labelbottom=False)
    for side in ("left", "bottom"):
        strip.spines[side].set_visible(False)


def plot_spectrum(measures: Mapping[str, SpectralMeasure], ridges: Mapping[str, float]) -> "Figure":
    """The share of eigenvalues up to |lambda|, as the quadrature nodes give it: nothing is smoothed.

    Args:
        measures: by curvature.
        ridges: by curvature, the ridge a of the width limit: directions with |lambda| far below a are free.
    """
    figure, (axes,) = _figure(6.4, 4.2)
    largest = max(float(np.max(np.abs(measure.nodes))) for measure in measures.values())
    low = min([*ridges.values(), largest]) * 1e-4
    for name, measure in measures.items():
        nodes, weights = measure.nodes.ravel(), measure.weights.ravel() / len(measure.nodes)
        colour, title = COLOURS[name], TITLES[name]
        axes.step(*_cumulative(np.abs(nodes), weights, low, largest), where="post", color=colour, label=title)
        negative = nodes < -ROUNDING * largest
        if weights[negative].sum() > 1e-3:
            steps = _cumulative(-nodes[negative], weights[negative], low, largest)
            label = f"{title}, λ < 0 alone"
            axes.step(*steps, where="post", color=colour, linestyle="--", linewidth=1, label=label)
        if name in ridges:
            label = f"a = {ridges[name]:.2g}, {title}"
            axes.axvline(ridges[name], color=colour, linewidth=1, linestyle=":", label=label)
    axes.set(xscale="log", xlim=(low, 2 * largest), ylim=(0, 1.02), xlabel="|λ| (loss per squared weight)")
    axes.set_ylabel("share of eigenvalues up to |λ|")
    _legend_below(figure, axes)
    return figure


def _cumulative(nodes: NDArray, weights: NDArray, low: float, high: float) -> Curve:
    order = np.argsort(nodes)
    shares = np.cumsum(weights[order])
    positions = np.maximum(nodes[order], low / 10)
    return np.append(positions, 2 * high), np.append(shares, shares[-1])


def plot_sensitivity(
    sensitivities: Mapping[str, Sensitivity],
    loss_tolerance: float,
    *,
    limits: Limits | None = None,
    measured: Mapping[str, Curve] | None = None,
) -> "Figure":
    """Limits against the loss tolerance.

    Args:
        sensitivities: by curvature, from `PruningLimit.sensitivity`.
        loss_tolerance: the one chosen, marked.
        limits: by curvature and name, at that tolerance; one_shot and readjusted are marked.
        measured: by label: (loss tolerances, measured thresholds).
    """
    figure, (axes,) = _figure(6.4, 4.2)
    for name, found in sensitivities.items():
        axes.plot(found.loss_tolerance, found.width, "-", color=COLOURS[name], label=f"width, {TITLES[name]}")
        if found.cone is not None:
            axes.plot(
                found.loss_tolerance, found.cone, "--", color=COLOURS[name], label=f"cone, {TITLES[name]}"
            )
    for colour, (label, (tolerances, thresholds)) in zip(MEASURED, (measured or {}).items(), strict=False):
        axes.plot(tolerances, thresholds, color=colour, linewidth=1.2, label=f"measured, {label}")
    for name, found in (limits or {}).items():
        for limit in ("one_shot", "readjusted"):
            if limit in found:
                label = f"{limit.replace('_', '-')}, {TITLES[name]}"
                marker = MARKERS[limit]
                axes.plot(
                    loss_tolerance, found[limit].value, marker, color=COLOURS[name], label=label, alpha=0.8
                )
    label = f"ε of this run, {loss_tolerance:.3g}"
    axes.axvline(loss_tolerance, color=GREY, linewidth=1, linestyle=":", label=label)
    axes.set(xscale="log", xlabel="loss tolerance ε (nats)", ylabel="limit (sparsity)")
    _legend_below(figure, axes)
    return figure


def plot_methods(curves: Mapping[str, tuple[NDArray, NDArray, NDArray]]) -> "Figure":
    """Test accuracy of pruning methods against sparsity, on an axis that opens towards 1.

    Args:
        curves: by label: (sparsities, means, spreads), the spreads drawn as bars. A curve at sparsity 0 only
            is a level that the others are measured by.
    """
    figure, (axes,) = _figure(6.4, 4.6)
    colours = iter((ORANGE, BLUE, GREEN, PURPLE, SKY, GREY, "#E69F00"))
    markers = iter("osD^vXP")
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
    _legend_below(figure, axes)
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
    figure, axes = _figure(6.4, 2.6 * len(panels) + 0.8, *[2.6] * len(panels))
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
    _legend_below(figure, *axes)
    return figure


def _figure(width: float, *heights: float) -> tuple["Figure", list["Axes"]]:
    """A figure `width` inches wide with panels of these heights, the first height alone being the total."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "jaxlimit[cli]"') from error
    total, panels = heights[0], heights[1:] or heights
    with mpl.rc_context(STYLES):
        figure = Figure(figsize=(width, total), dpi=150, layout="constrained")
        grid = figure.add_gridspec(len(panels), 1, height_ratios=panels, hspace=0)
        axes = [figure.add_subplot(grid[row, 0]) for row in range(len(panels))]
    return figure, axes


def _legend_below(figure: "Figure", *panels: "Axes") -> None:
    """One legend for all panels, below them, where it covers nothing."""
    found = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        list(found.values()),
        list(found),
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=8,
        handlelength=2.2,
        columnspacing=1.6,
    )
