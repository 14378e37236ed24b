r"""All four limits from one dense eigendecomposition: exact, for networks of up to a few thousand weights.

H = V diag(lambda) V^T in float64 on the host, |H| = V diag(|lambda|) V^T. Cost: D products with H and about
5 D^3 operations; memory about 5 matrices of 8 D^2 bytes (D = 5,000: 1 GB).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

from jaxlimit.curvature.dense_matrix import dense_matrix
from jaxlimit.limits.budget import Budget
from jaxlimit.limits.eigensystem import Eigensystem, eigensystem
from jaxlimit.limits.estimate import Estimate
from jaxlimit.limits.problem import Problem
from jaxlimit.spectrum.bracket import SpectralBracket
from jaxlimit.spectrum.measure import SpectralMeasure

# Up to here a dense eigendecomposition fits in 1 GB and is done in seconds, without any probe error.
DENSE_DIM = 5_000


@dataclass(frozen=True)
class DenseSource:
    """A curvature as a matrix, with its weights in the order in which they are removed.

    Attributes:
        matrix: (D, D) H, rows and columns in order of increasing magnitude of the weights.
        eigensystem: lambda, and V as far as it is needed.
        weights: (D,) the weights in the same order.
        gradient: (D,) the gradient in the same order.
        problem: order of the weights, and eps.
    """

    matrix: NDArray[np.float64]
    eigensystem: Eigensystem
    weights: NDArray[np.float64]
    gradient: NDArray[np.float64]
    problem: Problem

    @property
    def method(self) -> str:
        """As the result names it."""
        return "dense eigendecomposition"

    @property
    def exact(self) -> bool:
        """All eigenvalues are known to rounding."""
        return True

    @property
    def reorthogonalized(self) -> bool:
        """All eigenvectors are there, and orthogonal."""
        return True

    @property
    def measure(self) -> SpectralMeasure:
        """The spectral measure: every eigenvalue with weight 1/D."""
        eigenvalues = self.eigensystem.eigenvalues
        return SpectralMeasure(eigenvalues, np.full(len(eigenvalues), 1 / len(eigenvalues)))

    def spectrum(self) -> SpectralBracket:
        """The spectral measure as a bracket of no width."""
        return SpectralBracket.exact(self.measure)

    def removed(self, counts: list[int]) -> list[SpectralBracket]:
        """The spectral measure seen from c after n removals, for each n > 0. Cost: D^2 each."""
        ranks = np.arange(len(self.weights))
        vectors = np.stack([np.where(ranks < n, self.weights, 0.0) for n in counts], axis=1)
        squares = self.eigensystem.coordinates(vectors).T ** 2
        measures = [SpectralMeasure(self.eigensystem.eigenvalues, x / np.sum(x)) for x in squares]
        return [SpectralBracket.exact(measure) for measure in measures]

    def one_shot(self) -> Estimate:
        """First n at which -g^T c + c^T H c / 2 (signed H) exceeds eps, from one pass over the matrix."""
        c, dim = self.weights, len(self.weights)
        rows = np.tril(self.matrix, -1) @ c  # row n against the n weights removed before it
        losses = np.cumsum(c * rows + np.diag(self.matrix) * c**2 / 2 - self.gradient * c)
        crossed = losses > self.problem.loss_tolerance
        n = int(np.argmax(crossed)) + 1 if crossed.any() else dim
        return Estimate.between(n / dim, n / dim, n / dim, dim)

    def minimum(self) -> Callable[[int], tuple[float, float]]:
        """min_x (c - x)^T |H| (c - x) / 2 over vectors x on the kept weights, as a function of n.

        |H| is H with its negative eigenvalues turned round. Cost: 4 D^2 operations once for each of them, and
        (D - n)^3 / 3 a call. Eigenvalues below rounding (D machine epsilon lambda_max) are raised to it so
        that the factorisation exists.
        """
        eigenvalues = self.eigensystem.eigenvalues
        floor = len(eigenvalues) * np.finfo(np.float64).eps * np.max(np.abs(eigenvalues), initial=1e-300)
        low = np.flatnonzero(eigenvalues < floor)
        vectors = self.eigensystem.vectors(low)
        raised = np.maximum(np.abs(eigenvalues[low]), floor) - eigenvalues[low]
        absolute = self.matrix + (vectors * raised) @ vectors.T

        def value(n: int) -> tuple[float, float]:
            c, kept = self.weights[:n], absolute[n:, n:]
            right = absolute[n:, :n] @ c
            gained = right @ cho_solve(cho_factor(kept, lower=True), right) if len(kept) else 0.0
            loss = max(0.0, float(c @ absolute[:n, :n] @ c - gained) / 2)
            return loss, loss

        return value


def dense_fits(dim: int, num_products: float = np.inf) -> bool:
    """Whether the matrix of D weights is decomposed in seconds and can be had with so many products."""
    return dim <= min(DENSE_DIM, num_products)


def dense_source(problem: Problem, budget: Budget) -> DenseSource:
    """The matrix by D products, and its eigendecomposition."""
    budget.stage = "dense"
    order = problem.order
    matrix = dense_matrix(budget.matmat, order.like)[np.ix_(order.order, order.order)]
    gradient = order.sort(budget.curvature.gradient)
    return DenseSource(matrix, eigensystem(matrix), order.sort(order.like), gradient, problem)
