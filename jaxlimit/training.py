"""L1-regularised training with stochastic gradient descent, from arrays in memory.

The paper trains its networks with momentum, without weight decay, and with an L1 term on every parameter:

    minimise   mean_i loss_i(w) + l1 * sum_j |w_j|

The L1 term belongs to training alone: the losses here are those whose Hessian and whose spread over batches
the pruning limit is about, and the second derivative of |w| is zero wherever it exists.
"""

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxlimit.checkpoint import Checkpoint
from jaxlimit.losses import (
    Loss,
    classification_curvature,
    classification_loss,
    classification_metrics,
    cross_entropy,
    l1_norm,
)

__all__ = [
    "classification_curvature",
    "classification_loss",
    "classification_metrics",
    "cross_entropy",
    "l1_norm",
    "steps_per_epoch",
    "train",
    "train_model",
]

PyTree = Any
Model = TypeVar("Model", bound=nnx.Module)
# objective(params, state, batch, key) -> (mean loss of the batch, state after it)
Objective = Callable[[PyTree, PyTree, PyTree, jax.Array], tuple[jax.Array, PyTree]]


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
    checkpoint: str | os.PathLike[str] | None = None,
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
        checkpoint: folder in which every finished epoch is kept. Training that was interrupted goes on from
            there, to the same bits; a folder of other training is refused.

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

    def objective(params: PyTree, state: PyTree, batch: PyTree, key: jax.Array) -> tuple[jax.Array, PyTree]:
        return loss_fn(params, batch), state

    options = {"epochs": epochs, "batch_size": batch_size, "momentum": momentum, "l1": l1}
    return _minimise(objective, params, (), arrays, key, learning_rate, on_epoch, checkpoint, **options)[0]


def train_model(
    model: Model,
    arrays: tuple[Any, Any],
    key: jax.Array,
    *,
    epochs: int,
    batch_size: int = 128,
    learning_rate: float | optax.Schedule,
    momentum: float = 0.9,
    l1: float = 0.0,
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Model:
    """Trains a Flax NNX classifier: `train` for networks that hold more than parameters.

    The model runs in training mode: batch norm normalises by the batch and updates its running statistics,
    dropout draws anew. Without such layers and without `augment`, the parameters are those that `train`
    gives, to the bit.

    Args:
        model: called with a batch of inputs, it returns logits; left as it is.
        arrays: (inputs, labels), of N examples.
        key: as for `train`; also of the augmentation.
        epochs: as for `train`.
        batch_size: as for `train`.
        learning_rate: as for `train`.
        momentum: as for `train`.
        l1: as for `train`, on every `nnx.Param`.
        augment: `augment(key, inputs) -> inputs`, applied to every batch (`data.random_crop_and_flip`).
        on_epoch: as for `train`.
        checkpoint: as for `train`.

    Returns:
        A trained copy of the model, in training mode.

    Raises:
        ValueError: as for `train`.
        FloatingPointError: as for `train`.

    Examples:
        >>> from jaxlimit import models
        >>> inputs, labels = jnp.eye(4), jnp.arange(4)
        >>> model = models.FullyConnected([4, 4], rngs=nnx.Rngs(0))
        >>> model = train_model(
        ...     model, (inputs, labels), jax.random.key(0), epochs=100, batch_size=4, learning_rate=1.0
        ... )
        >>> model(inputs).argmax(-1).tolist()
        [0, 1, 2, 3]
    """
    model = nnx.clone(model)
    model.train()
    graphdef, params, keys, state = nnx.split(model, nnx.Param, nnx.RngKey, ...)

    def objective(params: PyTree, state: PyTree, batch: PyTree, key: jax.Array) -> tuple[jax.Array, PyTree]:
        inputs, labels = batch
        model = nnx.merge(graphdef, params, keys, state, copy=True)  # its variables change in here
        logits = model(inputs if augment is None else augment(key, inputs))
        return cross_entropy(logits, labels), nnx.state(model, nnx.Not(nnx.Any(nnx.Param, nnx.RngKey)))

    options = {"epochs": epochs, "batch_size": batch_size, "momentum": momentum, "l1": l1}
    found = _minimise(objective, params, state, arrays, key, learning_rate, on_epoch, checkpoint, **options)
    return nnx.merge(graphdef, found[0], keys, found[1])


def _minimise(
    objective: Objective,
    params: PyTree,
    state: PyTree,
    arrays: PyTree,
    key: jax.Array,
    learning_rate: float | optax.Schedule,
    on_epoch: Callable[[int, float], None] | None,
    checkpoint: str | os.PathLike[str] | None,
    *,
    epochs: int,
    batch_size: int,
    momentum: float,
    l1: float,
) -> tuple[PyTree, PyTree]:
    """Parameters and state after training."""
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

    def regularised(params: PyTree, state: PyTree, batch: PyTree, key: jax.Array) -> tuple[jax.Array, PyTree]:
        loss, state = objective(params, state, batch, key)
        return loss + l1 * l1_norm(params), state

    @partial(jax.jit, donate_argnums=0)
    def run_epoch(carry: PyTree, arrays: PyTree, key: jax.Array, epoch: int) -> tuple[PyTree, Any, Any]:
        key = jax.random.fold_in(key, epoch)

        def update(carry: PyTree, at: tuple[jax.Array, Any]) -> tuple[PyTree, jax.Array]:
            (params, momenta, state), (indices, number) = carry, at
            batch = jax.tree.map(lambda array: array[indices], arrays)
            with_gradient = jax.value_and_grad(regularised, has_aux=True)
            (value, state), gradient = with_gradient(params, state, batch, jax.random.fold_in(key, number))
            changes, momenta = optimizer.update(gradient, momenta, params)
            return (optax.apply_updates(params, changes), momenta, state), value * len(indices)

        order = jax.random.permutation(key, num_examples)
        full = order[:num_full].reshape(-1, batch_size)
        carry, values = jax.lax.scan(update, carry, (full, jnp.arange(len(full))))
        total = values.sum()
        if num_full < num_examples:
            carry, value = update(carry, (order[num_full:], len(full)))
            total += value
        finite = jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(carry[0])]).all()
        return carry, total / num_examples, finite

    # A copy, since each epoch donates its carry; strongly typed, or the second epoch would compile again.
    params, state = jax.tree.map(lambda leaf: jnp.array(leaf, dtype=jnp.result_type(leaf)), (params, state))
    carry = (params, optimizer.init(params), state)
    problem: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "momentum": momentum, "l1": l1}
    if checkpoint is not None:  # a pass over all data
        problem |= _fingerprint(params, arrays, key, learning_rate)
    store = Checkpoint(checkpoint, problem)
    stored = store.load_tree("epoch", (0, carry))
    done, carry = (0, carry) if stored is None else (int(stored[0]), jax.tree.map(jnp.asarray, stored[1]))
    arrays = jax.tree.map(jnp.asarray, arrays)
    for epoch in range(done, epochs):
        carry, mean_loss, finite = run_epoch(carry, arrays, key, epoch)
        mean_loss = float(mean_loss)
        if not (finite and math.isfinite(mean_loss)):
            raise FloatingPointError(
                f"training diverged in epoch {epoch} (counted from 0): mean loss {mean_loss}, parameters "
                f"{'finite' if finite else 'infinite or NaN'}; lower learning_rate, or warm it up"
            )
        store.save_tree("epoch", (epoch + 1, carry))
        if on_epoch is not None:
            on_epoch(epoch, mean_loss)
    return carry[0], carry[2]


def _fingerprint(
    params: PyTree, arrays: PyTree, key: jax.Array, learning_rate: float | optax.Schedule
) -> dict[str, Any]:
    """What tells one training from another."""
    rates = [learning_rate(step) for step in (0, 1000)] if callable(learning_rate) else [learning_rate]
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(arrays)]
    return {
        "learning_rate": np.asarray(rates, np.float64).tolist(),
        "params": float(l1_norm(params)),
        "arrays": [[*leaf.shape, float(np.sum(leaf, dtype=np.float64))] for leaf in leaves],
        "key": np.asarray(jax.random.key_data(key)).ravel().tolist(),
    }


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
