"""What a curvature takes for granted of its data and its loss, checked before the first product."""

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxlimit.core.batches import batch_length, first_of
from jaxlimit.core.checks import NOT_FINITE_CAUSES
from jaxlimit.core.programs import Program
from jaxlimit.core.sharding import example_sharding, to_host
from jaxlimit.core.trees import PyTree
from jaxlimit.curvature.products import Loss, Product


def require_single_precision(weights: PyTree) -> None:
    """Raises ValueError if a weight has fewer than 32 bits: sums over examples stagnate in bfloat16."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        if jnp.finfo(leaf.dtype).bits < 32:
            raise ValueError(
                f"prunable leaf {jax.tree_util.keystr(path)} has dtype {leaf.dtype}, too coarse for "
                "curvature: cast all parameters, jax.tree.map(lambda x: x.astype(jnp.float32), params)."
            )


def check_data(
    product: Product, weights: PyTree, rest: PyTree, groups: Iterable[PyTree]
) -> tuple[int, float]:
    """Two passes over the data must agree; the loss must be finite and a mean. Returns examples and loss."""
    loss = Loss(product)
    (first, num_first), (second, num_second) = (product.loss_sum(groups, weights, rest) for _ in range(2))
    first, second = float(first) / num_first, float(second) / num_second
    if not np.isfinite(first):
        raise ValueError(f"the mean loss is {first}. {NOT_FINITE_CAUSES}")
    if num_first != num_second:
        raise ValueError(data_changed(f"{num_first} examples", f"{num_second}"))
    if not np.isclose(first, second, rtol=1e-5, atol=1e-8):
        raise ValueError(data_changed(f"a mean loss of {first:.8g}", f"{second:.8g}"))
    _check_mean(loss, weights, rest, next(iter(groups)))
    return num_first, first


def _check_mean(loss: Loss, weights: PyTree, rest: PyTree, group: PyTree) -> None:
    """The loss of a batch is the mean of the losses of its two halves, or it is not a mean."""
    if example_sharding(group, axis=1) is not None:  # halves need not divide over the devices
        group = jax.tree.map(lambda x: to_host(x[:1]), group)
    half = batch_length(jax.eval_shape(first_of, group)) // 2
    if half < 1:
        return

    def losses(weights: PyTree, rest: PyTree, group: PyTree) -> tuple[jax.Array, jax.Array]:
        whole = jax.tree.map(lambda x: x[: 2 * half], first_of(group))
        halves = jax.tree.map(lambda x: x.reshape(2, half, *x.shape[1:]), whole)
        return loss(weights, rest, whole), jax.lax.map(partial(loss, weights, rest), halves)

    whole, halves = Program(losses)(weights, rest, group)
    whole, mean = float(whole), float(np.mean(np.asarray(halves, np.float64)))
    if not np.isclose(whole, mean, rtol=1e-3, atol=1e-5):
        raise ValueError(
            f"loss_fn is not a mean over the batch's examples: {2 * half} of them have loss {whole:.6g}, the "
            f"mean over two halves is {mean:.6g}. Likely causes: a sum instead of a mean, or batch "
            "norm in train mode (use evaluation mode)."
        )


def data_changed(first: str, second: str) -> str:
    """What is said where two passes over the data differ."""
    return (
        f"the data changed between two passes: {first} in the first, {second} in the second. Likely causes: "
        "shuffling, random augmentation, dropout, or batch norm in train mode. Curvature needs the same "
        "function every time: fix the order and use evaluation mode."
    )
