r"""Which share of a total sparsity each layer should bear, from the curvature of the loss.

Removing c from the weights costs, to second order,

    q(c) = -g^T c + c^T H c / 2.

Let every layer l prune its n_l smallest weights. If the signs of the removed weights are independent and
fair, the products of two different ones average out, between layers and within, and what is left of H is
its diagonal. With one curvature a layer, and one slope, which is exact for the layer as a whole,

    E q = sum_l [ b_l |c_l|_1 + h_l |c_l|^2 / 2 ],   h_l = tr H_ll / D_l,   b_l = -g_l . w_l / |w_l|_1

(b_l = 0 at a minimum and b_l = lambda at one of L + lambda |w|_1). To remove one more weight w from layer l
costs b_l |w| + h_l w^2 / 2, which grows with |w|. So the sum over l is separable and convex, and of all
allocations with sum_l n_l = s D the cheapest is greedy: remove the floor(s D) weights of least

    score = b_l |w| + h_l w^2 / 2,

a global cut like that of magnitude, in units of loss; for g = 0 that of sqrt(h_l) |w|. With a curvature for
every weight it would be the saliency of Optimal Brain Damage (LeCun, Denker and Solla 1990), whose model of
the loss this is; averages over layers can be had from a few products.

The global magnitude cut is the case of equal layers. It is also what the width limit prefers, which sees c
only through its length. Which is better on a real network is to be measured (docs/transformer.md).
"""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxlimit.core.checks import require_count, require_instance, require_key
from jaxlimit.core.trees import PyTree
from jaxlimit.curvature.operator import Curvature
from jaxlimit.geometry.magnitude import magnitude_mask, magnitude_order
from jaxlimit.spectrum.probes import signed_products


@dataclass(frozen=True)
class LayerCosts:
    """What removing weights costs in each layer: trees of numbers with one leaf for each leaf of the weights.

    Attributes:
        slope: b_l >= 0, in units of loss over weight.
        curvature: h_l >= 0, in units of loss over squared weight.
        curvature_error: standard error of h_l from the random probes.
    """

    slope: PyTree
    curvature: PyTree
    curvature_error: PyTree

    def scores(self, weights: PyTree) -> PyTree:
        """b_l |w| + h_l w^2 / 2 of every weight, in units of loss, float64 on the host."""

        def score(weight: Any, slope: float, curvature: float) -> Any:
            magnitude = np.abs(np.asarray(weight, np.float64))
            return slope * magnitude + curvature * magnitude**2 / 2

        return jax.tree.map(score, weights, self.slope, self.curvature)


def layer_costs(curvature: Curvature, key: jax.Array, *, num_probes: int = 16) -> LayerCosts:
    """The slope and the mean curvature of every layer; a layer is a leaf of `curvature.weights`.

        h_l = E [z_l . (H z)_l] / D_l,   z random signs (Hutchinson 1990)

    Cost: one gradient and `num_probes` products, one by one; memory for three vectors.

    Args:
        curvature: from `gauss_newton`, whose h_l are never negative, or `hessian`.
        key: of the random probes.
        num_probes: at least 2. The score rests on square roots of h_l, so an error of h_l by a tenth, typical
            of 16 probes, moves a layer's cut by a twentieth.

    Returns:
        Costs, with b_l cut off at 0: a layer whose removal the gradient favours is no reason to remove it.

    Raises:
        ValueError: num_probes below 2; a layer with a negative mean curvature, as a Hessian may have.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxlimit import batched, hessian
        >>> def loss(params, x): return jnp.mean(params["a"]**2 + 5 * params["b"]**2) / 2 + 0 * jnp.sum(x)
        >>> params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
        >>> curvature = hessian(loss, params, batched(jnp.ones((1, 1)), 1))
        >>> layer_costs(curvature, jax.random.key(0)).curvature
        {'a': 0.25, 'b': 1.25}
    """
    require_instance("curvature", curvature, Curvature, "gauss_newton or hessian")
    key = require_key("key", key)
    require_count("num_probes", num_probes, 2)  # for a standard error
    weights = curvature.weights
    samples = [jax.tree.map(_mean_product, *pair) for pair in signed_products(curvature, key, num_probes)]
    mean = jax.tree.map(lambda *x: float(np.mean(x)), *samples)
    error = jax.tree.map(lambda *x: float(np.std(x, ddof=1) / np.sqrt(num_probes)), *samples)
    for path, value in jax.tree_util.tree_leaves_with_path(mean):
        if not value >= 0:
            raise ValueError(
                f"the mean curvature of {jax.tree_util.keystr(path)} is {value:.3g} and must not be "
                "negative. Use gauss_newton, or more probes if its standard error is as large."
            )
    return LayerCosts(jax.tree.map(_slope, curvature.gradient, weights), mean, error)


def allocated_mask(weights: PyTree, costs: LayerCosts, sparsity: float) -> PyTree:
    """Mask of the cheapest allocation: exactly floor(s D) weights of least score are False, ties by index.

    Args:
        weights: pytree of the D prunable weights, as `curvature.weights`.
        costs: of its layers.
        sparsity: fraction of all weights removed, in [0, 1].

    Returns:
        Pytree of booleans like `weights`; True = kept. Within a layer these are its largest weights.

    Raises:
        ValueError: sparsity outside [0, 1], or weights that are empty or not finite.

    Examples:
        The second layer has fewer and smaller weights, but its loss is steeper.

        >>> weights = {"a": np.array([1.0, 2.0, 3.0]), "b": np.array([0.5, 0.9])}
        >>> costs = LayerCosts({"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 25.0}, {"a": 0.0, "b": 0.0})
        >>> mask = allocated_mask(weights, costs, 0.4)
        >>> mask["a"].tolist(), mask["b"].tolist()
        ([False, False, True], [True, True])
    """
    return magnitude_mask(weights, sparsity, scores=costs.scores(weights))


def uniform_mask(weights: PyTree, sparsity: float) -> PyTree:
    """Magnitude pruning with the same share of every layer, to within one weight; floor(s D) in all.

    Args:
        weights: pytree of the D prunable weights.
        sparsity: fraction of weights removed, in [0, 1].

    Returns:
        Pytree of booleans like `weights`; True = kept.

    Raises:
        ValueError: sparsity outside [0, 1], or weights that are empty or not finite.

    Examples:
        >>> uniform_mask({"a": np.array([1.0, 2.0]), "b": np.array([10.0, 20.0])}, 0.5)
        {'a': Array([False,  True], dtype=bool), 'b': Array([False,  True], dtype=bool)}
    """

    def shares_of(w: jax.Array) -> np.ndarray:
        ranks = magnitude_order(w).rank if np.size(w) else np.zeros(0)
        return ((ranks + 0.5) / max(np.size(w), 1)).reshape(np.shape(w))

    shares = jax.tree.map(shares_of, weights)
    return magnitude_mask(weights, sparsity, scores=shares)


def _mean_product(sign: jax.Array, product: jax.Array) -> float:
    products = np.asarray(sign, np.float64) * np.asarray(product, np.float64)
    return float(np.mean(products)) if products.size else 0.0


def _slope(gradient: jax.Array, weight: jax.Array) -> float:
    """-g . w / |w|_1, the mean slope toward zero; 0 where it is negative, or the layer is."""
    g, w = np.asarray(gradient, np.float64), np.asarray(weight, np.float64)
    norm = np.sum(np.abs(w))
    return max(0.0, float(-np.sum(g * w) / norm)) if norm > 0 else 0.0
