"""The precision that products really have: measured, not taken from the dtype of the weights.

For x that looks random and u = H x / ||H x||, products in exact arithmetic have

    H (x + u) = H x + H u,        x^T H u = u^T H x = ||H x||,

the first since they are linear, the second since H is symmetric. What is missing, in units of ||H u||, which
is near ||H|| after one step of the power iteration, is the error of a product.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxlimit.core.programs import Program
from jaxlimit.core.trees import PyTree
from jaxlimit.curvature.scattered import norm, scattered

# Relative error of products beyond which no small eigenvalue is left to be found.
HOPELESS = 1e-3


def measured_rounding(matvec: Callable[[PyTree], PyTree], weights: PyTree) -> float:
    """Relative error of a product in units of ||H||, at least machine epsilon. Cost: three products.

    Raises:
        ValueError: products are not linear or not symmetric, by more than a part in a thousand.
    """
    leaves, structure = jax.tree.flatten(weights)
    epsilon = max(float(jnp.finfo(x.dtype).eps) for x in leaves)
    start = _start(leaves)
    product = jax.tree.leaves(matvec(structure.unflatten(start)))
    direction, both = _direction(start, product)
    of_direction, of_both = (jax.tree.leaves(matvec(structure.unflatten(v))) for v in (direction, both))
    found = _errors(start, product, of_direction, of_both)
    scale, linear, symmetric = (float(x) for x in found)
    if not np.isfinite(scale) or scale == 0:
        return epsilon  # no product, no error: Lanczos says what is wrong with products that are not finite
    if linear > HOPELESS * scale:
        raise ValueError(
            f"products with the curvature are not linear: off by {linear / scale:.1g} of the largest, "
            "and limits need 0.001. Likely causes: matrix products in TF32 or bfloat16 "
            '(precision="default", or a precision that the network sets itself), a cast of activations to '
            "fewer than 32 bits, or a stream of batches that changes from pass to pass (shuffling, random "
            "augmentation)."
        )
    if symmetric > HOPELESS * scale:
        raise ValueError(
            f"products with the curvature are not symmetric: u.Hv and v.Hu differ by {symmetric / scale:.1g} "
            "of the largest, so H is no second derivative. Likely causes: a custom gradient that is not the "
            "gradient of the function (straight-through estimators, reversed or clipped gradients), or "
            'matrix products in TF32 or bfloat16 (precision="default").'
        )
    return max(epsilon, linear / scale / np.sqrt(3))  # the errors of three products


def require_symmetric(matrix: NDArray[np.float64]) -> None:
    """Raises ValueError where products, row by row, are not those of one symmetric matrix.

    The root mean square of the singular values of the antisymmetric part is what a product with a random
    vector is off by. It is compared with ||H||, from below by two steps of the power iteration.
    """
    dim = len(matrix)
    vector = matrix[np.argmax(np.sum(matrix**2, axis=1))]
    for _ in range(2):
        size = np.linalg.norm(vector)
        vector = matrix @ (vector / size) if size > 0 else vector
    scale, wrong = np.linalg.norm(vector), np.linalg.norm(matrix - matrix.T) / (2 * np.sqrt(dim))
    if wrong > HOPELESS * scale:
        raise ValueError(
            "products with the curvature are not those of one symmetric matrix: off by "
            f"{wrong / scale:.1g} of the largest, and limits need 0.001. Likely causes: a stream of batches "
            "that changes from pass to pass (shuffling, random augmentation), or a custom gradient that is "
            "not the gradient of the function."
        )


@Program
def _start(leaves: list[jax.Array]) -> list[jax.Array]:
    """A vector of length 1."""
    vectors = [scattered(x, seed) for seed, x in enumerate(leaves)]
    return [x / norm(vectors).astype(x.dtype) for x in vectors]


@Program
def _direction(start: list[jax.Array], product: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
    size = norm(product)
    size = jnp.where(size > 0, size, 1)
    direction = [x / size.astype(x.dtype) for x in product]
    return direction, [x + y for x, y in zip(start, direction, strict=True)]


@Program
def _errors(
    start: list[jax.Array], product: list[jax.Array], of_direction: list[jax.Array], of_both: list[jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The size of products, and what is missing of linearity and of symmetry."""
    terms = zip(product, of_direction, of_both, strict=True)
    linear = norm([both - one - other for one, other, both in terms])
    across = sum(jnp.sum(x * y) for x, y in zip(start, of_direction, strict=True))
    return jnp.maximum(norm(of_direction), norm(product)), linear, jnp.abs(across - norm(product))
