"""Monte Carlo oracles of the pruning geometry, in plain NumPy: no formula is shared with the code under test.

Setting: a diagonal curvature H = diag(eigenvalues) >= 0, the removed vector c, the loss tolerance eps, and
the sublevel set seen from the pruned weights, {c + u : u^T H u <= 2 eps}. It generates the cone

    C = closure of cone{c + u : u^T H u <= 2 eps}.

Two questions are answered by sampling: what is the statistical dimension of C, and how many random directions
does it take until they reach the sublevel set. Integral geometry ties the answers together exactly
(`random_subspace_transition`), which is how the two oracles check each other.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import integrate

Array = NDArray[np.float64]

# The multipliers lie in (0, 1); more than the 53 bits of float64 for those near 0.
_NUM_BISECTIONS = 70


class QuadraticCone(NamedTuple):
    """The cone {y : y^T M y <= 0, axis^T y >= 0} times a linear space, in the eigenbasis of M.

    `values` are the eigenvalues of M divided by the modulus of its only negative one, which comes first and
    is therefore -1; `basis` holds the eigenvectors in columns, the first one pointing into the cone; `curved`
    marks the coordinates with a positive curvature, outside of which the cone is the whole linear space.
    """

    values: Array
    basis: Array
    curved: NDArray[np.bool_]


def sublevel_cone(eigenvalues: Array, c: Array, loss_tolerance: float) -> QuadraticCone | None:
    """Write C as one half of a quadratic cone; None where it is the whole space (c in the sublevel set).

    A point y lies in C iff (y - s c)^T H (y - s c) <= 2 eps s^2 for some s >= 0: a quadratic in s with
    leading coefficient q = c^T H c - 2 eps > 0. It reaches 0 for such an s iff neither its discriminant nor
    its minimiser c^T H y / q is negative:

        y^T M y <= 0 with M = H - H c c^T H / q,    c^T H y >= 0.

    On the coordinates with positive curvature M has exactly one negative eigenvalue (H minus a rank-one
    matrix, and c^T M c < 0). Coordinates without curvature are free: the sublevel set is unbounded there.
    """
    excess = c @ (eigenvalues * c) - 2 * loss_tolerance
    if excess <= 0:
        return None
    curved = eigenvalues > 0
    pull = eigenvalues[curved] * c[curved]
    values, basis = np.linalg.eigh(np.diag(eigenvalues[curved]) - np.outer(pull, pull) / excess)
    basis[:, 0] *= np.sign(pull @ basis[:, 0])
    return QuadraticCone(values / -values[0], basis, curved)


def project_onto_cone(cone: QuadraticCone, points: Array) -> Array:
    """Project points of shape (samples, D) onto the cone: the root of a decreasing function for each point.

    Stationarity of 1/2 ||y - g||^2 + mu/2 y^T M y gives (1 + mu m_i) y_i = g_i in the eigenbasis, where
    m_0 = -1 is the negative eigenvalue, so y_0 = g_0 / (1 - mu) must be positive. That leaves four cases:

    - g in C: y = g;
    - g_0 > 0, outside: mu in (0, 1), where y^T M y = sum m_i g_i^2 / (1 + mu m_i)^2 falls to -infinity;
    - g_0 < 0 and sum g_i^2 / m_i <= 0: g is in the polar cone, y = 0;
    - g_0 < 0 otherwise: nu = 1/mu in (0, 1), y_i = nu g_i / (nu + m_i), and sum m_i g_i^2 / (nu + m_i)^2
      decreases from a positive value at 0 to -infinity at 1.
    """
    projected = points.copy()
    in_eigenbasis = points[:, cone.curved] @ cone.basis
    projected[:, cone.curved] = _project_curved(cone.values, in_eigenbasis) @ cone.basis.T
    return projected


def _project_curved(values: Array, points: Array) -> Array:
    squares = points**2
    in_cone = (points[:, 0] >= 0) & (squares @ values <= 0)
    in_polar = (points[:, 0] <= 0) & (squares @ (1 / values) <= 0)
    facing = ~in_cone & (points[:, 0] > 0)
    averted = ~in_polar & (points[:, 0] <= 0)
    projected = np.where(in_cone[:, None], points, 0.0)
    projected[facing] = _bisect(values, points[facing], lambda g, mu: g / (1 + mu * values))
    projected[averted] = _bisect(values, points[averted], lambda g, nu: g / (nu + values), lambda nu: nu)
    return projected


def _bisect(
    values: Array,
    points: Array,
    direction: Callable[[Array, Array], Array],
    length: Callable[[Array], Array] = np.ones_like,
) -> Array:
    """Find the multiplier in (0, 1) at which y^T M y changes sign, and return length * direction there."""
    low = np.zeros((len(points), 1))
    high = np.ones_like(low)
    for _ in range(_NUM_BISECTIONS):
        middle = (low + high) / 2
        above = direction(points, middle) ** 2 @ values[:, None] > 0
        low = np.where(above, middle, low)
        high = np.where(above, high, middle)
    middle = (low + high) / 2
    return length(middle) * direction(points, middle)


def cone_projection_dimension(
    eigenvalues: Array, c: Array, loss_tolerance: float, rng: np.random.Generator, num_samples: int
) -> tuple[float, float]:
    """Estimate the statistical dimension E||Pi_C(g)||^2 / D of C from exact projections.

    The projection on a cone is positively homogeneous and ||g||^2 is independent of g / ||g|| with mean D, so
    this is E||Pi_C(theta)||^2 over directions theta uniform on the unit sphere, which has less variance.

    Returns:
        Mean and standard error.
    """
    cone = sublevel_cone(eigenvalues, c, loss_tolerance)
    if cone is None:
        return 1.0, 0.0
    directions = rng.standard_normal((num_samples, eigenvalues.size))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return _mean_and_standard_error(np.sum(project_onto_cone(cone, directions) ** 2, axis=1))


def random_subspace_transition(
    eigenvalues: Array, c: Array, loss_tolerance: float, rng: np.random.Generator, num_samples: int
) -> tuple[float, float]:
    """Estimate the mean number k of random directions, over D, after which they reach the sublevel set.

    Directions are added one after another to the columns of G until min_x 1/2 (c + G x)^T H (c + G x) <= eps.
    With A = H^(1/2) G = Q R the squared residual left by the first k columns is the sum over j >= k of
    (Q^T H^(1/2) c)_j^2, so one QR factorisation answers for every k. No cone appears anywhere.

    How it relates to the statistical dimension delta of C, exactly, when C is not a linear space: the Crofton
    formula (arXiv 1303.6672, section 5) says that j directions meet C with probability
    2 (v_{D-j+1} + v_{D-j+3} + ...), v the intrinsic volumes, whose mean sum_i i v_i is delta and whose odd
    part sums to 1/2. Summing P(k > j) over j gives

        E k = D - delta + 1/2.

    Returns:
        Mean and standard error of k / D.
    """
    curved = eigenvalues > 0
    roots = np.sqrt(eigenvalues[curved])
    rank = roots.size
    fractions = np.empty(num_samples)
    for sample in range(num_samples):
        system = roots[:, None] * rng.standard_normal((rank, rank))
        rotated = np.linalg.qr(np.column_stack([system, roots * c[curved]]), mode="r")[:, -1]
        remaining = np.append(np.cumsum(rotated[::-1] ** 2)[::-1], 0.0)
        fractions[sample] = np.argmax(remaining <= 2 * loss_tolerance) / eigenvalues.size
    return _mean_and_standard_error(fractions)


def circular_cone_dimension(dimension: int, angle: float) -> float:
    """Statistical dimension over D of the circular cone of half-angle alpha <= pi/2, by quadrature.

    A uniform direction makes an angle beta with the axis, of density proportional to sin(beta)^(D-2); its
    projection has squared norm 1 inside the cone, cos(beta - alpha)^2 up to alpha + pi/2, and 0 in the polar.
    """

    def density(beta: float) -> float:
        return np.sin(beta) ** (dimension - 2)

    # In high dimension the density is a peak of width 1 / sqrt(D) at the equator, which quad must be shown.
    half_width = 12 / np.sqrt(dimension)
    breaks = [np.pi / 2 - half_width, np.pi / 2, np.pi / 2 + half_width]

    def integral(function: Callable[[float], float], start: float, stop: float) -> float:
        edges = [start, *(point for point in breaks if start < point < stop), stop]
        pieces = itertools.pairwise(edges)
        return sum(integrate.quad(function, *piece, epsabs=0, epsrel=1e-11)[0] for piece in pieces)

    inside = integral(density, 0.0, angle)
    near = integral(lambda beta: np.cos(beta - angle) ** 2 * density(beta), angle, angle + np.pi / 2)
    return (inside + near) / integral(density, 0.0, np.pi)


def _mean_and_standard_error(samples: Array) -> tuple[float, float]:
    return float(samples.mean()), float(samples.std(ddof=1) / np.sqrt(samples.size))
