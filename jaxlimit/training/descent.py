"""Stochastic gradient descent with momentum: the one training loop, which knows nothing of networks.

`jaxlimit.training` and the methods of `jaxlimit.baselines` say what is minimised; here is how.
"""

import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlimit.core.sharding import to_host
from jaxlimit.core.storage import Checkpoint, ordered_sum
from jaxlimit.training.losses import l1_norm

PyTree = Any
# objective(params, state, batch, key) -> (mean loss of the batch, state after it)
Objective = Callable[[PyTree, PyTree, PyTree, jax.Array], tuple[jax.Array, PyTree]]


def minimise(
    objective: Objective,
    params: PyTree,
    state: PyTree,
    arrays: PyTree,
    key: jax.Array,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float | optax.Schedule,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    l1: float = 0.0,
    project: Callable[[PyTree], PyTree] | None = None,
    after_epoch: Callable[[int, PyTree, PyTree], tuple[PyTree, PyTree]] | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    identity: Mapping[str, Any] | None = None,
) -> tuple[PyTree, PyTree]:
    """Parameters and state after training as `jaxlimit.training.train` describes it.

    Args:
        objective: `objective(params, state, batch, key) -> (mean loss of the batch, state after it)`.
        params: pytree of floating arrays to start from.
        state: pytree of arrays that no gradient is taken of: running statistics, masks.
        arrays: as for `train`.
        key: as for `train`.
        epochs: as for `train`.
        batch_size: as for `train`.
        learning_rate: as for `train`.
        momentum: as for `train`.
        weight_decay: as for `train`.
        l1: as for `train`.
        project: `project(params) -> params`, applied before each update; not after the last one.
        after_epoch: `after_epoch(epoch, params, state) -> (params, state)` to go on with, of the same shapes
            and dtypes; momentum and learning rate go on. It must depend on its arguments alone.
        on_epoch: as for `train`.
        checkpoint: as for `train`.
        identity: what else decides the result, as JSON values, so that a checkpoint with others is refused:
            the settings of objective, project and after_epoch.

    Raises:
        ValueError: as for `train`.
        FloatingPointError: as for `train`.

    Examples:
        Halved after each epoch, and without any gradient:

        >>> still = lambda params, state, batch, key: (0.0 * params, state)
        >>> halve = lambda epoch, params, state: (params / 2, state)
        >>> settings = {"epochs": 3, "batch_size": 1, "learning_rate": 1.0}
        >>> w, _ = minimise(still, 8.0, (), jnp.ones(1), jax.random.key(0), after_epoch=halve, **settings)
        >>> float(w)
        1.0
    """
    require_count("epochs", epochs)
    require_count("batch_size", batch_size)
    require_range("momentum", momentum, 0 <= momentum < 1, "at least 0 and below 1")
    for name, value in (("l1", l1), ("weight_decay", weight_decay)):
        require_range(name, value, 0 <= value < math.inf, "finite and at least 0")
    if not callable(learning_rate):
        allowed = "finite and above 0, or an optax schedule over updates"
        require_range("learning_rate", learning_rate, 0 < learning_rate < math.inf, allowed)
    num_examples = _count_examples(arrays)
    _require_finite("arrays", arrays)
    _require_floating("params", params)
    _require_finite("params", params)

    optimizer = optax.sgd(learning_rate, momentum=momentum)
    if weight_decay:
        optimizer = optax.chain(optax.add_decayed_weights(weight_decay), optimizer)
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
            params = params if project is None else project(params)
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
    problem: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": batch_size,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "l1": l1,
    }
    if checkpoint is not None:  # a pass over all data
        updates = epochs * -(-num_examples // batch_size)
        problem |= _fingerprint((params, state), arrays, key, learning_rate, updates) | dict(identity or {})
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
        if after_epoch is not None:
            params, state = after_epoch(epoch, carry[0], carry[2])
            carry = (params, carry[1], state)
        store.save_tree("epoch", (epoch + 1, carry))
        if on_epoch is not None:
            on_epoch(epoch, mean_loss)
    return carry[0], carry[2]


def _fingerprint(
    start: PyTree, arrays: PyTree, key: jax.Array, learning_rate: float | optax.Schedule, updates: int
) -> dict[str, Any]:
    """What tells one training from another; of a schedule the first rate and the sum of all.

    Devices round random weights and cosines differently: of these five and six digits.
    """
    rates = [learning_rate]
    if callable(learning_rate):
        each = np.asarray(jax.vmap(learning_rate)(jnp.arange(updates)), np.float64)
        rates = [float(f"{rate:.6g}") for rate in (each[0], each.sum())]
    sums = [ordered_sum(to_host(leaf).ravel()) for leaf in jax.tree.leaves(start)]
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(arrays)]
    examples = [np.sum(leaf.reshape(len(leaf), -1), axis=1, dtype=np.float64) for leaf in leaves]
    return {
        "learning_rate": np.asarray(rates, np.float64).tolist(),
        "start": float(f"{ordered_sum(sums):.5g}"),
        "arrays": [[*leaf.shape, ordered_sum(x)] for leaf, x in zip(leaves, examples, strict=True)],
        "key": np.asarray(jax.random.key_data(key)).ravel().tolist(),
    }


def require_count(name: str, value: int) -> None:
    """Raises ValueError unless the value is an integer of at least 1."""
    if not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value}")


def require_range(name: str, value: Any, holds: bool, allowed: str) -> None:
    """Raises ValueError, which says what is allowed, unless `holds`."""
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
