"""Mean loss of the data, and how much the loss of one batch scatters around it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxlimit.core.checks import NOT_FINITE_CAUSES, check_scalar, require_problem, require_weight_fn
from jaxlimit.core.cuts import Sampled, mixed
from jaxlimit.core.placement import placed
from jaxlimit.core.programs import Program, Traced
from jaxlimit.core.sums import batch_weight, sum_of_weights
from jaxlimit.core.trees import PyTree, frozen, thawed
from jaxlimit.curvature.small_batches import LEAST_LOSS
from jaxlimit.curvature.value_checks import ValueCheck


@partial(jax.tree_util.register_dataclass, data_fields=["mean", "batch_std"], meta_fields=["num_examples"])
@dataclass(frozen=True)
class LossStatistics:
    """Mean loss of the data, and how much the loss of one batch scatters around it.

    Attributes:
        mean: mean loss over all examples.
        batch_std: population standard deviation of the batches' mean losses, each batch counted once, or with
            `weight_fn` as much as that says: the paper's code takes it as loss tolerance, with 128 examples a
            batch in a fixed order.
        num_examples: number of examples.
    """

    mean: float
    batch_std: float
    num_examples: int


def loss_statistics(
    loss_fn: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    batches: Iterable[PyTree],
    *,
    weight_fn: Callable[[PyTree], jax.Array] | None = None,
) -> LossStatistics:
    """Weighted mean of the loss and standard deviation of the batch means.

    Cost: the loss of all data, of data in memory twice: the same examples must have the same mean loss in
    other batches. Losses may be of any precision; their sums are float64.

    Args:
        loss_fn: `loss_fn(params, batch) -> scalar`, mean over the batch's examples, or over what `weight_fn`
            counts.
        params: pytree of parameters.
        batches: `Batches`, a list of batches or any re-iterable of batches.
        weight_fn: how much a batch counts, as for `hessian`.

    Raises:
        ValueError: no batches, a loss that is not finite, or not a mean; unusable weights.

    Examples:
        >>> from jaxlimit import batched
        >>> batches = batched(np.array([1.0, 2.0, 3.0, 6.0, 5.0]), batch_size=2)
        >>> statistics = loss_statistics(lambda scale, x: (scale * x).mean(), 1.0, batches)
        >>> print(f"{statistics.mean:.2f} {statistics.batch_std:.2f}")
        3.40 1.55
    """
    require_problem("loss_statistics(loss_fn, params, batches)", params, loss_fn=loss_fn)
    require_weight_fn(weight_fn)
    groups, params = placed(loss_fn, batches, params), frozen(params)
    losses_of = Program(partial(batch_losses, Traced(loss_fn), weight_fn))
    passed = Sampled(groups)
    values, weights = _losses(losses_of, params, passed)
    counted = weights > 0
    usable = np.isfinite(values) | ~counted
    if not np.all(usable):
        bad = int(np.argmin(usable))
        raise ValueError(f"the loss is not finite in batch {bad}. {NOT_FINITE_CAUSES}")
    mean = _mean(values, weights)
    check = ValueCheck(loss_fn, weight_fn, "loss_fn")
    check.few(params, passed.batches)
    if isinstance(groups, list):
        one = mean
        if check.is_coarse(params, groups[0]):
            losses_of = Program(partial(batch_losses, check.metrics_fn, weight_fn))
            one = _mean(*_losses(losses_of, params, groups))
        check.all(params, groups[0], one, _mean(*_losses(losses_of, params, mixed(groups))), LEAST_LOSS)
    # The paper counts every batch once.
    spread = values - np.mean(values) if weight_fn is None else values[counted] - mean
    variance = np.average(spread**2, weights=None if weight_fn is None else weights[counted])
    return LossStatistics(mean, float(np.sqrt(variance)), passed.num_examples)


def _losses(
    losses_of: Program, params: PyTree, groups: Iterable[PyTree]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean losses of all batches, and how much each counts."""
    found = [losses_of(params, group) for group in groups]
    if not found:
        raise ValueError("batches hold no examples.")
    losses, weights = ([np.asarray(x, np.float64) for x in side] for side in zip(*found, strict=True))
    sum_of_weights(weights)
    return np.concatenate(losses), np.concatenate(weights)


def _mean(values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    return float(np.sum(np.where(weights > 0, values * weights, 0)) / np.sum(weights))


def batch_losses(
    loss_fn: Callable, weight_fn: Callable | None, params: PyTree, group: PyTree
) -> tuple[jax.Array, jax.Array]:
    """Mean loss of each of several stacked batches, and how much it counts."""

    def loss(batch: PyTree) -> tuple[jax.Array, jax.Array]:
        value = loss_fn(thawed(params), batch)
        check_scalar(value)
        return value, jnp.asarray(batch_weight(weight_fn, batch), jnp.float32)

    return jax.lax.map(loss, group)
