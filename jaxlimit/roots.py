r"""The four pruning limits as roots of scalar functions of the sparsity s.

| limit      | equation                                        | function of s          |
|------------|-------------------------------------------------|------------------------|
| one_shot   | -g^T c + c^T H c / 2 = eps, first crossing      | not monotone           |
| width      | delta(2 eps / R^2) / D = s                      | left side falls        |
| cone       | delta(a) / D = s, a c^T H (H+a)^{-1} c = 2 eps  | crosses once in practice |
| readjusted | min_x (c - x)^T H (c - x) / 2 = eps             | left side rises        |

with c = c(s) the removed vector, R its norm, x any vector on the kept weights. The solvers here take what
they need as numbers and functions, so that the same code serves a dense eigendecomposition and Lanczos.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from numpy.typing import NDArray

from jaxlimit.geometry import cone_ridge, effective_dimension, width_ridge
from jaxlimit.magnitude import MagnitudeOrder
from jaxlimit.quadrature import SpectralBracket, SpectralMeasure

# Standard errors by which the probe error widens [lower, upper]: 99.7 % if the error were normal.
STANDARD_ERRORS = 3.0


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["value", "lower", "upper", "probe_error", "spread"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Estimate:
    """A limit in units of sparsity, with what is known of its error.

    Attributes:
        value: the estimate.
        lower, upper: the certified quadrature bracket, widened by three probe errors and by 1/D, the
            step of R(s).
        probe_error: standard error due to the finite number of probes (a bound; 0 if no probe is used).
        spread: interquartile range over quadrature rules of different step counts; 0 where the bracket
            alone tells the error.
    """

    value: float
    lower: float
    upper: float
    probe_error: float = 0.0
    spread: float = 0.0

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.lower:.4f}, {self.upper:.4f}]"


def fixed_point(dimension: Callable[[int], float], dim: int) -> float:
    """The s at which delta / D = s, for a dimension that falls with the number of removed weights n.

    delta is constant while floor(s D) = n, and the root of that step function is returned exactly:
    bisection finds the last n with dimension(n) >= n / D. Cost: log2(D) evaluations.

    Example:
        >>> fixed_point(lambda n: 1 - n / 10, dim=10)
        0.5
    """
    low, high = 0, dim + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if dimension(middle) >= middle / dim else (low, middle)
    return min(max(dimension(low), low / dim), (low + 1) / dim, 1.0)


def dimension_root(
    bracket: SpectralBracket,
    order: MagnitudeOrder,
    ridges: Callable[[str, int], float],
) -> Estimate:
    """Root of delta(a(s)) / D = s, with its bracket, probe error and spread over quadrature rules.

    Args:
        bracket: of the spectral measure.
        order: of the weights.
        ridges: `ridges(side, n)`, the ridge after n removals, for side "lower", "value" and "upper".
    """

    def root(measure: SpectralMeasure, side: str, standard_errors: float = 0.0) -> float:
        def dimension(n: int) -> float:
            a = ridges(side, n)
            delta = effective_dimension(measure, a)
            if standard_errors == 0 or np.isinf(a):
                return delta
            return delta + standard_errors * measure.probe_error(lambda x: a / (a + np.abs(x)))

        return fixed_point(dimension, order.dim)

    roots = np.array([root(measure, "value") for measure in bracket.rules])
    last = bracket.rules[-1]
    probe_error = (root(last, "value", 1.0) - root(last, "value", -1.0)) / 2
    value = float(np.median(roots))
    # The value may leave a rigorous bracket only by rounding.
    lower = min(root(bracket.lower, "lower", -STANDARD_ERRORS), value) - 1 / order.dim
    upper = max(root(bracket.upper, "upper", STANDARD_ERRORS), value) + 1 / order.dim
    quartiles = np.percentile(roots, [25, 75])
    return Estimate(value, max(lower, 0.0), min(upper, 1.0), probe_error, float(quartiles[1] - quartiles[0]))


def quadrature_error(bracket: SpectralBracket, order: MagnitudeOrder, loss_tolerance: float) -> float:
    """What more Lanczos steps could still change of the width limit, in units of s; the probes' error apart.

    The width of the rigorous bracket for a semidefinite matrix, the spread over rules for an indefinite one.
    """
    if len(bracket.rules) > 2:
        return width_limit(bracket, order, loss_tolerance).spread
    lower, upper = (
        fixed_point(
            lambda n, m=measure: effective_dimension(m, width_ridge(removed_radius(order, n), loss_tolerance)),
            order.dim,
        )
        for measure in (bracket.lower, bracket.upper)
    )
    return upper - lower


def removed_radius(order: MagnitudeOrder, num_removed: int) -> float:
    """R after n removals."""
    return float(np.sqrt(order.squared_norm[num_removed]))


def width_limit(bracket: SpectralBracket, order: MagnitudeOrder, loss_tolerance: float) -> Estimate:
    """The paper's limit: delta_width(s) / D = s."""
    return dimension_root(bracket, order, lambda _, n: width_ridge(removed_radius(order, n), loss_tolerance))


@dataclass(frozen=True)
class ConePoint:
    """The cone's ridge at one sparsity, in units of the width formula's: rho = a R^2 / (2 eps) >= 1.

    Attributes:
        num_removed: n = floor(s D).
        lower, value, upper: rho and its bracket.
        spread: interquartile range of log rho over quadrature rules.
    """

    num_removed: int
    lower: float
    value: float
    upper: float
    spread: float


# log(rho) beyond this makes the dimension 1 to rounding; it stands for the infinite ridge.
_LOG_INFINITE = 60.0


def cone_point(num_removed: int, removed: SpectralBracket, radius: float, loss_tolerance: float) -> ConePoint:
    """rho(s) from a bracket of the spectral measure seen from c(s)."""
    base = width_ridge(radius, loss_tolerance)

    def rho(measure: SpectralMeasure) -> float:
        return float(np.exp(min(np.log(cone_ridge(measure, radius, loss_tolerance) / base), _LOG_INFINITE)))

    rhos = np.array([rho(measure) for measure in removed.rules])
    value = float(np.median(rhos))
    low, high = np.percentile(np.log(rhos), [25, 75])
    return ConePoint(
        num_removed, min(rho(removed.lower), value), value, max(rho(removed.upper), value), float(high - low)
    )


def cone_root(
    bracket: SpectralBracket, order: MagnitudeOrder, points: Sequence[ConePoint], loss_tolerance: float
) -> Estimate:
    """delta_cone(s) / D = s, with log rho(s) interpolated linearly between the points.

    rho varies slowly with s (it is 1 where the curvature along c is large), so a few points near the root
    suffice; R(s) itself is exact.
    """
    points = sorted(points, key=lambda point: point.num_removed)
    at = [point.num_removed for point in points]
    logs = {side: np.log([getattr(point, side) for point in points]) for side in ("lower", "value", "upper")}

    def ridges(side: str, n: int) -> float:
        return width_ridge(removed_radius(order, n), loss_tolerance) * float(np.exp(np.interp(n, at, logs[side])))

    return dimension_root(bracket, order, ridges)


def cone_limit(
    bracket: SpectralBracket,
    order: MagnitudeOrder,
    removed: Callable[[list[int]], list[SpectralBracket]],
    loss_tolerance: float,
    start: float,
    tolerance: float,
    max_rounds: int = 6,
) -> tuple[Estimate, list[ConePoint]]:
    """The exact cone's limit: rho at a few sparsities, then at each new root until the root rests.

    Args:
        bracket: of the spectral measure.
        order: of the weights.
        removed: brackets of the spectral measure seen from c after n removals, for several n at once.
        loss_tolerance: eps.
        start: the width limit, below which the cone limit cannot lie.
        tolerance: the iteration ends when the root moves by less than a tenth of it.
        max_rounds: rounds of refinement at most.

    Returns:
        The limit and the points it was computed from.
    """

    def evaluate(counts: list[int]) -> list[ConePoint]:
        return [
            cone_point(n, measure, removed_radius(order, n), loss_tolerance)
            for n, measure in zip(counts, removed(counts), strict=True)
        ]

    kept = order.dim * (1 - start)
    first = sorted({min(order.dim, max(1, round(order.dim - kept * part))) for part in (1, 0.75, 0.5, 0.25)})
    points = evaluate([n for n in first if order.squared_norm[n] > 0])
    if not points:
        return Estimate(1.0, 1.0, 1.0), []
    estimate = cone_root(bracket, order, points, loss_tolerance)
    for _ in range(max_rounds):
        n = min(max(1, round(estimate.value * order.dim)), order.dim)
        if n in {point.num_removed for point in points} or order.squared_norm[n] == 0:
            break
        points += evaluate([n])
        previous, estimate = estimate, cone_root(bracket, order, points, loss_tolerance)
        if abs(estimate.value - previous.value) < 0.1 * tolerance:
            break
    return estimate, points


def one_shot_limit(
    increase: Callable[[NDArray], NDArray], dim: int, loss_tolerance: float, tolerance: float, num_points: int = 32
) -> Estimate:
    """First crossing of the predicted loss of the pruned network, on a grid that is refined where it crosses.

    An excursion above eps narrower than 1 / num_points can be missed by the first grid.

    Args:
        increase: predicted increase of the loss at an array of sparsities (one product with H each).
        dim: D.
        loss_tolerance: eps.
        tolerance: spacing of the last grid, at most; not finer than 1/D.
        num_points: intervals a round; the default resolves .001 in two rounds.

    Returns:
        The crossing by linear interpolation, between its two neighbours on the last grid; 1 without crossing.

    Example:
        >>> print(one_shot_limit(lambda s: s**2, dim=10**6, loss_tolerance=0.25, tolerance=1e-3))
        0.5000 [0.5000, 0.5010]
    """
    grid = np.linspace(0, 1, num_points + 1)
    losses = np.concatenate([[0.0], increase(grid[1:])])
    while True:
        above = np.flatnonzero(losses > loss_tolerance)
        if above.size == 0:
            return Estimate(1.0, 1.0 - 1 / dim, 1.0)
        i = int(above[0])
        low, high, part = grid[i - 1], grid[i], (loss_tolerance - losses[i - 1]) / (losses[i] - losses[i - 1])
        if high - low <= max(tolerance, 1 / dim):
            return Estimate(low + part * (high - low), max(low - 1 / dim, 0.0), min(high + 1 / dim, 1.0))
        grid = np.linspace(low, high, num_points + 1)
        losses = np.concatenate([[losses[i - 1]], increase(grid[1:-1]), [losses[i]]])


def readjusted_limit(
    minimum: Callable[[int], tuple[float, float]], dim: int, loss_tolerance: float, tolerance: float, start: float
) -> Estimate:
    """Largest s whose best readjusted quadratic loss is at most eps, by bisection over nested supports.

    Args:
        minimum: `minimum(n) -> (lower, upper)`: bounds on min_x (c - x)^T H (c - x) / 2 after n removals,
            which is compared with eps and may stop as soon as eps lies outside them.
        dim: D.
        loss_tolerance: eps.
        tolerance: width at which the bisection ends; 0 for the exact n.
        start: a first guess of the limit.

    Returns:
        The limit between the largest s known to reach eps and the smallest known not to.
    """
    low, high = 0, dim + 1  # at low eps is reached; at high, one beyond all weights, it is not
    n, stride, boundary = min(max(1, round(start * dim)), dim), max(1, round(0.02 * dim)), None
    while high - low > max(1, tolerance * dim):
        below, above = minimum(n)
        if above <= loss_tolerance:
            low = n
        elif below > loss_tolerance:
            high = n
        else:  # the bounds cannot tell eps apart: n is the root as far as they go
            boundary = n
            break
        # First walk from the guess in growing strides, then bisect between the ends found.
        reached = high if above <= loss_tolerance else low
        if reached in (0, dim + 1):
            n = min(low + stride, dim) if above <= loss_tolerance else max(high - stride, 1)
            stride *= 2
            if low < n < high:
                continue
        n = (low + high) // 2
    value = (low + high) / 2 if boundary is None else boundary
    return Estimate(min(value / dim, 1.0), max(low - 1, 0) / dim, min((high + 1) / dim, 1.0))
