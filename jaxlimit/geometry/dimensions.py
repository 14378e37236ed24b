r"""Statistical dimensions of the loss sublevel set seen from the pruned weights, and their transition.

Near a minimum w* the sublevel set {L <= L* + eps} is the ellipsoid S = {w* + u : u^T H u <= 2 eps}.
Seen from w_pruned = w* - c it spans a cone; a k-dimensional subspace through w_pruned meets S, with high
probability, iff k + delta >= D, with delta the cone's statistical dimension (Amelunxen, Lotz, McCoy and
Tropp 2014, arXiv 1303.6672). Both formulas below are the *effective dimension* of H at some ridge a,

    delta(a) = sum_i a / (a + |lambda_i|) = D - tr |H| (|H| + a)^{-1},

and differ only in the ridge. Everything here is scalar and knows nothing of networks; dimensions are
returned as fractions of D.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import brentq

from jaxlimit.core.checks import as_real, require_count, require_instance, require_positive, require_range
from jaxlimit.spectrum.measure import SpectralMeasure

# A cone's ridge of exp(60) times the width formula's makes the dimension D to rounding.
LOG_INFINITE = 60.0


def effective_dimension(measure: SpectralMeasure, ridge: float) -> float:
    """delta(a) / D: the integral of a / (a + |lambda|); 1 for an infinite ridge.

    Args:
        measure: spectral measure of H.
        ridge: a > 0, in units of the eigenvalues.

    Raises:
        ValueError: a ridge that is not positive.

    Examples:
        >>> effective_dimension(SpectralMeasure([[0.0, 1.0]], [[0.5, 0.5]]), ridge=1.0)
        0.75
    """
    require_instance("measure", measure, SpectralMeasure, "spectral_measure")
    require_range("ridge", ridge, as_real(ridge) > 0, "positive")
    if math.isinf(ridge):
        return 1.0
    ridge = float(ridge)
    return min(1.0, measure.integrate(lambda x: ridge / (ridge + np.abs(x)))[0])


def width_ridge(radius: float, loss_tolerance: float) -> float:
    """A = 2 eps / R^2: the ridge of the Gaussian-width formula; infinite at radius 0."""
    radius, loss_tolerance = _checked(radius, loss_tolerance)
    return 2 * loss_tolerance / radius / radius if radius > 0 else math.inf


def cone_ridge(rank: Callable[[float], float], radius: float, loss_tolerance: float) -> float:
    """The a > 0 with a c^T |H| (|H| + a)^{-1} c = 2 eps; infinite if c^T |H| c <= 2 eps.

    The left side grows with a from 0 to c^T |H| c, so the root is unique, and at least 2 eps / R^2.

    Args:
        rank: a -> integral of |lambda| / (a + |lambda|) over the spectral measure of H seen from c.
        radius: R = ||c||.
        loss_tolerance: eps > 0.
    """
    low = width_ridge(radius, loss_tolerance)

    def excess(log_rho: float) -> float:
        return math.exp(log_rho) * rank(math.exp(log_rho) * low) - 1

    # Beyond, the dimension is D to rounding: a is infinite, or as good as.
    if excess(LOG_INFINITE) <= 0:
        return math.inf
    if excess(0.0) >= 0:  # rank = 1: all curvature along c is infinite next to a
        return low
    return low * math.exp(brentq(excess, 0.0, LOG_INFINITE, xtol=1e-13))  # pyright: ignore[reportArgumentType, reportReturnType]


def width_dimension(measure: SpectralMeasure, radius: float, loss_tolerance: float) -> float:
    r"""The paper's estimate of delta / D, which sees the removed vector only through its length.

        delta = sum_i r_i^2 / (R^2 + r_i^2) = sum_i 2 eps / (2 eps + |lambda_i| R^2)

    with semi-axes r_i = sqrt(2 eps / |lambda_i|). It never exceeds `cone_dimension`.

    Args:
        measure: spectral measure of H (one row a probe; a diagonal matrix is one row of weights 1/D).
        radius: R = ||c||, the norm of the removed weights, in units of the weights; at least 0.
        loss_tolerance: eps > 0, in units of the loss.

    Returns:
        delta / D in [0, 1].

    Raises:
        ValueError: a radius or tolerance out of range.

    Examples:
        >>> width_dimension(SpectralMeasure([[0.0, 1.0]], [[0.5, 0.5]]), radius=2.0, loss_tolerance=0.5)
        0.6

    Source: Larsen et al. 2022 (arXiv 2107.05802); arXiv 2306.05857, its Gaussian width of an ellipsoid.
    """
    return effective_dimension(measure, width_ridge(radius, loss_tolerance))


def cone_dimension(
    measure: SpectralMeasure, removed_measure: SpectralMeasure, radius: float, loss_tolerance: float
) -> float:
    r"""The statistical dimension delta / D of the cone, to leading order in D.

        find a > 0 with  a c^T |H| (|H| + a)^{-1} c = 2 eps,   then  delta = sum_i a / (a + |lambda_i|)

    and delta = D if c^T |H| c <= 2 eps, for then the pruned weights lie in the ellipsoid.

    Args:
        measure: spectral measure of H.
        removed_measure: spectral measure of H seen from c: nodes lambda_i with weights <c, v_i>^2 / ||c||^2.
        radius: R = ||c||, at least 0.
        loss_tolerance: eps > 0.

    Returns:
        delta / D in [0, 1].

    Raises:
        ValueError: a radius or tolerance out of range.

    Examples:
        With c along the flat direction alone the cone is everything.

        >>> measure = SpectralMeasure([[0.0, 1.0]], [[0.5, 0.5]])
        >>> cone_dimension(measure, SpectralMeasure([[0.0, 1.0]], [[1.0, 0.0]]), 2.0, 0.5)
        1.0
        >>> round(cone_dimension(measure, SpectralMeasure([[0.0, 1.0]], [[0.0, 1.0]]), 2.0, 0.5), 6)
        0.625

    Source: the polar cone {z : z^T c + sqrt(2 eps) ||H^{-1/2} z|| <= 0}; the projection of a Gaussian g on
    it is z = H (H + a)^{-1} (g - tau c), and in high dimension its constraint concentrates to the equation
    for a. Checked by Monte Carlo in the tests, where its error is at most 1 / D.
    """
    if _checked(radius, loss_tolerance)[0] == 0:
        return 1.0

    def rank(ridge: float) -> float:
        return removed_measure.integrate(lambda x: np.abs(x) / (ridge + np.abs(x)))[0]

    return effective_dimension(measure, cone_ridge(rank, radius, loss_tolerance))


def fixed_point(dimension: Callable[[int], float], dim: int, counts: Sequence[int] | None = None) -> float:
    """The s that solves the phase-transition equation delta(s) / D = s, where delta falls with s.

    delta depends on s through the removals that it allows and is constant between; the root of this step
    function is returned exactly. Cost: log2(D) evaluations.

    Args:
        dimension: n -> delta / D after n removals; it must not rise with n.
        dim: D.
        counts: (removals + 1,) weights that n removals remove; None: n, single weights go.

    Examples:
        >>> fixed_point(lambda n: 1 - n / 10, dim=10)
        0.5
    """
    counts = range(dim + 1) if counts is None else counts
    last = last_within(dimension, counts)
    beyond = counts[last + 1] / dim if last + 1 < len(counts) else 1.0
    return min(max(dimension(last), counts[last] / dim), beyond, 1.0)


def last_within(dimension: Callable[[int], float], counts: Sequence[int]) -> int:
    """The last n with delta / D >= s, by bisection: so many removals can be, one more cannot.

    Args:
        dimension: as for `fixed_point`.
        counts: as for `fixed_point`; the last one is D.

    Examples:
        >>> last_within(lambda n: 1 - n / 11, range(12))
        5
    """
    low, high, dim = 0, len(counts), counts[-1]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if dimension(middle) >= counts[middle] / dim else (low, middle)
    return low


def transition_halfwidth(dim: int, eta: float) -> float:
    r"""Half the width of the window of s in which the probability of meeting S falls from 1-eta to eta.

        a_eta / sqrt(D),   a_eta = sqrt(8 log(4 / eta))

    Args:
        dim: D, at least 1.
        eta: probability in (0, 1).

    Raises:
        ValueError: dim or eta out of range.

    Examples:
        >>> round(transition_halfwidth(10_000, 0.05), 4)
        0.0592

    Source: Amelunxen et al. 2014, approximate kinematic formula (theorem II).
    """
    require_count("dim", dim)
    require_range("eta", eta, 0 < as_real(eta) < 1, "strictly between 0 and 1")
    return math.sqrt(8 * math.log(4 / eta) / dim)


def _checked(radius: float, loss_tolerance: float) -> tuple[float, float]:
    """Both in double precision; a ValueError where one is out of range."""
    require_range("radius", radius, 0 <= as_real(radius) < math.inf, "finite and not negative")
    require_positive("loss_tolerance", loss_tolerance)
    return float(radius), float(loss_tolerance)
