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
    n, stride, boundary = min(max(1, round(start * dim)), dim), max(1, round(FIRST_STRIDE * dim)), None
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
