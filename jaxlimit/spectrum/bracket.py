r"""Both sides of an effective dimension: what Lanczos runs say of it, and how sure that is.

The integrand is f(lambda) = a / (a + |lambda|); its integral over the spectral measure mu is delta(a) / D.
T_k and beta_k fix the moments of mu up to degree 2k, and among all measures with these moments

    the integral of f is largest for the Gauss-Radau rule with a node at 0,

whatever the signs of the eigenvalues, and smallest for the Gauss rule if none is negative; otherwise for
one of the rules that extend T_k by a row (`least_rules`). So both bounds are proven, and the best that k
products can give; documentation page "Numerics" has the proof. On a semidefinite H they close fast, and
the value is their mean. On an indefinite H the lower one lags behind, while the upper one falls
geometrically with k: the value is its limit, extrapolated from three step counts (Aitken).

Two other errors are kept apart from this one. That of the probes is `SpectralMeasure.probe_error`. As to
rounding, the products are those of a matrix H' that differs from H by about r ||H||, with r machine epsilon
or what was measured; u is twice that. On a semidefinite H the bounds allow for it whatever it does to
eigenvalues and eigenvectors: H' - u <= H <= H' + u and f falls, so f(H' + u) <= f(H) <= f(H' - u), and no
eigenvalue of H' lies below -u, where its Gauss-Radau rule has its node. On an indefinite H all |nodes| are
moved by u.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from jaxlimit.spectrum.measure import SpectralMeasure, stack_rules
from jaxlimit.spectrum.rules import Rule, gauss, gauss_radau, least_rules
from jaxlimit.spectrum.tridiagonal import Tridiagonal

T = TypeVar("T")
S = TypeVar("S")
R = TypeVar("R")
# Sixteenths of the steps from which each estimate for an indefinite matrix is extrapolated, the value first.
# The last is what the value was after three quarters of the steps.
WINDOWS = ((16, 12, 8), (14, 10, 6), (12, 8, 4), (12, 9, 6))
SIXTEENTHS = tuple(sorted({part for window in WINDOWS for part in window}))
# Share of what is extrapolated that counts as uncertain even where the step counts agree better: on the
# networks of benchmarks/accuracy.py the error was rarely larger.
CORRECTION = 0.25
# Eigenvalues are uncertain by so many times r ||H||. On the digits network of the tests once was enough for
# every probe in float32.
ROUNDING = 2.0
# A semidefinite matrix has no node so many times r ||H|| below 0: with reorthogonalisation 2 were the most of
# hundreds of matrices in float32, without it, where rounding makes copies of nodes, 20.
NEGATIVE = {True: 10.0, False: 100.0}


@dataclass(frozen=True)
class Bracketed(Generic[T]):
    """A quantity as all that is known of it: numbers, or functions from which numbers follow.

    Attributes:
        lower, upper: its bounds.
        value: what is taken for it.
        others: other estimates, whose distance from the value tells how well it is resolved.
    """

    lower: T
    value: T
    upper: T
    others: tuple[T, ...] = ()

    @classmethod
    def known(cls, value: T) -> "Bracketed[T]":
        """A quantity that is known exactly."""
        return cls(value, value, value)

    def map(self, function: Callable[[T], S]) -> "Bracketed[S]":
        """What follows from each: `function` of the bounds, the value and the other estimates."""
        others = tuple(function(x) for x in self.others)
        return Bracketed(function(self.lower), function(self.value), function(self.upper), others)

    def join(self, function: Callable[[T, S], R], second: "Bracketed[S]") -> "Bracketed[R]":
        """What follows from this and another quantity: from both lower bounds, both values and so on.

        Where one has fewer other estimates, its value takes the place of those that are missing.
        """
        size = max(len(self.others), len(second.others))
        pairs = zip(self._padded(size), second._padded(size), strict=True)
        lower, value, upper, *others = (function(x, y) for x, y in pairs)
        return Bracketed(lower, value, upper, tuple(others))

    def _padded(self, num_others: int) -> list[T]:
        missing = num_others - len(self.others)
        return [self.lower, self.value, self.upper, *self.others, *[self.value] * missing]


def spread(number: Bracketed[float]) -> float:
    """How well the Lanczos steps resolve a number: the distance of the farthest estimate from its value.

    For a semidefinite matrix it is half the bracket. For an indefinite one it is how far the value moved over
    the last quarter of the steps, and at least a quarter of what is extrapolated. It never exceeds what the
    bounds allow.

    Examples:
        >>> spread(Bracketed(lower=0.0, value=0.5, upper=1.0, others=(0.375, 0.75)))
        0.25
    """
    estimates = max((abs(other - number.value) for other in number.others), default=0.0)
    return min(estimates, max(abs(number.lower - number.value), abs(number.upper - number.value)))


@dataclass(frozen=True)
class EffectiveDimension:
    """delta(a) / D as a function of the ridge a, by one way to compute it.

    Attributes:
        rank: a -> 1 - delta(a) / D, which keeps its digits where delta is D to rounding.
    """

    rank: Callable[[float], float]

    def __call__(self, ridge: float) -> float:
        """delta(a) / D."""
        return 1 - self.rank(ridge)


@dataclass(frozen=True, eq=False)
class SpectralBracket:
    """What a set of Lanczos runs says about the effective dimension int a / (a + |lambda|) dmu.

    Attributes:
        lower: measures on |lambda|; the smallest of their integrals bounds that of each probe from below.
        upper: measure whose integral bounds it from above, on |lambda|, or with nodes just below 0 where
            rounding may put them.
        rules: the rules behind the value: one if the measure is known; Gauss and Gauss-Radau, of which the
            mean is taken; or the Gauss-Radau rules after SIXTEENTHS of the steps, to be extrapolated.
        bounded: (probes,) whether `lower` holds for a probe; where it does not, the bound is 0. None: all.
    """

    lower: tuple[SpectralMeasure, ...]
    upper: SpectralMeasure
    rules: tuple[SpectralMeasure, ...]
    bounded: NDArray[np.bool_] | None = None

    @classmethod
    def exact(cls, measure: SpectralMeasure, rounding: float = 0.0) -> "SpectralBracket":
        """Of a measure that is known but for relative errors of the matrix."""
        norm = float(np.max(np.abs(measure.nodes)))
        larger, smaller = (_moved(measure, sign * ROUNDING * rounding * norm) for sign in (1, -1))
        return cls((larger,), smaller, (measure,))

    @property
    def dimension(self) -> Bracketed[EffectiveDimension]:
        """Delta / D as functions of the ridge: its lower and upper bound, its value and other estimates."""
        num_estimates = len(_estimates([0.0] * len(self.rules)))
        others = [partial(self._estimated_rank, i) for i in range(1, num_estimates)]
        lower, value, upper = self._largest_rank, self._rank, self._smallest_rank
        ranks = Bracketed[Callable[[float], float]](lower, value, upper, tuple(others))
        return ranks.map(EffectiveDimension)

    def probe_error(self, ridge: float) -> float:
        """Standard error of delta(a) / D due to the finite number of probes."""
        if np.isinf(ridge):
            return 0.0
        return self.rules[-1].probe_error(lambda x: ridge / (ridge + np.abs(x)))

    def _largest_rank(self, ridge: float) -> float:
        if np.isinf(ridge):  # delta is D, whatever is known of H
            return 0.0
        largest = np.max([_ranks(measure, ridge) for measure in self.lower], axis=0)
        return float(np.mean(largest if self.bounded is None else np.where(self.bounded, largest, 1.0)))

    def _smallest_rank(self, ridge: float) -> float:
        return float(np.mean(_signed_ranks(self.upper, ridge)))

    def _estimated_rank(self, index: int, ridge: float) -> float:
        return _estimates([float(np.mean(_ranks(rule, ridge))) for rule in self.rules])[index]

    def _rank(self, ridge: float) -> float:
        # What is extrapolated from few steps may leave the bounds (which are in order but for rounding).
        bounds = self._largest_rank(ridge), self._smallest_rank(ridge)
        return sorted((bounds[0], self._estimated_rank(0, ridge), bounds[1]))[1]


def _ranks(measure: SpectralMeasure, ridge: float) -> NDArray[np.float64]:
    """(probes,) integrals of |x| / (a + |x|)."""
    magnitudes = np.abs(measure.nodes)
    return np.sum(measure.weights * (magnitudes / (ridge + magnitudes)), axis=1)


def _signed_ranks(measure: SpectralMeasure, ridge: float) -> NDArray[np.float64]:
    """(probes,) integrals of x / (a + x), for nodes that rounding may put below 0; 0 where it reaches -a."""
    nodes = np.where(measure.weights > 0, measure.nodes, 0.0)
    known = np.min(nodes, axis=1) > -ridge
    nodes = np.where(known[:, None], nodes, 0.0)
    return np.maximum(np.sum(measure.weights * (nodes / (ridge + nodes)), axis=1), 0.0)


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
    lower, upper = [gauss(run) for run in runs], [_radau_below(run, 0.0) for run in runs]
    lower = [(np.maximum(nodes, 0), weights) for nodes, weights in lower]
    rules = stack_rules(lower, dim), stack_rules(upper, dim)
    least = [_radau_below(run, ROUNDING * run.rounding * run.norm) for run in runs]
    return SpectralBracket((_shifted(lower, runs, 1, dim),), stack_rules(least, dim), rules)


def _radau_below(run: Tridiagonal, u: float) -> Rule:
    """The Gauss-Radau rule with a node at -u, moved by -u."""
    nodes, weights = gauss_radau(run, -u)
    return np.maximum(nodes, -u) - u, weights


def bracket_indefinite(
    runs: Sequence[Tridiagonal], dim: int | None = None, *, ridge: float | None = None
) -> SpectralBracket:
    """Gauss-Radau with a node at 0 above, the least rules below; the value is the extrapolated upper bound.

    Args:
        runs: Lanczos runs of an indefinite matrix.
        dim: as in `SpectralMeasure`.
        ridge: scale of |lambda| around which the lower bound is resolved, over four decades. None leaves it
            out: it is 0 then, but for runs that ended and are exact.
    """
    if all(run.breakdown for run in runs):
        known = [gauss(run) for run in runs]
        lower, upper = (_shifted(known, runs, sign, dim) for sign in (1, -1))
        return SpectralBracket((lower,), upper, (stack_rules(known, dim),))
    radau = [
        [gauss_radau(run.truncate(max(run.num_steps * part // 16, 1)), 0.0) for run in runs]
        for part in SIXTEENTHS
    ]
    least, bounded = [radau[-1]], np.array([run.breakdown for run in runs])  # those that ended are exact
    if ridge is not None:
        ridges = [ridge / 100, ridge, ridge * 100]
        each = [[gauss(run)] * 3 if run.breakdown else least_rules(run, ridges) for run in runs]
        least, bounded = list(zip(*each, strict=True)), None
    lower = tuple(_shifted(rules, runs, 1, dim) for rules in least)
    upper = _shifted(radau[-1], runs, -1, dim)
    values = tuple(stack_rules(rules, dim) for rules in radau)
    return SpectralBracket(lower, upper, values, bounded)


def negative_share(runs: Sequence[Tridiagonal]) -> float:
    """How far below 0 the matrix of the runs reaches, in units of ||H||; 0 where that is but rounding.

    A node of a Gauss rule lies between the least and the largest eigenvalue, so a negative one shows that the
    matrix is not semidefinite.

    Examples:
        >>> run = Tridiagonal(np.array([1.0, 1.0]), np.array([3.0]), 0.0, rounding=1e-7)
        >>> negative_share([run])
        0.5
    """
    shares = [-float(np.min(gauss(run)[0])) / run.norm for run in runs if run.norm > 0]
    noise = [NEGATIVE[run.reorthogonalized] * run.rounding for run in runs if run.norm > 0]
    return max((x for x, least in zip(shares, noise, strict=True) if x > least), default=0.0)


def _moved(measure: SpectralMeasure, by: float) -> SpectralMeasure:
    """A measure on |lambda|, moved."""
    return replace(measure, nodes=np.maximum(np.abs(measure.nodes) + by, 0))


def _shifted(
    rules: Sequence[Rule], runs: Sequence[Tridiagonal], sign: int, dim: int | None
) -> SpectralMeasure:
    """Rules on |lambda|, moved by the rounding of each run's eigenvalues."""
    return stack_rules(
        [
            (np.maximum(np.abs(nodes) + sign * ROUNDING * run.rounding * run.norm, 0), weights)
            for (nodes, weights), run in zip(rules, runs, strict=True)
        ],
        dim,
    )
