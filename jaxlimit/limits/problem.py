"""What is asked of the weights: in which order they go, and by how much the loss may rise."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxlimit.core.storage import about, ordered_sum
from jaxlimit.core.trees import flatten
from jaxlimit.curvature.operator import Curvature
from jaxlimit.geometry.dimensions import width_ridge
from jaxlimit.geometry.magnitude import MagnitudeOrder, num_removed
from jaxlimit.spectrum.probes import rademacher


@dataclass(frozen=True, eq=False)
class Problem:
    """How many weights can go, in this order, while the loss rises by at most eps?

    Attributes:
        order: of the weights.
        loss_tolerance: eps, in units of the loss.
    """

    order: MagnitudeOrder
    loss_tolerance: float

    @property
    def dim(self) -> int:
        """Number of weights D."""
        return self.order.dim

    @property
    def counts(self) -> Sequence[int]:
        """(removals + 1,) the weights that n removals remove: the sparsities that can be reached, times D."""
        return self.order.counts

    @property
    def least_removed(self) -> int:
        """The smallest n whose removal moves the weights at all: one more than there are zeros."""
        return self.order.num_zeros + 1

    def sparsity(self, num_removed: int) -> float:
        """S after n removals."""
        return self.order.sparsity(num_removed)

    def num_removed(self, sparsity: float) -> int:
        """The most removals within s, but at least `least_removed`, so that the ridge there is finite."""
        return max(self.order.within(int(num_removed(self.dim, sparsity))), self.least_removed)

    def radius(self, num_removed: int) -> float:
        """R = ||c|| after n removals, in units of the weights."""
        return self.order.radius(num_removed)

    def ridge(self, num_removed: int) -> float:
        """A = 2 eps / R^2, the ridge of the width formula after n removals; infinite while R = 0."""
        return width_ridge(self.radius(num_removed), self.loss_tolerance)


def group_share(counts: Sequence[int]) -> float | None:
    """The largest group as a share of the weights, from the weights after each removal; None of weights."""
    dim = counts[-1]
    return None if len(counts) == dim + 1 else int(np.max(np.diff(counts))) / dim


# What devices may differ by: of a loss, and of a product with a random vector, relative to its length.
SAME_LOSS, SAME_PRODUCT = 1e-4, 1e-3


def fingerprint(
    curvature: Curvature, problem: Problem, key: jax.Array, tolerance: float, num_probes: int | None
) -> dict[str, Any]:
    """What tells one computation from another, so that a checkpoint is not continued by mistake.

    Two curvatures of one network may have the same loss: a product with a random vector tells them apart, by
    its length and by its parts along that vector and along the weights. Devices round losses and products
    differently, so these are stored with what they may differ by. Cost: one product.
    """
    weights = curvature.weights
    probe = rademacher(key, weights, 1)
    product = flatten(jax.tree.map(lambda x: x[0], curvature.matmat(probe)))
    length = float(np.linalg.norm(product))
    along = {
        "probe": flatten(jax.tree.map(lambda x: x[0], probe)),
        "weights": flatten(weights),
    }
    parts = {name: float(vector @ product / np.linalg.norm(vector)) for name, vector in along.items()}
    return {
        "dim": curvature.dim,
        "num_examples": curvature.num_examples,
        "positive_semidefinite": curvature.positive_semidefinite,
        "loss": about(curvature.loss, SAME_LOSS * abs(curvature.loss) + 1e-6),
        "product": {name: about(x, SAME_PRODUCT * length) for name, x in {"length": length, **parts}.items()},
        "weights": ordered_sum(flatten(weights)),
        "order": ordered_sum(problem.order.rank),
        "loss_tolerance": problem.loss_tolerance,
        "tolerance": tolerance,
        "num_probes": num_probes,
        "key": np.asarray(jax.random.key_data(key)).ravel().tolist(),
    }
