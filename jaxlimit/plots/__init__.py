"""How do limits, spectra and sweeps look? Figures for reports, notebooks and papers.

Every function takes plain arrays or results and returns a `matplotlib.figure.Figure` of its own: a notebook
shows it, `figure.savefig(path)` writes it. matplotlib is needed only when a function is called. Curvatures go
by their names "hessian" and "gauss_newton" and keep their colours in all figures.
"""

from jaxlimit.plots.assessments import plot_assessment
from jaxlimit.plots.measurements import plot_sweep
from jaxlimit.plots.predictions import plot_limit, plot_sensitivity, plot_spectrum, plot_transition
from jaxlimit.plots.series import plot_methods, plot_series
from jaxlimit.plots.style import COLOURS, STYLES, Curve, narrow
from jaxlimit.training.losses import TITLES

__all__ = [
    "COLOURS",
    "STYLES",
    "TITLES",
    "Curve",
    "narrow",
    "plot_assessment",
    "plot_limit",
    "plot_methods",
    "plot_sensitivity",
    "plot_series",
    "plot_spectrum",
    "plot_sweep",
    "plot_transition",
]
