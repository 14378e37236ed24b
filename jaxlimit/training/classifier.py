"""L1-regularised training with stochastic gradient descent, from arrays in memory.

The paper trains its networks with momentum, without weight decay, and with an L1 term on every parameter:

    minimise   mean_i loss_i(w) + l1 * sum_j |w_j|

The L1 term belongs to training alone: the losses here are those whose Hessian and whose spread over batches
the pruning limit is about, and the second derivative of |w| is zero wherever it exists. A group lasso
(`training.group_lasso`) may stand beside it or in its place, where whole channels are to go.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx, traverse_util

from jaxlimit.core.checks import check_scalar, require_problem
from jaxlimit.core.leaves import as_bools, to_arrays
from jaxlimit.core.programs import Program
from jaxlimit.core.trees import PyTree
from jaxlimit.geometry.magnitude import apply_mask
from jaxlimit.training.descent import Objective, Settings, minimise
from jaxlimit.training.group_lasso import GroupLasso, group_lasso_of
from jaxlimit.training.losses import Loss, cross_entropy

Model = TypeVar("Model", bound=nnx.Module)


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
    weight_decay: float = 0.0,
    l1: float = 0.0,
    group_lasso: float = 0.0,
    groups: Any = None,
    mask: PyTree | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> PyTree:
    """Minimises the mean loss plus an L1 term by stochastic gradient descent with momentum.

        g_t = gradient of [ loss_fn(w_t, batch_t) + l1 * ||w_t||_1 ] + weight_decay * w_t
        m_t = momentum * m_{t-1} + g_t,     w_{t+1} = w_t - learning_rate_t * m_t

    Epoch e, from 0, visits the examples in the order
    `jax.random.permutation(jax.random.fold_in(key, e), num_examples)`, each exactly once, in batches of
    `batch_size`; an uneven last batch is a smaller batch and counts as a full update.

    An epoch is one compiled call, the same for all epochs. It costs one gradient per example, and memory for
    the data, one batch with its activations, and three copies of the parameters: weights, momentum, gradient.

    Args:
        loss_fn: `loss_fn(params, batch) -> scalar`, the mean over the batch's examples, without the L1 term.
        params: pytree of floating arrays to start from; left as it is.
        arrays: pytree of arrays with a common leading example axis, such as (images, labels). A batch is the
            same tree with fewer examples.
        key: random key for the order of the examples. The same key gives the same result on the same CPU;
            on a GPU only with XLA's deterministic operations (docs/performance.md).
        epochs: number of passes over the data, 1 or more.
        batch_size: examples per update, 1 or more; 128, as in all presets of the paper's code. All examples
            form one batch where there are fewer.
        learning_rate: a positive number, or an optax schedule over updates, from 0 (see `steps_per_epoch`).
        momentum: 0 or more and below 1; 0.9, as in all presets of the paper's code.
        weight_decay: 0 or more, on every parameter; 0, as in all presets of the paper's code.
        l1: weight of the L1 term per example, 0 or more; 0 by default, the dense control of the paper.
        group_lasso: weight of an L1 term on the norms of groups, 0 or more: see `training.group_lasso`.
        groups: prunable weights that go together in it, as for `pruning_limit`.
        mask: weights that are False in it are set to zero and stay there: a pytree of booleans like `params`,
            with None for leaves that are not pruned, as `magnitude_mask` of the prunable weights gives it.
        on_epoch: called after each epoch as `on_epoch(epoch, mean_loss)`: the epoch from 0, and the mean over
            its examples of what is minimised, the L1 term included, each batch before its own update.
        checkpoint: folder in which every finished epoch is kept. Training that was interrupted goes on from
            there, to the same bits; a folder of a training with other numbers, data, start or key is refused.
            It does not know the loss itself: another one needs another folder.

    Returns:
        The trained parameters, a pytree like `params`.

    Raises:
        ValueError: before any tracing, if a number is outside its range, if `params` is not a tree of
            floating arrays, if the arrays hold no examples or differ in their number, or if a value is not
            finite.
        FloatingPointError: at the end of the epoch in which the loss or a parameter becomes infinite or NaN.

    Examples:
        Least squares; the minimum of (w - 3)^2 + 2 |w| is at w = 2:

        >>> import jax.numpy as jnp
        >>> data = jnp.full(10, 3.0)
        >>> squares = lambda w, batch: jnp.mean((w - batch) ** 2)
        >>> w = train(squares, jnp.array(0.0), data, jax.random.key(0),
        ...           epochs=200, batch_size=5, learning_rate=0.05, l1=2.0)
        >>> round(float(w), 3)
        2.0
    """
    require_problem("train(loss_fn, params, arrays, key, ...)", params, loss_fn=loss_fn)
    mask = jax.tree.map(as_bools, mask)

    def objective(params: PyTree, state: PyTree, batch: PyTree, key: jax.Array) -> tuple[jax.Array, PyTree]:
        mask, lasso = state
        # Weights that start at zero and have no gradient stay there, exactly.
        params = apply_mask(params, mask)
        loss = loss_fn(params, batch)
        check_scalar(loss)
        return loss + _value(lasso, params), state

    settings = Settings(epochs, batch_size, learning_rate, momentum, weight_decay, l1)
    start, state = _masked(params, mask), (mask, group_lasso_of(params, group_lasso, groups))
    keywords: dict[str, Any] = {"on_epoch": on_epoch, "checkpoint": checkpoint}
    keywords["identity"] = _identity(group_lasso)
    return minimise(objective, start, state, arrays, key, settings, **keywords)[0]


def train_model(
    model: Model,
    arrays: tuple[Any, Any],
    key: jax.Array,
    *,
    epochs: int,
    batch_size: int = 128,
    learning_rate: float | optax.Schedule,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    l1: float = 0.0,
    group_lasso: float = 0.0,
    groups: Any = None,
    mask: PyTree | None = None,
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
        weight_decay: as for `train`, on every `nnx.Param`.
        l1: as for `train`, on every `nnx.Param`.
        group_lasso: as for `train`.
        groups: as for `train`.
        mask: as for `train`, like the parameters that `models.from_nnx` gives.
        augment: `augment(key, inputs) -> inputs`, applied to every batch (`data.random_crop_and_flip`). A
            checkpoint knows it by its name.
        on_epoch: as for `train`.
        checkpoint: as for `train`.

    Returns:
        A trained copy of the model, in training mode.

    Raises:
        ValueError: as for `train`.
        FloatingPointError: as for `train`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxlimit import models
        >>> inputs, labels = jnp.eye(4), jnp.arange(4)
        >>> model = models.FullyConnected([4, 4], rngs=nnx.Rngs(0))
        >>> model = train_model(
        ...     model, (inputs, labels), jax.random.key(0), epochs=100, batch_size=4, learning_rate=1.0
        ... )
        >>> model(inputs).argmax(-1).tolist()
        [0, 1, 2, 3]
    """
    network, mask = pure_classifier(model, augment), jax.tree.map(as_bools, mask)
    if not isinstance(arrays, (tuple, list)) or len(arrays) != 2:
        raise ValueError(f"arrays must be a pair, (inputs, labels), got a {type(arrays).__name__}.")
    if jnp.any(jnp.asarray(to_arrays("labels", arrays[1])) < 0):
        raise ValueError("labels must be classes, 0 or more, got a negative one: leave such examples out.")

    def objective(params: PyTree, state: PyTree, batch: PyTree, key: jax.Array) -> tuple[jax.Array, PyTree]:
        mask, lasso, state = state
        params = apply_mask(params, mask)
        loss, state = network.objective(params, state, batch, key)
        return loss + _value(lasso, params), (mask, lasso, state)

    params, (_, _, state) = minimise(
        objective,
        _masked(network.params, mask),
        (mask, group_lasso_of(network.params, group_lasso, groups), network.state),
        arrays,
        key,
        Settings(epochs, batch_size, learning_rate, momentum, weight_decay, l1),
        on_epoch=on_epoch,
        checkpoint=checkpoint,
        identity=network.identity | _identity(group_lasso),
    )
    return network.rebuild(params, state)


def _value(lasso: GroupLasso | None, params: PyTree) -> jax.Array | float:
    return 0.0 if lasso is None else lasso(params)


def _identity(group_lasso: float) -> dict[str, float]:
    """Of the term, for a checkpoint; its labels are in that of the state."""
    return {"group_lasso": float(group_lasso)} if group_lasso else {}


def _masked(params: PyTree, mask: PyTree | None) -> PyTree:
    """`apply_mask` in one program, for single operations compile one by one."""
    return params if mask is None else Program(apply_mask)(params, mask)


class PureClassifier(NamedTuple):
    """A model in training mode, as pure functions of its parameters and of what else changes.

    Attributes:
        objective: `objective(params, state, (inputs, labels), key) -> (mean cross entropy, state after it)`.
        params: every `nnx.Param`, named as by `models.from_nnx`.
        state: everything else that training changes: running statistics.
        rebuild: `rebuild(params, state) -> model`.
        identity: of the augmentation, for a checkpoint.
    """

    objective: Objective
    params: dict[str, Any]
    state: PyTree
    rebuild: Callable[[dict[str, Any], PyTree], Any]
    identity: dict[str, str]


def pure_classifier(
    model: nnx.Module, augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None
) -> PureClassifier:
    """What `train_model` minimises, for those who minimise it in their own way.

    Args:
        model: called with a batch of inputs, it returns logits; left as it is.
        augment: as for `train_model`.

    Examples:
        >>> from jaxlimit import models
        >>> network = pure_classifier(models.FullyConnected([4, 2], rngs=nnx.Rngs(0)))
        >>> sorted(network.params["layers"]["0"])
        ['bias', 'kernel']
    """
    if not isinstance(model, nnx.Module):
        raise ValueError(f"model must be an NNX module, got a {type(model).__name__}: see train.")
    model = nnx.clone(model)
    model.train()
    graphdef, trainable, keys, state = nnx.split(model, nnx.Param, nnx.RngKey, ...)
    flat = traverse_util.flatten_dict(nnx.to_pure_dict(trainable))
    params = traverse_util.unflatten_dict({tuple(map(str, path)): leaf for path, leaf in flat.items()})

    def rebuild(params: dict[str, Any], state: PyTree, *, copy: bool = False) -> Any:
        return nnx.merge(graphdef, nnx.restore_int_paths(params), keys, state, copy=copy)

    def objective(params: PyTree, state: PyTree, batch: PyTree, key: jax.Array) -> tuple[jax.Array, PyTree]:
        inputs, labels = batch
        model = rebuild(params, state, copy=True)  # its variables change in here
        logits = model(inputs if augment is None else augment(key, inputs))
        return cross_entropy(logits, labels), nnx.state(model, nnx.Not(nnx.Any(nnx.Param, nnx.RngKey)))

    identity = {} if augment is None else {"augment": getattr(augment, "__qualname__", repr(type(augment)))}
    return PureClassifier(objective, params, state, rebuild, identity)
