r"""The readjusted limit: the largest s with min_x (c - x)^T H (c - x) / 2 <= eps, x on the kept weights."""

from collections.abc import Callable

from jaxlimit.limits.budget import BudgetSpent
from jaxlimit.limits.estimate import Estimate

# First step of the walk from the guess, in units of s; the next ones are twice as long each.
FIRST_STRIDE = 0.02


def readjusted_limit(
    minimum: Callable[[int], tuple[float, float]],
    dim: int,
    loss_tolerance: float,
    tolerance: float,
    start: float,
    looked: Callable[[int, int], None] = lambda within, beyond: None,
) -> Estimate:
    """Largest s whose best readjusted quadratic loss is at most eps, by bisection over nested supports.

    Args:
        minimum: `minimum(n) -> (lower, upper)`: bounds on min_x (c - x)^T H (c - x) / 2 after n removals,
            which is compared with eps and may stop as soon as eps lies outside them, or for lack of products.
        dim: D.
        loss_tolerance: eps.
        tolerance: width at which the bisection ends; 0 for the exact n.
        start: a first guess of the limit.
        looked: told between which n the limit lies so far.

    Returns:
        The largest s known to reach eps, with the smallest known not to as its upper bound. Where these are
        farther apart than the tolerance, since products ran out or the bounds cannot tell, their distance is
        its spread.

    Raises:
        BudgetSpent: by `minimum`, at the first n.
    """
    low, high = 0, dim + 1  # at low eps is reached; at high, one beyond all weights, it is not
    unknown: list[int] = []  # where the bounds cannot tell
    narrow = max(1, tolerance * dim)
    n, stride = min(max(1, round(start * dim)), dim), max(1, round(FIRST_STRIDE * dim))
    while True:
        try:
            below, above = minimum(n)
        except BudgetSpent:
            if (low, high, unknown) == (0, dim + 1, []):
                raise
            break
        if above <= loss_tolerance:
            low = n
        elif below > loss_tolerance:
            high = n
        else:
            unknown.append(n)
        unknown = [x for x in unknown if low < x < high]
        looked(low, min(high, dim))
        first, last = min([*unknown, high]), max([*unknown, low])
        gaps = (low, first), (last, high)  # one and the same where nothing is unknown
        if high - low <= narrow or max(end - begin for begin, end in gaps) <= narrow:
            break
        # First walk from the guess in growing strides, then bisect between the ends found.
        if low == 0 or high == dim + 1:
            n = max(first - stride, 1) if low == 0 else min(last + stride, dim)
            stride *= 2
            if any(begin < n < end for begin, end in gaps):
                continue
        n = sum(max(gaps, key=lambda gap: gap[1] - gap[0])) // 2
    lower, upper = low / dim, min(high / dim, 1.0)
    spread = upper - lower if high - low > narrow else 0.0
    return Estimate.between(lower, lower, upper, dim, spread=spread)
