"""What people put into batches and parameters, as arrays that JAX takes: of NumPy, PyTorch and their like.

Arrays of other libraries, and those of NumPy, can be written to after they were handed over, and JAX reads
such memory in place and late. `copied` keeps what they held.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes
from jax.core import Tracer
from numpy.typing import NDArray

PyTree = Any


def to_arrays(name: str, tree: PyTree) -> PyTree:
    """The same tree with arrays of JAX or NumPy as leaves, of dtypes that JAX has.

    Python numbers stay as they are. Mappings that are no pytrees become dictionaries.

    Args:
        name: of the tree, for messages.
        tree: pytree whose leaves may be of any library that gives its arrays to NumPy.

    Raises:
        ValueError: a leaf that is no dense array of numbers, or integers that 32 bits do not hold.

    Examples:
        >>> to_arrays("batch", {"x": np.ones(2, ">f8"), "label": [1, None]})
        {'label': [1, None], 'x': array([1., 1.], dtype=float32)}
        >>> to_arrays("batch", ["a"])
        Traceback (most recent call last):
        ...
        ValueError: batch[0] must be an array of numbers, got the str 'a': leave names and texts out ...
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _array(name + jax.tree_util.keystr(path), leaf), tree, is_leaf=_is_sparse
    )


def copied(tree: PyTree) -> PyTree:
    """Arrays on the device, which keep what those of the host hold now; arrays of JAX as they are."""
    return jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jax.device_put(np.array(x)), tree)


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array of numbers, of any library: no function, text or Python number."""
    if isinstance(leaf, (np.ndarray, np.generic)):
        return _has_numbers(leaf.dtype)
    return isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)) or _is_foreign(leaf)


def _array(name: str, leaf: Any) -> Any:
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct, bool, int, float, complex)):
        return leaf
    if isinstance(leaf, Mapping):
        return to_arrays(name, dict(leaf))
    if isinstance(leaf, np.ma.MaskedArray):
        raise ValueError(
            f"{name} is a masked array, whose mask JAX does not know: pass filled values, and the mask as an "
            "array of its own (weight_fn counts what is valid)."
        )
    if _is_sparse(leaf):
        raise ValueError(f"{name} is a sparse {type(leaf).__name__}: pass a dense array (todense, toarray).")
    if not (isinstance(leaf, (np.ndarray, np.generic)) or _is_foreign(leaf)):
        raise ValueError(_no_numbers(name, leaf))
    try:
        host = _on_host(leaf)
    except Exception as error:  # of any library, and of any kind
        raise ValueError(
            f"{name}, a {type(leaf).__name__}, cannot be read as an array: pass a NumPy array. "
            f"Its library says: {error}"
        ) from error
    if not _has_numbers(host.dtype):
        raise ValueError(_no_numbers(name, leaf))
    return _canonical(name, host)


def _no_numbers(name: str, leaf: Any) -> str:
    dtype = getattr(leaf, "dtype", None)
    found = f"the {type(leaf).__name__} {leaf!r:.50}" if dtype is None else f"dtype {dtype}"
    return f"{name} must be an array of numbers, got {found}: leave names and texts out of the batch."


def _on_host(leaf: Any) -> NDArray[Any]:
    """The values as NumPy's; they may share memory with the leaf."""
    if not _is_torch(leaf):
        return np.asarray(leaf)
    try:
        return leaf.numpy(force=True)
    except TypeError:  # of a dtype that NumPy lacks; float32 holds each of them exactly
        return leaf.float().numpy(force=True).astype(jnp.dtype(str(leaf.dtype).removeprefix("torch.")))


def _canonical(name: str, host: NDArray[Any]) -> NDArray[Any]:
    """In the byte order of the machine, and with the bits that JAX is set to."""
    host = host.astype(host.dtype.newbyteorder("="), copy=False)
    dtype = dtypes.canonicalize_dtype(host.dtype)
    if host.size and dtype != host.dtype and np.issubdtype(host.dtype, np.integer):
        bounds, least, largest = np.iinfo(dtype), host.min(), host.max()
        if least < bounds.min or largest > bounds.max:
            raise ValueError(
                f"{name} holds integers from {least} to {largest}, which {dtype} does not hold: set "
                "jax_enable_x64, or leave out what is only an identifier."
            )
    return host.astype(dtype, copy=False)


def _has_numbers(dtype: np.dtype) -> bool:
    """Whether JAX has this dtype, at least with 64 bits."""
    largest = 16 if np.issubdtype(dtype, np.complexfloating) else 8
    return dtype == np.bool_ or (jnp.issubdtype(dtype, jnp.number) and dtype.itemsize <= largest)


def _is_foreign(leaf: Any) -> bool:
    """Whether another library's array stands here."""
    return not isinstance(leaf, type) and (hasattr(leaf, "__array__") or _is_torch(leaf))


def _is_torch(leaf: Any) -> bool:
    return hasattr(leaf, "numpy") and hasattr(leaf, "detach")


def _is_sparse(leaf: Any) -> bool:
    """Of JAX, whose parts would be cut as if they were examples, or of SciPy."""
    module = type(leaf).__module__
    return module.startswith(("jax.experimental.sparse", "scipy.sparse"))


def as_bools(keep: Any) -> Any:
    """An array of a mask, of 0 and 1 as bools; a ValueError where it holds something else."""
    if jnp.issubdtype(jnp.result_type(keep), jnp.bool_):
        return keep
    if isinstance(keep, Tracer) or not bool(jnp.all((keep == 0) | (keep == 1))):
        raise ValueError(
            "mask must hold bools (or 0 and 1, outside of compiled functions): scores are no mask, "
            "scores > threshold is one."
        )
    return keep != 0
