"""What a curvature takes for granted of its weights and its data, in which words it is asked for."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlimit.core.batches import first_of, grouped
from jaxlimit.core.checksums import data_changed
from jaxlimit.core.trees import PyTree, combine, frozen, thawed
from jaxlimit.curvature.loss_trace import LossTrace, trace_loss


@contextlib.contextmanager
def order_explained(
    call: str, predict_fn: Callable, loss_fn: Callable, params: PyTree, batches: Iterable[PyTree]
) -> Iterator[None]:
    """A block that works with two functions: of what fails because they are exchanged, that is said.

    Args:
        call: how the function is called that was given them, with its arguments in order.
        predict_fn: `predict_fn(params, batch) -> outputs`.
        loss_fn: `loss_fn(outputs, batch) -> scalar`.
        params: the parameters.
        batches: the batches.

    Raises:
        ValueError: the two make no scalar as they stand, but do in the other order.
    """
    try:
        yield
    except Exception as error:
        orders = (predict_fn, loss_fn), (loss_fn, predict_fn)
        as_given, exchanged = (_makes_a_scalar(*order, params, batches) for order in orders)
        if as_given or not exchanged:
            raise
        raise ValueError(
            "predict_fn and loss_fn look exchanged: the second function of parameters and a batch, then the "
            "first of what it returns and the batch, make a scalar loss, but not so in the order given. Call "
            f"{call}."
        ) from error


def _makes_a_scalar(predict_fn: Callable, loss_fn: Callable, params: PyTree, batches: Iterable) -> bool:
    def loss(params: PyTree, batch: PyTree) -> Any:
        params = thawed(params)
        return loss_fn(predict_fn(params, batch), batch)

    try:
        batch = jax.eval_shape(first_of, next(iter(grouped(batches))))
        found = jax.eval_shape(loss, frozen(params), batch)
    except Exception:  # whatever functions in a foreign place raise
        return False
    return getattr(found, "shape", None) == ()


def require_single_precision(weights: PyTree) -> None:
    """Raises ValueError if a weight has fewer than 32 bits: sums over examples stagnate in bfloat16."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        if jnp.finfo(leaf.dtype).bits < 32:
            raise ValueError(
                f"prunable leaf {jax.tree_util.keystr(path)} has dtype {leaf.dtype}, too coarse for "
                "curvature: cast all parameters, jax.tree.map(lambda x: x.astype(jnp.float32), params)."
            )


def require_precise(
    loss: Callable[[PyTree, PyTree], Any], weights: PyTree, rest: PyTree, group: PyTree
) -> LossTrace:
    """Raises ValueError if the loss computes with fewer than 32 bits what depends on the weights.

    Args:
        loss: of all parameters and a batch.
        weights: the prunable parameters.
        rest: the others.
        group: batches, stacked; only its shapes are looked at.

    Returns:
        What else the trace of the loss says.
    """
    batch = jax.eval_shape(first_of, group)
    trace = trace_loss(lambda weights, batch: loss(combine(weights, rest), batch), weights, batch)
    if trace.coarse:
        numbers = " and ".join(sorted(trace.coarse))
        raise ValueError(
            f"the loss computes in {numbers} on its way from the weights, too coarse for curvature: second "
            "derivatives drown in rounding. Compute in float32: dtype=jnp.float32 in the modules of Flax or "
            "Haiku; no cast of weights or activations in a function. Parameters may stay as they are."
        )
    return trace


def require_same_weight(weight_fn: Any, first: float, second: float) -> None:
    """Raises ValueError if two passes over the data count differently."""
    unit = "examples" if weight_fn is None else "weight of all batches"
    if not np.isclose(first, second, rtol=0 if weight_fn is None else 1e-5, atol=0):
        raise ValueError(data_changed(f"{first:.8g} {unit}", f"{second:.8g}"))


def not_a_mean(what: str, found: str, weight_fn: Any, trace: LossTrace) -> str:
    """What is said where a result depends on how the examples are cut into batches."""
    unit = "the batch's examples" if weight_fn is None else "what weight_fn counts"
    remedy = (
        "padding, masks, class weights, or a mean over tokens (pass weight_fn, how much a batch counts: "
        "weight_fn=lambda batch: jnp.sum(batch['mask']), say)"
        if weight_fn is None
        else "a weight_fn that counts something else than the mean divides by"
    )
    penalty = (
        " It has a term of the weights alone: leave L1 / L2 terms out of the loss." if trace.penalty else ""
    )
    return (
        f"{what} is not a mean over {unit}: {found}. Likely causes: a sum instead of a mean; {remedy}; "
        "broadcasting (N,) against (N, 1); a contrastive loss, which compares the examples of a batch; batch "
        f"norm in train mode (use evaluation mode).{penalty}"
    )
