"""How sparse can a trained network be pruned, how sure is that, and is it true?"""

from jaxlimit import geometry
from jaxlimit.adaptive import Progress
from jaxlimit.batches import Batches, LossStatistics, batched, loss_statistics
from jaxlimit.curvature import Curvature, gauss_newton, hessian
from jaxlimit.lanczos import Tridiagonal, tridiagonalize
from jaxlimit.limit import pruning_limit
from jaxlimit.magnitude import apply_mask, magnitude_mask, removed_norm
from jaxlimit.measure import Sweep, finetuned_sweep, sparsity_sweep
from jaxlimit.prunable import is_kernel
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
    "Sweep",
    "Tridiagonal",
    "apply_mask",
    "batched",
    "finetuned_sweep",
    "gauss_newton",
    "geometry",
    "hessian",
    "is_kernel",
    "loss_statistics",
    "magnitude_mask",
    "pruning_limit",
    "removed_norm",
    "sparsity_sweep",
    "spectral_measure",
    "tridiagonalize",
]
