r"""How low the quadratic loss can go on a given support: conjugate gradients on the kept weights.

With K the kept and P the removed coordinates, c the removed vector and H positive semidefinite,

    min over x in R^K of  (c - x)^T H (c - x) / 2,     solved by  H_KK x = H_KP c,

using products with H and masks only. Every iterate x gives an upper bound of the minimum.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlimit.core.storage import Checkpoint
from jaxlimit.core.trees import PyTree
from jaxlimit.limits.budget import Budget, BudgetSpent
from jaxlimit.limits.conjugate_directions import Directions
from jaxlimit.limits.problem import Problem

# Conjugate gradients stop when the last WINDOW products lowered the loss by less than DECISIVE of what
# would be needed to reach eps: the decision could then only change if convergence sped up a hundredfold.
WINDOW = 10
DECISIVE = 0.01
# A residual is orthogonal to all directions before, until rounding is all that is left of it. Its own
# direction is kept while that shows by no more than this share.
MIXED = 0.1


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
    known: Directions | None = None,
) -> Iterator[Iterate]:
    """Conjugate gradients on (H_KK + mu I) x = r_K: the start, x = 0, and one more after each product.

    They end where nothing is left to solve, or in a direction without curvature.

    Args:
        matvec: product with a positive semidefinite H.
        residual: r.
        mask: pytree of bools, True on the kept coordinates K.
        damping: mu >= 0, in units of H.
        rounding: how negative the curvature along a unit vector may be, for rounding.
        known: directions on K to which r is orthogonal already. New ones are made conjugate to them and join
            them, unless rounding hides their curvature. Only without damping.

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
    step = jax.tree.map(jnp.zeros_like, residual)
    direction = residual if known is None else known.without(residual)
    squared, decrease = inner(residual, residual), 0.0
    yield Iterate(step, decrease, squared)
    while squared > 0:
        product, length = matvec(direction), inner(direction, direction)
        curvature = _curvature(direction, product, length, rounding) + damping * length
        if curvature <= 0:
            return
        along = squared if known is None else inner(residual, direction)
        factor = along / curvature
        step = add_scaled(step, direction, factor)
        residual = _left(mask, residual, product, direction, factor, damping)
        decrease += factor * along / 2
        if known is not None and curvature > rounding * length and abs(along - squared) < MIXED * squared:
            known.add(direction, product, curvature)
        squared, before = inner(residual, residual), squared
        yield Iterate(step, decrease, squared)
        direction = add_scaled(residual, direction, squared / before)
        if known is not None:
            direction = known.without(direction)


def readjusted_minimum(
    matvec: Callable[[PyTree], PyTree],
    removed: PyTree,
    mask: PyTree,
    start: PyTree,
    loss_tolerance: float,
    max_matvecs: int,
    accuracy: float = 1e-4,
    rounding: float = np.inf,
    known: Directions | None = None,
) -> tuple[float, float, PyTree]:
    """Whether readjusting the kept weights brings the quadratic loss down to eps.

    Stops as soon as that is decided. Where the first guess does not come down to eps, c as it is gets a try,
    too: in single precision a guess may hold errors along stiff directions that are never got rid of. The
    upper bound holds to rounding. The lower one extrapolates the decrease of the last products, and is an
    estimate.

    Args:
        matvec: product with a positive semidefinite H.
        removed: c, a pytree that is zero on the kept weights.
        mask: pytree of bools, True on the kept weights.
        start: first guess of x (any pytree like c; only its kept part is used).
        loss_tolerance: eps > 0.
        max_matvecs: products at most; at least 1.
        accuracy: share of eps by which the last products must have lowered the loss for more to follow.
        rounding: how negative the curvature along a unit vector may be, for rounding.
        known: conjugate directions of earlier calls, which save products; those of this call join them.

    Returns:
        lower and upper bounds of the minimum, and the x that gives the upper one.

    Raises:
        FloatingPointError: a product is not finite.
        NegativeCurvature: a curvature is more negative than that.
    """
    guess = kept(mask, start)
    vector = jax.tree.map(jnp.subtract, removed, guess)
    search = partial(_search, matvec, mask, loss_tolerance, accuracy, rounding)
    found = search(vector if known is None else known.without(vector), max_matvecs, known)
    left = max_matvecs - found.num_matvecs
    if found.upper > loss_tolerance and left > 0 and inner(guess, guess) > 0:
        again = search(removed, left, None, found.upper)
        found = min(found, again, key=lambda x: x.upper)
    return found.lower, found.upper, jax.tree.map(jnp.subtract, removed, found.vector)


class _Found(NamedTuple):
    """Bounds of the minimum, the vector c - x that gives the upper one, and what it took."""

    lower: float
    upper: float
    vector: PyTree
    num_matvecs: int


def _search(
    matvec: Callable[[PyTree], PyTree],
    mask: PyTree,
    loss_tolerance: float,
    accuracy: float,
    rounding: float,
    vector: PyTree,
    max_matvecs: int,
    known: Directions | None,
    below: float = np.inf,
) -> _Found:
    """Conjugate gradients from one vector, until it is decided; not begun where its loss is not `below`."""
    product = matvec(vector)
    first = max(_curvature(vector, product, inner(vector, vector), rounding), 0.0) / 2
    steps = iterates(matvec, product, mask, rounding=rounding, known=known)
    losses, found = [first], next(steps)
    while len(losses) < max_matvecs and below > losses[-1] > loss_tolerance:
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
    return _Found(lower, loss, jax.tree.map(jnp.subtract, vector, found.step), len(losses))


@dataclass
class ReadjustedLoss:
    """Bounds on min_x (c - x)^T H (c - x) / 2 as a function of n, from products within a budget.

    Every call starts from the x of the call before, and from what all calls with as many removals or more
    have learned: so products are saved where n falls. Both are kept in the checkpoint.

    Attributes:
        problem: order of the weights, and eps.
        budget: of products with a positive semidefinite H.
        store: where results are kept.
        known: conjugate directions of all calls, as far as memory allows.
        accuracy, rounding: as in `readjusted_minimum`.
        start: the x of the last call; None before the first.
    """

    problem: Problem
    budget: Budget
    store: Checkpoint
    known: Directions
    accuracy: float
    rounding: float = np.inf
    start: PyTree | None = None

    def __call__(self, num_removed: int) -> tuple[float, float]:
        """Lower and upper bound after n removals.

        Raises:
            BudgetSpent: the products left do not tell whether eps is reached.
            NegativeCurvature: the matrix is not semidefinite.
        """
        like = self.problem.order.like
        self.known.num_removed = num_removed
        bounds = self._stored(f"readjustment-{num_removed}")
        if bounds is not None:
            return bounds
        if self.budget.left < 1:
            raise BudgetSpent
        before, known, eps = self.budget.count, len(self.known), self.problem.loss_tolerance
        lower, upper, best = readjusted_minimum(
            self.budget.matvec,
            self.problem.order.removed_vector(num_removed),
            self.problem.order.mask(num_removed),
            jax.tree.map(jnp.zeros_like, like) if self.start is None else self.start,
            eps,
            self.budget.left,
            self.accuracy,
            self.rounding,
            self.known,
        )
        if self.budget.left < 1 and lower <= eps < upper:
            raise BudgetSpent
        self.start, used, new = best, self.budget.count - before, len(self.known) - known
        self._keep(f"readjustment-{num_removed}", best, [lower, upper, used, new])
        return lower, upper

    def _keep(self, name: str, step: PyTree, bounds: list[float]) -> None:
        new = int(bounds[-1])
        if new and self.store.folder is not None:
            self.store.save_tree(f"{name}-directions", self.known.since(len(self.known) - new))
        self.store.save_tree(name, {"x": step, "bounds": np.array(bounds)})

    def _stored(self, name: str) -> tuple[float, float] | None:
        """Takes up what an earlier computation kept."""
        like = self.problem.order.like
        stored = self.store.load_tree(name, {"x": like, "bounds": np.zeros(4)})
        if stored is None:
            return None
        self.start = jax.tree.map(jnp.asarray, stored["x"])
        lower, upper, used, new = map(float, stored["bounds"])
        self.budget.count += int(used)
        if new:
            pairs = self.store.load_tree(f"{name}-directions", (like, like), same_shapes=False)
            if pairs is None:
                raise ValueError(
                    f"{name}-directions.npz is missing in the checkpoint {self.store.folder}: remove "
                    f"{name}.npz there to solve this once more."
                )
            self.known.restore(pairs, like)
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
