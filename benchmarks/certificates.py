"""How often a certificate is found, by each p-value, where there is one to find: what the default rests on.

    python benchmarks/certificates.py

Simulated data sets of n examples, whose true risk lies below the bound: errors, differences of paired errors,
a loss that is cut off at 1. "Constant bets" are those of Waudby-Smith and Ramdas (arXiv 2010.09686) for a
confidence interval; "z-test" is the share of a test that knows the variance, were the mean of the risks
normal. Then the same with the true risk at the bound, where each share is an error rate. Results are in
results/certificates.json and .md.
"""

import argparse
import math
from collections.abc import Callable, Mapping
from typing import Any

import common
import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, ndtr, ndtri

from jaxlimit.measuring.p_values import BettingGame, Risks, hoeffding_bentkus

NAME = "certificates"
LEVEL = 0.05
SIZES = (1000, 3000, 10_000)
Draw = Callable[[np.random.Generator, float, tuple[int, int]], Risks]


def errors(rng: np.random.Generator, mean: float, shape: tuple[int, int]) -> Risks:
    """0 or 1."""
    return (rng.random(shape) < mean).astype(np.float64)


def paired(rng: np.random.Generator, mean: float, shape: tuple[int, int]) -> Risks:
    """1.5 % of examples on which one of two networks errs, as numbers 0, 1/2 and 1."""
    u, worse = rng.random(shape), 0.0075 + mean - 0.5
    return np.where(u < worse, 1.0, np.where(u < 0.015, 0.0, 0.5))


def losses(rng: np.random.Generator, mean: float, shape: tuple[int, int]) -> Risks:
    """Exponential; what is cut off at 1 is less than a twenty-thousandth."""
    return np.minimum(rng.exponential(mean, shape), 1.0)


# Words, draws, true risk and bound in [0, 1].
CASES: Mapping[str, tuple[Draw, float, float]] = {
    "errors: 2.5 % against 3 %": (errors, 0.025, 0.03),
    "paired errors: half a point more against one point": (paired, 0.5025, 0.505),
    "loss: .095 against .1": (losses, 0.095, 0.1),
}


def constant_bets(risks: Risks, bound: float) -> NDArray[np.bool_]:
    """Whether bets of sqrt(2 log(1 / level) / (n variance)) of the capital multiply it by 1 / level."""
    n = risks.shape[1]
    seen = np.arange(n)
    means = (0.5 + np.cumsum(risks, axis=1)) / (seen + 2)
    squares = (risks - means) ** 2
    variances = (0.25 + np.cumsum(squares, axis=1) - squares) / (seen + 1)
    bets = np.minimum(np.sqrt(-2 * math.log(LEVEL) / (n * variances)), 0.5 / (1 - bound))
    capital = np.cumsum(np.log1p(bets * (bound - risks)), axis=1)
    return capital.max(axis=1) >= -math.log(LEVEL)


def shares(draw: Draw, mean: float, bound: float, n: int, repetitions: int, seed: int) -> dict[str, float]:
    """Of data sets that certify the bound, by p-value."""
    risks = draw(np.random.default_rng(seed), mean, (repetitions, n))
    observed = risks.mean(axis=1)
    found: dict[str, Any] = {
        "Hoeffding-Bentkus": [hoeffding_bentkus(x, n, bound) <= LEVEL for x in observed],
        "constant bets": constant_bets(risks, bound),
        "betting": BettingGame(risks, bound).reaches(bound, LEVEL),
    }
    if draw is errors:
        found["exact binomial"] = bdtr(risks.sum(axis=1), n, bound) <= LEVEL
    effect = (bound - mean) * math.sqrt(n) / float(np.std(risks))
    return {name: float(np.mean(x)) for name, x in found.items()} | {
        "z-test": float(ndtr(effect + ndtri(LEVEL)))
    }


def main() -> None:
    """As typed on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    heads = ["exact binomial", "Hoeffding-Bentkus", "constant bets", "betting", "z-test"]
    rows, table = [], []
    for name, (draw, mean, bound) in CASES.items():
        for n in SIZES:
            found = shares(draw, mean, bound, n, options.repetitions, options.seed)
            wrong = shares(draw, bound, bound, n, options.repetitions, options.seed + 1)
            rows.append({"case": name, "n": n, "found": found, "wrong": wrong})
            cells = [f"{100 * found[head]:.0f} %" if head in found else "" for head in heads]
            table.append([name, f"{n:,}", *cells, f"{100 * wrong['betting']:.1f} %"])
    command = f"python benchmarks/certificates.py --repetitions {options.repetitions} --seed {options.seed}"
    document = {"command": command, "level": LEVEL, "rows": rows}
    common.write(NAME, document, common.markdown(["risk", "n", *heads, "betting, wrongly"], table))


if __name__ == "__main__":
    main()
