"""Mean loss of the data, and how much the loss of one batch scatters around it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

from jaxlimit.core.batches import check_scalar, grouped
from jaxlimit.core.checks import NOT_FINITE_CAUSES, require_problem
from jaxlimit.core.programs import Program, Traced
from jaxlimit.core.trees import PyTree, frozen, thawed


@partial(jax.tree_util.register_dataclass, data_fields=["mean", "batch_std"], meta_fields=["num_examples"])
@dataclass(frozen=True)
class LossStatistics:
    """Mean loss of the data, and how much the loss of one batch scatters around it.

    Attributes:
        mean: mean loss over all examples.
        batch_std: population standard deviation of the batches' mean losses, each batch counted once:
            the paper's code takes it as loss tolerance, with 128 examples a batch in a fixed order.
        num_examples: number of examples.
    """

    mean: float
    batch_std: float
    num_examples: int


def loss_statistics(
    loss_fn: Callable[[PyTree, PyTree], jax.Array], params: PyTree, batches: Iterable[PyTree]
) -> LossStatistics:
    """Example-weighted mean of the loss and standard deviation of the batch means, in one pass.

    Args:
        loss_fn: `loss_fn(params, batch) -> scalar`, mean over the batch's examples.
        params: pytree of parameters.
        batches: `Batches`, a list of batches or any re-iterable of batches.

    Raises:
        ValueError: no batches, or a loss that is not finite.

    Examples:
        >>> from jaxlimit import batched
        >>> batches = batched(np.array([1.0, 2.0, 3.0, 6.0, 5.0]), batch_size=2)
        >>> statistics = loss_statistics(lambda scale, x: (scale * x).mean(), 1.0, batches)
        >>> print(f"{statistics.mean:.2f} {statistics.batch_std:.2f}")
        3.40 1.55
    """
    require_problem("loss_statistics(loss_fn, params, batches)", params, loss_fn=loss_fn)
    params, losses, sizes = frozen(params), [], []
    losses_of = Program(partial(batch_losses, Traced(loss_fn)))
    for group in grouped(batches):
        losses.append(np.asarray(losses_of(params, group), np.float64))
        sizes += [jax.tree.leaves(group)[0].shape[1]] * len(losses[-1])
    if not losses:
        raise ValueError("batches hold no examples.")
    values = np.concatenate(losses)
    if not np.all(np.isfinite(values)):
        bad = int(np.argmin(np.isfinite(values)))
        raise ValueError(f"the loss is not finite in batch {bad}. {NOT_FINITE_CAUSES}")
    return LossStatistics(float(np.average(values, weights=sizes)), float(np.std(values)), int(sum(sizes)))


def batch_losses(loss_fn: Callable, params: PyTree, group: PyTree) -> jax.Array:
    """Mean loss of each of several stacked batches."""

    def loss(batch: PyTree) -> jax.Array:
        value = loss_fn(thawed(params), batch)
        check_scalar(value)
        return value

    return jax.lax.map(loss, group)
