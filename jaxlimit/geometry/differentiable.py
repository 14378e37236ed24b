r"""The Gaussian-width dimension as a function that JAX can differentiate with respect to the weights.

With G(w) the Gauss-Newton matrix of a batch, R(s) the removed norm and eps the loss tolerance,

    delta(w) / D = tr a (G + a)^{-1} / D,     a = 2 eps / R(s)^2,

the share of directions that are flat at the ridge a (`geometry.width_dimension`). Where it is at least s, the
width limit is. A random sign vector z gives the estimate a z^T x / D with x = (G + a)^{-1} z by conjugate
gradients, and the rule for the derivative of a linear solve gives that of the estimate,

    d (a z^T x) = (z^T x - a x^T x) da - a x^T dG x,

at the cost of a second solve, which is the same one, and the derivative of one product. Nothing has to pass
through the iterations, as it would through those of Lanczos.

a/(a + |lambda|) is no rational function of an indefinite matrix, so this is for the Gauss-Newton matrix. The
order of the weights by magnitude is held fixed: the function is smooth but where two weights of equal
magnitude change places at the rank s D.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg

from jaxlimit.core.checks import as_real, require_count, require_positive, require_range
from jaxlimit.core.trees import Prunable, PyTree, is_kernel, partition
from jaxlimit.curvature.products import GaussNewtonProduct
from jaxlimit.geometry.magnitude import num_removed

# A residual of so much of the probe makes delta / D wrong by its square at most, .01.
UNSOLVED = 0.1


def width_dimension_of_params(
    predict_fn: Callable[[PyTree, PyTree], PyTree],
    loss_fn: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    batch: PyTree,
    probes: PyTree,
    *,
    sparsity: float,
    loss_tolerance: float,
    prunable: Prunable = is_kernel,
    precision: str = "highest",
    accuracy: float = 1e-5,
    max_matvecs: int = 1000,
) -> jax.Array:
    """The share of flat directions, delta / D, of one batch at R(sparsity): for `jax.grad` and `jax.jit`.

    Cost: for each probe a solve of up to `max_matvecs` products, typically sqrt(lambda_max / a) times ten; a
    gradient takes twice that. Memory: one batch's activations twice, and six vectors a probe.

    Args:
        predict_fn: `predict_fn(params, batch) -> outputs`.
        loss_fn: `loss_fn(outputs, batch) -> scalar`, the mean over the batch's examples, convex in outputs.
        params: pytree of parameters.
        batch: pytree of arrays with a leading axis of examples.
        probes: sign vectors along a leading axis, `rademacher(key, weights, num_probes)`. Fixed
            ones make a smooth function; new ones at every step make an unbiased gradient.
        sparsity: s in (0, 1], of the prunable weights.
        loss_tolerance: eps > 0, in units of the loss.
        prunable: pytree of bools like params, or `fn(path, leaf) -> bool`; default: `is_kernel`.
        precision: of matrix products, as for `hessian`.
        accuracy: of the solves, as a share of the norm of a probe.
        max_matvecs: products for a solve at most.

    Returns:
        The share; NaN where rounding or `max_matvecs` ended a solve too early for it to be known to .01. In
        float32 that is the case where lambda_max / a is beyond some 1e6.

    Raises:
        ValueError: a number out of range, or a sparsity that removes no weight; nothing prunable; probes that
            are not like the weights.

    Examples:
        G = I and four weights of 1: at s = 1/2, R^2 = 2, so that a = eps and delta / D = eps / (1 + eps).

        >>> def predict(w, x): return x @ w
        >>> def loss(outputs, x): return jnp.mean(outputs**2) / 2
        >>> signs = jnp.array([[[1.0], [-1.0], [1.0], [1.0]]])
        >>> delta = width_dimension_of_params(
        ...     predict, loss, jnp.ones((4, 1)), 2 * jnp.eye(4), signs, sparsity=0.5, loss_tolerance=1.0)
        >>> print(f"{delta:.4f}")
        0.5000
    """
    require_range("sparsity", sparsity, 0 < as_real(sparsity) <= 1, "in (0, 1]")
    require_positive("loss_tolerance", loss_tolerance)
    require_range("accuracy", accuracy, 0 < as_real(accuracy) < 1, "between 0 and 1")
    require_count("max_matvecs", max_matvecs)
    weights, rest = partition(params, prunable)
    _require_probes(probes, weights)
    squared_norm, dim = _squared_removed_norm(weights, sparsity)
    anything = squared_norm > 0
    ridge = 2 * loss_tolerance / jnp.where(anything, squared_norm, jnp.ones_like(squared_norm))
    product = GaussNewtonProduct(predict_fn, loss_fn, precision)

    def shifted(vector: PyTree) -> PyTree:
        image = product(weights, rest, jax.tree.map(lambda v: v[None], vector), batch)
        return jax.tree.map(lambda gv, v: gv[0] + ridge * v, image, vector)

    def quadratic_form(probe: PyTree) -> jax.Array:
        # In the dtype of the weights: a Python number would be a float64 constant under x64.
        tolerances: dict[str, Any] = {
            "tol": jnp.asarray(accuracy, ridge.dtype),
            "atol": jnp.zeros((), ridge.dtype),
        }
        solution, _ = cg(shifted, probe, **tolerances, maxiter=max_matvecs)
        residual = jax.lax.stop_gradient(jax.tree.map(jnp.subtract, probe, shifted(solution)))
        is_solved = _inner(residual, residual) <= UNSOLVED**2 * _inner(probe, probe)
        # z^T x + r^T x falls short of z^T (G + a)^{-1} z by r^T (G + a)^{-1} r, at most ||r||^2 / a.
        missing = jax.lax.stop_gradient(_inner(residual, solution))
        found = ridge * (_inner(probe, solution) + missing)
        return jnp.where(is_solved, found, jnp.full_like(found, jnp.nan))

    delta = jnp.mean(jax.lax.map(quadratic_form, probes)) / dim
    # Weights that are 0 can go: every direction is flat.
    return jnp.where(anything, delta, jnp.ones_like(delta))


def _require_probes(probes: PyTree, weights: PyTree) -> None:
    shapes, like = (jax.tree.map(jnp.shape, tree) for tree in (probes, weights))
    counts = {x.shape[0] if x.ndim else 0 for x in jax.tree.leaves(probes)}
    expected = jax.tree.map(lambda x: (*counts, *x.shape), weights)
    if len(counts) != 1 or 0 in counts or shapes != expected:
        raise ValueError(
            f"probes must be vectors like the weights, of shapes {like}, along a leading axis, as rademacher "
            f"makes them; got {shapes}."
        )


def _inner(x: PyTree, y: PyTree) -> jax.Array:
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, x, y)))  # pyright: ignore[reportReturnType]


def _squared_removed_norm(weights: PyTree, sparsity: float) -> tuple[jax.Array, int]:
    """R(s)^2, and the number of weights D."""
    magnitudes = jnp.abs(jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(weights)]))
    removed = int(num_removed(magnitudes.size, sparsity))
    if removed == 0:
        raise ValueError(f"sparsity {sparsity} removes none of {magnitudes.size} weights.")
    return jnp.sum(jnp.sort(magnitudes)[:removed] ** 2), magnitudes.size
