r"""The four pruning limits as roots of scalar functions of the sparsity s.

| limit      | equation                                        | function of s          |
|------------|-------------------------------------------------|------------------------|
| one_shot   | -g^T c + c^T H c / 2 = eps, first crossing      | not monotone           |
| width      | delta(2 eps / R^2) / D = s                      | left side falls        |
| cone       | delta(a) / D = s, a c^T H (H+a)^{-1} c = 2 eps  | crosses once in practice |
| readjusted | min_x (c - x)^T H (c - x) / 2 = eps             | left side rises        |

with c = c(s) the removed vector, R its norm, x any vector on the kept weights. The solvers here take what
they need as numbers and functions, so that the same code serves a dense eigendecomposition and Lanczos. That
of one_shot is in `jaxlimit.one_shot`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np

from jaxlimit.geometry.dimensions import LOG_INFINITE, cone_ridge, fixed_point, width_ridge
from jaxlimit.geometry.magnitude import MagnitudeOrder
from jaxlimit.spectrum.bracket import Bracketed, EffectiveDimension, SpectralBracket, spread

Ridge = Callable[[int], float]  # after n removals
# From the strongest demand to the weakest.
LIMITS = ("one_shot", "width", "cone", "readjusted")
# Standard errors by which the probe error widens [lower, upper]: 99.7 % if the error were normal.
STANDARD_ERRORS = 3.0


class BudgetSpent(Exception):
    """Not enough products are left for the next step; what was found so far stands."""


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
        lower, upper: of width and cone the certified quadrature bracket, widened by three probe errors and
            by 2/D: the step of R(s) to either side, where rules (floor or ceiling, last within or first
            beyond) differ. Of one_shot and readjusted from Lanczos, where the search ended: its points were
            judged by estimates (`one_shot.loss_between`, the lower bound of `readjust`).
        probe_error: standard error due to the finite number of probes (a bound; 0 if no probe is used).
        spread: how far it is from resolved (`SpectralBracket.spread`): half the bracket of a semidefinite
            matrix, which no further Lanczos step leaves; how far the value moved of late for an indefinite
            one, which bounds nothing. Of one_shot and readjusted, the interval in which they were left for
            lack of products; a cone left so is wider by its last moves, in spread, lower and upper.
    """

    value: float
    lower: float
    upper: float
    probe_error: float = 0.0
    spread: float = 0.0

    @classmethod
    def between(
        cls, value: float, lower: float, upper: float, dim: int, probe_error: float = 0.0, spread: float = 0.0
    ) -> "Estimate":
        """From a bracket of the root, which is widened by 2/D, kept around the value and cut to [0, 1]."""
        lower, upper = min(lower, value) - 2 / dim, max(upper, value) + 2 / dim
        return cls(value, max(lower, 0.0), min(upper, 1.0), probe_error, spread)

    def widened(self, by: float) -> "Estimate":
        """The same value, less sure by so much to either side."""
        lower, upper = max(self.lower - by, 0.0), min(self.upper + by, 1.0)
        return replace(self, lower=lower, upper=upper, spread=self.spread + by)

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.lower:.4f}, {self.upper:.4f}]"


def dimension_root(
    bracket: SpectralBracket,
    order: MagnitudeOrder,
    ridge: Bracketed[Ridge],
) -> Estimate:
    """Root of delta(a(s)) / D = s, with its bracket, probe error and spread.

    Args:
        bracket: of the spectral measure.
        order: of the weights.
        ridge: n -> a, the ridge after n removals.
    """
    delta = bracket.dimension

    def root(delta: EffectiveDimension, ridge: Ridge, standard_errors: float = 0.0) -> float:
        def dimension(n: int) -> float:
            a = ridge(n)
            return delta(a) + standard_errors * bracket.probe_error(a)

        return fixed_point(dimension, order.dim)

    roots = delta.join(root, ridge)
    probe_error = (root(delta.value, ridge.value, 1) - root(delta.value, ridge.value, -1)) / 2
    lower = root(delta.lower, ridge.lower, -STANDARD_ERRORS)
    upper = root(delta.upper, ridge.upper, STANDARD_ERRORS)
    return Estimate.between(roots.value, lower, upper, order.dim, probe_error, spread(roots))


def width_limit(bracket: SpectralBracket, order: MagnitudeOrder, loss_tolerance: float) -> Estimate:
    """The paper's limit: delta_width(s) / D = s."""
    ridge = Bracketed.known(lambda n: width_ridge(order.radius(n), loss_tolerance))
    return dimension_root(bracket, order, ridge)


@dataclass(frozen=True)
class ConePoint:
    """The cone's ridge at one sparsity, in units of the width formula's: rho = a R^2 / (2 eps) >= 1.

    Attributes:
        num_removed: n = floor(s D).
        log_rho: log rho. Its lower bound belongs to that of the dimension, and so on.
    """

    num_removed: int
    log_rho: Bracketed[float]


def cone_point(num_removed: int, removed: SpectralBracket, radius: float, loss_tolerance: float) -> ConePoint:
    """rho(s) from a bracket of the spectral measure seen from c(s)."""
    base = width_ridge(radius, loss_tolerance)

    def log_rho(delta: EffectiveDimension) -> float:
        ridge = cone_ridge(delta.rank, radius, loss_tolerance)
        return float(min(np.log(ridge / base), LOG_INFINITE))

    return ConePoint(num_removed, removed.dimension.map(log_rho))


def cone_root(
    bracket: SpectralBracket, order: MagnitudeOrder, points: Sequence[ConePoint], loss_tolerance: float
) -> Estimate:
    """delta_cone(s) / D = s, with 1 / rho(s) interpolated linearly between the points.

    rho varies slowly with s (it is 1 where the curvature along c is large), so a few points near the root
    suffice; R(s) itself is exact. Where c^T |H| c falls to 2 eps, rho grows without bound, but 1 / rho goes
    to 0 like (2 eps / R^2) (c^T |H| c - 2 eps) / c^T H^2 c.
    """
    points = sorted(points, key=lambda point: point.num_removed)
    at = [point.num_removed for point in points]
    log_rhos: Bracketed[tuple[float, ...]] = Bracketed.known(())
    for point in points:
        log_rhos = log_rhos.join(lambda known, x: (*known, x), point.log_rho)

    def ridge(log_rho: tuple[float, ...]) -> Ridge:
        shares = np.exp([-x for x in log_rho])
        return lambda n: width_ridge(order.radius(n), loss_tolerance) / float(np.interp(n, at, shares))

    return dimension_root(bracket, order, log_rhos.map(ridge))


def cone_limit(
    bracket: SpectralBracket,
    order: MagnitudeOrder,
    removed: Callable[[list[int]], list[SpectralBracket]],
    loss_tolerance: float,
    start: float,
    tolerance: float,
) -> Estimate:
    """The exact cone's limit: rho at a few sparsities, then at each new root until the root rests.

    A root that creeps on is overtaken by twice its last move, so that it comes to lie between two points:
    else steps of single weights would follow where rho bends sharply.

    Args:
        bracket: of the spectral measure.
        order: of the weights.
        removed: brackets of the spectral measure seen from c after n removals, for several n at once.
        loss_tolerance: eps.
        start: the width limit, below which the cone limit cannot lie.
        tolerance: the iteration ends when a look at the root moves it by less than a tenth of this; with 0
            when its n and both neighbours have been looked at.

    Returns:
        The limit; where `removed` ran out of products before the root rested, as far as it was found, widened
        by the larger of its last two moves.

    Raises:
        BudgetSpent: by `removed`, at the first sparsities.
    """

    def evaluate(counts: list[int]) -> list[ConePoint]:
        return [
            cone_point(n, measure, order.radius(n), loss_tolerance)
            for n, measure in zip(counts, removed(counts), strict=True)
        ]

    least = order.num_zeros + 1

    def count(sparsity: float) -> int:
        return min(max(least, round(sparsity * order.dim)), order.dim)

    points = evaluate(sorted({count(1 - (1 - start) * part) for part in (0.8, 0.35)}))
    estimate = cone_root(bracket, order, points, loss_tolerance)
    moves = [estimate.value - start]
    beside = [0.0] if tolerance else [0.0, -1 / order.dim, 1 / order.dim]
    known = {point.num_removed for point in points}
    while wanted := [n for n in (count(estimate.value + x) for x in beside) if n not in known]:
        creeps = len(moves) > 2 and moves[-1] * moves[-2] > moves[-2] ** 2 / 2
        ahead = count(estimate.value + 2 * moves[-1]) if creeps else wanted[0]
        n = wanted[0] if ahead in known else ahead
        try:
            points += evaluate([n])
        except BudgetSpent:
            return estimate.widened(max(map(abs, moves[-2:])))
        known.add(n)
        previous, estimate = estimate, cone_root(bracket, order, points, loss_tolerance)
        moves.append(estimate.value - previous.value)
        if n == wanted[0] and abs(moves[-1]) < 0.1 * tolerance:
            break
    return estimate


def readjusted_limit(
    minimum: Callable[[int], tuple[float, float]],
    dim: int,
    loss_tolerance: float,
    tolerance: float,
    start: float,
) -> Estimate:
    """Largest s whose best readjusted quadratic loss is at most eps, by bisection over nested supports.

    Args:
        minimum: `minimum(n) -> (lower, upper)`: bounds on min_x (c - x)^T H (c - x) / 2 after n removals,
            which is compared with eps and may stop as soon as eps lies outside them, or for lack of products.
        dim: D.
        loss_tolerance: eps.
        tolerance: width at which the bisection ends; 0 for the exact n.
        start: a first guess of the limit.

    Returns:
        The limit between the largest s known to reach eps and the smallest known not to. Where products ran
        out before the bisection ended, the distance of these two is its spread.

    Raises:
        BudgetSpent: by `minimum`, at the first n.
    """
    low, high = 0, dim + 1  # at low eps is reached; at high, one beyond all weights, it is not
    n, stride, boundary = min(max(1, round(start * dim)), dim), max(1, round(0.02 * dim)), None
    left = 0.0
    while high - low > max(1, tolerance * dim):
        try:
            below, above = minimum(n)
        except BudgetSpent:
            if (low, high) == (0, dim + 1):
                raise
            boundary, left = n, (min(high, dim) - low) / dim
            break
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
    return Estimate.between(min(value / dim, 1.0), low / dim, min(high / dim, 1.0), dim, spread=left)
