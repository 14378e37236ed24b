r"""The readjusted limit: the largest s with min_x (c - x)^T H (c - x) / 2 <= eps, x on the kept weights."""

from bisect import bisect_right
from collections.abc import Callable, Sequence

from jaxlimit.limits.budget import BudgetSpent
from jaxlimit.limits.estimate import Estimate
from jaxlimit.limits.problem import group_share

# First step of the walk from the guess, in units of s; the next ones are twice as long each.
FIRST_STRIDE = 0.02


def readjusted_limit(
    minimum: Callable[[int], tuple[float, float]],
    dim: int,
    loss_tolerance: float,
    tolerance: float,
    start: float,
    looked: Callable[[int, int], None] = lambda within, beyond: None,
    counts: Sequence[int] | None = None,
) -> Estimate:
    """Largest s whose best readjusted quadratic loss is at most eps, by bisection over nested supports.

    Args:
        minimum: `minimum(n) -> (lower, upper)`: bounds on min_x (c - x)^T H (c - x) / 2 after n removals,
            which is compared with eps and may stop as soon as eps lies outside them, or for lack of products.
        dim: D, the number of weights.
        loss_tolerance: eps.
        tolerance: width at which the bisection ends; 0 for the exact n.
        start: a first guess of the limit.
        looked: told between which n the limit lies so far.
        counts: (removals + 1,) weights that n removals remove; None: n, single weights go.

    Returns:
        The largest s known to reach eps, with the smallest known not to as its upper bound. Where these are
        farther apart than the tolerance, since products ran out or the bounds cannot tell, their distance is
        its spread.

    Raises:
        BudgetSpent: by `minimum`, at the first n.
    """
    counts = range(dim + 1) if counts is None else counts
    most = len(counts) - 1
    low, high = 0, most + 1  # at low eps is reached; at high, one beyond all removals, it is not
    unknown: list[int] = []  # where the bounds cannot tell
    narrow = max(1, tolerance * dim)

    def is_narrow(begin: int, end: int) -> bool:
        return end - begin <= 1 or _weights(counts, end) - counts[begin] <= narrow

    n = min(max(1, bisect_right(counts, round(start * dim)) - 1), most)
    stride = max(1, round(FIRST_STRIDE * most))
    while True:
        try:
            below, above = minimum(n)
        except BudgetSpent:
            if (low, high, unknown) == (0, most + 1, []):
                raise
            break
        if above <= loss_tolerance:
            low = n
        elif below > loss_tolerance:
            high = n
        else:
            unknown.append(n)
        unknown = [x for x in unknown if low < x < high]
        looked(low, min(high, most))
        first, last = min([*unknown, high]), max([*unknown, low])
        gaps = (low, first), (last, high)  # one and the same where nothing is unknown
        if is_narrow(low, high) or all(is_narrow(*gap) for gap in gaps):
            break
        # First walk from the guess in growing strides, then bisect between the ends found.
        if low == 0 or high == most + 1:
            n = max(first - stride, 1) if low == 0 else min(last + stride, most)
            stride *= 2
            if any(begin < n < end for begin, end in gaps):
                continue
        n = sum(max(gaps, key=lambda gap: gap[1] - gap[0])) // 2
    share = group_share(counts)
    # Of groups the one before `high` is the last that may be within; of single weights the interval is wider.
    last = high - 1 if share is not None else min(high, most)
    lower, upper = counts[low] / dim, counts[last] / dim
    spread = 0.0 if is_narrow(low, high) else upper - lower
    return Estimate.between(lower, lower, upper, dim, spread=spread, group_share=share)


def _weights(counts: Sequence[int], n: int) -> int:
    """Weights that n removals remove; one more than there are for one removal more."""
    return counts[n] if n < len(counts) else counts[-1] + 1
