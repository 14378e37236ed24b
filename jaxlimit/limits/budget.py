"""Products with the curvature are what a limit costs: they are counted, limited and reported."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax

from jaxlimit.core.terminal import Shown
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
        lower, upper: where the limit that is being resolved is known to lie so far.
        limit: which one that is.
        spread: how far it is from resolved, in units of s; infinite before the first look.
        tolerance: how far it may be.
        note: a warning, told before a stage begins: that it will not resolve within the budget. Else empty.
    """

    stage: str
    num_matvecs: int
    max_matvecs: int
    lower: float
    upper: float
    limit: str = ""
    spread: float = math.inf
    tolerance: float = 0.0
    note: str = ""

    def __str__(self) -> str:
        """In words, for a progress line."""
        limit = f"{self.stage}: {self.limit} in [{self.lower:.3f}, {self.upper:.3f}]"
        far = "" if math.isinf(self.spread) else f", resolved to {self.spread:.1e} of {self.tolerance:.1e}"
        return f"{limit}{far}" + (f" ({self.note})" if self.note else "")


def shown(state: Progress) -> Shown:
    """As a bar shows it."""
    return Shown("pruning limit", state.num_matvecs, state.max_matvecs, str(state))


@dataclass
class Budget:
    """Products with a curvature, up to a number of them.

    Attributes:
        curvature: what is multiplied with.
        max_matvecs: products at most.
        report: called after every block of products.
        count: products so far, those that a checkpoint holds included.
        state: what `report` is told, its counts excepted.
    """

    curvature: Curvature
    max_matvecs: int
    report: Callable[[Progress], None] | None = None
    count: int = 0
    state: Progress = field(default_factory=lambda: Progress("", 0, 0, 0.0, 1.0))

    @property
    def left(self) -> int:
        """Products that may still be made."""
        return self.max_matvecs - self.count

    def reserve(self, parts: int, at_least: int) -> int:
        """Products to leave for later: one of so many parts, and `at_least` so many products, are for now."""
        return max(0, self.left - max(self.left // parts, at_least))

    def begin(
        self, stage: str, limit: str, tolerance: float, needed: int = 0, available: int | None = None
    ) -> None:
        """A stage begins: what it resolves, to which accuracy, and whether its products will do.

        Args:
            stage: see `Progress`.
            limit: see `Progress`.
            tolerance: see `Progress`.
            needed: products that it takes at least, as far as that is known.
            available: those that it may take; None: all that are left.
        """
        available = self.left if available is None else available
        self.state = Progress(stage, 0, 0, 0.0, 1.0, limit, math.inf, tolerance)
        if needed > available:
            note = f"will not resolve: needs {needed:,} products or more, {max(available, 0):,} are left"
            self.state = self.state._replace(note=note)
            self._tell()

    def look(self, lower: float, upper: float, spread: float) -> None:
        """How far the limit of this stage is resolved."""
        self.state = self.state._replace(lower=max(lower, 0.0), upper=min(upper, 1.0), spread=spread)

    def matmat(self, vectors: PyTree) -> PyTree:
        """H V; counts each vector."""
        self.count += jax.tree.leaves(vectors)[0].shape[0]
        self._tell()
        return self.curvature.matmat(vectors)

    def matvec(self, vector: PyTree) -> PyTree:
        """H v; counts one."""
        return jax.tree.map(lambda x: x[0], self.matmat(jax.tree.map(lambda x: x[None], vector)))

    def _tell(self) -> None:
        if self.report is not None:
            self.report(self.state._replace(num_matvecs=self.count, max_matvecs=self.max_matvecs))
