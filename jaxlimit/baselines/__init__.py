"""Other pruning methods, to compare with: each takes a network at its start and gives sparse, trained ones.

    method(model, arrays, key, sparsities, settings) -> one SparseNetwork for each sparsity

`lomp` says what these arguments are; the other methods say only what is different with them. Every method
keeps exactly D - floor(s D) weights of the kernels at sparsity s, says which layers keep none, and goes on to
the same bits after it was killed, if it is given a folder.

Other orders of the weights are scores, which every function with `scores=` takes: `obd_scores`, with a
diagonal of the curvature, `taylor_scores`, `wanda_scores` and `lookahead_scores`.

`share_scores` is an order with the layer shares of a rule: ERK, ER, uniform or, with `uniform_plus`,
uniform+.

Other answers to "how sparse?" stand beside them: formulas in the weights alone (`near_zero_share`,
`effective_number`, `pq_sparsity`), and a law fitted to a few pruned networks (`fit_pruned_error`).
"""

from jaxlimit.baselines.controls import dense, random_pruning
from jaxlimit.baselines.gems import RareGems, rare_gems
from jaxlimit.baselines.growing_regularization import GReg, greg
from jaxlimit.baselines.iterative import IterativePruning, iterative_pruning
from jaxlimit.baselines.l1_pruning import LOMP, lomp
from jaxlimit.baselines.layer_shares import share_counts, share_scores, uniform_plus
from jaxlimit.baselines.lookahead import Layer, lookahead_layers, lookahead_scores
from jaxlimit.baselines.network import SparseNetwork
from jaxlimit.baselines.orders import (
    curvature_diagonal,
    gauss_newton_diagonal,
    obd_scores,
    taylor_scores,
)
from jaxlimit.baselines.pruned_error import PrunedError, fit_pruned_error
from jaxlimit.baselines.ratios import SmartRatio, smart_ratio
from jaxlimit.baselines.readjusting import ReadjustedPruning, readjusted_pruning
from jaxlimit.baselines.wanda import wanda_scores
from jaxlimit.baselines.weight_counts import effective_number, near_zero_share, pq_sparsity
from jaxlimit.training.recipe import Recipe, TrainingOptions

__all__ = [
    "LOMP",
    "GReg",
    "IterativePruning",
    "Layer",
    "PrunedError",
    "RareGems",
    "ReadjustedPruning",
    "Recipe",
    "SmartRatio",
    "SparseNetwork",
    "TrainingOptions",
    "curvature_diagonal",
    "dense",
    "effective_number",
    "fit_pruned_error",
    "gauss_newton_diagonal",
    "greg",
    "iterative_pruning",
    "lomp",
    "lookahead_layers",
    "lookahead_scores",
    "near_zero_share",
    "obd_scores",
    "pq_sparsity",
    "random_pruning",
    "rare_gems",
    "readjusted_pruning",
    "share_counts",
    "share_scores",
    "smart_ratio",
    "taylor_scores",
    "uniform_plus",
    "wanda_scores",
]
