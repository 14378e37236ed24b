"""Masks that are no cut through an order of all weights: N:M patterns, and masks that are handed in."""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxlimit.core.checks import require_count
from jaxlimit.core.leaves import to_arrays
from jaxlimit.core.sharding import place, sharding_like, to_host
from jaxlimit.core.trees import PyTree


def nm_mask(weights: PyTree, n: int, m: int, axis: int = -2) -> PyTree:
    """N:M sparsity: of every m consecutive weights along an axis the n of largest magnitude are kept.

    Sparse tensor cores multiply 2:4 patterns at up to twice the speed, where they run along the axis that a
    matrix product sums over. That is axis -2, the inputs, of the kernels of Flax: (inputs, outputs) and
    (rows, columns, inputs, outputs). Kernels of PyTorch and Equinox have it in axis 1.

    A leaf whose axis m does not divide, as that of three input channels, is kept whole, as in NVIDIA's own
    library. So the sparsity may be less than 1 - n / m: `predicted_loss` tells it.

    Args:
        weights: pytree of the prunable weights, as `curvature.weights`; or of scores in their place.
        n: weights to keep of each m, from 1 to m.
        m: consecutive weights that share a choice.
        axis: along which they stand; the same for every leaf.

    Returns:
        Pytree of bools like `weights`; True = kept. Of equal magnitudes the ones of lower index go first, as
        in `magnitude_mask`.

    Raises:
        ValueError: n and m that are no such numbers; a leaf without this axis, or with weights that are not
            finite; no leaf whose axis m divides.

    Examples:
        >>> nm_mask(jnp.array([[1.0], [-4.0], [3.0], [2.0]]), 2, 4).ravel().tolist()
        [False, True, True, False]

    Source: Mishra et al. 2021, "Accelerating sparse deep neural networks", arXiv 2104.08378.
    """
    require_count("n", n)
    require_count("m", m)
    if n > m:
        raise ValueError(f"n must be at most m, got {n}:{m}.")
    if isinstance(axis, bool) or not isinstance(axis, (int, np.integer)):
        raise ValueError(f"axis must be an integer, got {axis!r}.")
    divided = []

    def kept(path: tuple, leaf: jax.Array) -> jax.Array:
        magnitudes, name = np.abs(to_host(leaf)), jax.tree_util.keystr(path) or "weights"
        if not -magnitudes.ndim <= axis < magnitudes.ndim:
            raise ValueError(f"axis {axis} does not exist in {name}, of shape {magnitudes.shape}.")
        if not np.all(np.isfinite(magnitudes.astype(np.float64))):
            raise ValueError(f"{name} holds weights that are not finite (NaN or infinity).")
        divides = magnitudes.shape[axis] % m == 0 and magnitudes.size > 0
        divided.append(divides)
        found = _largest(magnitudes, n, m, axis) if divides else np.ones(magnitudes.shape, bool)
        return place(found, sharding_like(leaf))

    mask = jax.tree_util.tree_map_with_path(kept, to_arrays("weights", weights))
    if not any(divided):
        shapes = [np.shape(leaf) for leaf in jax.tree.leaves(weights)]
        raise ValueError(
            f"m = {m} divides axis {axis} of no leaf, of shapes {shapes}: choose another m or another axis "
            "(1 for kernels of PyTorch and Equinox)."
        )
    return mask


def require_mask(weights: PyTree, mask: PyTree, *, numbers: bool = False) -> PyTree:
    """A mask of the weights, as arrays of bools; with `numbers` 0 and 1 of other dtypes are taken, too.

    Raises:
        ValueError: another tree, other shapes, or other values.

    Examples:
        >>> require_mask({"w": np.ones(2)}, {"w": np.array([1.0, 0.0])}, numbers=True)
        {'w': Array([ True, False], dtype=bool)}
    """
    mask = to_arrays("mask", mask)
    expected, got = (jax.tree.map(np.shape, tree) for tree in (weights, mask))
    values = [to_host(leaf) for leaf in jax.tree.leaves(mask)]
    are_bools = all(x.dtype == bool or (numbers and np.all((x == 0) | (x == 1))) for x in values)
    if expected != got or not are_bools:
        allowed = "bools (or 0 and 1)" if numbers else "bools"
        found = got if expected != got else "other values: scores are no mask, scores > threshold is one"
        raise ValueError(
            f"mask must hold {allowed} in the shapes of the prunable weights, as "
            f"magnitude_mask(curvature.weights, s) does: expected {expected}, got {found}."
        )
    return jax.tree.map(lambda x: jnp.asarray(x, bool), mask)


def _largest(magnitudes: NDArray, n: int, m: int, axis: int) -> NDArray[np.bool_]:
    """Bools, True at the n largest of every m along an axis."""
    last = np.moveaxis(magnitudes, axis, -1)
    groups = last.reshape(*last.shape[:-1], -1, m)
    order = np.argsort(groups, axis=-1, kind="stable")
    kept = np.ones(groups.shape, bool)
    np.put_along_axis(kept, order[..., : m - n], False, axis=-1)
    return np.moveaxis(kept.reshape(last.shape), -1, axis)
