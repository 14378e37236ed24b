"""The two curvatures of a mean loss: its Hessian, and its Gauss-Newton matrix."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import jax

from jaxlimit.core.batches import Batches, grouped
from jaxlimit.core.checks import require_count, require_problem, require_weight_fn
from jaxlimit.core.memory import device_memory
from jaxlimit.core.placement import placed_batches, placed_groups
from jaxlimit.core.trees import Prunable, PyTree, is_kernel, partition
from jaxlimit.curvature.data_checks import order_explained, require_single_precision
from jaxlimit.curvature.linearizing import linear_batch_bytes, suitable_batch_size
from jaxlimit.curvature.mean_checks import check_loss, takes
from jaxlimit.curvature.operator import Curvature
from jaxlimit.curvature.products import GaussNewtonProduct, HessianProduct, Loss, Product


def hessian(
    loss_fn: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    batches: Iterable[PyTree],
    *,
    prunable: Prunable = is_kernel,
    precision: str = "highest",
    linear_bytes: int | None = None,
    weight_fn: Callable[[PyTree], jax.Array] | None = None,
) -> Curvature:
    r"""The Hessian of the mean loss on the prunable weights.

    Cost of a product: about two gradients or, linearised, 1.6; memory: one batch's activations twice and one
    vector, and up to `linear_bytes`.

    Args:
        loss_fn: `loss_fn(params, batch) -> scalar`, the mean over the batch's examples, or over what
            `weight_fn` counts.
        params: pytree of parameters, at which the Hessian is taken.
        batches: `batched(...)`, which is cut anew into batches of a size that suits the products; a list of
            batches, or any re-iterable of batches, which are taken as they are.
        prunable: pytree of bools like params, or `fn(path, leaf) -> bool`; default: `is_kernel`.
        precision: of matrix products, as in `jax.default_matmul_precision`. The default "highest" is
            float32: the devices' faster formats (TF32, bfloat16) disturb the smallest eigenvalues.
        linear_bytes: memory in which the linearised batches are kept from the first product on, if they fit
            and are not a stream; 0 linearises in every product. None: a quarter of the device's memory.
        weight_fn: `weight_fn(batch) -> scalar`, how much a batch's mean counts when means are put together:
            its tokens that are no padding, the sum of its class weights. None: its number of examples.

    Raises:
        ValueError: no batches; nothing prunable; weights of fewer than 32 bits, or a loss that computes with
            fewer; non-finite weights or loss; data that changes from one pass to the next; a loss that is not
            a mean over examples, or over what `weight_fn` counts.

    Examples:
        The Hessian of mean(x w)^2 / 2 is the mean of x^2.

        >>> import jax.numpy as jnp
        >>> from jaxlimit import batched
        >>> def loss(w, x): return jnp.mean((x @ w) ** 2) / 2
        >>> curvature = hessian(loss, jnp.ones((1, 1)), batched(jnp.array([[1.0], [2.0], [4.0]]), 2))
        >>> curvature.matvec(jnp.ones((1, 1)))
        Array([[7.]], dtype=float32)
    """
    require_problem("hessian(loss_fn, params, batches)", params, loss_fn=loss_fn)
    product = HessianProduct(loss_fn, precision, weight_fn)
    return _curvature(product, params, batches, prunable, linear_bytes, positive_semidefinite=False)


def gauss_newton(
    predict_fn: Callable[[PyTree, PyTree], PyTree],
    loss_fn: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    batches: Iterable[PyTree],
    *,
    prunable: Prunable = is_kernel,
    precision: str = "highest",
    linear_bytes: int | None = None,
    weight_fn: Callable[[PyTree], jax.Array] | None = None,
) -> Curvature:
    r"""The generalised Gauss-Newton matrix J^T (d^2 loss / d outputs^2) J on the prunable weights.

    Positive semidefinite for every loss that is convex in the outputs, which is not checked.
    Cost of a product: about 1.6 gradients or, linearised, 1.2; memory as for `hessian`.

    Args:
        predict_fn: `predict_fn(params, batch) -> outputs` (logits, say).
        loss_fn: `loss_fn(outputs, batch) -> scalar`, the mean over the batch's examples, convex in outputs.
        params: pytree of parameters.
        batches: `batched(...)`, a list of batches, or any re-iterable of batches, as for `hessian`.
        prunable: pytree of bools like params, or `fn(path, leaf) -> bool`; default: `is_kernel`.
        precision: of matrix products, as for `hessian`.
        linear_bytes: memory for the linearised batches, as for `hessian`.
        weight_fn: how much a batch counts, as for `hessian`.

    Raises:
        ValueError: as for `hessian`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxlimit import batched
        >>> def predict(w, x): return x @ w
        >>> def loss(outputs, x): return jnp.mean(outputs**2) / 2
        >>> curvature = gauss_newton(predict, loss, jnp.ones((1, 1)), batched(jnp.array([[1.0], [3.0]]), 2))
        >>> curvature.matvec(jnp.ones((1, 1)))
        Array([[5.]], dtype=float32)
    """
    call = "gauss_newton(predict_fn, loss_fn, params, batches)"
    require_problem(call, params, predict_fn=predict_fn, loss_fn=loss_fn)
    product = GaussNewtonProduct(predict_fn, loss_fn, precision, weight_fn)
    with order_explained(call, predict_fn, loss_fn, params, batches):
        return _curvature(product, params, batches, prunable, linear_bytes, positive_semidefinite=True)


def _curvature(
    product: Product,
    params: PyTree,
    batches: Iterable[PyTree],
    prunable: Prunable,
    linear_bytes: int | None,
    positive_semidefinite: bool,
) -> Curvature:
    if linear_bytes is None:
        linear_bytes = device_memory() // 4
    require_count("linear_bytes", linear_bytes, 0)
    require_weight_fn(product.weight_fn)
    weights, rest = partition(params, prunable)
    require_single_precision(weights)
    batches = placed_batches(Loss(product), batches, weights, rest)
    groups = used = placed_groups(Loss(product), grouped(batches), weights, rest)
    if isinstance(batches, Batches):
        size = _size_for_products(product, weights, rest, batches)
        used = grouped(replace(batches, batch_size=size))
    checked = check_loss(product, weights, rest, groups, used)
    if isinstance(batches, Batches):
        for group in used:  # of the loss as it is now, whatever its surroundings become
            linear_batch_bytes(product, weights, rest, group)
    return Curvature(
        weights,
        rest,
        used,
        checked.loss,
        checked.num_examples,
        product,
        positive_semidefinite,
        linear_bytes,
        checked.total_weight,
    )


def _size_for_products(product: Product, weights: PyTree, rest: PyTree, batches: Batches) -> int:
    """The caller's, where the loss takes batches of that size only: it may have a state of fixed size."""
    given = partial(takes, product, weights, rest, batches.arrays)
    if not (given(2) and given(4)):
        return batches.batch_size
    size = suitable_batch_size(product, weights, rest, batches.arrays)
    return size if given(size) else batches.batch_size
