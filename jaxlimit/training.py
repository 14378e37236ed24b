"""L1-regularised training with stochastic gradient descent, from arrays in memory.

The paper trains its networks with momentum, without weight decay, and with an L1 term on every parameter:

    minimise   mean_i loss_i(w) + l1 * sum_j |w_j|

The L1 term belongs to `train` alone: the losses here are those whose Hessian and whose spread over batches
the pruning limit is about, and the second derivative of |w| is zero wherever it exists.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

PyTree = Any
Predict = Callable[[PyTree, jax.Array], jax.Array]
Loss = Callable[[PyTree, Any], jax.Array]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross entropy of softmax outputs with integer labels.

        mean_i [ log sum_c exp(logits_ic) - logits_i,label_i ]

    Args:
        logits: floating array of shape (batch, classes).
        labels: integer array of shape (batch,), values 0 to classes - 1.

    Returns:
        A scalar, in nats.

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
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


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

    def loss(params: PyTree, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        inputs, labels = batch
        return cross_entropy(predict(params, inputs), labels)

    return loss


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

    def metrics(params: PyTree, batch: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
        inputs, labels = batch
        logits = predict(params, inputs)
        return {"loss": cross_entropy(logits, labels), "accuracy": jnp.mean(logits.argmax(-1) == labels)}

    return metrics


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
    return jnp.asarray(sum((leaf * jnp.sign(leaf)).sum() for leaf in jax.tree.leaves(params)))


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Number of updates `train` makes in an epoch: ceil(num_examples / batch_size).

    Args:
        num_examples: number of training examples, 1 or more.
        batch_size: examples per update, 1 or more.

    Returns:
        The number of batches, an uneven last one included.

    Raises:
        ValueError: if an argument is not an integer of at least 1.

    Examples:
        A cosine from 0.05 to 0 over 400 epochs:

        >>> schedule = optax.cosine_decay_schedule(0.05, 400 * steps_per_epoch(1438, 128))
        >>> round(float(schedule(200 * 12)), 6)
        0.025
    """
    _require_count("num_examples", num_examples)
    _require_count("batch_size", batch_size)
    return -(-num_examples // batch_size)


def train(
    loss_fn: Loss,
    params: PyTree,
    arrays: PyTree,
    key: jax.Array,
    *,
    epochs: int,
    batch_size: int = 128,
    learning_rate: float | optax.Schedule,
    momentum: float = 0.9,
    l1: float = 0.0,
    on_epoch: Callable[[int, float], None] | None = None,
) -> PyTree:
    """Minimises the mean loss plus an L1 term by stochastic gradient descent with momentum.

        g_t = gradient of [ loss_fn(w_t, batch_t) + l1 * ||w_t||_1 ]
        m_t = momentum * m_{t-1} + g_t,     w_{t+1} = w_t - learning_rate_t * m_t

    There is no weight decay. Epoch e, from 0, visits the examples in the order
    `jax.random.permutation(jax.random.fold_in(key, e), num_examples)`, each exactly once, in batches of
    `batch_size`; an uneven last batch is a smaller batch and counts as a full update.

    An epoch is one compiled call, the same for all epochs. It costs one gradient per example, and memory for
    the data, one batch with its activations, and three copies of the parameters: weights, momentum, gradient.

    Args:
        loss_fn: `loss_fn(params, batch) -> scalar`, the mean over the batch's examples, without the L1 term.
        params: pytree of floating arrays to start from; left as it is.
        arrays: pytree of arrays with a common leading example axis, such as (images, labels). A batch is the
            same tree with fewer examples.
        key: random key for the order of the examples. The same key gives the same result on the same machine.
        epochs: number of passes over the data, 1 or more.
        batch_size: examples per update, 1 or more; 128, as in all presets of the paper's code. All examples
            form one batch where there are fewer.
        learning_rate: a positive number, or an optax schedule over updates, from 0 (see `steps_per_epoch`).
        momentum: 0 or more and below 1; 0.9, as in all presets of the paper's code.
        l1: weight of the L1 term per example, 0 or more; 0 by default, the dense control of the paper.
        on_epoch: called after each epoch as `on_epoch(epoch, mean_loss)`: the epoch from 0, and the mean over
            its examples of what is minimised, the L1 term included, each batch before its own update.

    Returns:
        The trained parameters, a pytree like `params`.

    Raises:
        ValueError: before any tracing, if a number is outside its range, if `params` is not a tree of
            floating arrays, if the arrays hold no examples or differ in their number, or if a value is not
            finite.
        FloatingPointError: at the end of the epoch in which the loss or a parameter becomes infinite or NaN.

    Examples:
        Least squares; the minimum of (w - 3)^2 + 2 |w| is at w = 2:

        >>> data = jnp.full(10, 3.0)
        >>> squares = lambda w, batch: jnp.mean((w - batch) ** 2)
        >>> w = train(squares, jnp.array(0.0), data, jax.random.key(0),
        ...           epochs=200, batch_size=5, learning_rate=0.05, l1=2.0)
        >>> round(float(w), 3)
        2.0
    """
    _require_count("epochs", epochs)
    _require_count("batch_size", batch_size)
    _require_range("momentum", momentum, 0 <= momentum < 1, "at least 0 and below 1")
    _require_range("l1", l1, 0 <= l1 < math.inf, "finite and at least 0")
    if not callable(learning_rate):
        allowed = "finite and above 0, or an optax schedule over updates"
        _require_range("learning_rate", learning_rate, 0 < learning_rate < math.inf, allowed)
    num_examples = _count_examples(arrays)
    _require_finite("arrays", arrays)
    _require_floating("params", params)
    _require_finite("params", params)

    optimizer = optax.sgd(learning_rate, momentum=momentum)
    batch_size = min(batch_size, num_examples)
    num_full = num_examples // batch_size * batch_size

    def objective(params: PyTree, batch: PyTree) -> jax.Array:
        return loss_fn(params, batch) + l1 * l1_norm(params)

    @partial(jax.jit, donate_argnums=0)
    def run_epoch(state: PyTree, arrays: PyTree, key: jax.Array, epoch: int) -> tuple[PyTree, Any, Any]:
        def update(state: PyTree, indices: jax.Array) -> tuple[PyTree, jax.Array]:
            params, momenta = state
            batch = jax.tree.map(lambda array: array[indices], arrays)
            value, gradient = jax.value_and_grad(objective)(params, batch)
            changes, momenta = optimizer.update(gradient, momenta, params)
            return (optax.apply_updates(params, changes), momenta), value * len(indices)

        order = jax.random.permutation(jax.random.fold_in(key, epoch), num_examples)
        state, values = jax.lax.scan(update, state, order[:num_full].reshape(-1, batch_size))
        total = values.sum()
        if num_full < num_examples:
            state, value = update(state, order[num_full:])
            total += value
        finite = jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state[0])]).all()
        return state, total / num_examples, finite

    # A copy, since each epoch donates its state; strongly typed, or the second epoch would compile again.
    params = jax.tree.map(lambda leaf: jnp.array(leaf, dtype=jnp.result_type(leaf)), params)
    state = (params, optimizer.init(params))
    arrays = jax.tree.map(jnp.asarray, arrays)
    for epoch in range(epochs):
        state, mean_loss, finite = run_epoch(state, arrays, key, epoch)
        mean_loss = float(mean_loss)
        if not (finite and math.isfinite(mean_loss)):
            raise FloatingPointError(
                f"training diverged in epoch {epoch} (counted from 0): mean loss {mean_loss}, parameters "
                f"{'finite' if finite else 'infinite or NaN'}; lower learning_rate, or warm it up"
            )
        if on_epoch is not None:
            on_epoch(epoch, mean_loss)
    return state[0]


def _require_count(name: str, value: int) -> None:
    if not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value}")


def _require_range(name: str, value: float, holds: bool, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {allowed}, got {value}")


def _leaves(name: str, tree: PyTree) -> list[tuple[str, Any]]:
    named = [(name + jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)]
    if not named:
        raise ValueError(f"{name} must hold at least one array, got {tree}")
    return named


def _count_examples(arrays: PyTree) -> int:
    """Length of the leading axis that all arrays share."""
    shapes = {name: np.shape(leaf) for name, leaf in _leaves("arrays", arrays)}
    lengths = {shape[0] if shape else 0 for shape in shapes.values()}
    if len(lengths) > 1 or 0 in lengths:
        found = ", ".join(f"{name} of shape {shape}" for name, shape in shapes.items())
        raise ValueError(f"arrays must share a leading axis of 1 or more examples, got {found}")
    return lengths.pop()


def _require_floating(name: str, tree: PyTree) -> None:
    for leaf_name, leaf in _leaves(name, tree):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(f"{name} must be floating arrays, got {jnp.result_type(leaf)} in {leaf_name}")


def _require_finite(name: str, tree: PyTree) -> None:
    for leaf_name, leaf in _leaves(name, tree):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) and not jnp.isfinite(leaf).all():
            raise ValueError(f"{name} must be finite, got an infinite or NaN value in {leaf_name}")
