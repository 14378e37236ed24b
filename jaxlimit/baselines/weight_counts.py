r"""How sparse a network is said to be by its weights alone, without loss or data.

Each is a formula in the D prunable weights, and each names the share of them that may go. They cost nothing,
and know nothing of the loss tolerance: what they are worth is measured in docs/limits.md.
"""

import numpy as np

from jaxlimit.core.checks import as_real, require_range
from jaxlimit.core.trees import PyTree, flatten


def near_zero_share(weights: PyTree, threshold: float, *, relative: bool = False) -> float:
    """The share of the weights whose magnitude is below a threshold: what a trained network already is.

    Args:
        weights: pytree of the prunable weights.
        threshold: in units of the weights; .01 and .001 are usual.
        relative: whether it is in units of the largest magnitude instead.

    Raises:
        ValueError: a threshold that is not positive; weights that are empty, not finite, or, where it is
            relative, all 0.

    Examples:
        >>> near_zero_share(np.array([0.0, 0.0005, -0.02, 10.0]), 0.001)
        0.5
        >>> near_zero_share(np.array([0.0, 0.0005, -0.02, 10.0]), 0.01, relative=True)
        0.75
    """
    require_range("threshold", threshold, as_real(threshold) > 0, "positive")
    magnitudes = _magnitudes(weights) if relative else _finite(weights)
    scale = float(np.max(magnitudes)) if relative else 1.0
    return float(np.mean(magnitudes < threshold * scale))


def effective_number(scores: PyTree) -> float:
    """N_eff = 1 / sum p_i^2 with p_i = |score_i| / sum |score|: how many equal scores would be as spread out.

    Of the weights themselves it is |w|_1^2 / |w|_2^2, the participation ratio: 2 D / pi = .637 D for Gaussian
    weights, D / 2 for those of a Laplace distribution. Source: arXiv 2509.25606, which keeps N_eff weights.

    Args:
        scores: pytree of the weights, or of numbers that say how much each of them matters.

    Raises:
        ValueError: scores that are empty, not finite, or all 0.

    Examples:
        >>> effective_number(np.array([1.0, 1.0, 0.0, 0.0]))
        2.0
    """
    magnitudes = _magnitudes(scores)
    return float(np.sum(magnitudes) ** 2 / np.sum(magnitudes**2))


def pq_sparsity(weights: PyTree, p: float = 0.5, q: float = 1.0, *, slack: float = 0.0) -> float:
    """The sparsity that the PQ index allows.

    Of D weights it keeps at least r D, where

        r = (1 + slack)^(-q / (q - p)) (1 - I)^(p q / (q - p)),    I = 1 - D^(1/q - 1/p) |w|_p / |w|_q

    and I, the index, is 0 for weights of one magnitude and near 1 where a few hold all. With p = 1 and q = 2
    this keeps `effective_number`. Source: Diao, Wang, Zhang, Yang, Ding and Tarokh, "Pruning Deep Neural
    Networks from a Sparsity Perspective", ICLR 2023, theorem 1; p, q and a slack eta of 0 as there. That
    method prunes in rounds, at most .9 of what is left in each (gamma = 1); this is its first round.

    Args:
        weights: pytree of the prunable weights.
        p: exponent of the one norm, above 0 and at most 1.
        q: exponent of the other, at least 1 and above p.
        slack: eta, at least 0 in that paper's use; how far the removed weights may count.

    Raises:
        ValueError: exponents or slack out of range; weights that are empty, not finite, or all 0.

    Examples:
        >>> round(pq_sparsity(np.array([1.0, 1.0, 0.0, 0.0]), 1.0, 2.0), 6)
        0.5
    """
    ordered = 0 < as_real(p) <= 1 <= as_real(q) and p < q
    require_range("p and q", (p, q), ordered, "0 < p <= 1 <= q with p < q")
    require_range("slack", slack, as_real(slack) >= 0, "at least 0")
    magnitudes = _magnitudes(weights)
    scaled = magnitudes / np.max(magnitudes)  # the index does not depend on the scale; powers stay finite
    norms = [np.mean(scaled**power) ** (1 / power) for power in (p, q)]
    kept = (1 + slack) ** (-q / (q - p)) * (norms[0] / norms[1]) ** (p * q / (q - p))
    return float(min(1 - kept, LARGEST_ROUND))


# Of what is left, the share that a round of the PQ method removes at most.
LARGEST_ROUND = 0.9


def _magnitudes(weights: PyTree) -> np.ndarray:
    """(D,) |w|, float64; a ValueError where there are none, not all are finite, or all are 0."""
    magnitudes = _finite(weights)
    if not np.any(magnitudes):
        raise ValueError("there are no weights but zeros: nothing is left to count.")
    return magnitudes


def _finite(weights: PyTree) -> np.ndarray:
    """(D,) |w|, float64; a ValueError where there are none, or not all are finite."""
    magnitudes = np.abs(flatten(weights))
    if not magnitudes.size:
        raise ValueError("there are no weights: nothing is left to count.")
    if not np.all(np.isfinite(magnitudes)):
        raise ValueError(f"{int(np.sum(~np.isfinite(magnitudes)))} weights are not finite (NaN or infinity).")
    return magnitudes
