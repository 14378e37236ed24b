"""What the loss itself does where the limits lie: the rise at the pruned weights, nothing readjusted."""

from collections.abc import Mapping

from jaxlimit.curvature.operator import Curvature
from jaxlimit.limits.conjugate_gradients import kept
from jaxlimit.limits.estimate import Estimate
from jaxlimit.limits.problem import Problem

# The name of the network without any prunable weight, beside those of the limits.
EVERYTHING = "everything"


def true_rises(
    curvature: Curvature, problem: Problem, limits: Mapping[str, Estimate | None]
) -> dict[str, float]:
    """L(w - c) - L(w) at each limit, and with every weight removed, in units of the loss.

    Cost: one pass over the data for each, without a gradient.

    Args:
        curvature: whose loss it is.
        problem: order of the weights.
        limits: by name; those that are None are left out.
    """
    within, dim = problem.order.within, problem.dim
    counts = {name: within(round(x.value * dim)) for name, x in limits.items() if x is not None}
    counts[EVERYTHING] = problem.order.num_removals
    rises = {n: _rise(curvature, problem, n) for n in sorted(set(counts.values()))}
    return {name: rises[n] for name, n in counts.items()}


def _rise(curvature: Curvature, problem: Problem, num_removed: int) -> float:
    mask = problem.order.mask(num_removed)
    return curvature.mean_loss(kept(mask, curvature.weights)) - curvature.loss
