r"""Global magnitude pruning: which weights go at sparsity s, and how far that moves the weights.

One-shot magnitude pruning at sparsity s sets the floor(s D) smallest |w| to zero, ties broken by index.
The *removed vector* c(s) holds those weights, and R(s) = ||c(s)|| is the removed norm. One sort and one
cumulative sum give R(s) for every s.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxlimit.core.sharding import sharding_like, to_host
from jaxlimit.core.trees import PyTree, flatten, unflatten


@dataclass(frozen=True, eq=False)
class MagnitudeOrder:
    """The weights in the order in which magnitude pruning removes them, or another order put in its place.

    Attributes:
        order: (D,) indices into the flattened weights, smallest magnitude (or score) first, ties by index.
        rank: (D,) inverse of `order`: weight i is removed iff rank[i] < floor(s D).
        squared_norm: (D + 1,) R^2 after removing n = 0 ... D weights, float64.
        like: the pytree of weights, which gives its shape to masks and removed vectors.
    """

    order: NDArray[np.int64]
    rank: NDArray[np.int32]
    squared_norm: NDArray[np.float64]
    like: PyTree

    @property
    def dim(self) -> int:
        """Number of weights D."""
        return self.order.size

    @property
    def num_zeros(self) -> int:
        """Number of weights that are exactly zero, as far as they are the first to go."""
        return int(np.sum(self.squared_norm[1:] == 0))

    def radius(self, num_removed: int) -> float:
        """R = ||c||, the norm of the first `num_removed` weights to go."""
        return float(np.sqrt(self.squared_norm[num_removed]))

    def sort(self, tree: PyTree) -> NDArray[Any]:
        """(D,) the entries of a pytree like the weights, in the order in which the weights go."""
        return flatten(tree)[self.order]

    def removed_vector(self, num_removed: int) -> PyTree:
        """c(s) as a pytree: the first `num_removed` weights to go, and zero elsewhere. Cost O(D)."""
        flat = flatten(self.like)
        return unflatten(np.where(self.rank < num_removed, flat, 0.0), self.like)

    def mask(self, num_removed: int) -> PyTree:
        """Pytree of bools, False at the first `num_removed` weights to go. Cost O(D)."""
        booleans = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, bool, sharding=sharding_like(x)), self.like
        )
        return unflatten(self.rank >= num_removed, booleans)


def magnitude_order(weights: PyTree, scores: PyTree | None = None) -> MagnitudeOrder:
    """Sorts the weights by magnitude once; everything else in this module is read off it.

    Cost: one stable sort of D float64 numbers on the host.

    Args:
        weights: pytree of the D prunable weights.
        scores: pytree of the same shapes whose magnitudes decide the order instead; None: the weights'.

    Raises:
        ValueError: no weights, weights or scores that are not finite, or scores of other shapes.

    Examples:
        >>> magnitude_order(np.array([3.0, -4.0, 1.0]), scores=np.array([2.0, 1.0, 3.0])).order.tolist()
        [1, 0, 2]
    """
    magnitudes = _magnitudes(weights)
    if magnitudes.size == 0:
        raise ValueError("weights has no leaves: there is nothing to prune.")
    if not np.all(np.isfinite(magnitudes)):
        raise ValueError(f"{int(np.sum(~np.isfinite(magnitudes)))} weights are not finite (NaN or infinity).")
    ranking = magnitudes
    if scores is not None:
        expected, got = (jax.tree.map(np.shape, tree) for tree in (weights, scores))
        if expected != got:
            raise ValueError(f"scores must have the shapes of weights, {expected}, got {got}.")
        ranking = _magnitudes(scores)
        if not np.all(np.isfinite(ranking)):
            raise ValueError(f"{int(np.sum(~np.isfinite(ranking)))} scores are not finite (NaN or infinity).")
    order = np.argsort(ranking, kind="stable")
    rank = np.empty(order.size, np.int32)
    rank[order] = np.arange(order.size, dtype=np.int32)
    squared_norm = np.concatenate([[0.0], np.cumsum(magnitudes[order] ** 2)])
    return MagnitudeOrder(order, rank, squared_norm, weights)


def _magnitudes(tree: PyTree) -> NDArray[np.float64]:
    """(D,) |w| of real or complex entries."""
    return np.abs(flatten(jax.tree.map(lambda x: np.abs(to_host(x)) if np.iscomplexobj(x) else x, tree)))


def num_removed(dim: int, sparsity: ArrayLike) -> NDArray[np.int64]:
    """floor(s D), where a product near an integer counts as that integer.

    Near is within 1e-9 D, or within two roundings of a sparsity of fewer than 64 bits: without the allowance
    .29 * 100 = 28.999999999999996 would remove 28 weights, and the float32 of .9 eight of ten.

    Raises:
        ValueError: a sparsity outside [0, 1], or no number.

    Examples:
        >>> int(num_removed(100, 0.29)), int(num_removed(10, np.float32(0.9)))
        (29, 9)
    """
    given = np.asarray(sparsity)
    if not (jnp.issubdtype(given.dtype, np.floating) or given.dtype.kind in "iu"):
        raise ValueError(f"sparsity must be numbers in [0, 1], got {sparsity!r:.80}.")
    sparsity = given.astype(np.float64)
    if not np.all((sparsity >= 0) & (sparsity <= 1)):
        raise ValueError(f"sparsity must lie in [0, 1], got {sparsity}.")
    coarse = jnp.issubdtype(given.dtype, np.floating) and jnp.finfo(given.dtype).bits < 64
    allowance = max(1e-9, 2 * float(jnp.finfo(given.dtype).eps) if coarse else 0.0)
    product = sparsity * dim
    near = np.round(product)
    counts = np.where(np.abs(product - near) <= allowance * dim, near, np.floor(product))
    return counts.astype(np.int64)[()]


def removed_norm(weights: PyTree, sparsity: ArrayLike) -> NDArray[np.float64]:
    r"""R(s) = ||c(s)||, the Euclidean norm of the floor(s D) smallest weights, accumulated in float64.

    Args:
        weights: pytree of the D prunable weights.
        sparsity: fraction of weights removed, in [0, 1]; a scalar or an array.

    Returns:
        Norms of the shape of `sparsity`.

    Raises:
        ValueError: sparsity outside [0, 1], or weights that are empty or not finite.

    Examples:
        >>> removed_norm({"kernel": np.array([3.0, -4.0, 12.0])}, [0, 2 / 3, 1])
        array([ 0.,  5., 13.])
    """
    order = magnitude_order(weights)
    return np.sqrt(order.squared_norm[num_removed(order.dim, sparsity)])


def magnitude_mask(weights: PyTree, sparsity: float) -> PyTree:
    """Mask of global one-shot magnitude pruning: exactly floor(s D) weights are False, ties by index.

    Args:
        weights: pytree of the D prunable weights.
        sparsity: fraction of weights removed, in [0, 1].

    Returns:
        Pytree of booleans shaped like `weights`; True = kept.

    Raises:
        ValueError: sparsity outside [0, 1], or weights that are empty or not finite.

    Examples:
        >>> magnitude_mask(np.array([1.0, -1.0, 1.0, 2.0]), 0.5)
        Array([False, False,  True,  True], dtype=bool)
    """
    order = magnitude_order(weights)
    return order.mask(int(num_removed(order.dim, sparsity)))


def apply_mask(params: PyTree, mask: PyTree) -> PyTree:
    """Sets to zero every weight whose mask is False; a None in the mask leaves that leaf as it is.

    Args:
        params: pytree of parameters.
        mask: the same pytree, or one with None in the place of leaves that are not pruned (as
            `magnitude_mask(curvature.weights, s)` gives it).

    Raises:
        ValueError: the trees do not match.

    Examples:
        >>> apply_mask({"w": jnp.ones(2), "b": jnp.ones(1)}, {"w": jnp.array([True, False]), "b": None})
        {'b': Array([1.], dtype=float32), 'w': Array([1., 0.], dtype=float32)}
    """

    def masked(keep: Any, leaf: Any) -> Any:
        if keep is None:
            return leaf
        if np.shape(keep) != np.shape(leaf):
            raise ValueError(f"mask has a leaf of shape {np.shape(keep)} where params has {np.shape(leaf)}.")
        return jnp.where(keep, leaf, jnp.zeros_like(leaf))

    return jax.tree.map(masked, mask, params, is_leaf=lambda x: x is None)
