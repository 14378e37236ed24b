"""Numbers that look random and are the same every time, for checks that need no key."""

import jax
import jax.numpy as jnp

from jaxlimit.core.programs import Program
from jaxlimit.core.trees import PyTree


def scattered(x: jax.Array, seed: int) -> jax.Array:
    """Numbers in [-1, 1) shaped like an array."""
    axes = [jax.lax.broadcasted_iota(jnp.float32, x.shape, axis) for axis in range(x.ndim)]
    angle = sum(((12.9898 + 65.2432 * axis) * index for axis, index in enumerate(axes)), jnp.float32(seed))
    return (2 * jnp.mod(43758.5453 * jnp.sin(angle), 1) - 1).astype(x.dtype)


def moved_weights(weights: PyTree, amount: float) -> PyTree:
    """Weights that are moved by about this share of their root mean square in each array."""
    leaves, structure = jax.tree.flatten(weights)
    return structure.unflatten(_move(leaves, amount))


def nudged_weights(weights: PyTree) -> PyTree:
    """Weights that differ in their last digits."""
    return moved_weights(weights, 8 * max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(weights)))


def norm(tree: PyTree) -> jax.Array:
    """Euclidean, of all leaves together."""
    return jnp.sqrt(sum(jnp.sum(jnp.abs(x) ** 2) for x in jax.tree.leaves(tree)))


@Program
def _move(leaves: list[jax.Array], amount: jax.Array) -> list[jax.Array]:
    def move(x: jax.Array, seed: int) -> jax.Array:
        scale = jnp.sqrt(jnp.mean(x**2))
        step = amount * jnp.where(scale > 0, scale, 1) * scattered(x, seed)
        return x + step.astype(x.dtype)

    return [move(x, seed) for seed, x in enumerate(leaves)]
