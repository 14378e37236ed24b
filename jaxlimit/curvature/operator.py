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

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from numpy.typing import NDArray

from jaxlimit.core.display import Displayed, View
from jaxlimit.core.sharding import explicit_sharding, sharding_like
from jaxlimit.core.sums import ExampleSum, mean_of_sum
from jaxlimit.core.trees import Prunable, PyTree, combine, leaf_paths, partition, path_name
from jaxlimit.curvature.data_checks import require_precise, require_same_weight, require_single_precision
from jaxlimit.curvature.dense_matrix import dense_matrix
from jaxlimit.curvature.linearizing import linearize_groups, num_bytes
from jaxlimit.curvature.products import LinearGroup, Product
from jaxlimit.curvature.rounding import measured_rounding

# Linearised batches that another compiled function may hold as constants, in bytes.
CONSTANT_BYTES = 2**26


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, eq=False, repr=False)
class Curvature(Displayed):
    """A symmetric matrix of size D x D known through its products. Vectors are pytrees like `weights`.

    It is a pytree, and can be an argument of a compiled function: its arrays are leaves. Its loss compares by
    identity, so that a function which is compiled for one curvature is compiled anew for another. There its
    products take the linearised batches where a product outside was there first; else they linearise anew.

    Attributes:
        weights: the prunable weights w, shaped like the parameters with None for everything else.
        rest: the other parameters, with None for the weights.
        groups: the batches, stacked by shape; or a stream of them.
        loss: the mean loss at the weights.
        num_examples: number of examples the loss is a mean of.
        product: products of one batch.
        positive_semidefinite: whether the matrix has no negative eigenvalue by construction.
        linear_bytes: memory for the linearised batches, as for `hessian`.
        total_weight: what the weights of all batches add up to: the number of examples, or what `weight_fn`
            counts.
    """

    weights: PyTree
    rest: PyTree
    groups: Iterable[PyTree]
    loss: float
    num_examples: int
    product: Product
    positive_semidefinite: bool
    linear_bytes: int
    total_weight: float

    @property
    def dim(self) -> int:
        """Number of prunable weights D."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.weights))

    def _view(self) -> View:
        kind = "Gauss-Newton matrix" if self.positive_semidefinite else "Hessian"
        arrays = [
            f"{path_name(path)} {x.shape}" for path, x in jax.tree_util.tree_leaves_with_path(self.weights)
        ]
        more = [*arrays[:3], f"and {len(arrays) - 3} more"] if len(arrays) > 4 else arrays
        size = f"{self.num_examples:,} examples, {self.dim:,} weights"
        return View(f"{kind} of a mean loss over {size}: {', '.join(more)}")

    @property
    def params(self) -> PyTree:
        """All parameters, those outside the matrix too."""
        return combine(self.weights, self.rest)

    def of(self, prunable: Prunable) -> "Curvature":
        """The same curvature on other parameters: `prunable` as in `hessian`. All others stay as they are.

        `pruning_limit` of it answers how far one layer, or one group of layers, can be pruned alone.

        Raises:
            ValueError: parameters, or numbers on the way from them to the loss, of fewer than 32 bits.

        Examples:
            >>> from jaxlimit import batched, hessian
            >>> def loss(params, x): return jnp.mean((x @ params["a"] @ params["b"]) ** 2) / 2
            >>> params = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 1))}
            >>> curvature = hessian(loss, params, batched(jnp.ones((1, 2)), 1))
            >>> curvature.dim, curvature.of(lambda path, leaf: path[0].key == "b").dim
            (9, 3)
        """
        weights, rest = partition(self.params, prunable)
        require_single_precision(weights)
        known = {*leaf_paths(self.weights)}
        if not known.issuperset(leaf_paths(weights)):
            # What lies between the others and the loss has not been looked at.
            require_precise(self.product.loss, weights, rest, next(iter(self.groups)))
        return replace(self, weights=weights, rest=rest)

    @cached_property
    def gradient(self) -> PyTree:
        """Gradient of the mean loss with respect to the weights, same tree; computed on first use."""
        return self._mean(self.product.gradient_sum)

    @property
    def loss_and_gradient(self) -> tuple[float, PyTree]:
        """The mean loss at the weights and its gradient, in one pass; for data that `loss` is not of."""
        loss, gradient = self._mean(self.product.loss_and_gradient_sum)
        return float(loss), gradient

    def mean_loss(self, weights: PyTree) -> float:
        """The mean loss itself at other weights, shaped like `weights`; all other parameters as they are."""
        found, weight = self.product.loss_sum(self.groups, weights, self.rest)
        return float(found) / weight

    @cached_property
    def rounding(self) -> float:
        """Relative error of a product, in units of ||H||: see `measured_rounding`; three products, once."""
        return measured_rounding(self.matvec, self.weights)

    def matvec(self, vector: PyTree) -> PyTree:
        """H v for one vector shaped like `weights`. Cost: about two gradients of the loss."""
        return _only(self.matmat(_block_of_one(vector)))

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
        vectors = jax.tree.map(_beside, vectors, self.weights)
        linear = self._linear_inside() if _any_tracer((vectors, self.weights)) else self.linear
        if linear is None:
            return self._mean(self.product.sum, vectors)
        return self.product.linear_mean(linear, self.total_weight, vectors)

    @cached_property
    def linear(self) -> list[LinearGroup] | None:
        """The batches, linearised at the weights; None for a stream, or where they do not fit the budget."""
        if not isinstance(self.groups, list):
            return None
        return linearize_groups(self.product, self.weights, self.rest, self.groups, self.linear_bytes)

    def _linear_inside(self) -> list[LinearGroup] | None:
        """The linearised batches within another compiled function: if they are there already.

        As constants of that function they must be small; as its arguments they need not.
        """
        linear = vars(self).get("linear")
        small = _any_tracer(linear) or num_bytes(linear) <= CONSTANT_BYTES
        return linear if small else None

    def dense(self) -> NDArray[np.float64]:
        """The matrix itself: see `dense_matrix`."""
        return dense_matrix(self.matmat, self.weights)

    def _mean(self, total: ExampleSum, *args: PyTree) -> PyTree:
        found, weight = total(self.groups, self.weights, self.rest, *args)
        if not isinstance(weight, Tracer):
            require_same_weight(self.product.weight, self.total_weight, weight)
        return mean_of_sum(found, self.total_weight)

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], tuple]:
        """Leaves are all arrays that there are, for `jax.tree`."""
        in_memory = isinstance(self.groups, list)
        known = vars(self)
        leaves = {
            "weights": self.weights,
            "rest": self.rest,
            "loss": self.loss,
            "groups": self.groups if in_memory else None,
            "linear": known.get("linear"),
            "gradient": known.get("gradient"),
        }
        names = jax.tree_util.GetAttrKey
        fixed = (
            self.num_examples,
            self.product,
            self.positive_semidefinite,
            self.linear_bytes,
            self.total_weight,
            None if in_memory else self.groups,
        )
        return [(names(name), value) for name, value in leaves.items()], fixed

    @classmethod
    def tree_unflatten(cls, fixed: tuple, leaves: Iterable[Any]) -> "Curvature":
        """The curvature with other leaves, for `jax.tree`."""
        num_examples, product, positive_semidefinite, linear_bytes, total_weight, stream = fixed
        weights, rest, loss, groups, linear, gradient = leaves
        groups = groups if stream is None else stream
        made = cls(
            weights,
            rest,
            groups,
            loss,
            num_examples,
            product,
            positive_semidefinite,
            linear_bytes,
            total_weight,
        )
        known = {"linear": linear, "gradient": gradient}
        vars(made).update({name: value for name, value in known.items() if value is not None})
        return made


def _beside(vectors: Any, weight: Any) -> jax.Array:
    """In the dtype of a weight, and divided as it is where that is part of its type."""
    if np.iscomplexobj(vectors):
        raise ValueError("vectors must be real, got complex ones: multiply real and imaginary parts apart.")
    if not isinstance(vectors, jax.Array) or vectors.dtype != weight.dtype:
        vectors = jnp.asarray(vectors, weight.dtype)
    sharding = sharding_like(weight, new_axes=1)
    explicit = explicit_sharding(jax.typeof(weight)) is not None and not isinstance(weight, Tracer)
    return jax.sharding.reshard(vectors, sharding) if explicit and sharding is not None else vectors


@jax.jit
def _block_of_one(vector: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x[None], vector)


@jax.jit
def _only(block: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x[0], block)


def _any_tracer(tree: PyTree) -> bool:
    return any(isinstance(x, Tracer) for x in jax.tree.leaves(tree))
