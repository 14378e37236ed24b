"""How sparse can a trained network be pruned, how sure is that, and is it true?"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jaxlimit import geometry
from jaxlimit.core.batches import Batches, batched
from jaxlimit.core.trees import is_kernel
from jaxlimit.core.version import __version__ as __version__
from jaxlimit.curvature.makers import gauss_newton, hessian
from jaxlimit.curvature.operator import Curvature
from jaxlimit.geometry.magnitude import apply_mask, magnitude_mask, removed_norm
from jaxlimit.geometry.patterns import nm_mask
from jaxlimit.limits.budget import Progress
from jaxlimit.limits.estimate import Estimate
from jaxlimit.limits.layers import LayerLimits, layer_limits
from jaxlimit.limits.predicted_loss import PredictedLoss, predicted_loss
from jaxlimit.limits.pruning_limit import pruning_limit
from jaxlimit.limits.result import PruningLimit
from jaxlimit.measuring.certificates import Certificate, certify
from jaxlimit.measuring.finetuning import finetuned_sweep
from jaxlimit.measuring.loss_statistics import LossStatistics, loss_statistics
from jaxlimit.measuring.risks import paired
from jaxlimit.measuring.sweeps import Sweep, sparsity_sweep
from jaxlimit.pruning.attained import attained_limit
from jaxlimit.pruning.masks import keep_zeros, torch_masks
from jaxlimit.pruning.prune import prune
from jaxlimit.pruning.result import Attained, Pruned, Readjusting
from jaxlimit.pruning.trust_region import Settings
from jaxlimit.reference.paper_code import reference_limit
from jaxlimit.spectrum.lanczos import tridiagonalize
from jaxlimit.spectrum.measure import SpectralMeasure, spectral_measure
from jaxlimit.spectrum.tridiagonal import Tridiagonal

if TYPE_CHECKING:
    from jaxlimit.application.answers import CertifiedNetwork
    from jaxlimit.application.assess import assess
    from jaxlimit.application.assessment import Assessment
    from jaxlimit.application.loading import load_assessment
    from jaxlimit.pruning.shrink import Shrunk, shrink

__all__ = [
    "Assessment",
    "Attained",
    "Batches",
    "Certificate",
    "CertifiedNetwork",
    "Curvature",
    "Estimate",
    "LayerLimits",
    "LossStatistics",
    "PredictedLoss",
    "Progress",
    "Pruned",
    "PruningLimit",
    "Readjusting",
    "Settings",
    "Shrunk",
    "SpectralMeasure",
    "Sweep",
    "Tridiagonal",
    "apply_mask",
    "assess",
    "attained_limit",
    "batched",
    "certify",
    "finetuned_sweep",
    "gauss_newton",
    "geometry",
    "hessian",
    "is_kernel",
    "keep_zeros",
    "layer_limits",
    "load_assessment",
    "loss_statistics",
    "magnitude_mask",
    "nm_mask",
    "paired",
    "predicted_loss",
    "prune",
    "pruning_limit",
    "reference_limit",
    "removed_norm",
    "shrink",
    "sparsity_sweep",
    "spectral_measure",
    "torch_masks",
    "tridiagonalize",
]


# Imported when first used: all else takes .9 s, these, with Flax and what draws, take .6 more.
_LATER = {
    "Assessment": "jaxlimit.application.assessment",
    "CertifiedNetwork": "jaxlimit.application.answers",
    "Shrunk": "jaxlimit.pruning.shrink",
    "assess": "jaxlimit.application.assess",
    "load_assessment": "jaxlimit.application.loading",
    "shrink": "jaxlimit.pruning.shrink",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'jaxlimit' has no attribute '{name}'")
    return getattr(import_module(_LATER[name]), name)
