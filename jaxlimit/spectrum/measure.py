r"""The spectral measure of a curvature: averages over its eigenvalues, with the error of the probes.

For a random sign vector z, tr f(H) / D = E z^T f(H) z / ||z||^2, and the rules of a Lanczos run from z
(`jaxlimit.spectrum.rules`) integrate f over the measure that z sees.

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

from jaxlimit.core.checks import require_count, require_instance, require_key
from jaxlimit.core.display import Displayed, View
from jaxlimit.curvature.operator import Curvature
from jaxlimit.spectrum import lanczos
from jaxlimit.spectrum.probes import rademacher
from jaxlimit.spectrum.rules import Rule, gauss

# What a row of weights may sum to beside 1: float32 rounds so much in a sum of a million.
SAME_MASS = 1e-3


@partial(jax.tree_util.register_dataclass, data_fields=["nodes", "weights"], meta_fields=["dim"])
@dataclass(frozen=True, eq=False, repr=False)
class SpectralMeasure(Displayed):
    """A discrete probability measure on the eigenvalue axis: one row a probe, equally weighted.

    Attributes:
        nodes: (probes, steps), units of the curvature.
        weights: (probes, steps), each row sums to 1; rows of shorter rules end in nodes of weight 0.
        dim: order D of the matrix if the rows are random sign probes of its trace; None for a measure
            that is not a sample (a diagonal matrix: one row with weights 1/D).

    Raises:
        ValueError: nodes and weights of other shapes, nodes that are not finite, weights that are negative
            or do not sum to 1, or an order below 1.

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
            if nodes.shape != weights.shape:
                raise ValueError(
                    f"nodes and weights must have one shape, got {nodes.shape} and {weights.shape}."
                )
            if np.iscomplexobj(nodes) or not np.all(np.isfinite(nodes)):
                raise ValueError("nodes must be real and finite: they are eigenvalues of a curvature.")
            if not np.all(weights >= 0) or np.any(np.abs(weights.sum(axis=1) - 1) > SAME_MASS):
                raise ValueError("weights must be at least 0, and each row of them must sum to 1.")
            if self.dim is not None:
                require_count("dim", self.dim)
            object.__setattr__(self, "nodes", nodes.astype(np.float64))
            object.__setattr__(self, "weights", weights.astype(np.float64))

    def _view(self) -> View:
        rows, nodes = self.nodes.shape
        mean, error = self.integrate(lambda x: x)
        used = self.nodes[self.weights > 0]
        return View(
            f"Spectral measure of {rows} x {nodes} nodes from {used.min():.4g} to {used.max():.4g}, "
            f"mean eigenvalue {mean:.4g} +- {error:.1g}"
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
    require_instance("curvature", curvature, Curvature, "hessian or gauss_newton")
    key = require_key("key", key)
    require_count("num_probes", num_probes)
    require_count("num_matvecs", num_matvecs)
    starts = rademacher(key, curvature.weights, num_probes)
    max_basis = None if reorthogonalize else 0
    state = lanczos.run(curvature.matmat, lanczos.init(starts), num_matvecs, max_basis)
    return stack_rules([gauss(t) for t in state.tridiagonals()], curvature.dim)
