"""A matrix of which only products are known, written out: for small networks, and for tests."""

import math
from collections.abc import Callable

import jax
import numpy as np
from numpy.typing import NDArray

from jaxlimit.core.sharding import to_host
from jaxlimit.core.trees import PyTree
from jaxlimit.curvature.rounding import require_symmetric

BLOCK_SIZE = 16


def num_dense_products(dim: int) -> int:
    """Products that `dense_matrix` takes: D, up to a whole number of blocks.

    Examples:
        >>> [num_dense_products(dim) for dim in (5, 16, 17)]
        [5, 16, 32]
    """
    return dim if dim < BLOCK_SIZE else math.ceil(dim / BLOCK_SIZE) * BLOCK_SIZE


def dense_matrix(
    matmat: Callable[[PyTree], PyTree], like: PyTree, block_size: int = BLOCK_SIZE
) -> NDArray[np.float64]:
    """The symmetric matrix behind products, symmetrised, in the order of the flattened weights.

    Cost: `num_dense_products(D)` products, in blocks of `block_size`; memory 8 D^2 bytes on the host.

    Raises:
        FloatingPointError: a product is not finite.
        ValueError: the products are not those of one symmetric matrix, by more than a part in a thousand.

    Examples:
        >>> dense_matrix(lambda v: 3 * v, np.ones(2)).tolist()
        [[3.0, 0.0], [0.0, 3.0]]
    """
    dim = sum(x.size for x in jax.tree.leaves(like))
    matrix = np.empty((dim, dim))
    for start in range(0, dim, block_size):
        # The last block overlaps the one before, so that all have one shape and compile once.
        first = max(0, min(start, dim - block_size))
        rows = np.arange(first, min(first + block_size, dim))
        product = jax.tree.leaves(matmat(unit_vectors(rows, like)))
        matrix[rows] = np.concatenate(
            [to_host(x).reshape(len(rows), math.prod(x.shape[1:])) for x in product], 1
        )
        if not np.all(np.isfinite(matrix[rows])):
            raise FloatingPointError(
                "a product with the curvature is not finite: look for overflow in the loss."
            )
    require_symmetric(matrix)
    return (matrix + matrix.T) / 2


def unit_vectors(indices: NDArray[np.integer], like: PyTree) -> PyTree:
    """e_i for each index i of the flattened weights, along a leading axis, on the host.

    Examples:
        >>> unit_vectors(np.array([2, 0]), {"a": np.zeros(2), "b": np.zeros((1, 1))})["a"].tolist()
        [[0.0, 0.0], [1.0, 0.0]]
    """
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([x.size for x in leaves])
    parts = np.split(indices[:, None] == np.arange(ends[-1]), ends[:-1], 1)
    return structure.unflatten(
        [part.reshape(len(indices), *x.shape).astype(x.dtype) for part, x in zip(parts, leaves, strict=True)]
    )
