r"""Quadrature rules of one Lanczos run: nodes and weights that integrate over the spectral measure it saw.

T_k of Lanczos from a vector z gives rules for the spectral measure mu of H seen from z. Their nodes are the
eigenvalues of T_k, their weights the squared first components of its eigenvectors (Golub and Meurant 2010).
Nothing is smoothed or binned before integrating.

A rule of k steps is exact for polynomials up to degree 2k - 1 (`gauss`) or 2k (`gauss_radau`); what it leaves
uncertain of the integrals of this package is the subject of `jaxlimit.spectrum.bracket`.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal
from scipy.optimize import minimize_scalar

from jaxlimit.spectrum.tridiagonal import Tridiagonal

Rule = tuple[NDArray[np.float64], NDArray[np.float64]]  # nodes, weights


def gauss(tridiagonal: Tridiagonal) -> Rule:
    """The k-point Gauss rule: exact for polynomials of degree 2k - 1.

    Examples:
        >>> nodes, weights = gauss(Tridiagonal(np.array([2.0, 2.0]), np.array([1.0]), 0.0))
        >>> nodes.round(6).tolist(), weights.round(6).tolist()
        ([1.0, 3.0], [0.5, 0.5])
    """
    return _rule(tridiagonal.diagonal, tridiagonal.off_diagonal)


def gauss_radau(tridiagonal: Tridiagonal, node: float) -> Rule:
    """The (k+1)-point rule with one prescribed node; exact for polynomials of degree 2k.

    T_k is extended by beta_k and the last diagonal entry node + delta_k, where
    (T_k - node I) delta = beta_k^2 e_k (Golub 1973).

    Examples:
        >>> nodes, _ = gauss_radau(Tridiagonal(np.array([2.0]), np.array([]), 1.0), node=0.0)
        >>> nodes.tolist()
        [0.0, 2.5]
    """
    beta = tridiagonal.residual_norm
    if beta == 0:
        return gauss(tridiagonal)
    # By elimination delta_k = beta_k^2 / (last pivot). At an eigenvalue of T_k that pivot vanishes, and one
    # node of the rule runs off to infinity: it is stopped where its weight is nothing but rounding.
    tiny = np.finfo(np.float64).eps * max(beta, float(np.max(np.abs(tridiagonal.diagonal - node))))
    pivot = np.inf
    for diagonal, coupling in zip(
        tridiagonal.diagonal, np.append(0.0, tridiagonal.off_diagonal), strict=True
    ):
        pivot = float(diagonal - node - coupling**2 / pivot)
        if abs(pivot) < tiny:
            pivot = tiny
    last = node + beta**2 / pivot
    return _rule(np.append(tridiagonal.diagonal, last), np.append(tridiagonal.off_diagonal, beta))


def _rule(diagonal: NDArray[np.float64], off_diagonal: NDArray[np.float64]) -> Rule:
    nodes, vectors = eigh_tridiagonal(diagonal, off_diagonal)
    return nodes, vectors[0] ** 2


def least_rules(tridiagonal: Tridiagonal, ridges: Sequence[float]) -> list[Rule]:
    r"""The rules with the moments of T_k and beta_k that minimise the integral of a / (a + |x|), for each a.

    All rules that extend T_k by one row form a closed curve: as one node moves from 0 to where the rule with
    a node at 0 has its next, each node takes the place of its neighbour. The integral is largest at either
    end and has one minimum between, which is found by `scipy.optimize.minimize_scalar`.

    Args:
        tridiagonal: of a run that did not break down. Cost: about 17 + 10 m eigenproblems of order k + 1.
        ridges: (m,) positive a.
    """
    at_zero = gauss_radau(tridiagonal, 0.0)[0]
    # Where there is no node to the right, the matrix is looked at from the other side.
    far = float(np.max(np.abs(at_zero)))
    right, left = at_zero[at_zero > 1e-12 * far], at_zero[at_zero < -1e-12 * far]
    next_node = float(right[0]) if right.size else float(left[-1])
    positions = np.linspace(-18, 0, 17)  # logarithms, in units of the next node

    def rule(position: float) -> Rule:
        return gauss_radau(tridiagonal, next_node * float(np.exp(position)))

    def integral(rule: Rule, ridge: float) -> float:
        return float(np.sum(rule[1] * (ridge / (ridge + np.abs(rule[0])))))

    tried, least = [rule(position) for position in positions], []
    for ridge in ridges:
        j = int(np.argmin([integral(r, ridge) for r in tried]))
        around = positions[max(j - 1, 0)], positions[min(j + 1, 16)]
        found = minimize_scalar(
            lambda x, a=ridge: integral(rule(x), a), bounds=around, method="bounded", options={"xatol": 1e-3}
        )
        best = rule(float(found.x))  # pyright: ignore[reportAttributeAccessIssue]
        least.append(min(best, tried[j], key=lambda r, a=ridge: integral(r, a)))
    return least
