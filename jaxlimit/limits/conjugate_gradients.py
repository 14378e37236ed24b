r"""How low the quadratic loss can go on a given support: conjugate gradients on the kept weights.

With K the kept and P the removed coordinates, c the removed vector and H positive semidefinite,

    min over x in R^K of  (c - x)^T H (c - x) / 2,     solved by  H_KK x = H_KP c,

using products with H and masks only. Every iterate x gives an upper bound of the minimum.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxlimit.core.storage import Checkpoint
from jaxlimit.core.trees import PyTree
from jaxlimit.limits.budget import Budget, BudgetSpent
from jaxlimit.limits.problem import Problem

# Conjugate gradients stop when the last WINDOW products lowered the loss by less than DECISIVE of what
# would be needed to reach eps: the decision could then only change if convergence sped up a hundredfold.
WINDOW = 10
DECISIVE = 0.01


class NegativeCurvature(Exception):
    """A direction along which a matrix that was declared semidefinite has negative curvature; holds it."""


def readjusted_minimum(
    matvec: Callable[[PyTree], PyTree],
    removed: PyTree,
    mask: PyTree,
    start: PyTree,
    loss_tolerance: float,
    max_matvecs: int,
    accuracy: float = 1e-4,
    rounding: float = np.inf,
) -> tuple[float, float, PyTree]:
    """Whether readjusting the kept weights brings the quadratic loss down to eps.

    Stops as soon as that is decided. The upper bound holds to rounding. The lower one extrapolates the
    decrease of the last products, and is an estimate.

    Args:
        matvec: product with a positive semidefinite H.
        removed: c, a pytree that is zero on the kept weights.
        mask: pytree of bools, True on the kept weights.
        start: first guess of x (any pytree like c; only its kept part is used).
        loss_tolerance: eps > 0.
        max_matvecs: products at most; at least 1.
        accuracy: share of eps by which the last products must have lowered the loss for more to follow.
        rounding: how negative the curvature along a unit vector may be, for rounding.

    Returns:
        lower and upper bounds of the minimum, and the x that gives the upper one.

    Raises:
        FloatingPointError: a product is not finite.
        NegativeCurvature: a curvature is more negative than that.
    """
    kept = jax.tree.map(lambda keep, x: jnp.where(keep, x, 0), mask, start)
    vector = jax.tree.map(jnp.subtract, removed, kept)
    product = matvec(vector)
    loss = _curvature(vector, product, _inner(vector, vector), rounding) / 2
    residual = jax.tree.map(lambda keep, x: jnp.where(keep, x, 0), mask, product)
    direction, squared = residual, _inner(residual, residual)
    losses = [loss]
    for _ in range(max_matvecs - 1):
        recent = losses[-WINDOW - 1] - loss if len(losses) > WINDOW else np.inf
        undecided = recent > max(DECISIVE * (loss - loss_tolerance), accuracy * loss_tolerance)
        if loss <= loss_tolerance or squared == 0 or not undecided:
            break
        product = matvec(direction)
        curvature = _curvature(direction, product, _inner(direction, direction), rounding)
        if curvature <= 0:  # a flat direction, to rounding: nothing more to gain
            break
        step = squared / curvature
        kept = add_scaled(kept, direction, step)
        residual = jax.tree.map(
            lambda keep, r, p, s=step: jnp.where(keep, r - s * p, 0), mask, residual, product
        )
        loss = max(loss - step * squared / 2, 0.0)
        squared, previous = _inner(residual, residual), squared
        direction = add_scaled(residual, direction, squared / previous)
        losses.append(loss)
    recent = losses[-WINDOW - 1] - loss if len(losses) > WINDOW else loss
    return (loss if squared == 0 else max(0.0, loss - recent / DECISIVE * 0.99)), loss, kept


@dataclass
class ReadjustedLoss:
    """Bounds on min_x (c - x)^T H (c - x) / 2 as a function of n, from products within a budget.

    Every call starts from the x of the call before, and keeps its own in the checkpoint.

    Attributes:
        problem: order of the weights, and eps.
        budget: of products with a positive semidefinite H.
        store: where results are kept.
        accuracy, rounding: as in `readjusted_minimum`.
        start: the x of the last call; None before the first.
    """

    problem: Problem
    budget: Budget
    store: Checkpoint
    accuracy: float
    rounding: float = np.inf
    start: PyTree | None = None

    def __call__(self, num_removed: int) -> tuple[float, float]:
        """Lower and upper bound after n removals.

        Raises:
            BudgetSpent: the products left do not tell whether eps is reached.
            NegativeCurvature: the matrix is not semidefinite.
        """
        name, like = f"readjusted-{num_removed}", self.problem.order.like
        stored = self.store.load_tree(name, {"x": like, "bounds": np.zeros(3)})
        if stored is not None:
            self.start = jax.tree.map(jnp.asarray, stored["x"])
            lower, upper, used = map(float, stored["bounds"])
            self.budget.count += int(used)
            return lower, upper
        if self.budget.left < 1:
            raise BudgetSpent
        before, eps = self.budget.count, self.problem.loss_tolerance
        lower, upper, best = readjusted_minimum(
            self.budget.matvec,
            self.problem.order.removed_vector(num_removed),
            self.problem.order.mask(num_removed),
            jax.tree.map(jnp.zeros_like, like) if self.start is None else self.start,
            eps,
            self.budget.left,
            self.accuracy,
            self.rounding,
        )
        if self.budget.left < 1 and lower <= eps < upper:
            raise BudgetSpent
        self.start, used = best, self.budget.count - before
        self.store.save_tree(name, {"x": best, "bounds": np.array([lower, upper, used])})
        return lower, upper


@jax.jit
def inner_products(x: PyTree, y: PyTree) -> jax.Array:
    """Of each leaf of two vectors."""
    return jnp.stack(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), x, y)))


def _inner(x: PyTree, y: PyTree) -> float:
    value = float(np.sum(np.asarray(inner_products(x, y), np.float64)))
    if not np.isfinite(value):
        raise FloatingPointError("a product with the curvature is not finite: look for overflow in the loss.")
    return value


def _curvature(vector: PyTree, product: PyTree, squared_length: float, rounding: float) -> float:
    """V^T H v, at least 0 but for what is no rounding."""
    curvature = _inner(vector, product)
    if curvature < -rounding * squared_length:
        raise NegativeCurvature(curvature / squared_length)
    return max(curvature, 0.0)


@jax.jit
def add_scaled(x: PyTree, y: PyTree, factor: float) -> PyTree:
    """X + factor y."""
    return jax.tree.map(lambda a, b: a + jnp.asarray(factor, a.dtype) * b, x, y)
