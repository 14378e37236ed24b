r"""Spectral integrals from Lanczos runs, with their errors.

For a random sign vector z, tr f(H) / D = E z^T f(H) z / ||z||^2, and T_k of Lanczos from z gives quadrature
rules for the spectral measure mu of H seen from z: nodes = eigenvalues of T_k, weights = squared first
components of its eigenvectors (Golub and Meurant 2010). Nothing is smoothed or binned before integrating.

Two errors, kept apart:

*Quadrature.* The integrand of this package, f(lambda) = a / (a + |lambda|), falls as |lambda| grows.
On a positive semidefinite H it is completely monotone, so Gauss <= truth <= Gauss-Radau with a node at 0.
On an indefinite H the Chebyshev-Markov-Stieltjes inequalities bound the mass of every interval (-t, t),
and with it the integral; as value we take the median over the Gauss and anti-Gauss rules of the last
quarter of the step counts, since a single Gauss rule jumps whenever a node crosses 0.

*Probes.* For sign vectors the variance of z^T F z / D is 2 sum_{i != j} F_ij^2 / D^2 (Hutchinson 1990).
Subtracting a multiple of the identity from F leaves it as it is, so it is at most 2 Var_mu(f) / D, and P
probes leave a standard error of at most sqrt(2 Var_mu(f) / (D P)).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal

from jaxlimit import lanczos
from jaxlimit.curvature import Curvature
from jaxlimit.geometry import effective_dimension
from jaxlimit.lanczos import Tridiagonal

PyTree = Any
Rule = tuple[NDArray[np.float64], NDArray[np.float64]]  # nodes, weights
FAR = 1e300  # an eigenvalue too large to matter, for mass of which nothing is known


@partial(jax.tree_util.register_dataclass, data_fields=["nodes", "weights"], meta_fields=["dim"])
@dataclass(frozen=True)
class SpectralMeasure:
    """A discrete probability measure on the eigenvalue axis: one row a probe, equally weighted.

    Attributes:
        nodes: (probes, steps), units of the curvature.
        weights: (probes, steps), each row sums to 1; rows of shorter rules end in nodes of weight 0.
        dim: order D of the matrix if the rows are random sign probes of its trace; None for a measure
            that is not a sample (a diagonal matrix: one row with weights 1/D).

    Example:
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

    Example:
        >>> nodes, weights = gauss(Tridiagonal(np.array([2.0, 2.0]), np.array([1.0]), 0.0))
        >>> nodes.round(6).tolist(), weights.round(6).tolist()
        ([1.0, 3.0], [0.5, 0.5])
    """
    return _rule(tridiagonal.diagonal, tridiagonal.off_diagonal)


def anti_gauss(tridiagonal: Tridiagonal) -> Rule:
    """Laurie's k-point anti-Gauss rule: its error is minus that of the (k-1)-point Gauss rule.

    So for polynomials of degree up to 2k - 1. T_k with its last coupling times sqrt 2 (Laurie 1996). Of a
    run that broke down the Gauss rule is exact and is returned instead.
    """
    if tridiagonal.breakdown:
        return gauss(tridiagonal)
    off_diagonal = tridiagonal.off_diagonal.copy()
    off_diagonal[-1:] *= np.sqrt(2)
    return _rule(tridiagonal.diagonal, off_diagonal)


def gauss_radau(tridiagonal: Tridiagonal, node: float) -> Rule:
    """The (k+1)-point rule with one prescribed node; exact for polynomials of degree 2k.

    T_k is extended by beta_k and the last diagonal entry node + delta_k, where
    (T_k - node I) delta = beta_k^2 e_k (Golub 1973).

    Example:
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


def interval_bounds(tridiagonal: Tridiagonal, thresholds: NDArray[np.float64]) -> tuple[NDArray, NDArray]:
    """Chebyshev-Markov-Stieltjes bounds on mu((-t, t)) for each threshold t > 0.

    The rule with a node at t gives sum_{x < t} w <= mu((-inf, t)) <= mu((-inf, t]) <= sum_{x <= t} w.

    Args:
        tridiagonal: of one Lanczos run with k steps.
        thresholds: (m,) positive numbers. Cost: 2 m eigenproblems of order k + 1, on the host.

    Returns:
        lower, upper: (m,) masses in [0, 1].
    """

    def distribution(t: float) -> tuple[float, float]:
        nodes, weights = gauss_radau(tridiagonal, t)
        if tridiagonal.residual_norm == 0:
            return float(np.sum(weights[nodes < t])), float(np.sum(weights[nodes <= t]))
        at = int(np.argmin(np.abs(nodes - t)))
        return float(np.sum(weights[:at])), float(np.sum(weights[: at + 1]))

    right = np.array([distribution(t) for t in thresholds])
    left = np.array([distribution(-t) for t in thresholds])
    return np.clip(right[:, 0] - left[:, 1], 0, 1), np.clip(right[:, 1] - left[:, 0], 0, 1)


def rademacher(key: jax.Array, like: PyTree, num_probes: int) -> PyTree:
    """Random sign vectors along a leading axis, shaped like the leaves of `like`."""
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten(
        [jax.random.rademacher(k, (num_probes, *x.shape), x.dtype) for k, x in zip(keys, leaves, strict=True)]
    )


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

    Example:
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
    state = lanczos.run(curvature.matmat, lanczos.init(starts, reorthogonalize=reorthogonalize), num_matvecs)
    return stack_rules([gauss(t) for t in state.tridiagonals()], curvature.dim)


@dataclass(frozen=True)
class SpectralBracket:
    """What a set of Lanczos runs says about the effective dimension int a / (a + |lambda|) dmu.

    Attributes:
        lower, upper: measures on |lambda| whose integrals bound the truth of each probe, rigorously.
        rules: measures whose integrals estimate it. Their median, probe by probe, is the value; their
            scatter tells how well the spectrum is resolved. One rule if the measure is exact.
    """

    lower: SpectralMeasure
    upper: SpectralMeasure
    rules: tuple[SpectralMeasure, ...]

    @classmethod
    def exact(cls, measure: SpectralMeasure) -> "SpectralBracket":
        """Of a measure that is known."""
        return cls(measure, measure, (measure,))

    def dimension(self, side: str, ridge: float) -> float:
        """delta(a) / D: its "lower" or "upper" bound, or its "value"."""
        if side == "value":
            return 1.0 if np.isinf(ridge) else float(np.mean(np.median(self._by_rule(ridge), axis=0)))
        return effective_dimension(self.lower if side == "lower" else self.upper, ridge)

    def spread(self, ridge: float) -> float:
        """Semi-interquartile range of delta(a) / D over the rules, mean over probes."""
        if np.isinf(ridge):
            return 0.0
        low, high = np.percentile(self._by_rule(ridge), [25, 75], axis=0)
        return float(np.mean(high - low)) / 2

    def probe_error(self, ridge: float) -> float:
        """Standard error of delta(a) / D due to the finite number of probes."""
        if np.isinf(ridge):
            return 0.0
        return self.rules[-1].probe_error(lambda x: ridge / (ridge + np.abs(x)))

    def _by_rule(self, ridge: float) -> NDArray[np.float64]:
        """(rules, probes) values of delta(a) / D."""
        return np.array(
            [np.sum(rule.weights * (ridge / (ridge + np.abs(rule.nodes))), axis=1) for rule in self.rules]
        )


def bracket_semidefinite(runs: Sequence[Tridiagonal], dim: int | None = None) -> SpectralBracket:
    """Gauss below, Gauss-Radau with a node at 0 above; the value is their mean (of two, the median)."""

    def at_zero(run: Tridiagonal) -> Rule:
        # Where rounding put an eigenvalue of T_k at or below 0, take the spectrum to begin just below it,
        # and move it to begin at 0.
        smallest = gauss(run)[0][0]
        node = 0.0 if smallest > 0 else float(smallest) - 1e-13 * run.residual_norm
        nodes, weights = gauss_radau(run, node)
        return np.maximum(nodes - node, 0), weights

    def from_zero(run: Tridiagonal) -> Rule:
        nodes, weights = gauss(run)
        return np.maximum(nodes, 0), weights

    lower = stack_rules([from_zero(run) for run in runs], dim)
    upper = stack_rules([at_zero(run) for run in runs], dim)
    return SpectralBracket(lower, upper, (lower, upper))


def bracket_indefinite(
    runs: Sequence[Tridiagonal], dim: int | None = None, *, ridge: float | None = None, num_rules: int = 16
) -> SpectralBracket:
    """Chebyshev-Markov-Stieltjes below and above; the value is a median over step counts.

    Args:
        runs: Lanczos runs of an indefinite matrix.
        dim: as in `SpectralMeasure`.
        ridge: scale of |lambda| around which the rigorous bounds are resolved, by 48 thresholds over six
            decades (a factor 1.34 apart). None leaves them out, as [0, 1].
        num_rules: step counts in the last quarter at which Gauss and anti-Gauss rules are taken. The
            default costs 32 eigenproblems of order k on the host.
    """
    longest = max(run.num_steps for run in runs)
    counts = np.unique(np.linspace(0.75 * longest, longest, num_rules).astype(int))
    rules = [
        stack_rules([rule(run.truncate(max(int(count), 1))) for run in runs], dim)
        for count in counts
        for rule in (gauss, anti_gauss)
    ]
    if all(run.breakdown for run in runs):
        return SpectralBracket.exact(stack_rules([gauss(run) for run in runs], dim))
    if ridge is None:
        lower = SpectralMeasure(np.full((1, 1), FAR), np.ones((1, 1)), dim)
        upper = SpectralMeasure(np.zeros((1, 1)), np.ones((1, 1)), dim)
        return SpectralBracket(lower, upper, tuple(rules))
    thresholds = ridge * np.geomspace(1e-3, 1e3, 48)
    # Mass known to lie within t is put at t (below); mass that may lie within t at the threshold before.
    far, lowest = np.append(thresholds, FAR), np.append(0.0, thresholds)
    lower_rules, upper_rules = [], []
    for run in runs:
        within, may_be_within = interval_bounds(run, thresholds)
        lower_rules.append((far, np.diff(np.maximum.accumulate(within), prepend=0.0, append=1.0)))
        may_be_within = np.minimum.accumulate(may_be_within[::-1])[::-1]
        upper_rules.append((lowest, np.diff(may_be_within, prepend=0.0, append=1.0)))
    return SpectralBracket(stack_rules(lower_rules, dim), stack_rules(upper_rules, dim), tuple(rules))
