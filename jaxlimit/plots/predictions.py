"""Figures of what is predicted: a limit and its transition, the spectrum behind it, its sensitivity."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from jaxlimit.limits.result import LimitCurve, PruningLimit, Sensitivity
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
from jaxlimit.spectrum.measure import SpectralMeasure
from jaxlimit.training.losses import TITLES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Eigenvalues below this share of the largest are zero to the rounding of float32 products.
ROUNDING = 1e-6


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
    figure, (axes,) = new_figure(6.4, 4.6)
    start = first_sparsity([limit.value for found in limits.values() for limit in found.values()])
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
    legend_below(figure, axes)
    return figure


def plot_spectrum(measures: Mapping[str, SpectralMeasure], ridges: Mapping[str, float]) -> "Figure":
    """The share of eigenvalues up to |lambda|, as the quadrature nodes give it: nothing is smoothed.

    Args:
        measures: by curvature.
        ridges: by curvature, the ridge a of the width limit: directions with |lambda| far below a are free.
    """
    figure, (axes,) = new_figure(6.4, 4.2)
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
    legend_below(figure, axes)
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
    figure, (axes,) = new_figure(6.4, 4.2)
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
    legend_below(figure, axes)
    return figure
