r"""All four limits from one dense eigendecomposition: exact, for networks of up to a few thousand weights.

H = V diag(lambda) V^T in float64 on the host, |H| = V diag(|lambda|) V^T. Cost: D products with H and about
5 D^3 operations; memory about 5 matrices of 8 D^2 bytes (D = 5,000: 1 GB).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

from jaxlimit.curvature.dense_matrix import dense_matrix, num_dense_products
from jaxlimit.limits.budget import Budget
from jaxlimit.limits.cone import Look, look_at
from jaxlimit.limits.eigensystem import Eigensystem, eigensystem
from jaxlimit.limits.estimate import Estimate
from jaxlimit.limits.problem import Problem, group_share
from jaxlimit.spectrum.bracket import NEGATIVE, ROUNDING, SpectralBracket
from jaxlimit.spectrum.measure import SpectralMeasure

# Up to here a dense eigendecomposition fits in 1 GB and is done in seconds, without any probe error.
DENSE_DIM = 5_000
# What one_shot alone takes without the matrix: a glance at the spectrum, and the points of its path.
ONE_SHOT_PRODUCTS = 64
# Lanczos steps that a probe takes at least, of a Gauss-Newton matrix; a Hessian needs several times as many.
PROBE_STEPS = 64


@dataclass(frozen=True, eq=False)
class DenseSource:
    """A curvature as a matrix, with its weights in the order in which they are removed.

    Attributes:
        matrix: (D, D) H, rows and columns in order of increasing magnitude of the weights.
        eigensystem: lambda, and V as far as it is needed.
        weights: (D,) the weights in the same order.
        gradient: (D,) the gradient in the same order.
        problem: order of the weights, and eps.
        rounding: relative error of the products that the matrix was made of.
        declared_semidefinite: whether the matrix should have no negative eigenvalue.
    """

    matrix: NDArray[np.float64]
    eigensystem: Eigensystem
    weights: NDArray[np.float64]
    gradient: NDArray[np.float64]
    problem: Problem
    rounding: float
    declared_semidefinite: bool

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
        """The spectral measure as a bracket that is as wide as rounding makes it."""
        return SpectralBracket.exact(self.measure, self.rounding)

    @property
    def negative_share(self) -> float:
        """How far a matrix that should be semidefinite reaches below 0, in units of ||H||; 0 for rounding."""
        values = self.eigensystem.eigenvalues
        share = -float(values[0]) / max(float(np.max(np.abs(values))), 1e-300)
        return share if self.declared_semidefinite and share > NEGATIVE[True] * self.rounding else 0.0

    def look(self, num_removed: int) -> Look:
        """The cone after n > 0 removals; nothing beside it, for a look takes no product. Cost: 6 D^2."""
        removed = np.arange(len(self.weights)) < self.problem.counts[num_removed]
        squares = self.eigensystem.coordinates(np.where(removed, self.weights, 0.0)[:, None])[:, 0] ** 2
        measure = SpectralMeasure(self.eigensystem.eigenvalues, squares / np.sum(squares))
        return look_at(SpectralBracket.exact(measure, self.rounding), self.problem, num_removed)

    def one_shot(self) -> Estimate:
        """Last n before -g^T c + c^T H c / 2 (signed H) exceeds eps, from one pass over the matrix.

        Rounding of the products may change the losses by u R^2 / 2, u as in `jaxlimit.spectrum.bracket`.
        """
        c, problem = self.weights, self.problem
        rows = np.tril(self.matrix, -1) @ c  # row n against the n weights removed before it
        losses = np.cumsum(c * rows + np.diag(self.matrix) * c**2 / 2 - self.gradient * c)
        losses = losses[np.asarray(problem.counts[1:]) - 1]
        norm = float(np.max(np.abs(self.eigensystem.eigenvalues)))
        error = ROUNDING * self.rounding * norm * problem.order.squared_norm[1:] / 2

        def last(losses: NDArray[np.float64]) -> float:
            return problem.sparsity(int(np.argmax(np.append(losses, np.inf) > problem.loss_tolerance)))

        bounds = last(losses), last(losses + error), last(losses - error)
        return Estimate.between(*bounds, problem.dim, group_share=group_share(problem.counts))

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
            m = self.problem.counts[n]
            c, kept = self.weights[:m], absolute[m:, m:]
            right = absolute[m:, :m] @ c
            gained = right @ cho_solve(cho_factor(kept, lower=True), right) if len(kept) else 0.0
            loss = max(0.0, float(c @ absolute[:m, :m] @ c - gained) / 2)
            return loss, loss

        return value


def dense_fits(dim: int, num_products: float = np.inf) -> bool:
    """Whether the matrix of D weights is decomposed in seconds and can be had with so many products."""
    return dim <= DENSE_DIM and num_dense_products(dim) <= num_products


def dense_is_cheaper(dim: int, which: Sequence[str], tolerance: float, semidefinite: bool) -> bool:
    """Whether D products are fewer than the limits are bound to take without the matrix.

    readjusted of a Hessian rests on the matrix, so nothing is saved. Width and cone are means over all
    eigenvalues of values in [0, 1], whose variance is at most 1/4, so that of a probe is 1 / (2 D) at most
    (see `jaxlimit.spectrum.measure`). Then 1 / (2 D tolerance^2) probes are sure of the tolerance, at
    `PROBE_STEPS` products each: more than D for all D <= 5,000 at the default tolerance of .001. Real
    spectra take fewer; the matrix is chosen where that is not sure, for it is exact.
    """
    if set(which) == {"one_shot"}:
        return dim <= ONE_SHOT_PRODUCTS
    if "readjusted" in which and (not semidefinite or {"width", "cone"}.isdisjoint(which)):
        return True
    return dim <= PROBE_STEPS * np.ceil(1 / (2 * dim * tolerance**2))


def dense_source(problem: Problem, budget: Budget) -> DenseSource:
    """The matrix by D products, and its eigendecomposition."""
    budget.begin("dense", "all", 0.0)
    order = problem.order
    matrix = dense_matrix(budget.matmat, order.like)[np.ix_(order.order, order.order)]
    gradient = order.sort(budget.curvature.gradient)
    curvature = budget.curvature
    precision = curvature.rounding, curvature.positive_semidefinite
    return DenseSource(matrix, eigensystem(matrix), order.sort(order.like), gradient, problem, *precision)
