"""Products with the curvature are what a limit costs: they are counted, limited and reported."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax

from jaxlimit.core.trees import PyTree
from jaxlimit.curvature.operator import Curvature


class BudgetSpent(Exception):
    """Not enough products are left for the next step; what was found so far stands."""


class Progress(NamedTuple):
    """What `pruning_limit` tells about its work, after every block of products.

    Attributes:
        stage: "dense", "spectrum", "cone", "one_shot" or "readjusted".
        num_matvecs: products so far.
        max_matvecs: products at most.
        lower, upper: where the width limit is known to lie so far.
    """

    stage: str
    num_matvecs: int
    max_matvecs: int
    lower: float
    upper: float


@dataclass
class Budget:
    """Products with a curvature, up to a number of them.

    Attributes:
        curvature: what is multiplied with.
        max_matvecs: products at most.
        report: called after every block of products.
        count: products so far, those that a checkpoint holds included.
        stage, lower, upper: what `report` is told, see `Progress`.
    """

    curvature: Curvature
    max_matvecs: int
    report: Callable[[Progress], None] | None = None
    count: int = 0
    stage: str = ""
    lower: float = 0.0
    upper: float = 1.0

    @property
    def left(self) -> int:
        """Products that may still be made."""
        return self.max_matvecs - self.count

    def half(self, at_least: int) -> int:
        """Products to leave for later: half of those left, or fewer where `at_least` are needed now."""
        return max(0, min(self.left // 2, self.left - at_least))

    def matmat(self, vectors: PyTree) -> PyTree:
        """H V; counts each vector."""
        self.count += jax.tree.leaves(vectors)[0].shape[0]
        if self.report is not None:
            self.report(Progress(self.stage, self.count, self.max_matvecs, self.lower, self.upper))
        return self.curvature.matmat(vectors)

    def matvec(self, vector: PyTree) -> PyTree:
        """H v; counts one."""
        return jax.tree.map(lambda x: x[0], self.matmat(jax.tree.map(lambda x: x[None], vector)))
