"""Trees of parameters: which leaves may be pruned, the two halves that this makes, and trees as vectors."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes
from jax.core import Tracer
from numpy.typing import ArrayLike, NDArray

from jaxlimit.core.checks import are_finite
from jaxlimit.core.sharding import place, sharding_like, to_host

PyTree = Any
Prunable = PyTree | Callable[[tuple, Any], bool]


def is_kernel(path: tuple, leaf: Any) -> bool:
    """The default of `prunable`: floating-point arrays with two or more dimensions.

    These are the kernels of dense and convolution layers; biases and normalisation have one dimension
    and stay out, as in the paper.
    """
    return np.ndim(leaf) >= 2 and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def partition(params: PyTree, prunable: Prunable = is_kernel) -> tuple[PyTree, PyTree]:
    """Splits params into prunable weights and the rest, each with None where the other has a leaf.

    Raises:
        ValueError: a tree of bools that does not match, nothing prunable, or prunable leaves that are
            not floating-point or not finite.

    Examples:
        >>> partition({"kernel": jnp.ones((1, 2)), "bias": jnp.ones(2)})[0]
        {'bias': None, 'kernel': Array([[1., 1.]], dtype=float32)}
    """
    if callable(prunable):
        chosen = jax.tree_util.tree_map_with_path(lambda path, x: bool(prunable(path, x)), params)
    else:
        chosen = prunable
        expected, got = jax.tree.structure(params), jax.tree.structure(prunable)
        if expected != got:
            raise ValueError(f"prunable does not match params: expected the tree {expected}, got {got}.")
    weights = jax.tree.map(lambda keep, x: jnp.asarray(x) if keep else None, chosen, params)
    rest = jax.tree.map(lambda keep, x: None if keep else x, chosen, params)
    _check_weights(weights)
    return weights, rest


def combine(weights: PyTree, rest: PyTree) -> PyTree:
    """The inverse of `partition`."""
    return jax.tree.map(lambda w, r: r if w is None else w, weights, rest, is_leaf=lambda x: x is None)


def _check_weights(weights: PyTree) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(weights)
    if not leaves:
        raise ValueError(
            "no prunable leaf: params has no floating-point array that `prunable` accepts (the default takes "
            "arrays of 2 or more dimensions)."
        )
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path)
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"prunable leaf {name} has dtype {jnp.result_type(leaf)}: floating-point needed."
            )
    known = [(path, leaf) for path, leaf in leaves if not isinstance(leaf, Tracer)]  # not under jit or grad
    with jax.ensure_compile_time_eval():
        finite = are_finite([leaf for _, leaf in known])
    for (path, _), is_finite in zip(known, finite, strict=True):
        if not is_finite:
            raise ValueError(f"prunable leaf {jax.tree_util.keystr(path)} holds NaN or infinite weights.")


def flatten(weights: PyTree) -> NDArray[np.float64]:
    """All leaves of a pytree, in `jax.tree.leaves` order, as one float64 vector on the host."""
    leaves = [to_host(leaf).astype(np.float64).ravel() for leaf in jax.tree.leaves(weights)]
    return np.concatenate(leaves) if leaves else np.zeros(0)


def unflatten(vector: ArrayLike, like: PyTree) -> PyTree:
    """The inverse of `flatten`: a vector cut into leaves of the shapes, dtypes and devices of `like`."""
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
    parts = np.split(np.asarray(vector), ends)
    return structure.unflatten(
        [
            place(part.reshape(x.shape).astype(dtypes.canonicalize_dtype(x.dtype)), sharding_like(x))
            for part, x in zip(parts, leaves, strict=True)
        ]
    )
