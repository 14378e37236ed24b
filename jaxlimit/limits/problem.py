"""What is asked of the weights: in which order they go, and by how much the loss may rise."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxlimit.core.storage import ordered_sum
from jaxlimit.core.trees import flatten
from jaxlimit.curvature.operator import Curvature
from jaxlimit.geometry.dimensions import width_ridge
from jaxlimit.geometry.magnitude import MagnitudeOrder, num_removed


@dataclass(frozen=True)
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
    def least_removed(self) -> int:
        """The smallest n whose removal moves the weights at all: one more than there are zeros."""
        return self.order.num_zeros + 1

    def num_removed(self, sparsity: float) -> int:
        """N = floor(s D), but at least `least_removed`, so that the ridge there is finite."""
        return max(int(num_removed(self.dim, sparsity)), self.least_removed)

    def radius(self, num_removed: int) -> float:
        """R = ||c|| after n removals, in units of the weights."""
        return self.order.radius(num_removed)

    def ridge(self, num_removed: int) -> float:
        """A = 2 eps / R^2, the ridge of the width formula after n removals; infinite while R = 0."""
        return width_ridge(self.radius(num_removed), self.loss_tolerance)


def fingerprint(
    curvature: Curvature, problem: Problem, key: jax.Array, tolerance: float, num_probes: int | None
) -> dict[str, Any]:
    """What tells one computation from another, so that a checkpoint is not continued by mistake.

    Devices round the loss of one network differently: the fingerprint has four digits of it, six decimals.
    """
    return {
        "dim": curvature.dim,
        "num_examples": curvature.num_examples,
        "positive_semidefinite": curvature.positive_semidefinite,
        "loss": round(float(f"{curvature.loss:.4g}"), 6),
        "weights": ordered_sum(flatten(curvature.weights)),
        "order": ordered_sum(problem.order.rank),
        "loss_tolerance": problem.loss_tolerance,
        "tolerance": tolerance,
        "num_probes": num_probes,
        "key": np.asarray(jax.random.key_data(key)).ravel().tolist(),
    }
