r"""The cone limit: delta(a) / D = s with the exact cone's ridge, a c^T H (H + a)^{-1} c = 2 eps.

The ridge at one s needs the spectral measure seen from c(s), which is to be had at a few s only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxlimit.geometry.dimensions import LOG_INFINITE, cone_ridge
from jaxlimit.limits.budget import BudgetSpent
from jaxlimit.limits.estimate import Estimate
from jaxlimit.limits.problem import Problem
from jaxlimit.limits.width import Ridge, dimension_root
from jaxlimit.spectrum.bracket import Bracketed, EffectiveDimension, SpectralBracket

# Where the cone is looked at first, and at least then, as shares of the way from 1 down to the width limit.
FIRST_LOOKS = (0.35, 0.8)
# Where log rho changes by more beside a look, its slope does not tell by how much.
STEEP = 0.2
# d^T F d over mean(diag F) d^T d is .45 to 4.2 on digits, with and without an L1 term, for both matrices
# (benchmarks/products_spent.py): weights that are about to go matter more than the mean weight.
MOST = 6.0


@dataclass(frozen=True)
class ConePoint:
    """The cone's ridge at one sparsity, in units of the width formula's: rho = a R^2 / (2 eps) >= 1.

    Attributes:
        num_removed: n removals.
        log_rho: log rho. Its lower bound belongs to that of the dimension, and so on.
    """

    num_removed: int
    log_rho: Bracketed[float]


def cone_point(removed: SpectralBracket, problem: Problem, num_removed: int) -> ConePoint:
    """rho(s) from a bracket of the spectral measure seen from c(s)."""
    base, radius = problem.ridge(num_removed), problem.radius(num_removed)

    def log_rho(delta: EffectiveDimension) -> float:
        ridge = cone_ridge(delta.rank, radius, problem.loss_tolerance)
        return float(min(np.log(ridge / base), LOG_INFINITE))

    return ConePoint(num_removed, removed.dimension.map(log_rho))


class Look(NamedTuple):
    """What is seen of the cone after n removals.

    Attributes:
        removed: bracket of the spectral measure seen from c.
        point: the cone's ridge there.
        beside: its ridge to either side, where the look tells it: a root between these needs no further look.
    """

    removed: SpectralBracket
    point: ConePoint
    beside: Sequence[ConePoint] = ()


def look_at(removed: SpectralBracket, problem: Problem, num_removed: int) -> Look:
    """A look that tells its own point alone."""
    return Look(removed, cone_point(removed, problem, num_removed))


class Slope(NamedTuple):
    """What a look tells of its neighbours. F = |H| (|H| + a)^{-1} at the ridge a that it found, G = c^T F c.

    Attributes:
        image: (D,) F c, in the order of removal.
        mean: tr F / D.
        stiffening: k, where d log G / d log a = -k at the same c.
    """

    image: NDArray[np.float64]
    mean: float
    stiffening: float


def points_beside(point: ConePoint, slope: Slope, problem: Problem, within: int) -> list[ConePoint]:
    r"""The cone's ridge `within` removals to either side of a look, to second order and without a product.

    Other removals change c by d, and so G by 2 d^T F c + d^T F d. Of the last term the diagonal of F is
    taken, with its mean; the bounds are 0 and `MOST` times that. The equation a G = 2 eps then moves log a by
    -log(1 + dG / G) / (1 - k). Points at which log rho would differ by STEEP or more are left out.
    """
    n, counts = point.num_removed, problem.counts
    base, weights = problem.ridge(n), problem.order.sort(problem.order.like).astype(np.float64)
    total = 2 * problem.loss_tolerance / (base * np.exp(point.log_rho.value))
    beside = []
    for other in {max(n - within, problem.least_removed), min(n + within, problem.order.num_removals)} - {n}:
        span, sign = slice(*sorted((counts[n], counts[other]))), np.sign(other - n)
        w, moved = weights[span], np.log(base / problem.ridge(other))
        terms = [2 * sign * w @ slope.image[span] + times * slope.mean * w @ w for times in (MOST, 1, 0)]
        changes = np.maximum(np.array(terms) / total, -STEEP)
        by = Bracketed(*(moved - np.log1p(changes) / (1 - slope.stiffening)).tolist())
        if abs(by.value) < STEEP:
            beside.append(ConePoint(other, point.log_rho.join(_shifted, by)))
    return beside


def _shifted(log_rho: float, by: float) -> float:
    return float(np.clip(log_rho + by, 0.0, LOG_INFINITE))


def cone_root(
    bracket: SpectralBracket, problem: Problem, points: Sequence[ConePoint]
) -> tuple[Estimate, float]:
    """delta_cone(s) / D = s, with 1 / rho(s) linear between the points, and before them for as far again.

    The second value is the root to less than a weight.

    rho varies slowly with s (it is 1 where the curvature along c is large), so a few points near the root
    suffice; R(s) itself is exact. Where c^T |H| c falls to 2 eps, rho grows without bound, but 1 / rho goes
    to 0 like (2 eps / R^2) (c^T |H| c - 2 eps) / c^T H^2 c.
    """
    points, counts = sorted(points, key=lambda point: point.num_removed), problem.counts
    at, known = [counts[point.num_removed] for point in points], [point.log_rho for point in points]
    # Before the first point the bounds are as far apart as there.
    rise = known[0].value - known[-1].value
    before = known[0].map(lambda x: _shifted(x, rise))
    log_rhos: Bracketed[tuple[float, ...]] = Bracketed.known(())
    for log_rho in (before, *known):
        log_rhos = log_rhos.join(lambda known, x: (*known, x), log_rho)

    def ridge(log_rho: tuple[float, ...]) -> Ridge:
        shares = np.exp([-x for x in log_rho])
        return lambda n: problem.ridge(n) / float(np.interp(counts[n], [2 * at[0] - at[-1], *at], shares))

    return dimension_root(bracket, log_rhos.map(ridge), problem)


def cone_limit(
    bracket: SpectralBracket,
    look: Callable[[int], Look],
    problem: Problem,
    start: float,
    tolerance: float,
) -> tuple[Estimate, dict[int, SpectralBracket]]:
    """The exact cone's limit: rho at two sparsities, then at each new root until a look tells it or it rests.

    A root that creeps on is overtaken by twice its last move, so that it comes to lie between two points:
    else steps of single weights would follow where rho bends sharply.

    Args:
        bracket: of the spectral measure.
        look: at the cone after n removals.
        problem: order of the weights, and eps.
        start: the width limit, below which the cone limit cannot lie.
        tolerance: the iteration ends when a look at the root moves it by less than a tenth of this; with 0
            when its n and both neighbours have been looked at.

    Returns:
        The limit, and the brackets seen from c by their n. Where `look` ran out of products before the
        root rested, the limit is as far as it was found, widened by the larger of its last two moves.

    Raises:
        BudgetSpent: by `look`, at the first sparsities.
    """
    least, most, dim = problem.least_removed, problem.order.num_removals, problem.dim

    def removals(sparsity: float) -> int:
        return min(max(least, problem.order.within(round(sparsity * dim))), most)

    brackets: dict[int, SpectralBracket] = {}
    points: dict[int, ConePoint] = {}

    def looked(n: int) -> tuple[Estimate, float, bool]:
        """The root, to less than a weight too, and whether it lies where the look tells its ridge."""
        brackets[n], point, beside = look(n)
        seen = {x.num_removed: x for x in (point, *beside)}
        for other in [x for x in points if min(seen) <= x <= max(seen)]:
            del points[other]  # known better now
        points.update(seen)
        estimate, root = cone_root(bracket, problem, list(points.values()))
        return estimate, root, min(seen) < removals(root) < max(seen)

    first, second = (removals(1 - (1 - start) * part) for part in FIRST_LOOKS)
    estimate, root, told = looked(first)
    moves, rests = [root - start], False
    offsets = [0] if tolerance else [0, -1, 1]
    while not tolerance or not (told or rests):
        wanted = [n for x in offsets if least <= (n := removals(root) + x) <= most and n not in brackets]
        if not wanted:
            break
        n = wanted[0]
        if len(moves) == 1 and n < second and second not in brackets:
            n = second
        elif len(moves) > 2 and moves[-1] * moves[-2] > moves[-2] ** 2 / 2:  # it creeps
            ahead = removals(root + 2 * moves[-1])
            n = n if ahead in brackets else ahead
        try:
            previous, (estimate, root, told) = root, looked(n)
        except BudgetSpent:
            return estimate.widened(max(map(abs, moves[-2:]))), brackets
        moves.append(root - previous)
        rests = n == wanted[0] and abs(moves[-1]) < 0.1 * tolerance
    return estimate, brackets
