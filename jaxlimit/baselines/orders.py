r"""Other orders of the weights than that of their magnitudes, from the loss: scores for `scores=`.

Removing one weight w changes the loss, to second order, by -g w + h w^2 / 2, with g its slope and h its
curvature H_ii. The second term alone is the saliency of Optimal Brain Damage, the size of the first is
Taylor's score. All scores are pytrees like the prunable weights, float64 on the host, and the weights of the
smallest go first.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxlimit.core.batches import Batches, batched, examples_like, grouped
from jaxlimit.core.checks import require_count, require_instance, require_key
from jaxlimit.core.sums import ExampleSum, mean_of_sum
from jaxlimit.core.trees import Prunable, PyTree, combine, flatten, is_kernel, partition
from jaxlimit.curvature.data_checks import require_single_precision
from jaxlimit.curvature.operator import Curvature
from jaxlimit.spectrum.probes import signed_products

# Numbers in the Jacobians of a batch that `gauss_newton_diagonal` cuts by itself: 256 MB.
JACOBIAN_SIZE = 2**26


def obd_scores(weights: PyTree, diagonal: PyTree) -> PyTree:
    """Optimal Brain Damage: h w^2 / 2, what the loss rises by where a weight goes alone, at a minimum.

    A negative curvature counts as 0: the weight is among the first to go. Source: LeCun, Denker and Solla,
    "Optimal Brain Damage", 1990, equation 5.

    Args:
        weights: pytree of the prunable weights, as `curvature.weights`.
        diagonal: h of each, from `gauss_newton_diagonal` or `curvature_diagonal`.

    Raises:
        ValueError: the trees do not match.

    Examples:
        >>> obd_scores({"kernel": np.array([2.0, -1.0])}, {"kernel": np.array([1.0, 6.0])})
        {'kernel': array([2., 3.])}
    """
    expected, got = (jax.tree.map(np.shape, tree) for tree in (weights, diagonal))
    if expected != got:
        raise ValueError(f"diagonal must have the shapes of weights, {expected}, got {got}.")
    return jax.tree.map(lambda w, h: np.maximum(_wide(h), 0) * _wide(w) ** 2 / 2, weights, diagonal)


def taylor_scores(curvature: Curvature) -> PyTree:
    """|g w|, the size of the first-order term of the loss, with g the gradient of the mean loss.

    Where training has come to a minimum of the loss, g is rounding and noise, and so is this order. At one of
    the loss with an L1 term g = -l1 sign(w), and it is the order of magnitudes. Cost: one gradient. Source:
    Molchanov, Tyree, Karras, Aila and Kautz, arXiv 1611.06440, for single weights.

    Args:
        curvature: from `hessian` or `gauss_newton`, whose weights and gradient these are.

    Examples:
        >>> from jaxlimit import batched, hessian
        >>> curvature = hessian(lambda w, x: jnp.mean(x @ w), jnp.ones((2, 1)), batched(jnp.eye(2), 2))
        >>> taylor_scores(curvature).tolist()
        [[0.5], [0.5]]
    """
    require_instance("curvature", curvature, Curvature, "gauss_newton or hessian")
    return jax.tree.map(lambda w, g: np.abs(_wide(w) * _wide(g)), curvature.weights, curvature.gradient)


def curvature_diagonal(curvature: Curvature, key: jax.Array, *, num_probes: int = 64) -> PyTree:
    """The diagonal of a curvature, estimated by random signs z: the mean of z * (H z).

    An entry has the variance sum_{j != i} H_ij^2 / num_probes, which neighbours of large curvature make
    large: `gauss_newton_diagonal` is exact where it can be afforded. Cost: `num_probes` products, one by
    one. Source: Bekas, Kokiopoulou and Saad 2007.

    Args:
        curvature: from `hessian` or `gauss_newton`.
        key: of the random probes.
        num_probes: 1 or more.

    Returns:
        Pytree like `curvature.weights`, float64 on the host; some entries may be negative.

    Raises:
        ValueError: fewer than one probe.

    Examples:
        Without other entries in its row, an entry is exact.

        >>> from jaxlimit import batched, hessian
        >>> def loss(w, x): return jnp.mean(x @ w**2) / 2
        >>> curvature = hessian(loss, jnp.ones((2, 1)), batched(jnp.array([[1.0, 3.0]]), 1))
        >>> curvature_diagonal(curvature, jax.random.key(0), num_probes=1).tolist()
        [[1.0], [3.0]]
    """
    require_instance("curvature", curvature, Curvature, "gauss_newton or hessian")
    require_count("num_probes", num_probes)
    total = jax.tree.map(lambda w: np.zeros(w.shape), curvature.weights)
    for pair in signed_products(curvature, require_key("key", key), num_probes):
        total = jax.tree.map(lambda t, z, hz: t + _wide(z) * _wide(hz), total, *pair)
    return jax.tree.map(lambda t: t / num_probes, total)


def gauss_newton_diagonal(
    predict_fn: Callable[[PyTree, PyTree], PyTree],
    loss_fn: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    batches: Iterable[PyTree],
    *,
    prunable: Prunable = is_kernel,
) -> PyTree:
    """The exact diagonal of the Gauss-Newton matrix of a mean over examples.

        G_ii = mean over examples of j_i^T B j_i,   j_i = d outputs / d w_i,   B = d^2 loss / d outputs^2

    Cost: a gradient for each output of each example; memory for the Jacobians of a batch: its examples times
    outputs times weights.

    Args:
        predict_fn: `predict_fn(params, batch) -> outputs`, as for `gauss_newton`; the outputs of an example
            must not depend on the others in its batch.
        loss_fn: `loss_fn(outputs, batch) -> scalar`, the mean over the batch's examples.
        params: pytree of parameters.
        batches: as for `hessian`; `batched(...)` is cut anew, to Jacobians of 256 MB at most.
        prunable: as for `hessian`.

    Returns:
        Pytree like the prunable weights, float64 on the host, without negative entries if the loss is convex
        in the outputs.

    Raises:
        ValueError: no batches, nothing prunable, weights in half precision.

    Examples:
        >>> def predict(w, x): return x @ w
        >>> def loss(outputs, x): return jnp.mean(outputs**2) / 2
        >>> data = batched(jnp.array([[1.0, 2.0], [3.0, 0.0]]), 2)
        >>> gauss_newton_diagonal(predict, loss, jnp.ones((2, 1)), data).tolist()
        [[5.0], [2.0]]
    """
    weights, rest = partition(params, prunable)
    require_single_precision(weights)
    diagonal = partial(_batch_diagonal, predict_fn, loss_fn)
    if isinstance(batches, Batches):
        batches = batched(batches.arrays, _affordable(predict_fn, weights, rest, batches))
    total, weight = ExampleSum(diagonal)(grouped(batches), weights, rest)
    return jax.tree.map(_wide, mean_of_sum(total, weight))


def _affordable(predict_fn: Callable[..., PyTree], weights: PyTree, rest: PyTree, batches: Batches) -> int:
    """Examples whose Jacobians take `JACOBIAN_SIZE` numbers."""
    one = examples_like(batches.arrays, 1)
    made = jax.eval_shape(lambda weights, batch: predict_fn(combine(weights, rest), batch), weights, one)
    num_outputs = sum(math.prod(x.shape) for x in jax.tree.leaves(made))
    fitting = JACOBIAN_SIZE // (num_outputs * flatten(weights).size)
    return max(1, min(batches.batch_size, fitting))


def _batch_diagonal(
    predict_fn: Callable[[PyTree, PyTree], PyTree],
    loss_fn: Callable[[PyTree, PyTree], jax.Array],
    weights: PyTree,
    rest: PyTree,
    batch: PyTree,
) -> PyTree:
    """The mean over the examples of a batch."""

    def of_one(example: PyTree) -> PyTree:
        one = jax.tree.map(lambda x: x[None], example)
        outputs, restore = ravel_pytree(predict_fn(combine(weights, rest), one))
        curved = jax.hessian(lambda z: loss_fn(restore(z), one))(outputs)
        jacobian = jax.jacrev(lambda w: ravel_pytree(predict_fn(combine(w, rest), one))[0])(weights)
        return jax.tree.map(lambda j: (j * jnp.tensordot(curved, j, 1)).sum(0), jacobian)

    return jax.tree.map(lambda x: x.mean(0), jax.vmap(of_one)(batch))


def _wide(leaf: Any) -> np.ndarray:
    """Float64 on the host."""
    return np.asarray(leaf, np.float64)
