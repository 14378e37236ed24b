r"""Global magnitude pruning: which weights go at sparsity s, and how far that moves the weights.

One-shot magnitude pruning at sparsity s sets the floor(s D) smallest |w| to zero, ties broken by index.
The *removed vector* c(s) holds those weights, and R(s) = ||c(s)|| is the removed norm. One sort and one
cumulative sum give R(s) for every s.

Where groups of weights go together, a *removal* takes a group in the place of a single weight. Groups go in
the order of the root mean square of their weights, which does not depend on their sizes, and the sparsities
that can be reached are those after whole removals. Without groups a removal is a weight, and n removals
remove n weights.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxlimit.core.checks import require_range
from jaxlimit.core.leaves import as_bools
from jaxlimit.core.sharding import sharding_like, to_host
from jaxlimit.core.trees import PyTree, flatten, unflatten
from jaxlimit.geometry.groups import group_labels


@dataclass(frozen=True, eq=False)
class MagnitudeOrder:
    """The weights in the order in which magnitude pruning removes them, or another order put in its place.

    Attributes:
        order: (D,) indices into the flattened weights, smallest magnitude (or score) first, ties by index.
            Weights of one group stand beside each other.
        rank: (D,) the removal that takes each weight: weight i is gone after n removals iff rank[i] < n.
        squared_norm: (removals + 1,) R^2 after n = 0, 1, ... removals, float64.
        like: the pytree of weights, which gives its shape to masks and removed vectors.
        counts: (removals + 1,) how many weights n removals remove; n itself where single weights go.
    """

    order: NDArray[np.int64]
    rank: NDArray[np.int32]
    squared_norm: NDArray[np.float64]
    like: PyTree
    counts: Sequence[int]

    @property
    def dim(self) -> int:
        """Number of weights D."""
        return self.order.size

    @property
    def num_removals(self) -> int:
        """Number of removals that leave no weight: of weights D, or of groups."""
        return len(self.counts) - 1

    @property
    def num_zeros(self) -> int:
        """Number of removals that take nothing but zeros, as far as they are the first to go."""
        return int(np.sum(self.squared_norm[1:] == 0))

    def sparsity(self, num_removed: int) -> float:
        """S after n removals: the share of the weights that is gone."""
        return self.counts[num_removed] / self.dim

    def within(self, num_weights: int) -> int:
        """The most removals that remove no more than so many weights."""
        return bisect_right(self.counts, num_weights) - 1

    def per_removal(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """(removals,) sums over the weights that each takes, of (D,) values in the order of removal."""
        single = self.num_removals == self.dim
        return values if single else np.add.reduceat(values, np.asarray(self.counts[:-1]))

    def radius(self, num_removed: int) -> float:
        """R = ||c||, the norm of what the first n removals take."""
        return float(np.sqrt(self.squared_norm[num_removed]))

    def sort(self, tree: PyTree) -> NDArray[Any]:
        """(D,) the entries of a pytree like the weights, in the order in which the weights go."""
        return flatten(tree)[self.order]

    def removed_vector(self, num_removed: int) -> PyTree:
        """c(s) as a pytree: the weights that the first n removals take, and zero elsewhere. Cost O(D)."""
        flat = flatten(self.like)
        return unflatten(np.where(self.rank < num_removed, flat, 0.0), self.like)

    def mask(self, num_removed: int) -> PyTree:
        """Pytree of bools, False at the weights that the first n removals take. Cost O(D)."""
        booleans = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, bool, sharding=sharding_like(x)), self.like
        )
        return unflatten(self.rank >= num_removed, booleans)


def magnitude_order(weights: PyTree, scores: PyTree | None = None, groups: Any = None) -> MagnitudeOrder:
    """Sorts the weights by magnitude once; everything else in this module is read off it.

    Cost: one stable sort of D float64 numbers on the host; with groups one of D integers, too.

    Args:
        weights: pytree of the D prunable weights.
        scores: pytree of the same shapes whose magnitudes decide the order instead; None: the weights'.
        groups: which weights go together, as for `group_labels`; None: every weight by itself. A group goes
            in the order of the root mean square of its weights (or scores); of equal ones the one that
            begins first.

    Raises:
        ValueError: no weights, weights or scores that are not finite, scores of other shapes, or what
            `group_labels` refuses.

    Examples:
        >>> magnitude_order(np.array([3.0, -4.0, 1.0]), scores=np.array([2.0, 1.0, 3.0])).order.tolist()
        [1, 0, 2]
        >>> magnitude_order(np.array([3.0, -4.0, 1.0]), groups=np.array([0, 1, 0])).counts
        [0, 2, 3]
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
    if groups is not None:
        return _grouped(magnitudes, ranking, weights, group_labels(weights, groups))
    order = np.argsort(ranking, kind="stable")
    rank = np.empty(order.size, np.int32)
    rank[order] = np.arange(order.size, dtype=np.int32)
    squared_norm = np.concatenate([[0.0], np.cumsum(magnitudes[order] ** 2)])
    return MagnitudeOrder(order, rank, squared_norm, weights, range(order.size + 1))


def _grouped(
    magnitudes: NDArray[np.float64], ranking: NDArray[np.float64], weights: PyTree, labels: PyTree
) -> MagnitudeOrder:
    """The order in which whole groups go."""
    flat = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(labels)])
    _, begins, group, sizes = np.unique(flat, return_index=True, return_inverse=True, return_counts=True)
    mean_square = np.bincount(group, ranking**2) / sizes
    sequence = np.lexsort((begins, mean_square))
    rank = np.empty(len(sizes), np.int32)
    rank[sequence] = np.arange(len(sizes), dtype=np.int32)
    rank = rank[group]
    order = np.argsort(rank, kind="stable")
    counts = [0, *np.cumsum(sizes[sequence]).tolist()]
    squared_norm = np.concatenate([[0.0], np.cumsum(magnitudes[order] ** 2)])[counts]
    return MagnitudeOrder(order, rank, squared_norm, weights, counts)


def _magnitudes(tree: PyTree) -> NDArray[np.float64]:
    """(D,) |w| of real or complex entries."""
    return np.abs(flatten(jax.tree.map(lambda x: np.abs(to_host(x)) if np.iscomplexobj(x) else x, tree)))


def num_removed(dim: int, sparsity: ArrayLike) -> NDArray[np.int64]:
    """floor(s D), where a product near an integer counts as that integer.

    Near is within 1e-9 D, or within two roundings of a sparsity of fewer than 64 bits: without the allowance
    .29 * 100 = 28.999999999999996 would remove 28 weights, and the float32 of .9 eight of ten.

    Raises:
        ValueError: a sparsity outside [0, 1], no number, or a masked array.

    Examples:
        >>> int(num_removed(100, 0.29)), int(num_removed(10, np.float32(0.9)))
        (29, 9)
    """
    given = to_host(sparsity)
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


def removed_norm(
    weights: PyTree, sparsity: ArrayLike, *, scores: PyTree | None = None, groups: Any = None
) -> NDArray[np.float64]:
    r"""R(s) = ||c(s)||, the Euclidean norm of the floor(s D) smallest weights, accumulated in float64.

    Args:
        weights: pytree of the D prunable weights.
        sparsity: fraction of weights removed, in [0, 1]; a scalar or an array.
        scores: as for `magnitude_order`.
        groups: as for `magnitude_order`: as many whole groups go as do not exceed the sparsity.

    Returns:
        Norms of the shape of `sparsity`.

    Raises:
        ValueError: sparsity outside [0, 1], weights that are empty or not finite, or what `magnitude_order`
            refuses.

    Examples:
        >>> removed_norm({"kernel": np.array([3.0, -4.0, 12.0])}, [0, 2 / 3, 1])
        array([ 0.,  5., 13.])
    """
    order = magnitude_order(weights, scores, groups)
    counts = num_removed(order.dim, sparsity)
    if order.num_removals < order.dim:
        counts = np.searchsorted(order.counts, counts, side="right") - 1
    return np.sqrt(order.squared_norm[counts])


def magnitude_mask(
    weights: PyTree, sparsity: float, *, scores: PyTree | None = None, groups: Any = None
) -> PyTree:
    """Mask of global one-shot magnitude pruning: exactly floor(s D) weights are False, ties by index.

    Args:
        weights: pytree of the D prunable weights.
        sparsity: fraction of weights removed, in [0, 1].
        scores: as for `magnitude_order`.
        groups: as for `magnitude_order`: as many whole groups go as do not exceed the sparsity.

    Returns:
        Pytree of booleans shaped like `weights`; True = kept.

    Raises:
        ValueError: sparsity outside [0, 1], weights that are empty or not finite, or what `magnitude_order`
            refuses.

    Examples:
        >>> magnitude_mask(np.array([1.0, -1.0, 1.0, 2.0]), 0.5)
        Array([False, False,  True,  True], dtype=bool)
        >>> magnitude_mask(np.array([1.0, -1.0, 1.0, 2.0]), 0.5, groups=np.array([0, 1, 1, 0]))
        Array([ True, False, False,  True], dtype=bool)
    """
    require_range("sparsity", sparsity, np.ndim(sparsity) == 0, "one number in [0, 1]")
    order = magnitude_order(weights, scores, groups)
    return order.mask(order.within(int(num_removed(order.dim, sparsity))))


def apply_mask(params: PyTree, mask: PyTree) -> PyTree:
    """Sets to zero every weight whose mask is False; a None in the mask leaves that leaf as it is.

    Args:
        params: pytree of parameters.
        mask: the same pytree, or one with None in the place of leaves that are not pruned (as
            `magnitude_mask(curvature.weights, s)` gives it).

    Raises:
        ValueError: the trees do not match, or the mask holds something else than bools, or 0 and 1.

    Examples:
        >>> apply_mask({"w": jnp.ones(2), "b": jnp.ones(1)}, {"w": jnp.array([True, False]), "b": None})
        {'b': Array([1.], dtype=float32), 'w': Array([1., 0.], dtype=float32)}
    """

    def masked(keep: Any, leaf: Any) -> Any:
        if keep is None:
            return leaf
        if np.shape(keep) != np.shape(leaf):
            raise ValueError(f"mask has a leaf of shape {np.shape(keep)} where params has {np.shape(leaf)}.")
        return jnp.where(as_bools(keep), leaf, jnp.zeros_like(leaf))

    structure = jax.tree.structure(mask, is_leaf=lambda x: x is None)
    try:
        leaves = structure.flatten_up_to(params)
    except ValueError:
        raise ValueError(
            "mask must be a pytree like params, with None in the place of what is not pruned, as "
            f"magnitude_mask(curvature.weights, s): expected {jax.tree.structure(params)}, got {structure}."
        ) from None
    kept = structure.flatten_up_to(mask)
    return structure.unflatten([masked(keep, leaf) for keep, leaf in zip(kept, leaves, strict=True)])
