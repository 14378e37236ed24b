r"""How low the quadratic loss can go on a given support: conjugate gradients on the kept weights.

With K the kept and P the removed coordinates, c the removed vector and H positive semidefinite,

    min over x in R^K of  (c - x)^T H (c - x) / 2,     solved by  H_KK x = H_KP c,

using products with H and masks only. Every iterate x gives an upper bound of the minimum.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

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


class Iterate(NamedTuple):
    """Where conjugate gradients are.

    Attributes:
        step: x, zero on the removed coordinates.
        decrease: by how much x lowers the quadratic x^T (H + mu I) x / 2 - x^T r.
        squared: ||r - (H + mu I) x||^2 on the kept coordinates.
    """

    step: PyTree
    decrease: float
    squared: float


def iterates(
    matvec: Callable[[PyTree], PyTree],
    residual: PyTree,
    mask: PyTree,
    damping: float = 0.0,
    rounding: float = np.inf,
) -> Iterator[Iterate]:
    """Conjugate gradients on (H_KK + mu I) x = r_K: the start, x = 0, and one more after each product.

    They end where nothing is left to solve, or in a direction without curvature.

    Args:
        matvec: product with a positive semidefinite H.
        residual: r.
        mask: pytree of bools, True on the kept coordinates K.
        damping: mu >= 0, in units of H.
        rounding: how negative the curvature along a unit vector may be, for rounding.

    Raises:
        FloatingPointError: a product is not finite.
        NegativeCurvature: a curvature is more negative than that.

    Examples:
        >>> scale, mask = jnp.array([1.0, 2.0, 4.0]), jnp.array([True, True, False])
        >>> *_, last = iterates(lambda v: scale * v, jnp.ones(3), mask)
        >>> print(last.step.round(3), round(last.decrease, 6))
        [1.  0.5 0. ] 0.75
    """
    residual = kept(mask, residual)
    step, direction = jax.tree.map(jnp.zeros_like, residual), residual
    squared, decrease = inner(residual, residual), 0.0
    yield Iterate(step, decrease, squared)
    while squared > 0:
        product, length = matvec(direction), inner(direction, direction)
        curvature = _curvature(direction, product, length, rounding) + damping * length
        if curvature <= 0:
            return
        factor = squared / curvature
        step = add_scaled(step, direction, factor)
        residual = _left(mask, residual, product, direction, factor, damping)
        decrease += factor * squared / 2
        squared, before = inner(residual, residual), squared
        yield Iterate(step, decrease, squared)
        direction = add_scaled(residual, direction, squared / before)


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
    start = kept(mask, start)
    vector = jax.tree.map(jnp.subtract, removed, start)
    product = matvec(vector)
    first = max(_curvature(vector, product, inner(vector, vector), rounding), 0.0) / 2
    steps = iterates(matvec, product, mask, rounding=rounding)
    losses, found = [first], next(steps)
    while len(losses) < max_matvecs and losses[-1] > loss_tolerance:
        loss = losses[-1]
        recent = losses[-WINDOW - 1] - loss if len(losses) > WINDOW else np.inf
        if not recent > max(DECISIVE * (loss - loss_tolerance), accuracy * loss_tolerance):
            break
        following = next(steps, None)
        if following is None:
            break
        found = following
        losses.append(max(first - found.decrease, 0.0))
    loss = losses[-1]
    recent = losses[-WINDOW - 1] - loss if len(losses) > WINDOW else loss
    lower = loss if found.squared == 0 else max(0.0, loss - recent / DECISIVE * 0.99)
    return lower, loss, jax.tree.map(jnp.add, start, found.step)


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


def inner(x: PyTree, y: PyTree) -> float:
    """Inner product of two vectors; sums over leaves are float64."""
    value = float(np.sum(np.asarray(inner_products(x, y), np.float64)))
    if not np.isfinite(value):
        raise FloatingPointError("a product with the curvature is not finite: look for overflow in the loss.")
    return value


def _curvature(vector: PyTree, product: PyTree, squared_length: float, rounding: float) -> float:
    """V^T H v; no more negative than rounding makes it."""
    curvature = inner(vector, product)
    if curvature < -rounding * squared_length:
        raise NegativeCurvature(curvature / squared_length)
    return curvature


@jax.jit
def kept(mask: PyTree, x: PyTree) -> PyTree:
    """The entries whose mask is True, zero elsewhere."""
    return jax.tree.map(lambda keep, a: jnp.where(keep, a, 0), mask, x)


@jax.jit
def _left(
    mask: PyTree, residual: PyTree, product: PyTree, direction: PyTree, factor: float, damping: float
) -> PyTree:
    """The residual after a step along a direction, on the kept coordinates."""

    def left(keep: jax.Array, r: jax.Array, p: jax.Array, d: jax.Array) -> jax.Array:
        step = jnp.asarray(factor, r.dtype) * (p + jnp.asarray(damping, r.dtype) * d)
        return jnp.where(keep, r - step, 0)

    return jax.tree.map(left, mask, residual, product, direction)


@jax.jit
def add_scaled(x: PyTree, y: PyTree, factor: float) -> PyTree:
    """X + factor y."""
    return jax.tree.map(lambda a, b: a + jnp.asarray(factor, a.dtype) * b, x, y)
