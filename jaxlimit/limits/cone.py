r"""The cone limit: delta(a) / D = s with the exact cone's ridge, a c^T H (H + a)^{-1} c = 2 eps.

The ridge at one s needs the spectral measure seen from c(s), which is to be had at a few s only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxlimit.geometry.dimensions import LOG_INFINITE, cone_ridge
from jaxlimit.limits.budget import BudgetSpent
from jaxlimit.limits.estimate import Estimate
from jaxlimit.limits.problem import Problem
from jaxlimit.limits.width import Ridge, dimension_root
from jaxlimit.spectrum.bracket import Bracketed, EffectiveDimension, SpectralBracket

# Where the cone is looked at first, as shares of the way from 1 down to the width limit.
FIRST_LOOKS = (0.8, 0.35)


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


def cone_root(
    bracket: SpectralBracket, problem: Problem, points: Sequence[ConePoint]
) -> tuple[Estimate, float]:
    """delta_cone(s) / D = s, with 1 / rho(s) interpolated linearly between the points.

    The second value is the root to less than a weight.

    rho varies slowly with s (it is 1 where the curvature along c is large), so a few points near the root
    suffice; R(s) itself is exact. Where c^T |H| c falls to 2 eps, rho grows without bound, but 1 / rho goes
    to 0 like (2 eps / R^2) (c^T |H| c - 2 eps) / c^T H^2 c.
    """
    points = sorted(points, key=lambda point: point.num_removed)
    counts = problem.counts
    at = [counts[point.num_removed] for point in points]
    log_rhos: Bracketed[tuple[float, ...]] = Bracketed.known(())
    for point in points:
        log_rhos = log_rhos.join(lambda known, x: (*known, x), point.log_rho)

    def ridge(log_rho: tuple[float, ...]) -> Ridge:
        shares = np.exp([-x for x in log_rho])
        return lambda n: problem.ridge(n) / float(np.interp(counts[n], at, shares))

    return dimension_root(bracket, log_rhos.map(ridge), problem)


def cone_limit(
    bracket: SpectralBracket,
    removed: Callable[[list[int]], list[SpectralBracket]],
    problem: Problem,
    start: float,
    tolerance: float,
) -> tuple[Estimate, dict[int, SpectralBracket]]:
    """The exact cone's limit: rho at a few sparsities, then at each new root until the root rests.

    A root that creeps on is overtaken by twice its last move, so that it comes to lie between two points:
    else steps of single weights would follow where rho bends sharply.

    Args:
        bracket: of the spectral measure.
        removed: brackets of the spectral measure seen from c after n removals, for several n at once.
        problem: order of the weights, and eps.
        start: the width limit, below which the cone limit cannot lie.
        tolerance: the iteration ends when a look at the root moves it by less than a tenth of this; with 0
            when its n and both neighbours have been looked at.

    Returns:
        The limit, and the brackets seen from c by their n. Where `removed` ran out of products before the
        root rested, the limit is as far as it was found, widened by the larger of its last two moves.

    Raises:
        BudgetSpent: by `removed`, at the first sparsities.
    """
    least, most, dim = problem.least_removed, problem.order.num_removals, problem.dim

    def removals(sparsity: float) -> int:
        return min(max(least, problem.order.within(round(sparsity * dim))), most)

    brackets: dict[int, SpectralBracket] = {}
    points: list[ConePoint] = []

    def look(counts: list[int]) -> tuple[Estimate, float]:
        brackets.update(zip(counts, removed(counts), strict=True))
        points.extend(cone_point(brackets[n], problem, n) for n in counts)
        return cone_root(bracket, problem, points)

    estimate, root = look(sorted({removals(1 - (1 - start) * part) for part in FIRST_LOOKS}))
    moves = [root - start]
    beside = [0] if tolerance else [0, -1, 1]
    while wanted := [n for x in beside if least <= (n := removals(root) + x) <= most and n not in brackets]:
        creeps = len(moves) > 2 and moves[-1] * moves[-2] > moves[-2] ** 2 / 2
        ahead = removals(root + 2 * moves[-1]) if creeps else wanted[0]
        n = wanted[0] if ahead in brackets else ahead
        try:
            previous, (estimate, root) = root, look([n])
        except BudgetSpent:
            return estimate.widened(max(map(abs, moves[-2:]))), brackets
        moves.append(root - previous)
        if n == wanted[0] and abs(moves[-1]) < 0.1 * tolerance:
            break
    return estimate, brackets
