"""Products of one batch with the matrices of `jaxlimit.curvature`, and what does not depend on the vector.

`linearize` computes what depends on the weights and the batch alone, as a pytree that is a function of the
vector; `apply` does the rest, without a forward pass.

These functions are static arguments of compiled ones. As frozen dataclasses they are equal when their fields
are, so a second curvature of the same loss does not compile again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlimit.batches import batch_length, check_scalar
from jaxlimit.prunable import combine

PyTree = Any
# Memory for linearised batches: less than what the Lanczos basis of a network of some size takes.
LINEAR_BYTES = 2**31
# Examples at once in a product: as many as let the linearised batch take so much memory. On a CPU it should
# stay in the cache, but a few examples are needed to make up for reading the weights: measured by
# benchmarks/products.py. Elsewhere it must be large enough to fill the device.
BATCH_BYTES, LEAST_BATCH = {"cpu": 2**25}, 16


@dataclass(frozen=True)
class HessianProduct:
    """Of a loss: `loss_fn(params, batch) -> scalar`."""

    loss_fn: Callable
    precision: str

    def loss(self, params: PyTree, batch: PyTree) -> jax.Array:
        """Mean loss of the batch."""
        return self.loss_fn(params, batch)

    def linearize(self, weights: PyTree, rest: PyTree, batch: PyTree) -> PyTree:
        """d/dt grad L(w + t v) as a function of v."""
        with jax.default_matmul_precision(self.precision):
            gradient = jax.grad(lambda w: self.loss(combine(w, rest), batch))
            return jax.linearize(gradient, weights)[1]

    def apply(self, linear: PyTree, vectors: PyTree) -> PyTree:
        """H V, from what `linearize` returned."""
        return _each(linear, vectors)

    def __call__(self, weights: PyTree, rest: PyTree, vectors: PyTree, batch: PyTree) -> PyTree:
        """H V."""
        return self.apply(self.linearize(weights, rest, batch), vectors)


@dataclass(frozen=True)
class GaussNewtonProduct:
    """Of outputs `predict_fn(params, batch)` and their loss `output_loss(outputs, batch) -> scalar`."""

    predict_fn: Callable
    output_loss: Callable
    precision: str

    def loss(self, params: PyTree, batch: PyTree) -> jax.Array:
        """Mean loss of the batch."""
        return self.output_loss(self.predict_fn(params, batch), batch)

    def linearize(self, weights: PyTree, rest: PyTree, batch: PyTree) -> PyTree:
        """J, and the second derivative of the loss of the outputs, as functions of a vector."""
        with jax.default_matmul_precision(self.precision):
            outputs, push_forward = jax.linearize(lambda w: self.predict_fn(combine(w, rest), batch), weights)
            curve = jax.linearize(jax.grad(lambda z: self.output_loss(z, batch)), outputs)[1]
            return push_forward, curve

    def apply(self, linear: PyTree, vectors: PyTree) -> PyTree:
        """G V, from what `linearize` returned."""
        push_forward, curve = linear
        pull_back = jax.linear_transpose(push_forward, jax.tree.map(lambda v: v[0], vectors))
        return _each(lambda v: pull_back(curve(push_forward(v)))[0], vectors)

    def __call__(self, weights: PyTree, rest: PyTree, vectors: PyTree, batch: PyTree) -> PyTree:
        """G V."""
        return self.apply(self.linearize(weights, rest, batch), vectors)


Product = HessianProduct | GaussNewtonProduct


def _each(linear: Callable[[PyTree], PyTree], vectors: PyTree) -> PyTree:
    """A linear function of every vector along the leading axis; of a single one without that axis."""
    if jax.tree.leaves(vectors)[0].shape[0] > 1:
        return jax.vmap(linear)(vectors)
    return jax.tree.map(lambda x: x[None], linear(jax.tree.map(lambda v: v[0], vectors)))


@dataclass(frozen=True)
class Gradient:
    """The gradient of a product's loss."""

    product: Product

    def __call__(self, weights: PyTree, rest: PyTree, batch: PyTree) -> PyTree:
        """With respect to the weights."""
        with jax.default_matmul_precision(self.product.precision):
            return jax.grad(lambda w: self.product.loss(combine(w, rest), batch))(weights)


@dataclass(frozen=True)
class Loss:
    """A product's loss."""

    product: Product

    def __call__(self, weights: PyTree, rest: PyTree, batch: PyTree) -> PyTree:
        """Mean over the batch; a ValueError if it is no scalar."""
        with jax.default_matmul_precision(self.product.precision):
            loss = self.product.loss(combine(weights, rest), batch)
        check_scalar(loss)
        return loss


@partial(jax.tree_util.register_dataclass, data_fields=["linear"], meta_fields=["batch_size"])
@dataclass(frozen=True)
class LinearGroup:
    """Batches of one shape, linearised: the leaves of `linear` have a leading axis of batches."""

    linear: PyTree
    batch_size: int


@partial(jax.jit, static_argnums=0)
def linearize_group(product: Product, weights: PyTree, rest: PyTree, group: PyTree) -> LinearGroup:
    """Linearises stacked batches, one after the other."""
    linear = jax.lax.map(lambda batch: product.linearize(weights, rest, batch), group)
    return LinearGroup(linear, batch_length(jax.tree.map(lambda x: x[0], group)))


@partial(jax.jit, static_argnums=(0, 2))
def linear_mean(product: Product, groups: list[LinearGroup], num_examples: int, vectors: PyTree) -> PyTree:
    """sum_b n_b H_b V / N over linearised batches."""
    total = jax.tree.map(jnp.zeros_like, vectors)
    for group in groups:

        def add(total: PyTree, linear: PyTree, size: int = group.batch_size) -> tuple[PyTree, None]:
            return jax.tree.map(lambda t, x: t + size * x, total, product.apply(linear, vectors)), None

        total, _ = jax.lax.scan(add, total, group.linear)
    return jax.tree.map(lambda x: x / num_examples, total)


def num_bytes(tree: PyTree) -> int:
    """Of all leaves, arrays or their shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def suitable_batch_size(product: Product, weights: PyTree, rest: PyTree, arrays: PyTree) -> int:
    """Examples at once in a product: `BATCH_BYTES`, and a divisor of all if there is one near it.

    With a divisor all batches have one shape, and a product compiles once.
    """
    num_examples = batch_length(arrays)

    def linear_bytes(size: int) -> int:
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), arrays)
        return num_bytes(_linearize.eval_shape(product, weights, rest, batch))

    per_example = max((linear_bytes(4) - linear_bytes(2)) // 2, 1)
    wanted = max(BATCH_BYTES.get(jax.default_backend(), LINEAR_BYTES) // per_example, LEAST_BATCH)
    if wanted >= num_examples:
        return num_examples
    divisors = (size for size in range(wanted, wanted // 2, -1) if num_examples % size == 0)
    return next(divisors, wanted)


@partial(jax.jit, static_argnums=0)
def _linearize(product: Product, weights: PyTree, rest: PyTree, batch: PyTree) -> PyTree:
    return product.linearize(weights, rest, batch)
