r"""A step towards the lowest loss with the mask held: Gauss-Newton, trusted as far as the real loss agrees.

    (G_KK + mu I) x = -g_K,    rho = (L(w) - L(w + x)) / (predicted decrease)

The step is taken if the real loss falls, else a shorter one. Where the quadratic was right (rho > 3/4) the
damping mu falls to a third. Where it was not (rho < 1/4, and for every halving of the step) it grows
fourfold. That is the rule of Levenberg and Marquardt, with the bounds of Nocedal and Wright (Numerical
Optimization, 2006, algorithm 4.1). There is no learning rate, no schedule and no random order.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlimit.core.checks import as_real, require_count, require_positive, require_range
from jaxlimit.core.trees import PyTree
from jaxlimit.curvature.operator import Curvature
from jaxlimit.limits.conjugate_gradients import Iterate, add_scaled, inner, iterates, kept
from jaxlimit.pruning.windows import window

# Products end where the last WINDOW of them lowered the quadratic by less than FLAT of all that was gained:
# the rule of Martens (2010, section 4.4), a coarser one, for the step is tried on the real loss next.
WINDOW, FLAT = 5, 0.01
TRUSTED, DISTRUSTED = 0.75, 0.25
SHRINK, GROW = 3.0, 4.0
# A step that raises the loss is tried at these lengths: a loss costs less than another solution.
LENGTHS = (1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125)
# What a gradient and a loss cost, in Gauss-Newton products: benchmarks/pruning.py.
GRADIENT, LOSS = 1.0, 1 / 3


@dataclass(frozen=True)
class Settings:
    """How a step is made, and how many there are on the way to a sparsity.

    Attributes:
        step_products: products of a step, at most.
        curvature_share: share of the data that the curvature is taken from; every step takes the next part.
        gradient_share: share of the data that gradient and loss are taken from, likewise.
        stage_share: share of the weights that each stage of a path keeps of those before it.
        damping: the first one, as a share of the curvature along the gradient; .001 is a damping of .003 on
            the published 784-40-20-10. More of it keeps what few data must not change.

    Raises:
        ValueError: no product; a share outside (0, 1], or a stage that keeps all; no damping.
    """

    step_products: int = 20
    curvature_share: float = 0.1
    gradient_share: float = 1.0
    stage_share: float = 0.8
    damping: float = 1e-3

    def __post_init__(self) -> None:
        require_count("step_products", self.step_products)
        for name in ("curvature_share", "gradient_share"):
            share = getattr(self, name)
            require_range(name, share, 0 < as_real(share) <= 1, "in (0, 1]")
        require_range("stage_share", self.stage_share, 0 < as_real(self.stage_share) < 1, "between 0 and 1")
        require_positive("damping", self.damping)


DEFAULT = Settings()


class Point(NamedTuple):
    """Where the search is: all that the next step depends on, as a pytree.

    Attributes:
        weights: all parameters that move.
        loss: there, on the data of the last step or cut; infinite after a cut where steps see parts of them.
        fall: by how much the last step lowered it.
        damping: mu.
        number: steps so far.
        num_products: what they cost, in products with all the data.
        rest: the parameters that do not move, where their statistics are taken anew; None: as they were.
    """

    weights: PyTree
    loss: float
    fall: float
    damping: float
    number: int
    num_products: float
    rest: PyTree = None


class _Data(NamedTuple):
    """The curvature at some weights, of the parts of the data that a step takes, and how large these are."""

    seen: Curvature  # for gradient and loss
    curved: Curvature
    seen_share: float
    curved_share: float


def _data(curvature: Curvature, point: Point, settings: Settings) -> _Data:
    here = replace(curvature, weights=point.weights, loss=math.nan)
    seen = window(here, settings.gradient_share, int(point.number))
    curved = window(here, settings.curvature_share, int(point.number))
    return _Data(seen, curved, *(x.total_weight / curvature.total_weight for x in (seen, curved)))


def first_point(curvature: Curvature, settings: Settings) -> Point:
    """At the weights of the curvature, with a damping that is a share of the curvature along the gradient."""
    first = Point(curvature.weights, curvature.loss, 0.0, 1.0, 0, 0.0)
    data = _data(curvature, first, settings)
    gradient = data.seen.gradient
    length = inner(gradient, gradient)
    along = max(inner(gradient, data.curved.matvec(gradient)), 0.0) / length if length > 0 else 0.0
    cost = GRADIENT * data.seen_share + data.curved_share
    return first._replace(damping=settings.damping * along, num_products=cost)


def without(point: Point, mask: PyTree) -> Point:
    """The point without the weights whose mask is False; its loss is not known."""
    return point._replace(weights=kept(mask, point.weights), loss=math.inf, fall=0.0)


def measured(curvature: Curvature, point: Point, settings: Settings) -> Point:
    """The point with its loss on all data. Cost: that loss.

    Where steps see a part of the data each, the next one measures the loss on its part.
    """
    if settings.gradient_share < 1:
        return point
    loss = curvature.mean_loss(point.weights)
    return point._replace(loss=loss, num_products=point.num_products + LOSS)


def step(curvature: Curvature, point: Point, mask: PyTree, settings: Settings) -> Point:
    """The next point on the kept coordinates, of a loss that is not higher on the data of this step.

    Cost: a gradient, up to `step_products` products, and a loss, or as many as there are `LENGTHS`.

    Args:
        curvature: Gauss-Newton, of the parameters that move.
        point: with weights that are zero where the mask is False.
        mask: pytree like these, False where weights are pruned.
        settings: how to make it.
    """
    data, start = _data(curvature, point, settings), point.loss
    if settings.gradient_share < 1:  # what is known was seen on other data
        start, gradient = data.seen.loss_and_gradient
    else:
        gradient = data.seen.gradient
    cost = GRADIENT * data.seen_share
    weights, loss, damping = point.weights, start, point.damping
    if not math.isfinite(start):  # no step would be known to lower it
        return _moved(point, weights, start, math.nan, damping, cost)
    found, num_products = _solved(data.curved.matvec, gradient, mask, damping, settings.step_products)
    cost += num_products * data.curved_share
    for factor in LENGTHS:
        trial = add_scaled(point.weights, found.step, factor)
        reached = data.seen.mean_loss(trial)
        cost += LOSS * data.seen_share
        trusted = factor == 1 and start - reached >= DISTRUSTED * found.decrease
        if not trusted:  # also where what is reached is NaN
            damping *= GROW
        if reached <= start:
            weights, loss = trial, reached
            break
    fall = start - loss
    if fall > TRUSTED * found.decrease:
        damping /= SHRINK
    return _moved(point, weights, loss, fall, damping, cost)


def _moved(point: Point, weights: PyTree, loss: float, fall: float, damping: float, cost: float) -> Point:
    """The point after a step."""
    number, num_products = point.number + 1, point.num_products + cost
    return Point(weights, loss, fall, damping, number, num_products, point.rest)


def _solved(
    matvec: Callable[[PyTree], PyTree], gradient: PyTree, mask: PyTree, damping: float, max_products: int
) -> tuple[Iterate, int]:
    """The step of so many products or fewer, no more accurate than a step on the real loss deserves."""
    steps = iterates(matvec, jax.tree.map(jnp.negative, gradient), mask, damping)
    found, decreases = next(steps), [0.0]
    for found in itertools.islice(steps, max_products):
        decreases.append(found.decrease)
        if len(decreases) > WINDOW and decreases[-1] - decreases[-1 - WINDOW] < FLAT * decreases[-1]:
            break
    return found, len(decreases) - 1
