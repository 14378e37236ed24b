"""Random sign vectors: their mean z^T F z / D is the trace of F over D."""

from functools import partial

import jax
import numpy as np

from jaxlimit.core.sharding import sharding_like
from jaxlimit.core.trees import PyTree


def rademacher(key: jax.Array, like: PyTree, num_probes: int) -> PyTree:
    """Random sign vectors along a leading axis, shaped and placed like the leaves of `like`."""
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    signs = [
        _signs(k, (num_probes, *x.shape), x.dtype, sharding_like(x, new_axes=1))
        for k, x in zip(keys, leaves, strict=True)
    ]
    return structure.unflatten(signs)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _signs(
    key: jax.Array, shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding | None
) -> jax.Array:
    # The signs of jax.random.rademacher, which under x64 would draw them in float64.
    signs = 1 - 2 * (jax.random.bits(key, shape, np.uint32) >> 31).astype(dtype)
    return signs if sharding is None else jax.lax.with_sharding_constraint(signs, sharding)
