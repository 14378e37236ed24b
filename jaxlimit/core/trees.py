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
from jaxlimit.core.functions import Static
from jaxlimit.core.leaves import copied, is_array, to_arrays
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

    What is no array (an activation function, a number, a text) is part of the structure of the rest: it stays
    as it is, and can be no argument of a compiled function. `prunable` is asked about arrays alone.

    Raises:
        ValueError: a tree of bools that does not match, or that chooses parts of arrays; nothing prunable;
            prunable leaves that are not floating-point or not finite.

    Examples:
        >>> partition({"kernel": jnp.ones((1, 2)), "bias": jnp.ones(2)})[0]
        {'bias': None, 'kernel': Array([[1., 1.]], dtype=float32)}
    """
    params = jax.tree.map(lambda x: as_array(x) if is_array(x) else x, params)
    chosen = _chosen(params, prunable)
    weights = jax.tree.map(lambda keep, x: as_array(x) if keep else None, chosen, params)
    rest = jax.tree.map(lambda keep, x: None if keep else _fixed(x), chosen, params)
    _check_weights(weights)
    return weights, rest


def combine(weights: PyTree, rest: PyTree) -> PyTree:
    """The inverse of `partition`."""
    return thawed(jax.tree.map(lambda w, r: r if w is None else w, weights, rest, is_leaf=_is_none))


def frozen(params: PyTree) -> PyTree:
    """Params as arguments of a compiled function: what is no array becomes part of their structure."""
    return jax.tree.map(_fixed, params)


def thawed(params: PyTree) -> PyTree:
    """The inverse of `frozen`."""
    return jax.tree.map(
        lambda x: x.value if isinstance(x, Static) else x, params, is_leaf=lambda x: isinstance(x, Static)
    )


def as_array(leaf: Any) -> Any:
    """A leaf of any library, or a number, as an array on the device that nobody else writes to."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    found = to_arrays("a leaf of params", leaf)
    return copied(found) if isinstance(found, np.ndarray) else jnp.asarray(found)


def _fixed(leaf: Any) -> Any:
    return as_array(leaf) if is_array(leaf) else Static(leaf)


def _is_none(x: Any) -> bool:
    return x is None


def _chosen(params: PyTree, prunable: Prunable) -> PyTree:
    """Of each leaf whether it is prunable."""
    # A model of bools can be called, too: a function is what has no leaves but itself.
    if callable(prunable) and jax.tree_util.all_leaves([prunable]):

        def choose(path: tuple, leaf: Any) -> bool:
            return is_array(leaf) and bool(_whole(path, prunable(path, leaf)))

        return jax.tree_util.tree_map_with_path(choose, params)
    expected, got = jax.tree.structure(params), jax.tree.structure(prunable)
    if expected != got:
        raise ValueError(f"prunable does not match params: expected the tree {expected}, got {got}.")
    for path, keep in jax.tree_util.tree_leaves_with_path(prunable):
        if np.asarray(_whole(path, keep)).dtype != bool:
            raise ValueError(f"prunable must hold bools, got {keep!r} in {jax.tree_util.keystr(path)}.")
    return prunable


def _whole(path: tuple, keep: Any) -> Any:
    """What is said of an array, unless it is said of each of its entries."""
    if np.ndim(keep) == 0:
        return keep
    raise ValueError(
        f"prunable must say one bool for {jax.tree_util.keystr(path) or 'params'}, got a mask of shape "
        f"{np.shape(keep)}: an array is prunable as a whole. To hold single weights, give them the largest "
        "`scores`, or make them an array of their own."
    )


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


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """The arrays of numbers of a pytree, by names like layers.0.kernel.

    Raises:
        ValueError: two arrays have one name.
    """
    found: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not is_array(leaf) or jnp.issubdtype(getattr(leaf, "dtype", jnp.float32), dtypes.extended):
            continue  # a function, a text, a random key
        name = path_name(path)
        if name in found:
            raise ValueError(f"two arrays of params have the name {name}: a file holds one of each name.")
        found[name] = leaf
    return found


def named_arrays(tree: PyTree) -> dict[str, NDArray[Any]]:
    """The same on the host.

    Raises:
        ValueError: as `named_leaves`.
    """
    leaves = named_leaves(tree).items()
    return {name: np.ascontiguousarray(to_host(leaf)).reshape(np.shape(leaf)) for name, leaf in leaves}


def leaf_paths(tree: PyTree) -> list[tuple]:
    """The paths of all leaves, in `jax.tree.leaves` order."""
    return [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def leaf_names(tree: PyTree) -> list[str]:
    """Their names."""
    return [path_name(path) for path in leaf_paths(tree)]


def path_name(path: tuple) -> str:
    """The name of a leaf, such as layers.0.kernel; that of a tree which is one array is params."""
    return jax.tree_util.keystr(path, simple=True, separator=".") or "params"


def flatten(weights: PyTree) -> NDArray[np.float64]:
    """All leaves of a pytree, in `jax.tree.leaves` order, as one float64 vector on the host.

    Raises:
        ValueError: a complex leaf, of which one number is not enough.
    """
    leaves = [to_host(leaf) for leaf in jax.tree.leaves(weights)]
    if any(np.iscomplexobj(leaf) for leaf in leaves):
        raise ValueError("weights must be real, got complex ones: hold real and imaginary parts apart.")
    return np.concatenate([leaf.astype(np.float64).ravel() for leaf in leaves]) if leaves else np.zeros(0)


def unflatten(vector: ArrayLike, like: PyTree) -> PyTree:
    """The inverse of `flatten`: a vector cut into leaves of the shapes, dtypes and devices of `like`.

    Raises:
        ValueError: the vector has another number of entries.
    """
    leaves, structure = jax.tree.flatten(like)
    vector, ends = np.asarray(vector), np.cumsum([leaf.size for leaf in leaves], dtype=int)
    expected = (int(ends[-1]) if len(ends) else 0,)
    if vector.shape != expected:
        raise ValueError(f"vector must have shape {expected}, an entry for each weight, got {vector.shape}.")
    parts = np.split(vector, ends[:-1])
    return structure.unflatten(
        [
            place(part.reshape(x.shape).astype(dtypes.canonicalize_dtype(x.dtype)), sharding_like(x))
            for part, x in zip(parts, leaves, strict=True)
        ]
    )
