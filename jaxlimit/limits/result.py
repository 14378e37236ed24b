r"""What `pruning_limit` returns: the limits, what they rest on, and how far to trust them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxlimit.core.display import Displayed, View, few
from jaxlimit.geometry.dimensions import transition_halfwidth, width_ridge
from jaxlimit.geometry.magnitude import num_removed
from jaxlimit.limits.cone import cone_point, cone_root
from jaxlimit.limits.estimate import LIMITS, Estimate
from jaxlimit.limits.problem import Problem
from jaxlimit.limits.rises import EVERYTHING
from jaxlimit.limits.status import Code, counted
from jaxlimit.limits.width import width_limit
from jaxlimit.spectrum.bracket import SpectralBracket
from jaxlimit.spectrum.measure import SpectralMeasure

# The window in which the probability falls from 95 % to 5 %.
ETA = 0.05
_HEAD = ("", "sparsity", "interval", "probe error", "spread", "true rise")
_CURVE = ("sparsity", "removed norm", "width / D", "lower", "upper")
# Of a limit, what is a number or a text: JSON carries it.
_NUMBERS = (
    *("loss_tolerance", "tolerance", "num_matvecs", "num_probes", "num_steps", "num_examples", "dim"),
    *("positive_semidefinite", "method", "reorthogonalized", "largest_eigenvalue", "ridge", "code", "status"),
)


@dataclass(frozen=True, eq=False, repr=False)
class LimitCurve(Displayed):
    """The two sides of the phase-transition equation, for plots: the limit is where delta / D crosses s.

    Attributes:
        sparsity: (m,) s.
        removed_norm: (m,) R(s).
        width_dimension: (m,) delta_width(s) / D.
        lower, upper: (m,) bounds of width_dimension, without probe error.
        cone_sparsity: (p,) sparsities at which the cone was computed.
        cone_dimension: (p,) delta_cone / D there.
    """

    sparsity: NDArray[np.float64]
    removed_norm: NDArray[np.float64]
    width_dimension: NDArray[np.float64]
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    cone_sparsity: NDArray[np.float64]
    cone_dimension: NDArray[np.float64]

    def _view(self) -> View:
        columns = (self.sparsity, self.removed_norm, self.width_dimension, self.lower, self.upper)
        rows = [tuple(f"{x:.4f}" for x in row) for row in zip(*columns, strict=True)]
        return View("The two sides of the limit's equation", _CURVE, few(rows))


@dataclass(frozen=True, eq=False, repr=False)
class Sensitivity(Displayed):
    """Limits against the loss tolerance, from the spectra at hand.

    Attributes:
        loss_tolerance: (m,) eps.
        width: (m,) width limit.
        cone: (m,) cone limit, or None if it was not computed. Its ridge is interpolated between the
            sparsities at hand, which products resolve to the tolerance at the limit and less far from it.
    """

    loss_tolerance: NDArray[np.float64]
    width: NDArray[np.float64]
    cone: NDArray[np.float64] | None

    def _view(self) -> View:
        columns = {"width": self.width} if self.cone is None else {"width": self.width, "cone": self.cone}
        rows = [
            (f"{eps:.4g}", *(f"{x:.4f}" for x in row))
            for eps, *row in zip(self.loss_tolerance, *columns.values(), strict=True)
        ]
        return View("Limits against the loss tolerance", ("loss tolerance", *columns), few(rows))


class Behind(NamedTuple):
    """What curves and sensitivities are made of.

    Attributes:
        problem: the question.
        bracket: of the spectral measure.
        removed: of the spectral measure seen from c, by the number of removals: weights or groups.
    """

    problem: Problem
    bracket: SpectralBracket
    removed: dict[int, SpectralBracket]


@dataclass(frozen=True, repr=False)
class PruningLimit(Displayed):
    """The sparsity that a network stands, as `pruning_limit` found it. Prints as a table.

    Attributes:
        one_shot, width, cone, readjusted: the limits, None where not asked for or not to be had.
        rises: by how much the loss itself rises at each of them, the weights pruned and none readjusted, and
            under "everything" with every prunable weight removed; in units of the loss.
        measure: spectral measure behind width and cone: one row a probe.
        loss_tolerance: eps, in units of the loss.
        tolerance: accuracy asked for, in units of sparsity.
        num_matvecs: products spent with the curvature.
        num_probes, num_steps: random probes and Lanczos steps of each; 0 and D when dense.
        num_examples: examples the curvature is a mean over.
        dim: number of prunable weights D.
        positive_semidefinite: True for Gauss-Newton, False for the Hessian (|H| is then used).
        method: "dense eigendecomposition" or "Lanczos".
        reorthogonalized: whether Lanczos kept all of its vectors orthogonal.
        largest_eigenvalue: of |H|.
        ridge: a = 2 eps / R^2 at the width limit; largest_eigenvalue / ridge is what Lanczos must resolve.
        code: how it ended, for programs.
        status: the same in sentences: converged or not, why, and what to do.
        num_groups: of weights that went together; None where single weights went.
    """

    one_shot: Estimate | None
    width: Estimate | None
    cone: Estimate | None
    readjusted: Estimate | None
    rises: Mapping[str, float]
    measure: SpectralMeasure
    loss_tolerance: float
    tolerance: float
    num_matvecs: int
    num_probes: int
    num_steps: int
    num_examples: int
    dim: int
    positive_semidefinite: bool
    method: str
    reorthogonalized: bool
    largest_eigenvalue: float
    ridge: float
    code: Code
    status: str
    _behind: Behind | None = field(repr=False)  # None where it was read from JSON
    num_groups: int | None = None

    @property
    def transition_halfwidth(self) -> float:
        """Half the window of s around width and cone in which the transition takes place (95 % to 5 %)."""
        return transition_halfwidth(self.dim, ETA)

    def estimates(self) -> dict[str, Estimate]:
        """The limits that were computed, by name."""
        limits = {name: getattr(self, name) for name in LIMITS}
        return {name: limit for name, limit in limits.items() if limit is not None}

    def curve(self, sparsities: ArrayLike | None = None) -> LimitCurve:
        """R(s) and delta(s) / D on a grid of sparsities (default: 201 from 0 to 1), for plots."""
        grid = np.linspace(0, 1, 201) if sparsities is None else _numbers(sparsities)
        behind = self._spectra()
        order, removed = behind.problem.order, num_removed(self.dim, grid)
        radii = np.sqrt(order.squared_norm[[order.within(n) for n in removed]])

        ridges = [width_ridge(float(radius), self.loss_tolerance) for radius in radii]
        width = behind.bracket.dimension.map(lambda delta: np.array([delta(a) for a in ridges]))
        counts = sorted(behind.removed)
        cone = np.array([_cone_dimension(behind, n) for n in counts])
        at = np.array([order.sparsity(n) for n in counts])
        return LimitCurve(grid, radii, width.value, width.lower, width.upper, at, cone)

    def _spectra(self) -> Behind:
        if self._behind is None:
            raise ValueError("a limit read from JSON has no spectrum: curves and sensitivities need one.")
        return self._behind

    def sensitivity(self, loss_tolerances: ArrayLike | None = None) -> Sensitivity:
        """How the limits move with the loss tolerance; costs no product.

        Args:
            loss_tolerances: positive numbers; default: 13 values from an eighth to eight times eps.

        Raises:
            ValueError: a tolerance that is not positive and finite.
        """
        if loss_tolerances is None:
            loss_tolerances = self.loss_tolerance * np.geomspace(1 / 8, 8, 13)
        grid = _numbers(loss_tolerances)
        if not np.all(np.isfinite(grid) & (grid > 0)):
            raise ValueError(f"loss_tolerances must be positive and finite, got {grid}.")

        behind = self._spectra()
        problems = [replace(behind.problem, loss_tolerance=float(eps)) for eps in grid]

        def cone(problem: Problem) -> float:
            points = [cone_point(bracket, problem, n) for n, bracket in behind.removed.items()]
            return cone_root(behind.bracket, problem, points)[0].value

        width = np.array([width_limit(behind.bracket, problem).value for problem in problems])
        return Sensitivity(grid, width, np.array([cone(x) for x in problems]) if behind.removed else None)

    def to_json(self) -> dict[str, Any]:
        """Everything but the arrays, as JSON values."""
        limits = {name: dict(vars(estimate)) for name, estimate in self.estimates().items()}
        # JSON has no number that is not finite.
        rises = {name: rise if np.isfinite(rise) else None for name, rise in self.rises.items()}
        numbers = {name: getattr(self, name) for name in (*_NUMBERS, "transition_halfwidth")}
        groups = {} if self.num_groups is None else {"num_groups": self.num_groups}
        return {**limits, **numbers, **groups, "rises": rises}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], measure: SpectralMeasure | None = None) -> "PruningLimit":
        """The inverse of `to_json`, but for the arrays, which JSON does not carry.

        Args:
            values: what `to_json` returned; other names are ignored.
            measure: the spectral measure; None: the limit has none, nor `curve` and `sensitivity`.

        Raises:
            ValueError: the values are not those of a limit.
        """
        try:
            limits = {name: Estimate(**values[name]) if name in values else None for name in LIMITS}
            # A rise that was not finite.
            rises = {name: np.nan if rise is None else rise for name, rise in values["rises"].items()}
            numbers: dict[str, Any] = {name: values[name] for name in _NUMBERS}
            numbers["code"] = Code(numbers["code"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"these are not the values of a PruningLimit: {type(error).__name__}: {error}."
            ) from error
        without: Any = measure
        groups = values.get("num_groups")
        return cls(**limits, **numbers, rises=rises, measure=without, _behind=None, num_groups=groups)

    def _view(self) -> View:
        groups = "" if self.num_groups is None else f" in {counted(self.num_groups, 'group')}"
        title = (
            f"Pruning limit for a loss increase of {self.loss_tolerance:.4g} "
            f"({self.dim:,} weights{groups}, {self.num_examples:,} examples)"
        )
        rows = [
            *((name, *_cells(limit), f"{self.rises[name]:.4g}") for name, limit in self.estimates().items()),
            (EVERYTHING, f"{1:.4f}", "", "", "", f"{self.rises[EVERYTHING]:.4g}"),
        ]
        return View(title, _HEAD, rows, [self._window, self._work, f"status: {self.status}"])

    @property
    def _window(self) -> str:
        halfwidth = self.transition_halfwidth
        if halfwidth < 1:
            return f"transition window of width and cone: +-{halfwidth:.4f} (95 % to 5 %)"
        return (
            f"transition window of width and cone: wider than [0, 1] (95 % to 5 %): {self.dim} weights are "
            "too few for a sharp transition"
        )

    @property
    def _work(self) -> str:
        kind = "Gauss-Newton" if self.positive_semidefinite else "Hessian"
        absolute = "" if self.positive_semidefinite and self.code is not Code.NOT_SEMIDEFINITE else ", |H|"
        probes = f", {counted(self.num_probes, 'probe')} of {self.num_steps} steps" if self.num_probes else ""
        return (
            f"{kind}{absolute}; {self.method}{probes}; {self.num_matvecs:,} products; "
            f"lambda_max / a = {self.largest_eigenvalue / self.ridge:.3g}"
        )


def _cells(limit: Estimate) -> tuple[str, ...]:
    return f"{limit.value:.4f}", limit.interval, f"{limit.probe_error:.4f}", f"{limit.spread:.4f}"


def _cone_dimension(behind: Behind, n: int) -> float:
    point = cone_point(behind.removed[n], behind.problem, n)
    return behind.bracket.dimension.value(behind.problem.ridge(n) * np.exp(point.log_rho.value))


def _numbers(values: ArrayLike) -> NDArray[np.float64]:
    """One number or several, as a vector."""
    return np.atleast_1d(np.asarray(values, np.float64))
