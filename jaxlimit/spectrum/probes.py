"""Random sign vectors: their mean z^T F z / D is the trace of F over D."""

from collections.abc import Callable, Iterator
from functools import cache

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxlimit.core.sharding import sharding_like
from jaxlimit.core.trees import PyTree
from jaxlimit.curvature.operator import Curvature


def rademacher(key: jax.Array, like: PyTree, num_probes: int) -> PyTree:
    """Random sign vectors along a leading axis, shaped and placed like the leaves of `like`."""
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten([_signs(k, x, num_probes) for k, x in zip(keys, leaves, strict=True)])


def signed_products(curvature: Curvature, key: jax.Array, number: int) -> Iterator[tuple[PyTree, PyTree]]:
    """(z, H z) of so many random sign vectors z, one by one."""
    for probe in jax.random.split(key, number):
        sign = jax.tree.map(lambda z: z[0], rademacher(probe, curvature.weights, 1))
        yield sign, curvature.matvec(sign)


def _signs(key: jax.Array, like: jax.Array, num_probes: int) -> jax.Array:
    sharding = sharding_like(like, new_axes=1)
    return _drawn(sharding)(key, (num_probes, *like.shape), like.dtype)


@cache
def _drawn(sharding: NamedSharding | None) -> Callable[..., jax.Array]:
    """Signs that are drawn on the devices where they are to lie."""
    return jax.jit(_signs_of_bits, static_argnums=(1, 2), out_shardings=sharding)


def _signs_of_bits(key: jax.Array, shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    # The signs of jax.random.rademacher, which under x64 would draw them in float64.
    return 1 - 2 * (jax.random.bits(key, shape, np.uint32) >> 31).astype(dtype)
