r"""Products with the curvature of a loss, restricted to the weights that may be pruned.

With w the prunable weights, everything else held fixed, and L the mean loss over N examples:

    Hessian         H v = d/dt grad L(w + t v) at t = 0                (forward over reverse)
    Gauss-Newton    G v = J^T (d^2 loss / d outputs^2) J v             (push forward, curve, pull back)

J is the Jacobian of the network's outputs. G equals H without the network's own second derivative; it is
positive semidefinite when the loss is convex in the outputs (Schraudolph 2002). Sums over batches are
weighted by their numbers of examples. Data and parameters are arguments of the compiled functions.

Both are linear in v, and Lanczos multiplies many v at the same w: the batches are linearised there once, and
a product is what is left to do, without a forward pass. That needs memory for what the network computes from
every example, so it is done for data in memory and within a budget; else each product linearises anew.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from numpy.typing import NDArray

from jaxlimit.core.batches import Batches, batch_length, example_sum, grouped
from jaxlimit.core.memory import device_memory
from jaxlimit.core.sharding import to_host
from jaxlimit.core.trees import Prunable, combine, is_kernel, partition
from jaxlimit.curvature.products import (
    GaussNewtonProduct,
    Gradient,
    HessianProduct,
    LinearGroup,
    Loss,
    Product,
    linear_mean,
    linearize_groups,
    num_bytes,
    suitable_batch_size,
)

PyTree = Any
# Linearised batches that another compiled function may hold as constants, in bytes.
CONSTANT_BYTES = 2**26


@dataclass(frozen=True)
class Curvature:
    """A symmetric matrix of size D x D known through its products. Vectors are pytrees like `weights`.

    Attributes:
        weights: the prunable weights w, shaped like the parameters with None for everything else.
        positive_semidefinite: whether the matrix has no negative eigenvalue by construction.
        num_examples: number of examples the loss is a mean of.
        loss: the mean loss at the weights.
    """

    weights: PyTree
    positive_semidefinite: bool
    num_examples: int
    loss: float
    _rest: PyTree
    _groups: Iterable[PyTree]
    _product: Product
    _linear_bytes: int

    @property
    def dim(self) -> int:
        """Number of prunable weights D."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.weights))

    @property
    def params(self) -> PyTree:
        """All parameters, those outside the matrix too."""
        return combine(self.weights, self._rest)

    def of(self, prunable: Prunable) -> "Curvature":
        """The same curvature on other parameters: `prunable` as in `hessian`. All others stay as they are.

        `pruning_limit` of it answers how far one layer, or one group of layers, can be pruned alone.

        Examples:
            >>> from jaxlimit import batched
            >>> def loss(params, x): return jnp.mean((x @ params["a"] @ params["b"]) ** 2) / 2
            >>> params = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 1))}
            >>> curvature = hessian(loss, params, batched(jnp.ones((1, 2)), 1))
            >>> curvature.dim, curvature.of(lambda path, leaf: path[0].key == "b").dim
            (9, 3)
        """
        weights, rest = partition(self.params, prunable)
        _require_single_precision(weights)
        return replace(self, weights=weights, _rest=rest)

    @cached_property
    def gradient(self) -> PyTree:
        """Gradient of the mean loss with respect to the weights, same tree; computed on first use."""
        with jax.ensure_compile_time_eval():  # kept, so it must not be a tracer
            return self._mean(Gradient(self._product))

    def matvec(self, vector: PyTree) -> PyTree:
        """H v for one vector shaped like `weights`. Cost: about two gradients of the loss."""
        product = self.matmat(jax.tree.map(lambda x: jnp.asarray(x)[None], vector))
        return jax.tree.map(lambda x: x[0], product)

    def matmat(self, vectors: PyTree) -> PyTree:
        """H V for several vectors along a leading axis, which share whatever does not depend on them.

        Raises:
            ValueError: vectors do not match the weights in structure or shape.
        """
        leaves, structure = jax.tree.flatten(vectors)
        like, expected = jax.tree.flatten(self.weights)
        if structure != expected:
            raise ValueError(f"vectors must be a tree like the weights, {expected}; got {structure}.")
        for leaf, weight in zip(leaves, like, strict=True):
            if leaf.shape[1:] != weight.shape:
                raise ValueError(f"a leaf of shape {leaf.shape[1:]} stands where weights has {weight.shape}.")
        vectors = jax.tree.map(lambda v, w: jnp.asarray(v, w.dtype), vectors, self.weights)
        linear = self._constants() if any(isinstance(x, Tracer) for x in leaves) else self._linear
        if linear is None:
            return self._mean(self._product, vectors)
        return linear_mean(self._product, linear, self.num_examples, vectors)

    @cached_property
    def _linear(self) -> list[LinearGroup] | None:
        """The batches, linearised at the weights; None for a stream, or where they do not fit the budget."""
        if not isinstance(self._groups, list):
            return None
        with jax.ensure_compile_time_eval():
            return linearize_groups(self._product, self.weights, self._rest, self._groups, self._linear_bytes)

    def _constants(self) -> list[LinearGroup] | None:
        """The linearised batches within another compiled function: if they are there already, and small."""
        linear = vars(self).get("_linear")
        return linear if num_bytes(linear) <= CONSTANT_BYTES else None

    def dense(self) -> NDArray[np.float64]:
        """The matrix itself: see `dense_matrix`."""
        return dense_matrix(self.matmat, self.weights)

    def _mean(self, fn: Callable, *args: PyTree) -> PyTree:
        total, num_examples = example_sum(fn, self._groups, self.weights, self._rest, *args)
        if num_examples != self.num_examples:
            raise ValueError(_changed(f"{self.num_examples} examples", f"{num_examples}"))
        return jax.tree.map(lambda x: x / num_examples, total)


def dense_matrix(
    matmat: Callable[[PyTree], PyTree], like: PyTree, block_size: int = 16
) -> NDArray[np.float64]:
    """The symmetric matrix behind products, symmetrised, in the order of the flattened weights.

    Cost: D products in blocks of `block_size`; memory 8 D^2 bytes on the host.

    Raises:
        FloatingPointError: a product is not finite.

    Examples:
        >>> dense_matrix(lambda v: 3 * v, jnp.ones(2)).tolist()
        [[3.0, 0.0], [0.0, 3.0]]
    """
    dim = sum(x.size for x in jax.tree.leaves(like))
    matrix = np.empty((dim, dim))
    for start in range(0, dim, block_size):
        # The last block overlaps the one before, so that all have one shape and compile once.
        first = max(0, min(start, dim - block_size))
        rows = np.arange(first, min(first + block_size, dim))
        product = jax.tree.leaves(matmat(unit_vectors(rows, like)))
        matrix[rows] = np.concatenate([np.reshape(x, (len(rows), -1)) for x in product], 1)
        if not np.all(np.isfinite(matrix[rows])):
            raise FloatingPointError(
                "a product with the curvature is not finite: look for overflow in the loss."
            )
    return (matrix + matrix.T) / 2


def unit_vectors(indices: NDArray[np.integer], like: PyTree) -> PyTree:
    """e_i for each index i of the flattened weights, along a leading axis, on the host.

    Examples:
        >>> unit_vectors(np.array([2, 0]), {"a": jnp.zeros(2), "b": jnp.zeros((1, 1))})["a"].tolist()
        [[0.0, 0.0], [1.0, 0.0]]
    """
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([x.size for x in leaves])
    parts = np.split(indices[:, None] == np.arange(ends[-1]), ends[:-1], 1)
    return structure.unflatten(
        [part.reshape(-1, *x.shape).astype(x.dtype) for part, x in zip(parts, leaves, strict=True)]
    )


def hessian(
    loss_fn: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    batches: Iterable[PyTree],
    *,
    prunable: Prunable = is_kernel,
    precision: str = "highest",
    linear_bytes: int | None = None,
) -> Curvature:
    r"""The Hessian of the mean loss on the prunable weights.

    Cost of a product: about two gradients or, linearised, 1.6; memory: one batch's activations twice and one
    vector, and up to `linear_bytes`.

    Args:
        loss_fn: `loss_fn(params, batch) -> scalar`, the mean over the batch's examples.
        params: pytree of parameters, at which the Hessian is taken.
        batches: `batched(...)`, which is cut anew into batches of a size that suits the products; a list of
            batches, or any re-iterable of batches, which are taken as they are.
        prunable: pytree of bools like params, or `fn(path, leaf) -> bool`; default: `is_kernel`.
        precision: of matrix products, as in `jax.default_matmul_precision`. The default "highest" is
            float32: the devices' faster formats (TF32, bfloat16) disturb the smallest eigenvalues.
        linear_bytes: memory in which the linearised batches are kept from the first product on, if they fit
            and are not a stream; 0 linearises in every product. None: a quarter of the device's memory.

    Raises:
        ValueError: no batches; nothing prunable; weights of fewer than 32 bits; non-finite weights or loss;
            data that changes from one pass to the next; a loss that is not a mean over examples.

    Examples:
        The Hessian of mean(x w)^2 / 2 is the mean of x^2.

        >>> from jaxlimit import batched
        >>> def loss(w, x): return jnp.mean((x @ w) ** 2) / 2
        >>> curvature = hessian(loss, jnp.ones((1, 1)), batched(jnp.array([[1.0], [2.0], [4.0]]), 2))
        >>> curvature.matvec(jnp.ones((1, 1)))
        Array([[7.]], dtype=float32)
    """
    product = HessianProduct(loss_fn, precision)
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

    Raises:
        ValueError: as for `hessian`.

    Examples:
        >>> from jaxlimit import batched
        >>> def predict(w, x): return x @ w
        >>> def loss(outputs, x): return jnp.mean(outputs**2) / 2
        >>> curvature = gauss_newton(predict, loss, jnp.ones((1, 1)), batched(jnp.array([[1.0], [3.0]]), 2))
        >>> curvature.matvec(jnp.ones((1, 1)))
        Array([[5.]], dtype=float32)
    """
    product = GaussNewtonProduct(predict_fn, loss_fn, precision)
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
    if linear_bytes < 0:
        raise ValueError(f"linear_bytes must be at least 0, got {linear_bytes}.")
    weights, rest = partition(params, prunable)
    _require_single_precision(weights)
    groups = grouped(batches)
    loss = Loss(product)
    num_examples, mean_loss = _check_data(loss, weights, rest, groups)
    if isinstance(batches, Batches):
        size = suitable_batch_size(product, weights, rest, batches.arrays)
        groups = grouped(replace(batches, batch_size=size))
    return Curvature(
        weights, positive_semidefinite, num_examples, mean_loss, rest, groups, product, linear_bytes
    )


def _require_single_precision(weights: PyTree) -> None:
    """Raises ValueError if a weight has fewer than 32 bits: sums over examples stagnate in bfloat16."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        if jnp.finfo(leaf.dtype).bits < 32:
            raise ValueError(
                f"prunable leaf {jax.tree_util.keystr(path)} has dtype {leaf.dtype}, too coarse for "
                "curvature: cast all parameters, jax.tree.map(lambda x: x.astype(jnp.float32), params)."
            )


def _check_data(loss: Loss, weights: PyTree, rest: PyTree, groups: Iterable[PyTree]) -> tuple[int, float]:
    """Two passes over the data must agree; the loss must be finite and a mean. Returns examples and loss."""
    (first, num_first), (second, num_second) = (example_sum(loss, groups, weights, rest) for _ in range(2))
    first, second = float(first) / num_first, float(second) / num_second
    if not np.isfinite(first):
        raise ValueError(f"the mean loss is {first}: the parameters or the data are not usable.")
    if num_first != num_second:
        raise ValueError(_changed(f"{num_first} examples", f"{num_second}"))
    if not np.isclose(first, second, rtol=1e-5, atol=1e-8):
        raise ValueError(_changed(f"a mean loss of {first:.8g}", f"{second:.8g}"))
    _check_mean(loss, weights, rest, jax.tree.map(lambda x: to_host(x[0]), next(iter(groups))))
    return num_first, first


def _check_mean(loss: Loss, weights: PyTree, rest: PyTree, batch: PyTree) -> None:
    """The loss of a batch is the weighted mean of the losses of its two halves, or it is not a mean."""
    size = batch_length(batch)
    if size < 2:
        return
    half = size // 2
    whole, left, right = (
        float(loss(weights, rest, jax.tree.map(lambda x, part=part: x[part], batch)))
        for part in (slice(None), slice(half), slice(half, None))
    )
    mean = (half * left + (size - half) * right) / size
    if not np.isclose(whole, mean, rtol=1e-3, atol=1e-5):
        raise ValueError(
            f"loss_fn is not a mean over the batch's examples: a batch of {size} has loss {whole:.6g}, the "
            f"mean over its two halves is {mean:.6g}. Likely causes: a sum instead of a mean, or batch norm "
            "in train mode (use evaluation mode)."
        )


def _changed(first: str, second: str) -> str:
    return (
        f"the data changed between two passes: {first} in the first, {second} in the second. Likely causes: "
        "shuffling, random augmentation, dropout, or batch norm in train mode. Curvature needs the same "
        "function every time: fix the order and use evaluation mode."
    )
