r"""Conjugate gradients on the kept coordinates, with products of the whole matrix and masks only.

min over x in R^K of  x^T g + x^T (G + mu I) x / 2,     solved by  (G_KK + mu I) x = -g_K
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlimit.core.trees import PyTree

# Products stop where the last WINDOW of them lowered the quadratic by less than FLAT of all that was gained:
# of the rule of Martens (2010, section 4.4) with a coarser FLAT, for the step is tried on the real loss next.
WINDOW, FLAT = 5, 0.01
# A residual that is so small a share of the first one is rounding, of float32.
ROUNDING = 1e-7


class Solution(NamedTuple):
    """A step on the kept coordinates.

    Attributes:
        step: x, zero elsewhere.
        decrease: of the quadratic, x^T g + x^T (G + mu I) x / 2 at 0 less at x; at least 0.
        num_products: products with G.
    """

    step: PyTree
    decrease: float
    num_products: int


def solve(
    matvec: Callable[[PyTree], PyTree], gradient: PyTree, mask: PyTree, damping: float, max_products: int
) -> Solution:
    """The step that lowers the damped quadratic, no more accurate than a step on the real loss deserves.

    Args:
        matvec: product with a positive semidefinite G.
        gradient: g.
        mask: pytree of bools, True on the kept coordinates.
        damping: mu >= 0, in units of G.
        max_products: at most.

    Examples:
        >>> scale = jnp.array([1.0, 2.0, 4.0])
        >>> mask = jnp.array([True, True, False])
        >>> found = solve(lambda v: scale * v, jnp.array([1.0, 1.0, 1.0]), mask, 0.0, 10)
        >>> found.step.round(4).tolist(), round(found.decrease, 4), found.num_products
        ([-1.0, -0.5, 0.0], 0.75, 2)
    """
    residual = kept(mask, jax.tree.map(jnp.negative, gradient))
    step, direction = jax.tree.map(jnp.zeros_like, residual), residual
    squared, decreases = inner(residual, residual), [0.0]
    least = ROUNDING**2 * squared
    while squared > least and len(decreases) <= max_products and not _is_flat(decreases):
        product = matvec(direction)
        curvature = inner(direction, product) + damping * inner(direction, direction)
        if not curvature > 0:  # for rounding, or a product that is not finite
            break
        length = squared / curvature
        step, residual = _advanced(step, residual, direction, product, mask, length, damping)
        decreases.append(decreases[-1] + length * squared / 2)
        squared, before = inner(residual, residual), squared
        direction = _next_direction(residual, direction, squared / before)
    return Solution(step, decreases[-1], len(decreases) - 1)


def _is_flat(decreases: list[float]) -> bool:
    return len(decreases) > WINDOW and decreases[-1] - decreases[-1 - WINDOW] < FLAT * decreases[-1]


@jax.jit
def kept(mask: PyTree, x: PyTree) -> PyTree:
    """The entries whose mask is True, zero elsewhere."""
    return jax.tree.map(lambda keep, a: jnp.where(keep, a, 0), mask, x)


@jax.jit
def _advanced(
    step: PyTree,
    residual: PyTree,
    direction: PyTree,
    product: PyTree,
    mask: PyTree,
    length: float,
    damping: float,
) -> tuple[PyTree, PyTree]:
    def along(x: jax.Array, d: jax.Array) -> jax.Array:
        return x + jnp.asarray(length, x.dtype) * d

    def left(keep: jax.Array, r: jax.Array, p: jax.Array, d: jax.Array) -> jax.Array:
        return jnp.where(keep, r - jnp.asarray(length, r.dtype) * (p + jnp.asarray(damping, r.dtype) * d), 0)

    return jax.tree.map(along, step, direction), jax.tree.map(left, mask, residual, product, direction)


@jax.jit
def _next_direction(residual: PyTree, direction: PyTree, factor: float) -> PyTree:
    return jax.tree.map(lambda r, d: r + jnp.asarray(factor, r.dtype) * d, residual, direction)


@jax.jit
def _inner_products(x: PyTree, y: PyTree) -> jax.Array:
    return jnp.stack(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), x, y)))


def inner(x: PyTree, y: PyTree) -> float:
    """Inner product of two vectors; sums over leaves are float64."""
    return float(np.sum(np.asarray(_inner_products(x, y), np.float64)))
