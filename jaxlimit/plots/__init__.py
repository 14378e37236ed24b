"""How do limits, spectra and sweeps look? Figures for reports, notebooks and papers.

Every function returns a figure of matplotlib of its own; matplotlib itself is needed only when one is called.
"""

from jaxlimit.plots.figures import (
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    STYLES,
    TITLES,
    Curve,
    plot_limit,
    plot_methods,
    plot_sensitivity,
    plot_series,
    plot_spectrum,
    plot_sweep,
    plot_transition,
)

__all__ = [
    "BLUE",
    "COLOURS",
    "GREEN",
    "GREY",
    "STYLES",
    "TITLES",
    "Curve",
    "plot_limit",
    "plot_methods",
    "plot_sensitivity",
    "plot_series",
    "plot_spectrum",
    "plot_sweep",
    "plot_transition",
]
