"""The look of all figures: colours, markers, and how a figure and its legend are laid out.

matplotlib is imported only when a figure is made; pyplot and its global state are not touched.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jaxlimit.limits.estimate import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Sparsities, or another variable, and the values there."""
Limits = Mapping[str, Mapping[str, Estimate]]

# Okabe and Ito's colours, told apart with any colour vision.
BLUE, ORANGE, GREEN, PURPLE, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#666666"
COLOURS = {"hessian": BLUE, "gauss_newton": ORANGE}
"""The colours of the curvatures, the same in all figures."""
MARKERS = {"one_shot": "o", "width": "s", "cone": "^", "readjusted": "D"}
MEASURED = ("#000000", GREEN, PURPLE, SKY)
# Of a legend as it is; and inches: one column of a paper, one line of a legend.
COLUMNS, COLUMN, LINE = 3, 3.4, 0.17
STYLES: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
}
"""Settings of matplotlib for all figures, as `matplotlib.rc_context` takes them."""


def first_sparsity(values: Sequence[float]) -> float:
    """Left end of a sparsity axis on which these values are seen, with the descent before them."""
    return max(0.0, np.floor(10 * min(values) - 2.5) / 10) if values else 0.0


def new_figure(width: float, *heights: float) -> tuple["Figure", list["Axes"]]:
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


def narrow(figure: "Figure") -> None:
    """Makes a figure one column of a paper wide; its words stay as large as they are.

    For print and for phones: the legend gets one column. `figure.savefig("name.pdf")` then writes vectors.
    """
    _, height = figure.get_size_inches()
    for legend in list(figure.legends):
        handles, labels = legend.legend_handles, [text.get_text() for text in legend.get_texts()]
        legend.remove()
        _legend(figure, handles, labels, ncols=1)
        height += LINE * (len(labels) - -(-len(labels) // COLUMNS))
    for axes in figure.axes:
        if len(axes.get_xticks()) > 8:  # their labels would run into each other
            axes.tick_params(axis="x", labelrotation=90)
    figure.set_size_inches(COLUMN, height)


def legend_below(figure: "Figure", *panels: "Axes") -> None:
    """One legend for all panels, below them, where it covers nothing."""
    found = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    _legend(figure, list(found.values()), list(found), ncols=COLUMNS)


def _legend(figure: "Figure", handles: Sequence[Any], labels: Sequence[str], *, ncols: int) -> None:
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=ncols,
        frameon=False,
        fontsize=8,
        handlelength=2.2,
        columnspacing=1.6,
    )
