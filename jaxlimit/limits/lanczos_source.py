r"""The four limits of a curvature that is too large for a dense matrix, from products alone.

Lanczos runs from random probes give the spectral measure, runs from the removed vectors that of the cone;
one_shot follows the predicted loss, and readjusted takes conjugate gradients.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from jaxlimit.core.memory import device_bytes
from jaxlimit.core.storage import Checkpoint
from jaxlimit.geometry.dimensions import LOG_INFINITE
from jaxlimit.limits.budget import Budget, BudgetSpent
from jaxlimit.limits.cone import ConePoint, Look, Slope, cone_point, cone_root, look_at, points_beside
from jaxlimit.limits.conjugate_directions import Directions
from jaxlimit.limits.conjugate_gradients import NegativeCurvature, ReadjustedLoss
from jaxlimit.limits.dense_source import dense_fits, dense_source
from jaxlimit.limits.estimate import Estimate
from jaxlimit.limits.lanczos_blocks import INDEFINITE_STEPS, LanczosBlocks
from jaxlimit.limits.one_shot import INTERVALS, one_shot_limit, predicted_path
from jaxlimit.limits.problem import Problem
from jaxlimit.limits.width import width_limit
from jaxlimit.spectrum.bracket import (
    NEGATIVE,
    SpectralBracket,
    bracket_indefinite,
    bracket_semidefinite,
    spread,
)
from jaxlimit.spectrum.functions import applied
from jaxlimit.spectrum.lanczos import LanczosState
from jaxlimit.spectrum.lanczos_files import LanczosFiles
from jaxlimit.spectrum.measure import SpectralMeasure, stack_rules
from jaxlimit.spectrum.probes import rademacher
from jaxlimit.spectrum.rules import gauss
from jaxlimit.spectrum.tridiagonal import Tridiagonal

# Steps of a probe where no limit rests on the spectrum: they find the outliers, for the reader of the result.
GLANCE = 16
# A look at the cone away from the root only says where to look next. Then the tolerance will do, or this
# share of the way where that is more.
FAR = 0.125
# Looks at the cone among which few products are divided: two, and one at the root.
LOOKS = 3


@dataclass
class LanczosSource:
    """A curvature seen through products: a `Source`.

    Attributes:
        problem: order of the weights, and eps.
        budget: of products with the curvature.
        blocks: of Lanczos runs.
        store: where the readjusted losses are kept.
        key: of the random probes.
        tolerance: accuracy of a limit in units of s. Each run is resolved to half of it, for the cone rests
            on two.
        num_probes: random probes, or None to choose.
        which: the limits that are wanted.
        probe_runs: the Lanczos runs from random probes, once `spectrum` was called.
        bracket: of the spectral measure, once `spectrum` was called.
        last_look: steps of the last look at the cone.
        cone_points: of all looks at the cone.
    """

    problem: Problem
    budget: Budget
    blocks: LanczosBlocks
    store: Checkpoint
    key: jax.Array
    tolerance: float
    num_probes: int | None
    which: Sequence[str]
    probe_runs: list[Tridiagonal] = field(default_factory=list)
    bracket: SpectralBracket = field(init=False)
    last_look: int = 0
    cone_points: list[ConePoint] = field(default_factory=list)

    @property
    def method(self) -> str:
        """As the result names it."""
        return "Lanczos"

    @property
    def exact(self) -> bool:
        """Products tell of the spectrum to a tolerance."""
        return False

    @property
    def reorthogonalized(self) -> bool:
        """Whether the vectors of all runs have fitted, in every run so far."""
        return self.blocks.reorthogonalized

    @property
    def negative_share(self) -> float:
        """As the runs so far see it."""
        return self.blocks.negative_share

    @property
    def measure(self) -> SpectralMeasure:
        """Gauss rules of the runs from random probes."""
        return stack_rules([gauss(run) for run in self.probe_runs], self.problem.dim)

    def spectrum(self) -> SpectralBracket:
        """Bracket of the spectral measure, its rigorous bounds resolved around the width limit's ridge."""
        self.probe_runs = self._probe_runs()
        n = self.problem.num_removed(self._width(self.probe_runs).value)
        self.bracket = self._bracket(self.probe_runs, self.problem.dim, n)
        return self.bracket

    def look(self, num_removed: int) -> Look:
        """The cone after n removals, by a run from c.

        The first looks leave products for the root itself. Later ones take as many steps as the one before at
        least, for fewer would see less than is known already.

        Raises:
            BudgetSpent: the products that are left do not do.
        """
        n, problem, budget = num_removed, self.problem, self.budget
        if budget.left < self.last_look:
            raise BudgetSpent
        # A run from c rarely takes fewer steps than one from a probe.
        steps = max(self.last_look, self.probe_runs[0].num_steps if self.probe_runs else 0)
        reserve = budget.reserve(max(LOOKS - len(self.cone_points), 1), 1)
        budget.begin("cone", "cone", self.tolerance / 2, steps, budget.left - reserve)
        sparsity = problem.sparsity(n)

        def point(runs: list[Tridiagonal]) -> ConePoint:
            return cone_point(self._bracket(runs, None), problem, n)

        def error(point: ConePoint) -> float:
            """That of the dimension, by d delta / d log a <= D - delta, and so of s."""
            return spread(point.log_rho) * (1 - sparsity)

        def resolved(runs: list[Tridiagonal]) -> bool:
            now = point(runs)
            budget.look(sparsity, sparsity, error(now))
            way = abs(cone_root(self.bracket, problem, [*self.cone_points, now])[1] - sparsity)
            if way > self.tolerance:
                return error(now) <= max(self.tolerance, FAR * way)
            if self.blocks.semidefinite:
                return error(now) <= self.tolerance / 2
            # The limit rests on this look, and a spread bounds nothing: the step count before must do, too.
            before = point([run.truncate(run.num_steps * 4 // 5) for run in runs])
            return max(error(now), error(before)) <= self.tolerance / 2

        start = jax.tree.map(lambda x: x[None], problem.order.removed_vector(n))
        (run,), state = self.blocks.extend(f"cone-{n}", start, resolved, reserve=reserve)
        self.last_look = run.num_steps
        look = look_at(self._bracket([run], None, n), problem, n)
        self.cone_points.append(look.point)
        return look._replace(beside=self._beside(look.point, run, state))

    def _beside(self, point: ConePoint, run: Tridiagonal, state: LanczosState) -> list[ConePoint]:
        """From the Krylov space of the look, where all its vectors were kept; a tolerance away."""
        problem, n = self.problem, point.num_removed
        if point.log_rho.value >= LOG_INFINITE:
            return []
        a = problem.ridge(n) * np.exp(point.log_rho.value)
        images = applied(state, [lambda x: np.abs(x) / (a + np.abs(x))])
        if images is None:
            return []
        nodes, weights = gauss(run)
        image = problem.order.sort(jax.tree.map(lambda x: x[0], images)) * problem.radius(n)
        part = np.abs(nodes) / (a + np.abs(nodes))
        stiffening = float(weights @ (part * (1 - part)) / (weights @ part))
        slope = Slope(image, 1 - self.bracket.dimension.value(a), stiffening)
        within = max(1, round(self.tolerance * problem.order.num_removals))
        return points_beside(point, slope, problem, within)

    def one_shot(self) -> Estimate:
        """From the predicted loss (signed H); its few products are not kept on disk.

        A network that is small enough for a dense matrix gets the n that the matrix would give.
        """
        problem = self.problem
        tolerance = 0.0 if dense_fits(problem.dim) and set(self.which) == {"one_shot"} else self.tolerance
        self.budget.begin("one_shot", "one_shot", self.tolerance, INTERVALS)

        def looked(within: int, beyond: int) -> None:
            width = (problem.counts[beyond] - problem.counts[within]) / problem.dim
            self.budget.look(problem.sparsity(within), problem.sparsity(beyond), width)

        path, start = predicted_path(problem, self.budget)
        return one_shot_limit(path, start, problem.loss_tolerance, tolerance, looked, problem.counts)

    def minimum(self) -> Callable[[int], tuple[float, float]]:
        """Bounds on the readjusted loss after n removals, by conjugate gradients.

        |H| is not to be had from products alone: an indefinite H needs its matrix.

        Raises:
            BudgetSpent: the matrix is too large or takes more products than are left.
            NegativeCurvature: by the function, where the matrix is not semidefinite after all.
        """
        if not self.blocks.semidefinite:
            if not dense_fits(self.problem.dim, self.budget.left):
                raise BudgetSpent
            return dense_source(self.problem, self.budget).minimum()
        self.budget.begin("readjusted", "readjusted", self.tolerance / 2)
        norm = max(run.norm for run in self.probe_runs)
        # A share of eps moves the root by less than that share wherever the minimum rises more than in
        # proportion to s. A fortieth of the tolerance, since the last products are not all that is left.
        accuracy, rounding = self.tolerance / 40, NEGATIVE[True] * self.budget.curvature.rounding * norm
        most = self.blocks.basis_bytes // (2 * device_bytes(self.budget.curvature.weights))
        loss = ReadjustedLoss(self.problem, self.budget, self.store, Directions(most), accuracy, rounding)

        def bounds(num_removed: int) -> tuple[float, float]:
            try:
                return loss(num_removed)
            except NegativeCurvature as error:
                self.blocks.negative_share = -error.args[0] / norm
                raise

        return bounds

    def _probe_runs(self) -> list[Tridiagonal]:
        """Lanczos from random probes: one decides how deep and how many, the others follow.

        A number of probes that was asked for runs as one block. A spectrum that does not resolve leaves half
        of the products for the other limits.
        """

        def resolved(runs: list[Tridiagonal]) -> bool:
            width = self._width(runs)
            self.budget.look(width.value - width.spread, width.value + width.spread, width.spread)
            return width.spread <= self.tolerance / 2

        needed = not {"width", "cone"}.isdisjoint(self.which)
        reserve = self.budget.reserve(2, self.num_probes or 1) if set(self.which) != {"width"} else 0
        # Not the second of two keys, which is `fold_in(key, 1)`: `jaxlimit run` takes that for another probe.
        first_key, _, more_key = jax.random.split(self.key, 3)
        like = self.problem.order.like
        first = rademacher(first_key, like, self.num_probes or 1)
        max_steps = None if needed else GLANCE
        steps = 0 if self.blocks.semidefinite else INDEFINITE_STEPS
        wanted = (steps if needed else GLANCE) * (self.num_probes or 1)
        self.budget.begin("spectrum", "width", self.tolerance / 2, wanted, self.budget.left - reserve)
        runs, _ = self.blocks.extend("probe", first, resolved, max_steps=max_steps, reserve=reserve)
        if self.num_probes is not None or not needed:
            return runs
        # The standard error falls as one over the square root of the number of probes.
        steps = runs[0].num_steps
        wanted = int(np.ceil((self._width(runs).probe_error / self.tolerance) ** 2)) - 1
        extra = min(wanted, (self.budget.left - reserve) // (2 * steps))
        if extra < 1:
            return runs
        more, name = rademacher(more_key, like, extra), f"probes-{extra}"
        return runs + self.blocks.extend(name, more, lambda _: False, max_steps=steps, reserve=reserve)[0]

    def _width(self, runs: Sequence[Tridiagonal]) -> Estimate:
        return width_limit(self._bracket(runs, self.problem.dim), self.problem)

    def _bracket(
        self, runs: Sequence[Tridiagonal], dim: int | None, num_removed: int | None = None
    ) -> SpectralBracket:
        """With rigorous bounds for an indefinite matrix only around the ridge at `num_removed`."""
        if self.blocks.semidefinite:
            return bracket_semidefinite(runs, dim)
        ridge = None if num_removed is None else self.problem.ridge(num_removed)
        return bracket_indefinite(runs, dim, ridge=ridge)


def lanczos_source(
    problem: Problem,
    budget: Budget,
    store: Checkpoint,
    key: jax.Array,
    *,
    tolerance: float,
    num_probes: int | None,
    which: Sequence[str],
    basis_bytes: int,
    host_bytes: int,
) -> LanczosSource:
    """A source that keeps its results in a checkpoint; arguments as for `pruning_limit`."""
    blocks = LanczosBlocks(budget, LanczosFiles(store), basis_bytes, host_bytes)
    return LanczosSource(problem, budget, blocks, store, key, tolerance, num_probes, which)
