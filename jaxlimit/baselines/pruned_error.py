r"""The scaling law of the error of pruned networks, fitted to a few of them.

    err(d) = err_dense [ (d^2 + p^2 (err_up / err_dense)^(2 / gamma)) / (d^2 + p^2) ]^(gamma / 2)

in the density d = 1 - s: a plateau at the dense network's error, a power law of exponent -gamma, and a
plateau at err_up. Free are err_up, gamma and p, where the power law ends. Source: Rosenfeld, Frankle, Carbin
and Shavit, "On the Predictability of Pruning Across Scales", ICML 2021, arXiv 2006.10621, equation 1; it
reports errors below 2 % on average, of networks that were trained again.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import least_squares

from jaxlimit.core.checks import as_real, require_range


@dataclass(frozen=True)
class PrunedError:
    """The law with its numbers.

    Attributes:
        dense: error without pruning.
        upper: error that sparse networks come to, at least `dense`.
        exponent: gamma, of the power law between the two.
        transition: p, the density below which the power law turns towards `upper`.

    Examples:
        >>> law = PrunedError(dense=0.1, upper=0.9, exponent=1.0, transition=0.01)
        >>> [round(float(x), 3) for x in law.error([1.0, 0.09, 0.0])]
        [0.1, 0.141, 0.9]
        >>> round(law.sparsity(0.2), 3)
        0.949
    """

    dense: float
    upper: float
    exponent: float
    transition: float

    def error(self, density: ArrayLike) -> NDArray[np.float64]:
        """err(d) at each density, in [0, 1]."""
        with np.errstate(divide="ignore"):  # the logarithm of a density of 0
            squares = 2 * np.log(np.asarray(density, np.float64))
        corner = 2 * np.log(self.transition)
        ratio = np.logaddexp(squares, corner + self._level(self.upper)) - np.logaddexp(squares, corner)
        return self.dense * np.exp(self.exponent / 2 * ratio)

    def sparsity(self, error: float) -> float:
        """The largest sparsity in [0, 1] with at most this error; 0 where there is none."""
        if error >= self.upper:
            return 1.0
        level = self._level(error)
        if level <= 0:
            return 0.0
        above = self._level(self.upper) - level
        ratio = above + np.log1p(-np.exp(-above)) - np.log1p(-np.exp(-level))
        return 1 - float(np.exp(min(0.0, np.log(self.transition) + ratio / 2)))

    def _level(self, error: float) -> float:
        """The logarithm of (error / dense)^(2 / gamma), which itself may be no float."""
        return 2 / self.exponent * float(np.log(error / self.dense))


def fit_pruned_error(densities: ArrayLike, errors: ArrayLike, dense: float) -> PrunedError:
    """The law of least squared relative errors, through the dense network's error.

    Args:
        densities: (m,) of the networks that were measured, each in (0, 1]; m is at least 3.
        errors: (m,) theirs, positive.
        dense: the dense network's, positive.

    Returns:
        The law. Which of its numbers few networks determine is another question: only densities below the
        transition say anything of `upper`.

    Raises:
        ValueError: fewer than three networks, or numbers out of range.

    Examples:
        >>> law = PrunedError(dense=0.05, upper=0.9, exponent=1.5, transition=0.02)
        >>> densities = np.array([0.5, 0.2, 0.1, 0.05, 0.02, 0.01])
        >>> found = fit_pruned_error(densities, law.error(densities), 0.05)
        >>> round(found.exponent, 3), round(found.transition, 3)
        (1.5, 0.02)
    """
    density, error = np.asarray(densities, np.float64), np.asarray(errors, np.float64)
    shapes = density.shape, error.shape
    fits = shapes[0] == shapes[1] and density.ndim == 1 and len(density) >= FREE
    require_range("densities and errors", shapes, fits, f"two rows of at least {FREE} numbers")
    inside = bool(np.all((density > 0) & (density <= 1)))
    require_range("densities", density.tolist(), inside, "above 0 and at most 1")
    positive = bool(np.all(np.isfinite(error) & (error > 0)))
    require_range("errors", error.tolist(), positive, "positive and finite")
    require_range("dense", dense, 0 < as_real(dense) < np.inf, "positive and finite")

    def law(logarithms: NDArray[np.float64]) -> PrunedError:
        rise, exponent, transition = np.exp(logarithms)
        return PrunedError(dense, float(dense * (1 + rise)), float(exponent), float(transition))

    largest = max(float(np.max(error)), 1.01 * dense)
    ends = np.quantile(density, [0, 0.5])
    starts = [np.log([largest / dense - 1, gamma, p]) for gamma in (0.5, 1, 2, 4) for p in ends]
    found = [least_squares(lambda x: law(x).error(density) / error - 1, start) for start in starts]
    return law(min(found, key=lambda fit: fit.cost).x)


# Numbers that are fitted.
FREE = 3
