"""Masks with an exact number of kept weights: pytrees of booleans like the prunable weights, True = kept."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from jaxlimit.core.trees import PyTree, flatten, unflatten
from jaxlimit.geometry.magnitude import num_removed


def kept_counts(weights: PyTree, sparsities: Sequence[float]) -> list[int]:
    """How many of the D weights stay at each sparsity s: D - floor(s D), as in magnitude pruning.

    Raises:
        ValueError: no sparsity, or one outside [0, 1), or so close to 1 that no weight stays.

    Examples:
        >>> kept_counts({"kernel": np.ones((3, 3))}, [0, 0.5])
        [9, 5]
    """
    if len(sparsities) == 0 or not all(0 <= sparsity < 1 for sparsity in sparsities):
        raise ValueError(f"sparsities must be one or more numbers from 0 to below 1, got {list(sparsities)}.")
    dim = size(weights)
    counts = [dim - int(num_removed(dim, sparsity)) for sparsity in sparsities]
    if not min(counts):
        raise ValueError(f"sparsities must leave one of the {dim} weights, got {max(sparsities)}.")
    return counts


def size(tree: PyTree) -> int:
    """Number of entries of all leaves."""
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(tree))


def count(mask: PyTree) -> int:
    """Number of weights that a mask keeps."""
    return sum(int(np.sum(np.asarray(leaf))) for leaf in jax.tree.leaves(mask))


def boolean(flat: Any, weights: PyTree) -> PyTree:
    """A vector of booleans, in the order of `flatten`, as a mask of these weights."""
    return unflatten(flat, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, bool), weights))


def keep_all(weights: PyTree) -> PyTree:
    """The mask of the dense network."""
    return boolean(np.ones(size(weights), bool), weights)


def keep_largest(scores: PyTree, num_kept: int, alive: PyTree | None = None) -> PyTree:
    """Mask of the `num_kept` largest scores in all leaves together; of equal ones the last by index.

    Cost: one stable sort on the host.

    Args:
        scores: pytree of numbers, of any sign.
        num_kept: from 0 to the number of those alive.
        alive: mask; what is False in it stays False.

    Raises:
        ValueError: more are to be kept than are alive.

    Examples:
        >>> keep_largest(np.array([3.0, -1.0, 5.0]), 2, alive=np.array([True, True, False]))
        Array([ True,  True, False], dtype=bool)
    """
    flat = flatten(scores)
    living = np.ones(flat.size, bool) if alive is None else flatten(alive) > 0
    if not 0 <= num_kept <= living.sum():
        raise ValueError(f"num_kept must lie between 0 and the {living.sum()} weights alive, got {num_kept}.")
    # The dead sort before all others.
    order = np.lexsort((flat, living))
    kept = np.zeros(flat.size, bool)
    kept[order[flat.size - num_kept :]] = True
    return boolean(kept, scores)


def random_mask(key: jax.Array, weights: PyTree, num_kept: int) -> PyTree:
    """Mask of `num_kept` weights drawn from all of them together, every choice equally likely.

    Examples:
        >>> int(random_mask(jax.random.key(0), np.ones((2, 3)), 4).sum())
        4
    """
    return boolean(np.asarray(jax.random.permutation(key, size(weights))) < num_kept, weights)


def layer_counts(mask: PyTree) -> dict[str, tuple[int, int]]:
    """By layer, how many weights it keeps and how many it has.

    Examples:
        >>> layer_counts({"layers": {"0": {"kernel": np.array([[True, False]]), "bias": None}}})
        {'layers.0.kernel': (1, 2)}
    """
    flat: dict[str, Any] = traverse_util.flatten_dict(mask, sep=".")
    return {
        name: (int(np.sum(np.asarray(leaf))), int(leaf.size))
        for name, leaf in flat.items()
        if leaf is not None
    }
