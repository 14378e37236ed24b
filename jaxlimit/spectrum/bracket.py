r"""Both sides of an effective dimension: what Lanczos runs say of it, and how sure that is.

The integrand is f(lambda) = a / (a + |lambda|); its integral over the spectral measure mu is delta(a) / D.
T_k and beta_k fix the moments of mu up to degree 2k, and among all measures with these moments

    the integral of f is largest for the Gauss-Radau rule with a node at 0,

whatever the signs of the eigenvalues, and smallest for the Gauss rule if none is negative; otherwise for
one of the rules that extend T_k by a row (`least_rules`). So both bounds are certified, and the best that k
products can give; documentation page "Numerics" has the proof. On a semidefinite H they close fast, and
the value is their mean. On an indefinite H the lower one lags behind, while the upper one falls
geometrically with k: the value is its limit, extrapolated from three step counts (Aitken).

Two other errors are kept apart from this one. That of the probes is `SpectralMeasure.probe_error`. As to
rounding, the products are those of a matrix that differs from H by about machine epsilon * ||H||, and the
bounds allow for eigenvalues that are so much larger or smaller.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from jaxlimit.spectrum.lanczos import Tridiagonal
from jaxlimit.spectrum.quadrature import Rule, SpectralMeasure, gauss, gauss_radau, least_rules, stack_rules

# A bound, the value, or one of the four other estimates whose distance from the value is its spread.
Side = Literal["lower", "upper", "value", 1, 2, 3, 4]
SIDES: tuple[Side, ...] = get_args(Side)
# Sixteenths of the steps from which each estimate for an indefinite matrix is extrapolated, the value first.
# The last is what the value was after three quarters of the steps.
WINDOWS = ((16, 12, 8), (14, 10, 6), (12, 8, 4), (12, 9, 6))
SIXTEENTHS = tuple(sorted({part for window in WINDOWS for part in window}))
# Share of what is extrapolated that counts as uncertain even where the step counts agree better: on the
# networks of benchmarks/accuracy.py the error was rarely larger.
CORRECTION = 0.25
# Eigenvalues are uncertain by so many times machine epsilon * ||H||. On the digits network of the tests once
# was enough for every probe in float32.
ROUNDING = 2.0


@dataclass(frozen=True)
class SpectralBracket:
    """What a set of Lanczos runs says about the effective dimension int a / (a + |lambda|) dmu.

    Attributes:
        lower: measures on |lambda|; the smallest of their integrals bounds that of each probe from below.
        upper: measure on |lambda| whose integral bounds it from above.
        rules: the rules behind the value: one if the measure is known; Gauss and Gauss-Radau, of which the
            mean is taken; or the Gauss-Radau rules after SIXTEENTHS of the steps, to be extrapolated.
    """

    lower: tuple[SpectralMeasure, ...]
    upper: SpectralMeasure
    rules: tuple[SpectralMeasure, ...]

    @classmethod
    def exact(cls, measure: SpectralMeasure) -> "SpectralBracket":
        """Of a measure that is known."""
        return cls((measure,), measure, (measure,))

    def rank(self, side: Side, ridge: float) -> float:
        """1 - delta(a) / D = int |lambda| / (a + |lambda|) dmu, its bounds named after those of delta."""
        if np.isinf(ridge):
            return 0.0
        if side == "lower":
            return float(np.mean(np.max([_ranks(measure, ridge) for measure in self.lower], axis=0)))
        if side == "upper":
            return float(np.mean(_ranks(self.upper, ridge)))
        value, *others = _estimates([float(np.mean(_ranks(rule, ridge))) for rule in self.rules])
        if side != "value" and side <= len(others):
            return others[side - 1]
        # What is extrapolated from few steps may leave the bounds (which are in order but for rounding).
        return sorted((self.rank("lower", ridge), value, self.rank("upper", ridge)))[1]

    def dimension(self, side: Side, ridge: float) -> float:
        """delta(a) / D: its "lower" or "upper" bound, its "value", or another estimate of it."""
        return 1 - self.rank(side, ridge)

    def spread(self, solve: Callable[[Side], float]) -> float:
        """How well the Lanczos steps resolve a quantity: the distance of the farthest estimate, in its units.

        Of a semidefinite matrix half its bracket; of an indefinite one how far it moved over the last quarter
        of the steps, and at least a quarter of what is extrapolated, but no more than its bracket allows.

        Args:
            solve: the quantity as computed from each side.
        """

        def farthest(*sides: Side) -> float:
            return max(abs(solve(side) - value) for side in sides)

        value = solve("value")
        return min(farthest(1, 2, 3, 4), farthest("lower", "upper"))

    def probe_error(self, ridge: float) -> float:
        """Standard error of delta(a) / D due to the finite number of probes."""
        if np.isinf(ridge):
            return 0.0
        return self.rules[-1].probe_error(lambda x: ridge / (ridge + np.abs(x)))


def _ranks(measure: SpectralMeasure, ridge: float) -> NDArray[np.float64]:
    """(probes,) integrals of |x| / (a + |x|)."""
    magnitudes = np.abs(measure.nodes)
    return np.sum(measure.weights * (magnitudes / (ridge + magnitudes)), axis=1)


def _estimates(terms: Sequence[float]) -> list[float]:
    """The value first, then the other estimates, from the integrals over `SpectralBracket.rules`."""
    if len(terms) == 1:
        return [terms[0]]
    if len(terms) == 2:
        return [(terms[0] + terms[1]) / 2, *terms]
    after = dict(zip(SIXTEENTHS, terms, strict=True))
    value, *others = (_aitken(*(after[part] for part in window)) for window in WINDOWS)
    return [value, *others, value + CORRECTION * (after[16] - value)]


def _aitken(last: float, middle: float, first: float) -> float:
    """Limit of a sequence with geometric differences; its last term if they do not shrink."""
    now, before = last - middle, middle - first
    limit = last + now * now / (before - now) if 0 < now < before else last
    return min(limit, 1.0)


def bracket_semidefinite(runs: Sequence[Tridiagonal], dim: int | None = None) -> SpectralBracket:
    """Gauss below, Gauss-Radau with a node at 0 above; the value is their mean."""
    lower, upper = [gauss(run) for run in runs], [gauss_radau(run, 0.0) for run in runs]
    lower = [(np.maximum(nodes, 0), weights) for nodes, weights in lower]
    rules = stack_rules(lower, dim), stack_rules(upper, dim)
    return SpectralBracket((_shifted(lower, runs, 1, dim),), _shifted(upper, runs, -1, dim), rules)


def bracket_indefinite(
    runs: Sequence[Tridiagonal], dim: int | None = None, *, ridge: float | None = None
) -> SpectralBracket:
    """Gauss-Radau with a node at 0 above, the least rules below; the value is the extrapolated upper bound.

    Args:
        runs: Lanczos runs of an indefinite matrix.
        dim: as in `SpectralMeasure`.
        ridge: scale of |lambda| around which the lower bound is resolved, over four decades. None leaves it
            out, as 0.
    """
    if all(run.breakdown for run in runs):
        known = [gauss(run) for run in runs]
        lower, upper = (_shifted(known, runs, sign, dim) for sign in (1, -1))
        return SpectralBracket((lower,), upper, (stack_rules(known, dim),))

    def least(run: Tridiagonal) -> list[Rule]:
        if run.breakdown:
            return [gauss(run)] * 3
        return [_NOWHERE] if ridge is None else least_rules(run, [ridge / 100, ridge, ridge * 100])

    radau = [
        [gauss_radau(run.truncate(max(run.num_steps * part // 16, 1)), 0.0) for run in runs]
        for part in SIXTEENTHS
    ]
    rules = tuple(stack_rules(rule, dim) for rule in radau)
    lower = [_shifted(rule, runs, 1, dim) for rule in zip(*map(least, runs), strict=False)]
    return SpectralBracket(tuple(lower), _shifted(radau[-1], runs, -1, dim), rules)


# All mass at an eigenvalue that is too large to matter: nothing is known from below.
_NOWHERE: Rule = (np.array([1e300]), np.array([1.0]))


def _shifted(
    rules: Sequence[Rule], runs: Sequence[Tridiagonal], sign: int, dim: int | None
) -> SpectralMeasure:
    """Rules on |lambda|, moved by the rounding of each run's eigenvalues."""
    return stack_rules(
        [
            (np.maximum(np.abs(nodes) + sign * ROUNDING * run.rounding, 0), weights)
            for (nodes, weights), run in zip(rules, runs, strict=True)
        ],
        dim,
    )
