"""Products of one batch with the matrices of `jaxlimit.curvature`, and what does not depend on the vector.

`linearize` computes what depends on the weights and the batch alone, as a pytree that is a function of the
vector; `apply` does the rest, without a forward pass.

A product traces the loss once for batches of each shape, and all derivatives are taken of that trace: it is
of the loss as it was then. Every curvature has a product of its own, equal to no other.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from jaxlimit.core.batches import batch_length, first_of
from jaxlimit.core.checks import check_scalar
from jaxlimit.core.convolutions import convolves, quick_in_loops
from jaxlimit.core.jaxprs import primitives
from jaxlimit.core.loops import each_of, scan
from jaxlimit.core.programs import Program, Traced
from jaxlimit.core.sharding import ExampleSharding, num_shards, on_parts, sum_of_parts
from jaxlimit.core.softmax import softmax_in_closed_form
from jaxlimit.core.sums import ExampleSum, batch_weight, running_sum, weighted
from jaxlimit.core.trees import PyTree, combine
from jaxlimit.curvature.compact import compacted
from jaxlimit.curvature.derivatives import derivative_of_gradient, linearized

# What `jax.checkpoint` is called in a traced function, by versions of JAX.
CHECKPOINT = {"remat2", "checkpoint"}


def _quick(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
    """The same function in a form whose derivatives take less time and memory."""
    return softmax_in_closed_form(quick_in_loops(jaxpr))


class _Product:
    """What the two products have in common."""

    precision: str
    weight_fn: Callable | None

    def loss(self, params: PyTree, batch: PyTree) -> jax.Array:
        """Mean loss of the batch."""
        raise NotImplementedError

    def _linearized(self, weights: PyTree, rest: PyTree, batch: PyTree) -> PyTree:
        raise NotImplementedError

    def apply(self, linear: PyTree, vectors: PyTree) -> PyTree:
        """Products with several vectors, from what `linearize` returned."""
        raise NotImplementedError

    def convolves(self, weights: PyTree, rest: PyTree, batch: PyTree) -> bool:
        """Whether a loop over batches of these shapes would be slow."""
        return convolves(self._whole_loss.jaxpr(combine(weights, rest), batch))

    def has_loops(self, weights: PyTree, rest: PyTree, batch: PyTree) -> bool:
        """Whether the network runs through steps, as recurrent ones do."""
        traced = self._whole_loss.jaxpr(combine(weights, rest), batch)
        return not primitives(traced.jaxpr).isdisjoint(("scan", "while"))

    @cached_property
    def _whole_loss(self) -> Traced:
        return Traced(self.loss)

    @cached_property
    def linearize(self) -> Traced:
        """`(weights, rest, batch) -> linear`: what does not depend on the vector."""
        return Traced(compacted(self._linearized))

    def __call__(self, weights: PyTree, rest: PyTree, vectors: PyTree, batch: PyTree) -> PyTree:
        """Products with several vectors."""
        return self.apply(self.linearize(weights, rest, batch), vectors)

    @cached_property
    def weight(self) -> Traced | None:
        """How much a batch counts; None: its number of examples."""
        return None if self.weight_fn is None else Traced(self.weight_fn)

    @cached_property
    def sum(self) -> ExampleSum:
        """Sum of the products over batches, each of them linearised anew."""
        return ExampleSum(self, self.weight)

    @cached_property
    def loss_sum(self) -> ExampleSum:
        """Sum of the losses over batches."""
        return ExampleSum(Loss(self), self.weight)

    @cached_property
    def gradient_sum(self) -> ExampleSum:
        """Sum of the gradients over batches."""
        return ExampleSum(Gradient(self), self.weight)

    @cached_property
    def loss_and_gradient_sum(self) -> ExampleSum:
        """Sums of both over batches."""
        return ExampleSum(Gradient(self, with_loss=True), self.weight)

    @cached_property
    def _group_linearizers(self) -> dict[ExampleSharding | None, Program]:
        return {}

    def group_linearizer(self, sharding: ExampleSharding | None) -> Program:
        """`linearize_group` of this product, traced once for groups of each shape, at whatever weights."""
        known = self._group_linearizers
        if sharding not in known:
            known[sharding] = Program(partial(linearize_group, self, sharding))
        return known[sharding]

    @cached_property
    def group_mean(self) -> Program:
        """`(linear_group, total_weight, vectors)`: its share of the mean, whose weights add up to that."""
        return Program(partial(_group_mean, self))

    def linear_mean(self, groups: list["LinearGroup"], total_weight: float, vectors: PyTree) -> PyTree:
        """sum_b W_b H_b V / sum_b W_b over linearised batches: a compiled call for each group."""
        return running_sum(self.group_mean(group, total_weight, vectors) for group in groups)


@dataclass(frozen=True, eq=False)
class HessianProduct(_Product):
    """Of a loss: `loss_fn(params, batch) -> scalar`."""

    loss_fn: Callable
    precision: str
    weight_fn: Callable | None = None

    @cached_property
    def _loss(self) -> Traced:
        return Traced(self.loss_fn, _quick)

    def loss(self, params: PyTree, batch: PyTree) -> jax.Array:
        """Mean loss of the batch."""
        return self._loss(params, batch)

    def _linearized(self, weights: PyTree, rest: PyTree, batch: PyTree) -> PyTree:
        """d/dt grad L(w + t v) as a function of v."""
        with jax.default_matmul_precision(self.precision):
            gradient = jax.grad(lambda w: self.loss(combine(w, rest), batch))
            return derivative_of_gradient(gradient, weights, self._loss.jaxpr(combine(weights, rest), batch))

    def apply(self, linear: PyTree, vectors: PyTree) -> PyTree:
        """H V, from what `linearize` returned."""
        return each(linear(), vectors)

    def __call__(self, weights: PyTree, rest: PyTree, vectors: PyTree, batch: PyTree) -> PyTree:
        """Products with several vectors.

        A linearised gradient is kept as a whole. Where the loss computes layers again (`jax.checkpoint`) the
        derivative goes through the gradient instead, layer by layer, and takes little more memory than it.
        """
        used = primitives(self._loss.jaxpr(combine(weights, rest), batch).jaxpr)
        if used.isdisjoint(CHECKPOINT) or any(name.startswith("custom_vjp") for name in used):
            return super().__call__(weights, rest, vectors, batch)
        with jax.default_matmul_precision(self.precision):
            gradient = jax.grad(lambda w: self.loss(combine(w, rest), batch))
            return each(lambda v: jax.jvp(gradient, (weights,), (v,))[1], vectors)


@dataclass(frozen=True, eq=False)
class GaussNewtonProduct(_Product):
    """Of outputs `predict_fn(params, batch)` and their loss `output_loss(outputs, batch) -> scalar`."""

    predict_fn: Callable
    output_loss: Callable
    precision: str
    weight_fn: Callable | None = None

    @cached_property
    def _predict(self) -> Traced:
        return Traced(self.predict_fn, _quick)

    @cached_property
    def _output_loss(self) -> Traced:
        return Traced(self.output_loss, _quick)

    def loss(self, params: PyTree, batch: PyTree) -> jax.Array:
        """Mean loss of the batch."""
        return self._output_loss(self._predict(params, batch), batch)

    def _linearized(self, weights: PyTree, rest: PyTree, batch: PyTree) -> PyTree:
        """J, and the second derivative of the loss of the outputs, as functions of a vector."""
        with jax.default_matmul_precision(self.precision):
            params = combine(weights, rest)
            fixed = self._fixed_outputs(params, batch)
            outputs, push_forward = linearized(
                lambda w: _smooth(self._predict(combine(w, rest), batch)),
                weights,
                self._predict.jaxpr(params, batch),
            )
            gradient = jax.grad(lambda z: self._output_loss(combine(z, fixed), batch))
            traced = self._output_loss.jaxpr(combine(outputs, fixed), batch)
            return push_forward, derivative_of_gradient(gradient, outputs, traced)

    def _fixed_outputs(self, params: PyTree, batch: PyTree) -> PyTree:
        """Those without derivatives, predicted classes or lengths, say; None for all others."""
        like = self._predict.shape(params, batch)
        if not jax.tree.leaves(_smooth(like)):
            raise ValueError("predict_fn returns no floating-point array: return logits, not classes.")
        if all(map(_is_smooth, jax.tree.leaves(like))):
            return jax.tree.map(lambda _: None, like)
        return jax.tree.map(lambda x: None if _is_smooth(x) else x, self._predict(params, batch))

    def apply(self, linear: PyTree, vectors: PyTree) -> PyTree:
        """G V, from what `linearize` returned."""
        push_forward, curve = linear()
        pull_back = jax.linear_transpose(push_forward, jax.tree.map(lambda v: v[0], vectors))
        return each(lambda v: pull_back(curve(push_forward(v)))[0], vectors)


Product = HessianProduct | GaussNewtonProduct


def _is_smooth(x: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether it has derivatives."""
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _smooth(outputs: PyTree) -> PyTree:
    """Outputs with derivatives, and None for the others."""
    return jax.tree.map(lambda x: x if _is_smooth(x) else None, outputs)


def each(fn: Callable[[PyTree], PyTree], vectors: PyTree) -> PyTree:
    """A function of every vector along the leading axis.

    Side by side, except on a CPU: there what the network computes from several would leave the cache, which
    costs large networks more than small ones gain (benchmarks/products.py).
    """
    count = batch_length(vectors)
    if jax.default_backend() != "cpu" and count > 1:
        return jax.vmap(fn)(vectors)
    if count == 1 or not convolves(jax.make_jaxpr(fn)(first_of(vectors))):
        return each_of(fn, vectors, count)
    one_by_one = [fn(jax.tree.map(lambda v, i=i: v[i], vectors)) for i in range(count)]
    return jax.tree.map(lambda *xs: jnp.stack(xs), *one_by_one)


@dataclass(frozen=True, eq=False)
class Gradient:
    """The gradient of a product's loss, behind the loss itself if that is wanted."""

    product: _Product
    with_loss: bool = False

    def __call__(self, weights: PyTree, rest: PyTree, batch: PyTree) -> PyTree:
        """With respect to the weights."""
        transform = jax.value_and_grad if self.with_loss else jax.grad
        with jax.default_matmul_precision(self.product.precision):
            return transform(lambda w: self.product.loss(combine(w, rest), batch))(weights)


@dataclass(frozen=True, eq=False)
class Loss:
    """A product's loss."""

    product: _Product

    def __call__(self, weights: PyTree, rest: PyTree, batch: PyTree) -> PyTree:
        """Mean over the batch; a ValueError if it is no scalar."""
        with jax.default_matmul_precision(self.product.precision):
            loss = self.product.loss(combine(weights, rest), batch)
        check_scalar(loss)
        return loss


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["linear", "weights"],
    meta_fields=["num_batches", "batch_size", "sharding"],
)
@dataclass(frozen=True)
class LinearGroup:
    """Batches of one shape, linearised: the leaves of `linear` have a leading axis of batches.

    Where the batches are divided over devices, `linear` holds the parts, and `batch_size` is theirs.
    `weights` are of batches, or of parts; None where each counts as its number of examples.
    """

    linear: PyTree
    weights: jax.Array | None
    num_batches: int
    batch_size: int
    sharding: ExampleSharding | None


def linearize_group(
    product: _Product, sharding: ExampleSharding | None, weights: PyTree, rest: PyTree, group: PyTree
) -> LinearGroup:
    """Linearises stacked batches, one after the other."""

    def linearize(weights: PyTree, rest: PyTree, batch: PyTree) -> tuple[PyTree, jax.Array | None]:
        weight = None if product.weight is None else batch_weight(product.weight, batch)
        return product.linearize(weights, rest, batch), weight

    def linearize_all(weights: PyTree, rest: PyTree, group: PyTree) -> PyTree:
        return each_of(partial(linearize, weights, rest), group, num_batches)

    num_batches = batch_length(group)
    linear, of_batches = on_parts(linearize_all, sharding, (None, None, 1))(weights, rest, group)
    batch_size = batch_length(jax.eval_shape(first_of, group))
    return LinearGroup(linear, of_batches, num_batches, batch_size // num_shards(sharding), sharding)


def _group_mean(product: _Product, group: LinearGroup, total_weight: float, vectors: PyTree) -> PyTree:
    def batch_sum(vectors: PyTree, batches: PyTree) -> PyTree:
        def add(total: PyTree, batch: PyTree) -> tuple[PyTree, None]:
            linear, weight = batch
            weight = group.batch_size if weight is None else weight
            part = product.apply(linear, vectors)
            return jax.tree.map(lambda t, x: t + weighted(weight, x), total, part), None

        return scan(add, jax.tree.map(jnp.zeros_like, vectors), batches, group.num_batches)[0]

    total = sum_of_parts(batch_sum, group.sharding, (None, 0))(vectors, (group.linear, group.weights))
    return jax.tree.map(lambda x: x / total_weight, total)
