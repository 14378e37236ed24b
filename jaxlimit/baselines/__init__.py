"""Other pruning methods, to compare with: each takes a network at its start and gives sparse, trained ones.

    method(model, arrays, key, sparsities, settings) -> one SparseNetwork for each sparsity

`lomp` says what these arguments are; the other methods say only what is different with them. Every method
keeps exactly D - floor(s D) weights of the kernels at sparsity s, says which layers keep none, and goes on to
the same bits after it was killed, if it is given a folder.

Other answers to "how sparse?" stand beside them: formulas in the weights alone (`near_zero_share`,
`effective_number`, `pq_sparsity`), and a law fitted to a few pruned networks (`fit_pruned_error`).
"""

from jaxlimit.baselines.controls import dense, random_pruning
from jaxlimit.baselines.gems import RareGems, rare_gems
from jaxlimit.baselines.iterative import IterativePruning, iterative_pruning
from jaxlimit.baselines.l1_pruning import LOMP, lomp
from jaxlimit.baselines.network import SparseNetwork
from jaxlimit.baselines.pruned_error import PrunedError, fit_pruned_error
from jaxlimit.baselines.ratios import SmartRatio, smart_ratio
from jaxlimit.baselines.weight_counts import effective_number, near_zero_share, pq_sparsity
from jaxlimit.training.recipe import Recipe, TrainingOptions

__all__ = [
    "LOMP",
    "IterativePruning",
    "PrunedError",
    "RareGems",
    "Recipe",
    "SmartRatio",
    "SparseNetwork",
    "TrainingOptions",
    "dense",
    "effective_number",
    "fit_pruned_error",
    "iterative_pruning",
    "lomp",
    "near_zero_share",
    "pq_sparsity",
    "random_pruning",
    "rare_gems",
    "smart_ratio",
]
