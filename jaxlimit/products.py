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
from jaxlimit.sharding import ExampleSharding, example_sharding, on_parts, sum_of_parts

PyTree = Any
# Memory for linearised batches, on each device: less than the Lanczos basis of a network of some size takes.
LINEAR_BYTES = 2**31
# Examples at once in a product: as many as let the linearised batch take so much memory, or twice that of the
# weights, which are read for every batch. On a CPU it should stay in the cache: measured by
# benchmarks/products.py. Elsewhere it must be large enough to fill the device.
BATCH_BYTES = {"cpu": 2**25}


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


@partial(jax.tree_util.register_dataclass, data_fields=["linear"], meta_fields=["batch_size", "sharding"])
@dataclass(frozen=True)
class LinearGroup:
    """Batches of one shape, linearised: the leaves of `linear` have a leading axis of batches.

    Where the batches are divided over devices, `linear` holds the parts, and `batch_size` is theirs.
    """

    linear: PyTree
    batch_size: int
    sharding: ExampleSharding | None

    @property
    def num_shards(self) -> int:
        """Number of parts."""
        return 1 if self.sharding is None else self.sharding.num_shards


@partial(jax.jit, static_argnums=(0, 1))
def linearize_group(
    product: Product, sharding: ExampleSharding | None, weights: PyTree, rest: PyTree, group: PyTree
) -> LinearGroup:
    """Linearises stacked batches, one after the other."""

    def linearize(weights: PyTree, rest: PyTree, group: PyTree) -> PyTree:
        return jax.lax.map(lambda batch: product.linearize(weights, rest, batch), group)

    linear = on_parts(linearize, sharding, (None, None, 1))(weights, rest, group)
    group_size = batch_length(jax.tree.map(lambda x: x[0], group))
    return LinearGroup(linear, group_size // (1 if sharding is None else sharding.num_shards), sharding)


@partial(jax.jit, static_argnums=(0, 2))
def linear_mean(product: Product, groups: list[LinearGroup], num_examples: int, vectors: PyTree) -> PyTree:
    """sum_b n_b H_b V / N over linearised batches."""

    def group_sum(group: LinearGroup) -> PyTree:
        def batch_sum(vectors: PyTree, linear: PyTree) -> PyTree:
            def add(total: PyTree, linear: PyTree) -> tuple[PyTree, None]:
                part = product.apply(linear, vectors)
                return jax.tree.map(lambda t, x: t + group.batch_size * x, total, part), None

            return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, vectors), linear)[0]

        return sum_of_parts(batch_sum, group.sharding, (None, 0))(vectors, group.linear)

    return jax.tree.map(lambda *sums: sum(sums) / num_examples, *[group_sum(group) for group in groups])


def num_bytes(tree: PyTree) -> int:
    """Of all leaves, arrays or their shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def suitable_batch_size(product: Product, weights: PyTree, rest: PyTree, arrays: PyTree) -> int:
    """Examples at once in a product: `BATCH_BYTES`, and a divisor of all if there is one near it.

    With a divisor all batches have one shape, and a product compiles once. Of examples that are divided over
    devices so many on each.
    """
    sharding = example_sharding(arrays)
    num_shards = 1 if sharding is None else sharding.num_shards
    num_examples = batch_length(arrays) // num_shards

    def linear_bytes(size: int) -> int:
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), arrays)
        return num_bytes(_linearize.eval_shape(product, weights, rest, batch))

    per_example = max((linear_bytes(4) - linear_bytes(2)) // 2, 1)
    batch_bytes = max(BATCH_BYTES.get(jax.default_backend(), LINEAR_BYTES), 2 * num_bytes(weights))
    wanted = max(min(batch_bytes // per_example, num_examples), 1)
    divisors = (size for size in range(wanted, wanted // 2, -1) if num_examples % size == 0)
    return num_shards * next(divisors, wanted)


@partial(jax.jit, static_argnums=0)
def _linearize(product: Product, weights: PyTree, rest: PyTree, batch: PyTree) -> PyTree:
    return product.linearize(weights, rest, batch)
