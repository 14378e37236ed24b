"""How sparse can a trained network be pruned, how sure is that, and is it true?"""

from jaxlimit import geometry
from jaxlimit.batches import Batches, LossStatistics, batched, loss_statistics
from jaxlimit.curvature import Curvature, gauss_newton, hessian, is_kernel
from jaxlimit.lanczos import Tridiagonal, tridiagonalize
from jaxlimit.limit import Progress, pruning_limit
from jaxlimit.magnitude import apply_mask, magnitude_mask, removed_norm
from jaxlimit.quadrature import SpectralMeasure, spectral_measure
from jaxlimit.result import PruningLimit
from jaxlimit.roots import Estimate

__version__ = "0.1.0"

__all__ = [
    "Batches",
    "Curvature",
    "Estimate",
    "LossStatistics",
    "Progress",
    "PruningLimit",
    "SpectralMeasure",
    "Tridiagonal",
    "apply_mask",
    "batched",
    "gauss_newton",
    "geometry",
    "hessian",
    "is_kernel",
    "loss_statistics",
    "magnitude_mask",
    "pruning_limit",
    "removed_norm",
    "spectral_measure",
    "tridiagonalize",
]
