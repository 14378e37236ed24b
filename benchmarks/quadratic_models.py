r"""Quadratic models of the loss of small networks, as dense matrices, and their limits.

    L(w + u) - L(w) = g^T u + u^T M u / 2

with M the Hessian, its modulus, its positive part, or Gauss-Newton's matrix, and g the gradient or 0.

How many random directions does it take from the pruned weights w - c? With b = M c - g the minimum over
w - c + B x, B Gaussian with k columns, is q(-c) - b^T B (B^T M B)^{-1} B^T b / 2. To leading order
B (B^T M B)^{-1} B^T is (M + a)^{-1}, where k = tr M (M + a)^{-1}: the sketched pseudoinverse (LeJeune, Patil,
Javadi, Baraniuk and Tibshirani 2022, arXiv 2211.03751). So the minimum is eps where

    a c^T M (M + a)^{-1} c - 2 a c^T (M + a)^{-1} g - g^T (M + a)^{-1} g = 2 eps,

which for g = 0 is the cone formula. The theorem is about semidefinite matrices; for an indefinite M this
is its continuation to ridges a > -lambda_min, which phase_transition.py compares with the polynomial itself.
There is no smaller a than that of the largest k, beyond which the model has no minimum in the subspace.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve, eigh

from jaxlimit.core.trees import flatten
from jaxlimit.geometry.dimensions import last_within

Array = NDArray[np.float64]
RIDGES = 800  # on the grid on which the equation is solved


@dataclass(frozen=True)
class Quadratic:
    """A model, in flat coordinates of the D prunable weights.

    Attributes:
        weights: (D,) w.
        gradient: (D,) g.
        eigenvalues: (D,) of M, ascending.
        eigenvectors: (D, D).
    """

    weights: Array
    gradient: Array
    eigenvalues: Array
    eigenvectors: Array

    @property
    def order(self) -> NDArray[np.integer]:
        """The weights by rising magnitude."""
        return np.argsort(np.abs(self.weights), kind="stable")

    @property
    def matrix(self) -> Array:
        """(D, D) M."""
        return (self.eigenvectors * self.eigenvalues) @ self.eigenvectors.T

    def removed(self, count: int) -> Array:
        """C after so many removals."""
        c = np.zeros_like(self.weights)
        c[self.order[:count]] = self.weights[self.order[:count]]
        return c

    def one_shot(self, loss_tolerance: float) -> float:
        """The last sparsity before q(-c) exceeds the tolerance."""
        order, matrix = self.order, self.matrix
        c = self.weights[order]
        inner = np.tril(matrix[np.ix_(order, order)], -1) @ c
        rises = np.cumsum(c * inner + np.diag(matrix)[order] * c**2 / 2 - self.gradient[order] * c)
        return int(np.argmax(np.append(rises, np.inf) > loss_tolerance)) / len(c)

    def cone(self, loss_tolerance: float) -> float:
        """The last sparsity at which a random subspace as large as the kept weights meets the tolerance."""
        dim = len(self.weights)

        def spare(count: int) -> float:
            needed = directions(
                self.eigenvalues,
                self.removed(count) @ self.eigenvectors,
                self.gradient @ self.eigenvectors,
                loss_tolerance,
            )
            return 1 - needed / dim

        return last_within(spare, range(dim + 1)) / dim

    def readjusted(self, loss_tolerance: float) -> float:
        """The sparsity at which the kept weights themselves do. A model without minimum is within it."""
        dim, matrix = len(self.weights), self.matrix
        floor = 1e-10 * np.mean(np.abs(self.eigenvalues))

        def spare(count: int) -> float:
            c, kept = self.removed(count), self.order[count:]
            start = c @ matrix @ c / 2 - self.gradient @ c
            pull = (matrix @ c - self.gradient)[kept]
            try:
                factor = cho_factor(matrix[np.ix_(kept, kept)] + floor * np.eye(len(kept)))
            except LinAlgError:
                return 1.0
            return 1.0 if start - pull @ cho_solve(factor, pull) / 2 <= loss_tolerance else 0.0

        return last_within(spare, range(dim + 1)) / dim


def directions(eigenvalues: Array, removed: Array, gradient: Array, loss_tolerance: float) -> float:
    """How many random directions are needed: see above.

    Args:
        eigenvalues: (D,) of M, ascending.
        removed: (D,) c in coordinates of the eigenvectors.
        gradient: (D,) g likewise.
        loss_tolerance: eps.

    Examples:
        The cone of M = 1 in 100 dimensions, with |c|^2 = 4 and 2 eps = 1: a = 1 / 3, and 75 directions.

        >>> round(directions(np.ones(100), np.full(100, 0.2), np.zeros(100), 0.5), 1)
        75.0
    """
    largest, lowest = float(np.max(np.abs(eigenvalues))), max(1e-12, -1.0001 * float(eigenvalues[0]))
    a = np.geomspace(lowest, 1e4 * largest, RIDGES)[:, None]
    needed = np.sum(eigenvalues / (eigenvalues + a), axis=1)
    terms = (a * eigenvalues * removed**2 - 2 * a * removed * gradient - gradient**2) / (eigenvalues + a)
    excess = np.sum(terms, axis=1) - 2 * loss_tolerance
    most = int(np.argmax(needed))
    return 0.0 if excess[-1] <= 0 else float(np.interp(0, excess[most:], needed[most:]))


def of_curvature(curvature: Any) -> Quadratic:
    """The model at trained weights, from `hessian` or `gauss_newton`."""
    weights, gradient = (flatten(x).astype(np.float64) for x in (curvature.weights, curvature.gradient))
    return Quadratic(weights, gradient, *eigh(np.asarray(curvature.dense(), np.float64)))
