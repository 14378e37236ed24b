"""Stochastic gradient descent with momentum: the one training loop, which knows nothing of networks.

`jaxlimit.training` and the methods of `jaxlimit.baselines` say what is minimised; here is how.
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlimit.core.checks import (
    as_real,
    check_scalar,
    named_leaves,
    require_count,
    require_finite,
    require_floating,
    require_key,
    require_range,
)
from jaxlimit.core.leaves import to_arrays
from jaxlimit.core.programs import Program
from jaxlimit.core.sharding import to_host
from jaxlimit.core.storage import Checkpoint, about, ordered_sum
from jaxlimit.core.sums import sum_dtype
from jaxlimit.core.trees import PyTree
from jaxlimit.training.losses import l1_norm

# objective(params, state, batch, key) -> (mean loss of the batch, state after it)
Objective = Callable[[PyTree, PyTree, PyTree, jax.Array], tuple[jax.Array, PyTree]]
# What devices may differ by in the loss of a batch, relative to it, where matrix products have ten bits.
SAME_LOSS = 2e-3


@dataclass(frozen=True)
class Settings:
    """The numbers of a descent.

    Attributes:
        epochs: as for `jaxlimit.training.train`, and so are the others.
        batch_size: examples per update.
        learning_rate: a positive number, or an optax schedule over updates.
        momentum: 0 or more and below 1.
        weight_decay: 0 or more.
        l1: weight of the L1 term.

    Raises:
        ValueError: a number outside its range.
    """

    epochs: int
    batch_size: int
    learning_rate: float | optax.Schedule
    momentum: float = 0.9
    weight_decay: float = 0.0
    l1: float = 0.0

    def __post_init__(self) -> None:
        require_count("epochs", self.epochs)
        require_count("batch_size", self.batch_size)
        require_range("momentum", self.momentum, 0 <= as_real(self.momentum) < 1, "at least 0 and below 1")
        for name in ("l1", "weight_decay"):
            value = getattr(self, name)
            require_range(name, value, 0 <= as_real(value) < math.inf, "finite and at least 0")
        if not callable(self.learning_rate):
            allowed = "finite and above 0, or an optax schedule over updates"
            rate = as_real(self.learning_rate)
            require_range("learning_rate", self.learning_rate, 0 < rate < math.inf, allowed)

    @property
    def numbers(self) -> dict[str, float]:
        """What is an argument of a compiled epoch, so that other values share it: all but a schedule.

        Without weight decay there is no term for it.
        """
        numbers = {"momentum": self.momentum, "l1": self.l1}
        if self.weight_decay:
            numbers["weight_decay"] = self.weight_decay
        if not callable(self.learning_rate):
            numbers["learning_rate"] = self.learning_rate
        return numbers


class _Carry(NamedTuple):
    """What an epoch changes."""

    params: PyTree
    momenta: PyTree  # state of the optimiser
    state: PyTree


def minimise(
    objective: Objective,
    params: PyTree,
    state: PyTree,
    arrays: PyTree,
    key: jax.Array,
    settings: Settings,
    *,
    project: Callable[[PyTree], PyTree] | None = None,
    after_epoch: Callable[[int, PyTree, PyTree], tuple[PyTree, PyTree]] | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    identity: Mapping[str, Any] | None = None,
) -> tuple[PyTree, PyTree]:
    """Parameters and state after training as `jaxlimit.training.train` describes it.

    Functions are traced anew for each training. A training that is like one before it, but for the values
    of its arrays and settings, compiles nothing.

    Args:
        objective: `objective(params, state, batch, key) -> (mean loss of the batch, state after it)`.
        params: pytree of floating arrays to start from.
        state: pytree of arrays that no gradient is taken of: running statistics, masks.
        arrays: pytree of arrays with a common leading example axis.
        key: random key for the order of the examples, and of the objective.
        settings: the numbers.
        project: `project(params) -> params`, applied before each update; not after the last one.
        after_epoch: `after_epoch(epoch, params, state) -> (params, state)` to go on with, of the same shapes
            and dtypes; momentum and learning rate go on. It must depend on its arguments alone.
        on_epoch: called after each epoch as `on_epoch(epoch, mean_loss)`.
        checkpoint: folder in which every finished epoch is kept.
        identity: what else decides the result, as JSON values, so that a checkpoint with others is refused:
            the settings of objective, project and after_epoch.

    Raises:
        ValueError: as for `train`.
        FloatingPointError: as for `train`.

    Examples:
        Halved after each epoch, and without any gradient:

        >>> still = lambda params, state, batch, key: (0.0 * params, state)
        >>> halve = lambda epoch, params, state: (params / 2, state)
        >>> settings = Settings(epochs=3, batch_size=1, learning_rate=1.0)
        >>> w, _ = minimise(still, 8.0, (), jnp.ones(1), jax.random.key(0), settings, after_epoch=halve)
        >>> float(w)
        1.0
    """
    arrays, key = to_arrays("arrays", arrays), require_key("key", key)
    num_examples = count_examples(arrays)
    require_finite("arrays", arrays)
    require_floating("params", params)
    require_finite("params", params)
    carry = Program(partial(_start, settings))(params, state)
    known = dict(identity or {})
    if checkpoint is not None:
        known |= _identity(objective, settings, carry, arrays, key)
    with Checkpoint(checkpoint, known) as store:
        stored = store.load_tree("epoch", (np.array(0), carry))
        done, carry = (0, carry) if stored is None else (int(stored[0]), jax.tree.map(jnp.asarray, stored[1]))
        arrays = jax.tree.map(jnp.asarray, arrays)
        batch_size = min(settings.batch_size, num_examples)
        schedule = settings.learning_rate if callable(settings.learning_rate) else None
        run_epoch = Program(partial(_epoch, objective, project, schedule, batch_size), donate_first=True)
        for epoch in range(done, settings.epochs):
            carry, mean_loss, finite = run_epoch(carry, arrays, key, epoch, settings.numbers)
            mean_loss = float(mean_loss)
            if not (finite and math.isfinite(mean_loss)):
                raise FloatingPointError(
                    f"training diverged in epoch {epoch} (counted from 0): mean loss {mean_loss}, parameters "
                    f"{'finite' if finite else 'infinite or NaN'}; lower learning_rate, or warm it up; "
                    "a loss that is NaN from the first batch on may have labels outside the classes"
                )
            if after_epoch is not None:
                params, state = after_epoch(epoch, carry.params, carry.state)
                carry = _Carry(params, carry.momenta, state)
            store.save_tree("epoch", (epoch + 1, carry))
            if on_epoch is not None:
                on_epoch(epoch, mean_loss)
        return carry.params, carry.state


def _start(settings: Settings, params: PyTree, state: PyTree) -> _Carry:
    """Copies, since each epoch donates its carry; strongly typed, or the second epoch would compile again."""
    params, state = jax.tree.map(lambda x: jnp.array(x, dtype=jnp.result_type(x)), (params, state))
    schedule = settings.learning_rate if callable(settings.learning_rate) else None
    return _Carry(params, _optimizer(schedule, settings.numbers).init(params), state)


def _optimizer(schedule: optax.Schedule | None, numbers: Mapping[str, Any]) -> optax.GradientTransformation:
    rate = numbers["learning_rate"] if schedule is None else schedule
    optimizer = optax.sgd(rate, momentum=numbers["momentum"])
    if "weight_decay" in numbers:
        optimizer = optax.chain(optax.add_decayed_weights(numbers["weight_decay"]), optimizer)
    return optimizer


def _epoch(
    objective: Objective,
    project: Callable[[PyTree], PyTree] | None,
    schedule: optax.Schedule | None,
    batch_size: int,
    carry: _Carry,
    arrays: PyTree,
    key: jax.Array,
    epoch: jax.Array,
    numbers: Mapping[str, jax.Array],
) -> tuple[_Carry, jax.Array, jax.Array]:
    """The carry after an epoch, its mean loss, and whether all parameters are finite."""
    num_examples = jax.tree.leaves(arrays)[0].shape[0]
    num_full = num_examples // batch_size * batch_size
    optimizer, key = _optimizer(schedule, numbers), jax.random.fold_in(key, epoch)
    # The permutation splits its key in two, which are `fold_in(key, 0)` and `fold_in(key, 1)`.
    objective_key = jax.random.fold_in(key, 2)

    def regularised(params: PyTree, state: PyTree, batch: PyTree, key: jax.Array) -> tuple[jax.Array, PyTree]:
        loss, state = objective(params, state, batch, key)
        check_scalar(loss)
        return loss.astype(sum_dtype(loss.dtype)) + numbers["l1"] * l1_norm(params), state

    def update(carry: _Carry, at: tuple[jax.Array, Any]) -> tuple[_Carry, jax.Array]:
        (params, momenta, state), (indices, number) = carry, at
        params = params if project is None else project(params)
        batch = jax.tree.map(lambda array: array[indices], arrays)
        with_gradient = jax.value_and_grad(regularised, has_aux=True)
        (value, state), gradient = with_gradient(
            params, state, batch, jax.random.fold_in(objective_key, number)
        )
        changes, momenta = optimizer.update(gradient, momenta, params)
        return _Carry(optax.apply_updates(params, changes), momenta, state), value * len(indices)

    order = jax.random.permutation(key, num_examples)
    full = order[:num_full].reshape(-1, batch_size)
    carry, values = jax.lax.scan(update, carry, (full, jnp.arange(len(full))))
    total = values.sum()
    if num_full < num_examples:
        carry, value = update(carry, (order[num_full:], len(full)))
        total += value
    finite = jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(carry.params)]).all()
    return carry, total / num_examples, finite


def _identity(
    objective: Objective,
    settings: Settings,
    start: _Carry,
    arrays: PyTree,
    key: jax.Array,
) -> dict[str, Any]:
    """What tells one training from another, by a pass over all data and the loss of a first batch.

    Of a schedule the first rate and the sum of all. Devices round random weights and cosines differently: of
    these five and six digits.
    """
    num_examples, rates = count_examples(arrays), [settings.learning_rate]
    batch_size = min(settings.batch_size, num_examples)
    if callable(settings.learning_rate):
        updates = settings.epochs * -(-num_examples // batch_size)
        each = np.asarray(jax.vmap(settings.learning_rate)(jnp.arange(updates)), np.float64)
        rates = [float(f"{rate:.6g}") for rate in (each[0], each.sum())]
    sums = [ordered_sum(to_host(leaf).ravel()) for leaf in jax.tree.leaves((start.params, start.state))]
    leaves = [np.asarray(_numbers(leaf)) for leaf in jax.tree.leaves(arrays)]
    examples = [_sums_of_rows(leaf.reshape(len(leaf), -1)) for leaf in leaves]
    batch = jax.tree.map(lambda x: jnp.asarray(x[:batch_size]), arrays)
    loss = float(Program(objective)(start.params, start.state, batch, key)[0])
    return {
        **vars(settings),
        "loss": about(loss, SAME_LOSS * abs(loss)) if math.isfinite(loss) else str(loss),
        "batch_size": batch_size,
        "learning_rate": np.asarray(rates, np.float64).tolist(),
        "start": float(f"{ordered_sum(sums):.5g}"),
        "arrays": [[*leaf.shape, ordered_sum(x)] for leaf, x in zip(leaves, examples, strict=True)],
        "key": np.asarray(jax.random.key_data(key)).ravel().tolist(),
    }


def _numbers(leaf: Any) -> Any:
    """The bits of random keys; complex numbers as pairs."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(leaf)
    return np.stack([leaf.real, leaf.imag], -1) if np.iscomplexobj(leaf) else leaf


def _sums_of_rows(rows: np.ndarray) -> np.ndarray:
    """(n,) weighted by place, so that other columns are other sums."""
    plain = rows if rows.dtype.kind in "fiu" else rows.astype(np.float64)
    return np.einsum("ij,j->i", plain, np.sqrt(np.arange(1.0, rows.shape[1] + 1)))


def count_examples(arrays: PyTree) -> int:
    """Length of the leading axis that all arrays share."""
    shapes = {name: np.shape(leaf) for name, leaf in named_leaves("arrays", arrays)}
    lengths = {shape[0] if shape else 0 for shape in shapes.values()}
    if len(lengths) > 1 or 0 in lengths:
        found = ", ".join(f"{name} of shape {shape}" for name, shape in shapes.items())
        raise ValueError(f"arrays must share a leading axis of 1 or more examples, got {found}.")
    return lengths.pop()
