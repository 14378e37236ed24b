"""The one-shot limit: the last sparsity up to which the predicted loss of the pruned network is in tolerance.

    q(n) = -g^T c + c^T H c / 2,      c what the first n removals take: the n smallest weights, or groups

is no monotone function of n, and every n costs a product with H. It is interpolated between points, and
where it may cross eps, points are added. The limit is the last n before the first crossing.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxlimit.limits.budget import Budget, BudgetSpent
from jaxlimit.limits.estimate import Estimate
from jaxlimit.limits.problem import Problem, group_share

# Intervals of the first grid, and pieces of an interval that is looked at again.
INTERVALS, PIECES = 32, 8


class PathPoint(NamedTuple):
    """The predicted loss after n removals, and its slope along every weight in order of removal.

    Attributes:
        num_removed: n.
        loss: q(n) = -g^T c + c^T H c / 2.
        slope: (H c - g)_i w_i: what removing weight i adds, to first order, summed over the weights of each
            removal; of all of them or of a span.
        first: the removal at which the span begins.
    """

    num_removed: int
    loss: float
    slope: NDArray[np.float64]
    first: int = 0

    def within(self, start: int, end: int) -> "PathPoint":
        """The point with the slopes of these removals only, in memory of their own."""
        span = self.slope[start - self.first : end - self.first].copy()
        return self._replace(slope=span, first=start)


def predicted_path(problem: Problem, budget: Budget) -> tuple[Callable[[int], PathPoint], PathPoint]:
    """The point of the path at n, for one product, and that at n = 0, which costs none.

    The function raises `BudgetSpent` where no product is left.
    """
    order = problem.order
    weights, gradient = order.sort(order.like), order.sort(budget.curvature.gradient)

    def path(n: int) -> PathPoint:
        if budget.left < 1:
            raise BudgetSpent
        hc = order.sort(budget.matvec(order.removed_vector(n)))
        m = problem.counts[n]
        loss = float(weights[:m] @ (hc / 2 - gradient)[:m])
        return PathPoint(n, loss, order.per_removal((hc - gradient) * weights))

    return path, PathPoint(0, 0.0, order.per_removal(-gradient * weights))


def loss_between(left: PathPoint, right: PathPoint) -> tuple[NDArray[np.float64], float]:
    r"""The predicted loss at every n between two points, from their slopes.

    With d the weights removed since `left` and e those still to be removed until `right`,

        q(n) = q(left) + slope_left . d + x = q(right) - slope_right . e + y

    and x = d^T H d / 2, y = e^T H e / 2.

    x - y is known from these, and x + y lies between Q (weights that do not interact) and
    (u^2 + (1-u)^2) Q (weights that act as one), where Q is x at `right` and u the fraction removed; the
    middle is taken. The largest |x - y| serves as uncertainty: an estimate, no bound (on digits networks
    the error stayed below it in every interval).

    Returns:
        losses: q(n) for n = left + 1 ... right; and the uncertainty.
    """
    span = left.num_removed, right.num_removed
    from_left = left.loss + np.cumsum(left.within(*span).slope)
    slope = right.within(*span).slope
    from_right = right.loss - np.sum(slope) + np.cumsum(slope)
    remainder = right.loss - from_left[-1]
    part = np.arange(1, len(from_left) + 1) / len(from_left)
    both = remainder * (1 + part**2 + (1 - part) ** 2) / 2
    difference = from_right - from_left
    return from_left + (both + difference) / 2, float(np.max(np.abs(difference)))


def one_shot_limit(
    path: Callable[[int], PathPoint],
    start: PathPoint,
    loss_tolerance: float,
    tolerance: float,
    looked: Callable[[int, int], None] = lambda within, beyond: None,
    counts: Sequence[int] | None = None,
) -> Estimate:
    """The last n before the predicted loss of the pruned network first exceeds eps.

    The loss is known at a grid of n up to its first point above eps, and between by `loss_between`. The
    intervals in which it may cross are divided again, the first one first, until one that does is no wider
    than the tolerance. The n that is returned was itself evaluated.

    Args:
        path: the point at n (one product with H).
        start: the point n = 0.
        loss_tolerance: eps.
        tolerance: width at which an interval is not divided further, in units of s.
        looked: told between which n the limit lies so far.
        counts: (removals + 1,) weights that n removals remove; None: n, single weights go.

    Returns:
        The limit, between the ends of the last interval; 1 if there is no crossing. Where `path` ran out of
        products, it lies between the first interval in doubt and a point above eps: these are its bounds
        then, and their distance its spread.

    Raises:
        BudgetSpent: by `path`, before a crossing was known.
        FloatingPointError: a predicted loss is not finite.
    """
    most = len(start.slope)
    counts = range(most + 1) if counts is None else counts
    narrow = max(1, int(tolerance * counts[-1]))

    def is_narrow(left: int, right: int) -> bool:
        return right - left <= 1 or counts[right] - counts[left] <= narrow

    def search(left: PathPoint, grid: Iterable[PathPoint]) -> Estimate | None:
        doubtful: list[Interval] = []
        for right in grid:
            losses, uncertainty = loss_between(left, right)
            losses[-1] = right.loss  # to the last bit
            span = left.num_removed, right.num_removed
            if np.max(losses) + (0.0 if is_narrow(*span) else uncertainty) > loss_tolerance:
                doubtful.append(Interval(left.within(*span), right.within(*span), losses))
            left = right
            if right.loss > loss_tolerance:
                break
        for left, right, losses in doubtful:
            looked(left.num_removed, doubtful[-1].right.num_removed)
            if is_narrow(left.num_removed, right.num_removed):
                ends = _confirmed(path, left.num_removed, right.num_removed, losses, loss_tolerance)
                return _estimate(*ends, counts)
            between = _grid(left.num_removed, right.num_removed, PIECES)[:-1]
            try:
                found = search(left, chain(_points(path, between), [right]))
            except BudgetSpent:
                if doubtful[-1].right.loss <= loss_tolerance:
                    raise  # they need not cross at all
                ends = left.num_removed, left.num_removed, doubtful[-1].right.num_removed
                return _estimate(*ends, counts, resolved=False)
            if found is not None:
                return found
        return None

    whole = search(start, _points(path, _grid(0, most, INTERVALS)))
    return whole or _estimate(most, most, most, counts)


class Interval(NamedTuple):
    """Two points of the path, and the predicted loss at n = left + 1 ... right."""

    left: PathPoint
    right: PathPoint
    losses: NDArray[np.float64]


# Products that may confirm the last n within the tolerance; then the left end of its interval, which was
# evaluated, is taken.
CONFIRMATIONS = 3


def _confirmed(
    path: Callable[[int], PathPoint],
    left: int,
    right: int,
    losses: NDArray[np.float64],
    loss_tolerance: float,
) -> tuple[int, int, int]:
    """The last n of an interval before its losses exceed eps, with a product that shows its own not to.

    Between the left end and the first n that is known to be beyond.
    """
    crossed = np.append(losses, np.inf) > loss_tolerance
    last, end = min(left + int(np.argmax(crossed)), right), right
    for _ in range(CONFIRMATIONS):
        if last == left:
            break
        try:
            loss = path(last).loss if last < right else losses[-1]
        except BudgetSpent:
            last = left
            break
        if loss <= loss_tolerance:
            break
        end, last = last, left + (last - left) // 2
    else:
        last = left
    return last, left, end


def _estimate(
    value: int, lower: int, upper: int, counts: Sequence[int], *, resolved: bool = True
) -> Estimate:
    """The limit of these removals; bounds that are left so far apart are its spread.

    The upper one is beyond the tolerance. Of groups the one before it is the last that may be within; of
    single weights the interval is wider.
    """
    dim, share = counts[-1], group_share(counts)
    upper = upper if share is None else max(value, upper - 1)
    first, last = counts[lower] / dim, counts[upper] / dim
    spread = 0.0 if resolved else last - first
    return Estimate.between(counts[value] / dim, first, last, dim, spread=spread, group_share=share)


def _points(path: Callable[[int], PathPoint], counts: NDArray[np.int64]) -> Iterator[PathPoint]:
    for count in counts.tolist():
        point = path(count)
        if not np.isfinite(point.loss):
            raise FloatingPointError(f"the predicted loss after {count} removals is not finite.")
        yield point


def _grid(start: int, end: int, pieces: int) -> NDArray[np.int64]:
    """Whole numbers that divide the way from start to end; without start."""
    return np.unique(np.linspace(start, end, pieces + 1).round().astype(np.int64))[1:]
