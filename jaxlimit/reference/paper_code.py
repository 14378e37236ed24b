r"""What the paper's own code would predict, defects included, for comparison.

Its prediction is the width limit, from one random probe, but on its way there

1. the spectrum is that of the Hessian of all parameters, biases included, without batch norm's;
2. each Ritz value becomes a Gaussian of variance 1e-10 max(1, range), range = largest - smallest + .02,
   sampled at 100,000 points from smallest - .01 to largest + .01 and normalised. The points lie further
   apart than a Gaussian is wide once the range is large: how much of its mass a Ritz value keeps then
   depends on where between two points it falls;
3. weights without curvature are counted among 100, those at the percentiles of |w|: the share q whose row of
   the Hessian vanishes is added as mass at 0, the rest of the density scaled by 1 - q;
4. delta / D is evaluated at integer R, and the prediction is the s of a grid of 1/1000 that comes nearest:

       argmin over s of | delta(round R(s)) / D - s |.

Source: the code published with arXiv 2306.05857; `tests/test_compat.py` has its outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxlimit.core.checks import require_instance, require_key, require_positive
from jaxlimit.core.leaves import is_array
from jaxlimit.core.memory import advice_on_memory
from jaxlimit.core.trees import PyTree, combine, flatten, leaf_paths
from jaxlimit.curvature.dense_matrix import unit_vectors
from jaxlimit.curvature.operator import Curvature
from jaxlimit.geometry.dimensions import fixed_point, width_dimension
from jaxlimit.geometry.magnitude import MagnitudeOrder, magnitude_order
from jaxlimit.spectrum import lanczos
from jaxlimit.spectrum.measure import SpectralMeasure
from jaxlimit.spectrum.probes import rademacher
from jaxlimit.spectrum.rules import gauss

GRID = np.arange(1000) / 1000
# Steps of its Lanczos run in most of its presets.
NUM_MATVECS = 128
NUM_POINTS = 100_000
NUM_ROWS = 100
# It compares the norms of rows, summed over batches of 128 and divided by the number of examples, with 1e-7.
# This is the same bound for the row of the mean Hessian.
ROW_NORM = 128 * 1e-7


@dataclass(frozen=True)
class ReferenceLimit:
    """The sparsity that the paper's code would predict.

    Attributes:
        value: its prediction.
        direct: width limit of the same Ritz values, without binning, integer R or zero rows.
        zero_share: q, the share of rows of the Hessian that it takes for zero.
        num_matvecs: Lanczos steps.
    """

    value: float
    direct: float
    zero_share: float
    num_matvecs: int

    def against(self, width: float) -> str:
        """A sentence that explains the distance from the width limit found here."""
        rounding, steps = self.value - self.direct, self.direct - width
        return (
            f"The paper's code would predict {self.value:.3f} ({self.value - width:+.4f} against width): "
            f"{rounding:+.4f} by its binning, integer R and {self.zero_share:.0%} of zero rows, {steps:+.4f} "
            f"by its {self.num_matvecs} Lanczos steps from one probe and the biases in its spectrum."
        )


@advice_on_memory()
def reference_limit(
    curvature: Curvature,
    key: jax.Array,
    *,
    loss_tolerance: float,
    num_matvecs: int = NUM_MATVECS,
    probe: PyTree | None = None,
) -> ReferenceLimit:
    """The sparsity that the paper's own code would predict for a network, beside `pruning_limit`'s.

    Its Lanczos divides by the norm plus 1e-6 and works in float32 with one Gram-Schmidt pass; here `lanczos`
    is used, which moves the prediction by no more than a step of its grid on the networks tested. Cost:
    `num_matvecs` products, and 104 for 100 rows in blocks.

    Args:
        curvature: from `hessian`; its prunable weights are the kernels.
        key: of the random sign vector. `jaxlimit run` gives `jax.random.fold_in(key, 1)` with the key of its
            limits.
        loss_tolerance: eps; its code takes `loss_statistics(...).batch_std`.
        num_matvecs: Lanczos steps, at least 1.
        probe: a start vector instead, with a leaf for each parameter in the spectrum (`spectrum_parameters`).

    Returns:
        The prediction; `against(width)` says why it differs from a width limit.

    Raises:
        ValueError: num_matvecs below 1.
        FloatingPointError: a product with the curvature is not finite.
        MemoryError: a device ran out of memory; says what needs less.

    Examples:
        H = I, so that delta / D = 1 / (1 + R^2). Up to s = .468 its R is rounded to 1, which makes 1/2.

        >>> from jaxlimit import batched, hessian
        >>> def loss(w, x): return jnp.mean((x @ (w - 1.0)) ** 2) / 2
        >>> weights = jnp.linspace(0.0, 1.0, 64).reshape(64, 1)
        >>> curvature = hessian(loss, weights, batched(8 * jnp.eye(64), 64))
        >>> found = reference_limit(curvature, jax.random.key(0), loss_tolerance=0.5)
        >>> found.value, round(found.direct, 4)
        (0.468, 0.4181)
    """
    require_instance("curvature", curvature, Curvature, "hessian")
    require_positive("loss_tolerance", loss_tolerance)
    key = require_key("key", key)
    kernels = magnitude_order(curvature.weights)
    everything = curvature.of(spectrum_parameters(curvature.params))
    if probe is None:
        probe = jax.tree.map(lambda x: x[0], rademacher(key, everything.weights, 1))
    nodes, weights = gauss(lanczos.tridiagonalize(everything.matvec, probe, num_matvecs))
    zero_share = zero_row_share(everything, kernels)
    radii = reference_radii(kernels)
    measure = SpectralMeasure(nodes, weights)
    return ReferenceLimit(
        reference_prediction(nodes, weights, radii, loss_tolerance, zero_share),
        fixed_point(lambda n: width_dimension(measure, kernels.radius(n), loss_tolerance), kernels.dim),
        zero_share,
        len(nodes),
    )


def reference_prediction(
    nodes: ArrayLike,
    weights: ArrayLike,
    radii: ArrayLike,
    loss_tolerance: float,
    zero_share: float = 0.0,
) -> float:
    """The prediction of the paper's code from Ritz values.

    Args:
        nodes: (k,) Ritz values of one probe.
        weights: (k,) their quadrature weights.
        radii: (1000,) R(s) at s = 0, .001, ..., .999 (`reference_radii`).
        loss_tolerance: eps.
        zero_share: q.

    Examples:
        >>> reference_prediction([1.0], [1.0], np.linspace(0, 9.99, 1000), loss_tolerance=2.0)
        0.308
    """
    eigenvalues, mass = binned_spectrum(np.ravel(nodes), np.ravel(weights))
    eigenvalues, mass = np.append(eigenvalues, 1e-30), np.append(mass * (1 - zero_share), zero_share)
    measure = SpectralMeasure(eigenvalues, mass)
    rounded, where = np.unique(np.round(np.asarray(radii)), return_inverse=True)
    dimension = np.array([width_dimension(measure, float(radius), loss_tolerance) for radius in rounded])
    return float(GRID[np.argmin(np.abs(dimension[where] - GRID))])


def binned_spectrum(
    nodes: NDArray[np.floating], weights: NDArray[np.floating]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Its sum of Gaussians at its 100,000 points, and the mass of each, 1 together."""
    nodes, weights = np.asarray(nodes, np.float64), np.asarray(weights, np.float64)
    smallest, largest = np.min(nodes) - 0.01, np.max(nodes) + 0.01
    points = np.linspace(smallest, largest, NUM_POINTS)
    variance = 1e-10 * max(1.0, largest - smallest)
    mass = np.zeros(NUM_POINTS)
    for node, weight in zip(nodes, weights, strict=True):
        mass += weight * np.exp(-((points - node) ** 2) / (2 * variance))
    return points, mass / np.sum(mass)


def reference_radii(order: MagnitudeOrder) -> NDArray[np.float64]:
    """(1000,) R(s) as it prunes: no weight is kept that is not above the max(1, ceil(s N))-th smallest.

    So it takes one more than `removed_norm`, which takes floor(s N), and all that are equal to the last.
    """
    magnitudes = np.abs(flatten(order.like)[order.order])
    thresholds = magnitudes[_places(GRID, order.dim)]
    return np.sqrt(order.squared_norm[np.searchsorted(magnitudes, thresholds, side="right")])


def zero_row_share(everything: Curvature, kernels: MagnitudeOrder) -> float:
    """Share of 100 kernel weights, at the percentiles of |w|, whose row of the Hessian vanishes.

    It depends on the examples: a weight counts when none of them reaches its unit (`tests/test_compat.py` has
    a network with 8 such rows on some images, and 17 on those of a run of its code). Its code adds up the
    norms of the batches' rows; here it is the norm of their mean's row, which vanishes with them.

    Args:
        everything: the Hessian of all parameters in the spectrum.
        kernels: the order of the weights among them that may be pruned.
    """
    return float(np.mean(row_norms(everything, percentile_rows(everything, kernels)) < ROW_NORM))


def percentile_rows(everything: Curvature, kernels: MagnitudeOrder) -> NDArray[np.int64]:
    """(100,) places among everything's flattened weights of the kernel weights at the percentiles of |w|."""
    others = jax.tree.map(jnp.zeros_like, everything.weights)
    inside = np.flatnonzero(flatten(combine(jax.tree.map(jnp.ones_like, kernels.like), others)))
    return inside[kernels.order[_places(np.arange(NUM_ROWS) / NUM_ROWS, kernels.dim)]]


def row_norms(
    curvature: Curvature,
    indices: ArrayLike,
    block_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> NDArray[np.float64]:
    """sum_j |H_ij| for rows i of the curvature. Cost: a product each.

    Args:
        curvature: H.
        indices: i, in the order of the flattened weights.
        block_size: products side by side.
        progress: called with the number of rows done, before every block.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxlimit import batched, hessian
        >>> loss = lambda w, x: jnp.mean((x @ w) ** 2) / 2
        >>> H = hessian(loss, jnp.ones((2, 1)), batched(jnp.array([[1.0, 1.0], [0.0, 2.0]]), 2))
        >>> row_norms(H, [0, 1]).tolist()  # [[.5, .5], [.5, 2.5]]
        [1.0, 3.0]
    """
    wanted = np.asarray(indices, int)
    padded = np.pad(wanted, (0, -len(wanted) % block_size), mode="edge")  # one shape, compiled once
    found = []
    for start in range(0, len(padded), block_size):
        if progress is not None:
            progress(start)
        units = unit_vectors(padded[start : start + block_size], curvature.weights)
        product = jax.tree.leaves(curvature.matmat(units))
        found.append(sum(np.abs(np.asarray(x, float)).reshape(block_size, -1).sum(1) for x in product))
    return np.concatenate(found)[: len(wanted)]


def _places(sparsities: NDArray[np.float64], dim: int) -> NDArray[np.int64]:
    """Place, from 0, of the last weight that it removes: the max(1, ceil(s N))-th smallest."""
    return np.maximum(1, np.ceil(sparsities * dim)).astype(np.int64) - 1


def spectrum_parameters(params: PyTree) -> PyTree:
    """True for every floating-point parameter but batch norm's: "scale", and what stands beside it."""

    def layer(path: tuple) -> str:
        return jax.tree_util.keystr(path[:-1])

    named = leaf_paths(params)
    normalized = {layer(path) for path in named if jax.tree_util.keystr(path[-1:], simple=True) == "scale"}

    def in_spectrum(path: tuple, x: Any) -> bool:
        floating = is_array(x) and jnp.issubdtype(x.dtype, jnp.floating)
        return floating and layer(path) not in normalized

    return jax.tree_util.tree_map_with_path(in_spectrum, params)
