"""Loss, metrics and curvature of classification, and the L1 norm."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlimit.core.functions import pure_function
from jaxlimit.core.sums import sum_dtype
from jaxlimit.core.trees import PyTree
from jaxlimit.curvature.makers import gauss_newton, hessian
from jaxlimit.curvature.operator import Curvature

TITLES = {"hessian": "Hessian |H|", "gauss_newton": "Gauss-Newton"}
"""The two curvatures as tables and figures call them: the one that predicts, then the one that is cheap."""
CURVATURES = tuple(TITLES)

Predict = Callable[[PyTree, jax.Array], jax.Array]
Loss = Callable[[PyTree, Any], jax.Array]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross entropy of softmax outputs with integer labels.

        mean_i [ log sum_c exp(logits_ic) - logits_i,label_i ]

    Args:
        logits: floating array of shape (batch, classes).
        labels: integer array of shape (batch,), values 0 to classes - 1.

    Returns:
        A scalar, in nats; NaN if a label is no class. So a label of -1 or -100, as it may stand for padding,
        is never counted as a class: leave such examples out, or mask them in a loss of your own and count the
        others with `weight_fn`.

    Raises:
        ValueError: if the labels are not integers or do not match the logits in shape.

    Examples:
        >>> round(float(cross_entropy(jnp.zeros((3, 2)), jnp.array([0, 1, 1]))), 5)  # log 2
        0.69315
    """
    if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels must be integers of shape {logits.shape[:-1]} for logits of shape {logits.shape}, "
            f"got {labels.dtype} of shape {labels.shape}"
        )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return _of_classes(losses, logits, labels).mean()


def are_right(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Whether the largest output of each example is that of its label; never of NaN, whose largest is at 0.

    Examples:
        >>> are_right(jnp.array([[1.0, 2.0], [jnp.nan, 0.0]]), jnp.array([1, 0])).tolist()
        [True, False]
    """
    return (jnp.argmax(logits, axis=-1) == labels) & ~jnp.isnan(logits).any(-1)


def _of_classes(values: jax.Array, logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The values of a batch's examples, NaN where a label is no class."""
    known = (labels >= 0) & (labels < logits.shape[-1])
    return jnp.where(known, values, jnp.nan)


@pure_function
@dataclass(frozen=True, eq=False)
class ClassificationLoss:
    """What `classification_loss` returns; arrays that `predict` carries are leaves."""

    predict: Predict

    def __call__(self, params: PyTree, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        """The mean cross entropy of a batch."""
        inputs, labels = batch
        return cross_entropy(self.predict(params, inputs), labels)


@pure_function
@dataclass(frozen=True, eq=False)
class ClassificationMetrics:
    """What `classification_metrics` returns; arrays that `predict` carries are leaves."""

    predict: Predict

    def __call__(self, params: PyTree, batch: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
        """Loss and accuracy of a batch."""
        inputs, labels = batch
        logits = self.predict(params, inputs)
        right = _of_classes(are_right(logits, labels), logits, labels)
        return {"loss": cross_entropy(logits, labels), "accuracy": right.mean()}


def classification_loss(predict: Predict) -> Loss:
    """The mean cross entropy of a batch, without any L1 term, as a function of the parameters.

    Args:
        predict: `predict(params, inputs) -> logits` of shape (batch, classes).

    Returns:
        `loss(params, (inputs, labels)) -> scalar`, in nats, the mean over the batch's examples.

    Examples:
        >>> loss = classification_loss(lambda params, inputs: inputs @ params)
        >>> round(float(loss(jnp.zeros((4, 2)), (jnp.ones((3, 4)), jnp.array([0, 1, 1])))), 5)
        0.69315
    """
    return ClassificationLoss(predict)


def classification_metrics(predict: Predict) -> Callable[[PyTree, Any], dict[str, jax.Array]]:
    """The loss and the accuracy of a batch, as a function of the parameters.

    Args:
        predict: `predict(params, inputs) -> logits` of shape (batch, classes).

    Returns:
        `metrics(params, (inputs, labels)) -> {"loss": ..., "accuracy": ...}`: two scalars, means over the
        batch's examples; the loss is the cross entropy in nats, the accuracy a share between 0 and 1.

    Examples:
        >>> metrics = classification_metrics(lambda params, inputs: inputs @ params)
        >>> values = metrics(jnp.eye(2), (jnp.eye(2), jnp.array([0, 0])))
        >>> float(values["accuracy"])
        0.5
    """
    return ClassificationMetrics(predict)


def classification_curvature(
    name: str, predict: Predict, params: PyTree, batches: Iterable[tuple[Any, Any]]
) -> Curvature:
    """Hessian or Gauss-Newton matrix of the mean cross entropy.

    Args:
        name: "hessian" or "gauss_newton".
        predict: `predict(params, inputs) -> logits` of shape (batch, classes).
        params: pytree of arrays, where the curvature is taken.
        batches: (inputs, labels), as in `hessian`.

    Returns:
        The curvature with respect to the weights that can be pruned, as `hessian` and `gauss_newton` give it.

    Raises:
        ValueError: another name; or as `hessian` and `gauss_newton`.

    Examples:
        >>> from jaxlimit import batched
        >>> data = batched((jnp.eye(2), jnp.array([0, 1])), 2)
        >>> predict = lambda params, inputs: inputs @ params
        >>> for name in CURVATURES:  # the same, for a linear network
        ...     print(classification_curvature(name, predict, jnp.zeros((2, 2)), data).dense()[0])
        [ 0.125 -0.125  0.     0.   ]
        [ 0.125 -0.125  0.     0.   ]
    """
    if name == "hessian":
        return hessian(classification_loss(predict), params, batches)
    if name == "gauss_newton":
        return gauss_newton(
            lambda params, batch: predict(params, batch[0]),
            lambda logits, batch: cross_entropy(logits, batch[1]),
            params,
            batches,
        )
    raise ValueError(f"name must be one of {', '.join(CURVATURES)}, got {name!r}.")


def l1_norm(params: PyTree) -> jax.Array:
    """Sum of the magnitudes of every parameter: weights, biases and normalisation alike.

        sum_j |w_j|

    The paper's code penalises all of them, not only the weights that can be pruned.

    Args:
        params: any pytree of floating arrays.

    Returns:
        A scalar. Its gradient is sign(w_j), and 0 where a parameter is exactly 0, as in the paper's code.

    Examples:
        >>> float(l1_norm({"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([-0.5])}))
        3.5
    """
    # Not jnp.abs: its derivative at 0 is 1, which would push biases off their start and zeros off zero.
    magnitudes = [leaf * jnp.sign(leaf) for leaf in jax.tree.leaves(params)]
    return jnp.asarray(sum(x.sum(dtype=sum_dtype(x.dtype)) for x in magnitudes))
