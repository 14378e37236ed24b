r"""p-values for a mean of bounded risks, and the upper confidence bounds that they give.

n independent examples have risks Y_1, ..., Y_n in [0, 1] with the mean r. The hypothesis is r > a. A p-value
is at most delta with probability at most delta wherever the hypothesis holds, for every delta.

*binomial*: P[Bin(n, a) <= Y_1 + ... + Y_n]. Exact, where every risk can only be 0 or 1.

*hoeffding_bentkus*: min(exp(-n KL(min(mean, a), a)), e P[Bin(n, a) <= ceil(n mean)]), for any risks
(Hoeffding 1963; Bentkus 2004; both as in Bates et al. 2021, Section 3.1). Both terms bound the same tail, so
the smaller one does. It knows only the mean of the risks, and pays for the largest variance that it allows.

*betting*: for any risks, and it learns their variance. A player holds p_0 and bets against the hypothesis,

    p_t = p_{t-1} + g_t (a - Y_t),
    g_t = min(phi(u) / (sigma_t sqrt(n - t + 1)), p_{t-1} / (1 - a), (1 - p_{t-1}) / a),

u = Phi^{-1}(p_{t-1}), sigma_t the standard deviation of the risks before t. If r >= a, p_t is a nonnegative
supermartingale whatever sigma_t is, so it ever reaches theta with probability at most p_0 / theta (Ville;
Waudby-Smith and Ramdas 2024). The p-value is the smallest p_0 that reaches theta, divided by theta.

The bets are those that hedge an option which pays 1 if the sum of the risks ends below its critical value,
so that p_t is the chance of that in the normal limit, and the power becomes that of the z-test with known
variance; constant bets need up to twice the examples. (Bets that aim anew at a target from the present
capital are those of Voracek and Orabona 2025, arXiv 2505.22422.) The two other terms of the minimum keep p_t
in [0, 1]. As phi(Phi^{-1}(p)) is concave and 0 at both ends, they also keep the slope of g_t in p between
-1 / a and 1 / (1 - a): then p_t never falls as p_{t-1} or a rises. So what rejects at one level rejects at
each larger level, and what rejects one mean rejects each larger mean: levels and means are found by search.

Sources: Waudby-Smith and Ramdas, arXiv 2010.09686; Bates et al., arXiv 2101.02703.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import bdtr, betaincinv, ndtri, rel_entr

Risks = NDArray[np.float64]

# theta: what is lost of a level by stopping here; a chance of 1 itself is not always reached.
REACHED = 0.99
# Bets at most: more examples are put together in means of equally many, which have the same mean risk.
MAX_BETS = 2**16
# Of the sum of squared deviations before any example is seen, in the place of a (1 - a) of each: half of an
# error's, so that a run without errors is not taken for certainty. In simulations of 0/1, Beta, exponential
# and paired risks with 300 to 3,000 examples nothing between 1/4 and 1 did better on all.
PRIOR_SQUARES = 0.5
# Smallest p-value that is told apart from 0 by betting, and points of a search at once.
SMALLEST, POINTS = 1e-12, 65
# With which probability the needed examples certify a risk like the one observed: the usual planning value.
POWER = 0.8


@dataclass(frozen=True)
class Method:
    """A p-value of risks (n,) in [0, 1], and what follows from it.

    Attributes:
        title: in words.
        p_value: of (risks, bound).
        upper_bound: of (risks, bound, level): smallest mean that is rejected at this level, where `bound` is.
        needed: of (risks, bound, level): about how many examples reject `bound` with probability `POWER`,
            if the true mean is the observed one, which is below it; None beyond 2^40.
    """

    title: str
    p_value: Callable[[Risks, float], float]
    upper_bound: Callable[[Risks, float, float], float]
    needed: Callable[[Risks, float, float], int | None]


def binomial(count: float, num_examples: int, bound: float) -> float:
    """P[Bin(n, a) <= count].

    Examples:
        >>> binomial(0, 100, 0.03) == 0.97**100
        True
    """
    return float(bdtr(count, num_examples, bound))


def hoeffding_bentkus(mean: float, num_examples: int, bound: float) -> float:
    """Smaller one of Hoeffding's and Bentkus' bounds of P[mean of n risks <= mean].

    Examples:
        >>> round(hoeffding_bentkus(0.02, 1000, 0.03), 4), round(binomial(20, 1000, 0.03), 4)
        (0.0905, 0.0333)
    """
    below = min(mean, bound)
    divergence = rel_entr(below, bound) + rel_entr(1 - below, 1 - bound)
    total = num_examples * mean
    errors = math.ceil(total * (1 - 4 * np.finfo(float).eps))  # whole numbers are whole but for rounding
    bentkus = math.e * bdtr(min(errors, num_examples), num_examples, bound)
    return float(min(1.0, math.exp(-num_examples * divergence), bentkus))


def betting(risks: Risks, bound: float) -> float:
    """Smallest level at which betting rejects, to a hundredth of it; 1 if none does.

    Examples:
        >>> risks = np.tile([0.0, 0.1, 0.02], 400)
        >>> betting(risks, 0.045) < 0.05 < hoeffding_bentkus(risks.mean(), len(risks), 0.045)
        True
    """
    game, p_value = BettingGame(risks, bound), 1.0
    levels = np.geomspace(SMALLEST, p_value, POINTS)  # the level 1 rejects everything
    for _ in range(2):
        first = _first_to_stay(game.reaches(bound, levels))
        p_value = float(levels[first])
        levels = np.geomspace(levels[max(first - 1, 0)], p_value, POINTS)
    return p_value


def _first_to_stay(rejected: NDArray[np.bool_]) -> int:
    """Where the last run of rejections begins; the last place of all if it is none."""
    accepted = np.flatnonzero(~rejected[:-1])
    return int(accepted[-1]) + 1 if accepted.size else 0


class BettingGame:
    """Bets on risks in an order that has nothing to do with them. The bound shapes the bets only.

    Args:
        risks: (n,), or (k, n) of k data sets at once.
        bound: a.
    """

    def __init__(self, risks: Risks, bound: float) -> None:
        n = risks.shape[-1]
        order = np.random.default_rng(0).permutation(n)
        starts = np.arange(0, n, -(-n // MAX_BETS))
        sums = np.add.reduceat(risks[..., order], starts, axis=-1)
        risks = sums / np.diff(starts, append=n)
        self._risks = risks.T
        self._scales = 1 / (np.sqrt(2 * np.pi) * _spread_to_come(risks, bound).T)

    def reaches(self, means: float | Risks, levels: float | Risks) -> NDArray[np.bool_]:
        """Whether bets against each of these means reach the target from these levels; (k,) of k data."""
        means, share, _ = np.broadcast_arrays(means, REACHED * np.asarray(levels), self._risks[0])
        most, rest = 1 / (1 - means), 1 / means
        for risk, scale in zip(self._risks, self._scales, strict=True):
            u = ndtri(share)
            stake = np.minimum(np.exp(-u * u / 2) * scale, np.minimum(share * most, (1 - share) * rest))
            after = np.maximum(share + stake * (means - risk), 0)
            share = np.where(share < REACHED, after, share)
        return share >= REACHED


def _spread_to_come(risks: Risks, bound: float) -> Risks:
    """Before each risk, the standard deviation of the sum of the risks to come, as those before show it."""
    n = risks.shape[-1]
    prior = PRIOR_SQUARES / (bound * (1 - bound))  # in examples
    seen = np.arange(n)
    means = (prior * bound + np.cumsum(risks, axis=-1)) / (prior + seen + 1)
    squares = (risks - means) ** 2
    before = PRIOR_SQUARES + np.cumsum(squares, axis=-1) - squares
    return np.sqrt(before / (prior + seen) * (n - seen))


def _binomial_upper_bound(risks: Risks, _: float, level: float) -> float:
    """Clopper and Pearson's."""
    n, count = len(risks), np.sum(risks)
    return 1.0 if count == n else float(betaincinv(count + 1, n - count, 1 - level))


def _hoeffding_bentkus_upper_bound(risks: Risks, bound: float, level: float) -> float:
    n, mean = len(risks), float(np.mean(risks))

    def above(candidate: float) -> float:
        return math.log(max(hoeffding_bentkus(mean, n, candidate), 1e-300) / level)

    return float(brentq(above, max(mean, 1e-12), bound, xtol=1e-10))  # pyright: ignore[reportArgumentType]


def _betting_upper_bound(risks: Risks, bound: float, level: float) -> float:
    game, lower, upper = BettingGame(risks, bound), 0.0, bound
    for _ in range(3):
        means = np.linspace(lower, upper, POINTS)[1:]
        first = _first_to_stay(game.reaches(means, level))
        lower, upper = lower if first == 0 else means[first - 1], means[first]
    return float(upper)


def _needed_for(p_value: Callable[[float, int, float], float]) -> Callable[[Risks, float, float], int | None]:
    """Examples for a p-value of (mean, n, bound): the mean observed lies as high as `POWER` allows."""

    def needed(risks: Risks, bound: float, level: float) -> int | None:
        mean, spread = float(np.mean(risks)), float(np.std(risks))

        def enough(n: int) -> bool:
            return p_value(min(mean + ndtri(POWER) * spread / math.sqrt(n), 1.0), n, bound) <= level

        powers = (2**exponent for exponent in range(41))
        upper = next((n for n in powers if enough(n)), None)
        if upper is None:
            return None
        lower = upper // 2
        while upper - lower > 1:
            middle = (lower + upper) // 2
            lower, upper = (lower, middle) if enough(middle) else (middle, upper)
        return upper

    return needed


def _needed_for_betting(risks: Risks, bound: float, level: float) -> int | None:
    """Examples of the z-test, and those that the largest bets need if all risks are the mean.

    These bets multiply p by 1 + gap / (1 - a) until it is near 1, and then 1 - p by 1 - gap / a. A tenth is
    added for the middle, where the option's stakes are smaller.
    """
    gap = bound - float(np.mean(risks))
    z_test = np.var(risks) * ((ndtri(POWER) - ndtri(level)) / gap) ** 2
    largest_bets = -((1 - bound) * math.log(level) + bound * math.log(1 - REACHED)) / gap
    needed = z_test + 1.1 * largest_bets
    return math.ceil(needed) if needed <= 2**40 else None


METHODS = {
    "binomial": Method(
        "exact binomial",
        lambda risks, bound: binomial(np.sum(risks), len(risks), bound),
        _binomial_upper_bound,
        _needed_for(lambda mean, n, bound: binomial(math.ceil(mean * n), n, bound)),
    ),
    "hoeffding_bentkus": Method(
        "Hoeffding-Bentkus",
        lambda risks, bound: hoeffding_bentkus(float(np.mean(risks)), len(risks), bound),
        _hoeffding_bentkus_upper_bound,
        _needed_for(hoeffding_bentkus),
    ),
    "betting": Method("betting", betting, _betting_upper_bound, _needed_for_betting),
}
