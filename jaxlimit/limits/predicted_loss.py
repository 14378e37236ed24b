r"""What a mask does to the loss, as its quadratic model at the trained weights predicts it.

    L(w - c) - L(w)  ~  -g^T c + c^T H c / 2,      c the weights that the mask removes

One mask, one sparsity, one question: no order of the weights is needed, so that N:M patterns, channels and
masks of other methods are asked about alike. The limit `one_shot` asks the same of every magnitude mask.
"""

from dataclasses import dataclass

import jax
import numpy as np

from jaxlimit.core.checks import require_instance
from jaxlimit.core.trees import PyTree, flatten
from jaxlimit.curvature.operator import Curvature
from jaxlimit.geometry.magnitude import apply_mask
from jaxlimit.geometry.patterns import require_mask


@dataclass(frozen=True)
class PredictedLoss:
    """By how much a mask raises the loss, in units of the loss: the prediction, its parts, and the truth.

    Attributes:
        increase: -g^T c + c^T H c / 2, what the quadratic model predicts.
        linear: -g^T c, its part from the gradient.
        quadratic: c^T H c / 2, its part from the curvature.
        rise: L(w - c) - L(w), what the loss itself does. Far from the weights the model does not hold: where
            `rise` and `increase` differ by more than matters to you, believe `rise`.
        sparsity: share of the prunable weights that the mask removes.
    """

    increase: float
    linear: float
    quadratic: float
    rise: float
    sparsity: float

    def __str__(self) -> str:
        """In words."""
        return (
            f"predicted increase {self.increase:.4g} ({self.linear:.4g} from the gradient, "
            f"{self.quadratic:.4g} from the curvature), the loss itself rises by {self.rise:.4g}, "
            f"at sparsity {self.sparsity:.4f}"
        )


def predicted_loss(curvature: Curvature, mask: PyTree) -> PredictedLoss:
    r"""By how much the loss rises when a mask removes weights and no other weight moves.

        -g^T c + c^T H c / 2

    Cost: one product, one pass over the data for `rise`, and one gradient for all masks of a curvature. A
    mask that removes no weight, or zeros alone, costs neither product nor pass: it changes nothing.

    Args:
        curvature: from `hessian`, whose H makes this the second-order model of the loss; with `gauss_newton`
            the part of H that the network's own second derivative adds is left out.
        mask: pytree like `curvature.weights`, False (or 0) where a weight is removed: from
            `magnitude_mask`, `nm_mask`, `Pruned.mask`, or of your own.

    Returns:
        The increase that is predicted, its two parts, and the rise of the loss itself.

    Raises:
        ValueError: no curvature; a mask of other shapes, or of other values than bools, 0 and 1.
        FloatingPointError: the product with the curvature is not finite.

    Examples:
        Two weights at the minimum of a quadratic loss, whose model is the loss itself.

        >>> import jax.numpy as jnp
        >>> from jaxlimit import batched, hessian
        >>> def loss(w, x): return jnp.mean((x @ (w - jnp.array([[1.0], [2.0]]))) ** 2) / 2
        >>> curvature = hessian(loss, jnp.array([[1.0], [2.0]]), batched(jnp.ones((4, 2)), 4))
        >>> found = predicted_loss(curvature, jnp.array([[True], [False]]))
        >>> found.increase, found.rise, found.sparsity
        (2.0, 2.0, 0.5)

    Source: the second-order model of Optimal Brain Damage (LeCun, Denker and Solla 1990), with its gradient
    and with all of H.
    """
    require_instance("curvature", curvature, Curvature, "hessian or gauss_newton")
    mask = require_mask(curvature.weights, mask, numbers=True)
    removed = apply_mask(curvature.weights, jax.tree.map(np.logical_not, mask))
    c, sparsity = flatten(removed), 1 - float(np.mean(flatten(mask)))
    if not c.any():
        return PredictedLoss(0.0, 0.0, 0.0, 0.0, sparsity)
    linear = -float(flatten(curvature.gradient) @ c)
    quadratic = float(c @ flatten(curvature.matvec(removed))) / 2
    if not np.isfinite(linear + quadratic):
        raise FloatingPointError("a product with the curvature is not finite: look for overflow in the loss.")
    rise = curvature.mean_loss(apply_mask(curvature.weights, mask)) - curvature.loss
    return PredictedLoss(linear + quadratic, linear, quadratic, rise, sparsity)
