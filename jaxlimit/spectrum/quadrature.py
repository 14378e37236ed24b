r"""Spectral integrals from Lanczos runs, with their errors.

For a random sign vector z, tr f(H) / D = E z^T f(H) z / ||z||^2, and T_k of Lanczos from z gives quadrature
rules for the spectral measure mu of H seen from z: nodes = eigenvalues of T_k, weights = squared first
components of its eigenvectors (Golub and Meurant 2010). Nothing is smoothed or binned before integrating.

A rule of k steps is exact for polynomials up to degree 2k - 1 (`gauss`) or 2k (`gauss_radau`); what it leaves
uncertain of the integrals of this package is the subject of `jaxlimit.bracket`.

The error of the probes: for sign vectors the variance of z^T F z / D is 2 sum_{i != j} F_ij^2 / D^2
(Hutchinson 1990). Subtracting a multiple of the identity from F leaves it as it is, so it is at most
2 Var_mu(f) / D, and P probes leave a standard error of at most sqrt(2 Var_mu(f) / (D P)).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal
from scipy.optimize import minimize_scalar

from jaxlimit.core.sharding import sharding_like
from jaxlimit.curvature.operator import Curvature
from jaxlimit.spectrum import lanczos
from jaxlimit.spectrum.lanczos import Tridiagonal

PyTree = Any
Rule = tuple[NDArray[np.float64], NDArray[np.float64]]  # nodes, weights


@partial(jax.tree_util.register_dataclass, data_fields=["nodes", "weights"], meta_fields=["dim"])
@dataclass(frozen=True)
class SpectralMeasure:
    """A discrete probability measure on the eigenvalue axis: one row a probe, equally weighted.

    Attributes:
        nodes: (probes, steps), units of the curvature.
        weights: (probes, steps), each row sums to 1; rows of shorter rules end in nodes of weight 0.
        dim: order D of the matrix if the rows are random sign probes of its trace; None for a measure
            that is not a sample (a diagonal matrix: one row with weights 1/D).

    Examples:
        >>> SpectralMeasure(nodes=[[1.0, 3.0]], weights=[[0.5, 0.5]]).integrate(lambda x: x**2)
        (5.0, 0.0)
    """

    nodes: NDArray[np.float64]
    weights: NDArray[np.float64]
    dim: int | None = field(default=None)

    def __post_init__(self) -> None:
        nodes, weights = np.atleast_2d(self.nodes), np.atleast_2d(self.weights)
        if nodes.dtype != object:  # pytree transformations rebuild with placeholders
            object.__setattr__(self, "nodes", nodes.astype(np.float64))
            object.__setattr__(self, "weights", weights.astype(np.float64))
            if nodes.shape != weights.shape:
                raise ValueError(
                    f"nodes and weights must have one shape, got {nodes.shape} and {weights.shape}."
                )

    def integrate(self, f: Callable[[NDArray[np.float64]], Any]) -> tuple[float, float]:
        """Integral of f, and its standard error over the probes.

        Args:
            f: function of an array of nodes, elementwise.

        Returns:
            Mean over the probes, and its standard error: from the scatter of two or more rows; of a single
            probe the bound of `probe_error`; 0 for a measure that is not a sample.
        """
        values = np.sum(self.weights * f(self.nodes), axis=1)
        if len(values) > 1:
            return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))
        return float(values[0]), self.probe_error(f)

    def probe_error(self, f: Callable[[NDArray[np.float64]], Any]) -> float:
        """Bound sqrt(2 Var(f) / (D P)) on the standard error over P sign probes; 0 without `dim`."""
        if self.dim is None:
            return 0.0
        values = f(self.nodes)
        mean = np.mean(np.sum(self.weights * values, axis=1))
        variance = np.mean(np.sum(self.weights * (values - mean) ** 2, axis=1))
        return float(np.sqrt(2 * variance / (self.dim * len(self.nodes))))


def stack_rules(rules: Sequence[Rule], dim: int | None = None) -> SpectralMeasure:
    """One measure with a row for each rule; shorter rules repeat their last node with weight 0."""
    width = max(len(nodes) for nodes, _ in rules)
    nodes = [np.pad(node, (0, width - len(node)), mode="edge") for node, _ in rules]
    weights = [np.pad(weight, (0, width - len(weight))) for _, weight in rules]
    return SpectralMeasure(np.array(nodes), np.array(weights), dim)


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


def rademacher(key: jax.Array, like: PyTree, num_probes: int) -> PyTree:
    """Random sign vectors along a leading axis, shaped and placed like the leaves of `like`."""
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    signs = [
        _signs(k, (num_probes, *x.shape), x.dtype, sharding_like(x, new_axes=1))
        for k, x in zip(keys, leaves, strict=True)
    ]
    return structure.unflatten(signs)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _signs(
    key: jax.Array, shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding | None
) -> jax.Array:
    # The signs of jax.random.rademacher, which under x64 would draw them in float64.
    signs = 1 - 2 * (jax.random.bits(key, shape, np.uint32) >> 31).astype(dtype)
    return signs if sharding is None else jax.lax.with_sharding_constraint(signs, sharding)


def spectral_measure(
    curvature: Curvature,
    key: jax.Array,
    *,
    num_probes: int,
    num_matvecs: int,
    reorthogonalize: bool = True,
) -> SpectralMeasure:
    """The spectrum of a curvature by stochastic Lanczos quadrature (Gauss rules, unsmoothed).

    Cost: `num_probes * num_matvecs` products; memory for as many vectors (three a probe without
    reorthogonalisation).

    Args:
        curvature: from `hessian` or `gauss_newton`.
        key: of the random sign probes.
        num_probes: P; the standard error of a mean over eigenvalues of values in [0, 1] is at most
            sqrt(2 / (D P)).
        num_matvecs: Lanczos steps for each probe.
        reorthogonalize: keep the basis orthogonal (default) or work with three vectors.

    Returns:
        Measure with one row a probe.

    Raises:
        ValueError: fewer than one probe or step.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxlimit import batched, hessian
        >>> def loss(w, x): return jnp.mean((x @ w) ** 2) / 2
        >>> curvature = hessian(loss, jnp.ones((2, 1)), batched(jnp.array([[1.0, 0.0], [0.0, 2.0]]), 2))
        >>> measure = spectral_measure(curvature, jax.random.key(0), num_probes=1, num_matvecs=2)
        >>> measure.nodes.round(4).tolist()
        [[0.5, 2.0]]
    """
    if num_probes < 1 or num_matvecs < 1:
        raise ValueError(
            f"num_probes and num_matvecs must be at least 1, got {num_probes} and {num_matvecs}."
        )
    starts = rademacher(key, curvature.weights, num_probes)
    max_basis = None if reorthogonalize else 0
    state = lanczos.run(curvature.matmat, lanczos.init(starts), num_matvecs, max_basis)
    return stack_rules([gauss(t) for t in state.tridiagonals()], curvature.dim)
