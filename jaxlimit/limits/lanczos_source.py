r"""What the limits need of a curvature too large for a dense matrix: Lanczos, products and CG, budgeted.

`AdaptiveCurvature` offers what `dense.DenseCurvature` offers, from products alone. Lanczos runs go on until
the limit they serve is resolved to the tolerance or the budget of products is spent; every result can be
kept in a checkpoint, from which an interrupted run goes on to the same bits.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlimit.core.memory import device_bytes
from jaxlimit.core.storage import Checkpoint
from jaxlimit.core.trees import flatten
from jaxlimit.curvature.operator import Curvature
from jaxlimit.geometry.dimensions import width_ridge
from jaxlimit.geometry.magnitude import MagnitudeOrder, num_removed
from jaxlimit.limits.conjugate_gradients import readjusted_minimum
from jaxlimit.limits.one_shot import PathPoint, one_shot_limit
from jaxlimit.limits.roots import BudgetSpent, Estimate, cone_point, width_limit
from jaxlimit.spectrum import lanczos
from jaxlimit.spectrum.bracket import SpectralBracket, bracket_indefinite, bracket_semidefinite, spread
from jaxlimit.spectrum.lanczos_files import LanczosFiles
from jaxlimit.spectrum.measure import SpectralMeasure, stack_rules
from jaxlimit.spectrum.probes import rademacher
from jaxlimit.spectrum.rules import gauss
from jaxlimit.spectrum.tridiagonal import Tridiagonal

PyTree = Any
# Steps before a run with an indefinite matrix may call itself resolved. While it still finds the outliers, no
# estimate knows of the eigenvalues around the ridge: on a network of 1.6 million weights they say .994 to
# .996 after 8 to 16 steps, where the limit is .89.
INDEFINITE_STEPS = 64
# Steps that show the outliers, where no limit rests on the spectrum.
GLANCE = 16


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


class Products:
    """Products with the curvature: counted, limited and reported."""

    def __init__(
        self, curvature: Curvature, max_matvecs: int, report: Callable[[Progress], None] | None = None
    ) -> None:
        self.curvature, self.max_matvecs, self.report = curvature, max_matvecs, report
        self.count, self.stage, self.lower, self.upper = 0, "", 0.0, 1.0
        self.reserve = 0

    @property
    def left(self) -> int:
        """Products left of the budget, but for those that are reserved for later stages."""
        return self.max_matvecs - self.reserve - self.count

    @contextmanager
    def half(self, at_least: int) -> Iterator[None]:
        """Keeps half of what is left for later stages, unless this one needs more for its first step."""
        self.reserve = max(0, min(self.left // 2, self.left - at_least))
        try:
            yield
        finally:
            self.reserve = 0

    def matmat(self, vectors: PyTree) -> PyTree:
        """H V; counts each vector."""
        self.count += jax.tree.leaves(vectors)[0].shape[0]
        if self.report is not None:
            self.report(Progress(self.stage, self.count, self.max_matvecs, self.lower, self.upper))
        return self.curvature.matmat(vectors)

    def matvec(self, vector: PyTree) -> PyTree:
        """H v; counts one."""
        return jax.tree.map(lambda x: x[0], self.matmat(jax.tree.map(lambda x: x[None], vector)))


@dataclass
class AdaptiveCurvature:
    """A curvature seen through products.

    Attributes:
        products: with the curvature.
        order: of the weights.
        key: of the random probes.
        loss_tolerance: eps.
        tolerance: accuracy of a limit in units of s; each run is resolved to half of it, for the cone
            rests on two.
        num_probes: random probes, or None to choose.
        store: where results are kept.
        basis_bytes: memory on each device for the vectors that Lanczos keeps.
        resolve: whether a limit rests on the spectrum; else GLANCE steps of it are enough.
        runs: the Lanczos runs from random probes, once `spectrum` was called.
        reorthogonalized: whether all of them have fitted so far, in every run.
        cone_steps: of the last look at the cone.
    """

    products: Products
    order: MagnitudeOrder
    key: jax.Array
    loss_tolerance: float
    tolerance: float
    num_probes: int | None
    store: Checkpoint
    basis_bytes: int
    resolve: bool = True
    runs: list[Tridiagonal] = field(default_factory=list)
    reorthogonalized: bool = True
    cone_steps: int = 0

    def __post_init__(self) -> None:
        self.files = LanczosFiles(self.store)

    @property
    def measure(self) -> SpectralMeasure:
        """Gauss rules of the runs from random probes."""
        return stack_rules([gauss(run) for run in self.runs], self.order.dim)

    def spectrum(self) -> SpectralBracket:
        """Bracket of the spectral measure, its rigorous bounds resolved around the width limit's ridge."""
        self.products.stage = "spectrum"
        self.runs = self._probe_runs()
        n = max(int(num_removed(self.order.dim, self._width(self.runs).value)), self.order.num_zeros + 1)
        return self._bracket(self.runs, self.order.dim, n)

    def removed(self, counts: list[int]) -> list[SpectralBracket]:
        """Brackets of the spectral measure seen from c after n removals, for several n side by side.

        Several n are a first look, which leaves half of the products for the root itself. Later ones take as
        many steps as the one before at least, for fewer would see less than is known already.

        Raises:
            BudgetSpent: the products that are left do not do.
        """
        if self.products.left < self.cone_steps:
            raise BudgetSpent
        self.products.stage = "cone"
        starts = jax.tree.map(lambda *x: jnp.stack(x), *[self.order.removed_vector(n) for n in counts])

        def error(n: int, run: Tridiagonal) -> float:
            """Of the dimension, by d delta / d log a <= D - delta, and so of s."""
            radius = self.order.radius(n)
            point = cone_point(n, self._bracket([run], None), radius, self.loss_tolerance)
            return spread(point.log_rho) * (1 - n / self.order.dim)

        def resolved(runs: list[Tridiagonal]) -> bool:
            return all(error(n, run) <= self.tolerance / 2 for n, run in zip(counts, runs, strict=True))

        with self.products.half(len(counts)) if len(counts) > 1 else nullcontext():
            runs = self._run_until(starts, resolved, "cone-" + "-".join(map(str, counts)))
        self.cone_steps = max(run.num_steps for run in runs)
        return [self._bracket([run], None, n) for n, run in zip(counts, runs, strict=True)]

    def one_shot(self) -> Estimate:
        """First crossing of the predicted loss (signed H); its few products are not kept on disk."""
        sorted_by = self.order.order
        weights = flatten(self.order.like)[sorted_by]
        gradient = flatten(self.products.curvature.gradient)[sorted_by]

        def path(n: int) -> PathPoint:
            self.products.stage = "one_shot"
            if self.products.left < 1:
                raise BudgetSpent
            hc = flatten(self.products.matvec(self.order.removed_vector(n)))[sorted_by]
            loss = float(weights[:n] @ (hc / 2 - gradient)[:n])
            return PathPoint(n, loss, (hc - gradient) * weights)

        start = PathPoint(0, 0.0, -gradient * weights)
        return one_shot_limit(path, start, self.loss_tolerance, self.tolerance)

    def minimum(self) -> Callable[[int], tuple[float, float]]:
        """Bounds on the readjusted loss after n removals, by CG, warm-started from the n before.

        Raises:
            BudgetSpent: by the function, where the products left do not tell whether eps is reached.
        """
        start = jax.tree.map(jnp.zeros_like, self.order.like)

        def bounds(n: int) -> tuple[float, float]:
            nonlocal start
            self.products.stage = "readjusted"
            name, like = f"readjusted-{n}", {"x": start, "bounds": np.zeros(3)}
            stored = self.store.load_tree(name, like)
            if stored is None:
                if self.products.left < 1:
                    raise BudgetSpent
                before = self.products.count
                vector, mask = self.order.removed_vector(n), self.order.mask(n)
                # A share of eps moves the root by less than that share wherever the minimum rises more than
                # in proportion to s. A tenth, since the last products are not all that is left.
                lower, upper, best = readjusted_minimum(
                    self.products.matvec,
                    vector,
                    mask,
                    start,
                    self.loss_tolerance,
                    self.products.left,
                    accuracy=self.tolerance / 10,
                )
                if self.products.left < 1 and lower <= self.loss_tolerance < upper:
                    raise BudgetSpent
                start, used = best, self.products.count - before
                self.store.save_tree(name, {"x": start, "bounds": np.array([lower, upper, used])})
                return lower, upper
            start = jax.tree.map(jnp.asarray, stored["x"])
            lower, upper, used = map(float, stored["bounds"])
            self.products.count += int(used)
            return lower, upper

        return bounds

    def _probe_runs(self) -> list[Tridiagonal]:
        """Lanczos from random probes: one decides how deep and how many, the others follow.

        A number of probes that was asked for runs as one block.
        """

        def resolved(runs: list[Tridiagonal]) -> bool:
            width = self._width(runs)
            self.products.lower = max(width.value - width.spread, 0.0)
            self.products.upper = min(width.value + width.spread, 1.0)
            return width.spread <= self.tolerance / 2

        keys, like = jax.random.split(self.key, 2), self.order.like
        max_steps = None if self.resolve else GLANCE
        runs = self._run_until(rademacher(keys[0], like, self.num_probes or 1), resolved, "probe", max_steps)
        if self.num_probes is not None or not self.resolve:
            return runs
        # The standard error falls as one over the square root of the number of probes.
        steps = runs[0].num_steps
        wanted = int(np.ceil((self._width(runs).probe_error / self.tolerance) ** 2)) - 1
        extra = min(wanted, self.products.left // (2 * steps))
        if extra < 1:
            return runs
        more = rademacher(keys[1], like, extra)
        return runs + self._run_until(more, lambda _: False, f"probes-{extra}", steps)

    def _run_until(
        self,
        starts: PyTree,
        resolved: Callable[[list[Tridiagonal]], bool],
        name: str,
        max_steps: int | None = None,
    ) -> list[Tridiagonal]:
        """Extends Lanczos runs by a quarter at a time until resolved, at max_steps or out of budget."""
        num_runs = jax.tree.leaves(starts)[0].shape[0]
        state = self.files.load(name, lanczos.init(starts))
        self.products.count += state.diagonal.size
        if self.products.left < num_runs and state.diagonal.size == 0:
            raise BudgetSpent
        least = 0 if self.products.curvature.positive_semidefinite else INDEFINITE_STEPS
        max_basis = self.basis_bytes // (num_runs * device_bytes(self.order.like))
        while True:
            steps = state.diagonal.shape[1]
            runs = state.tridiagonals()
            self.reorthogonalized &= all(run.reorthogonalized for run in runs)
            if runs and (all(run.breakdown for run in runs) or (steps >= least and resolved(runs))):
                return runs
            extra = max(16, steps // 64 * 16) if max_steps is None else max_steps - steps
            extra = min(extra, self.products.left // num_runs)
            if extra < 1:
                return runs
            state = lanczos.run(self.products.matmat, state, extra, max_basis)
            self.files.save(name, state)

    def _width(self, runs: Sequence[Tridiagonal]) -> Estimate:
        return width_limit(self._bracket(runs, self.order.dim), self.order, self.loss_tolerance)

    def _bracket(
        self, runs: Sequence[Tridiagonal], dim: int | None, num_removed: int | None = None
    ) -> SpectralBracket:
        """With rigorous bounds for an indefinite matrix only around the ridge at `num_removed`."""
        if self.products.curvature.positive_semidefinite:
            return bracket_semidefinite(runs, dim)
        radius = None if num_removed is None else self.order.radius(num_removed)
        ridge = None if radius is None else width_ridge(radius, self.loss_tolerance)
        return bracket_indefinite(runs, dim, ridge=ridge)
