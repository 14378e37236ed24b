"""Adam on the mean loss of all data with the mask held, batch by batch: what is compiled of fine-tuning."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlimit.core.batches import batch_length, first_of
from jaxlimit.core.programs import Traced
from jaxlimit.core.sharding import example_sharding, sum_of_parts, zeros_beside
from jaxlimit.core.sums import batch_weight, weighted
from jaxlimit.core.trees import PyTree, combine
from jaxlimit.curvature.products import each
from jaxlimit.measuring.sweeps import pruned


class _Pass(NamedTuple):
    """Sums over the batches of a pass so far: weights of the batches, losses (chunk,), gradients."""

    weight: jax.Array
    loss: jax.Array
    gradient: PyTree


class State(NamedTuple):
    """Of a chunk of sparsities, which is the leading axis of the arrays."""

    current: PyTree
    optimizer: PyTree
    best: PyTree
    best_loss: jax.Array
    sums: _Pass


def start(
    loss_fn: Traced, weights: PyTree, rest: PyTree, ranks: PyTree, counts: jax.Array, groups: list[PyTree]
) -> State:
    """Of a chunk of sparsities, before the first pass."""
    current = jax.vmap(lambda count: pruned(weights, ranks, count))(counts)
    loss = loss_fn.shape(combine(weights, rest), first_of(groups[0]))
    best_loss = jnp.full(counts.shape, jnp.inf, jnp.promote_types(loss.dtype, jnp.float32))
    adam = optax.adam(0.0)
    sums = _no_batch(current, best_loss)
    # Moments are those of the sums: squares of small gradients, and Adam's 1e-8, are 0 in float16.
    optimizer = optax.tree_map_params(
        adam, lambda x, w: zeros_beside(w, x.dtype), adam.init(sums.gradient), current
    )
    return State(current, optimizer, current, best_loss, sums)


def _no_batch(current: PyTree, loss: jax.Array) -> _Pass:
    """Sums over no batch, float32 at least."""
    gradient = jax.tree.map(lambda w: zeros_beside(w, jnp.promote_types(w.dtype, jnp.float32)), current)
    return _Pass(jnp.zeros((), loss.dtype), jnp.zeros_like(loss), gradient)


def advance(
    loss_fn: Traced,
    weight_fn: Callable[[PyTree], jax.Array] | None,
    state: State,
    rest: PyTree,
    ranks: PyTree,
    counts: jax.Array,
    groups: list[PyTree],
    learning_rate: jax.Array,
    start: jax.Array,
    stop: jax.Array,
) -> State:
    """The state after batches `start` to `stop` of all passes, counted through; each pass ends in a step."""
    add = [_adder(loss_fn, weight_fn, rest, group, state.sums) for group in groups]
    lengths = [batch_length(group) for group in groups]
    optimizer = optax.adam(learning_rate)

    def rest_of_pass(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
        position, state = carry
        first = position % sum(lengths)
        last = jnp.minimum(first + stop - position, sum(lengths))
        sums, before = state.sums, 0
        for add_batch, length in zip(add, lengths, strict=True):
            lower, upper = (jnp.clip(x - before, 0, length) for x in (first, last))
            sums = jax.lax.fori_loop(lower, upper, partial(add_batch, state.current), sums)
            before += length
        state = state._replace(sums=sums)
        state = jax.lax.cond(last == sum(lengths), partial(_step, optimizer, ranks, counts), _same, state)
        return position + last - first, state

    return jax.lax.while_loop(lambda carry: carry[0] < stop, rest_of_pass, (start, state))[1]


def _adder(
    loss_fn: Traced, weight_fn: Callable[[PyTree], jax.Array] | None, rest: PyTree, group: PyTree, like: _Pass
) -> Callable[[PyTree, jax.Array, _Pass], _Pass]:
    """`add(current, i, sums)`: with batch i of a group."""

    def part(current: PyTree, rest: PyTree, batch: PyTree) -> _Pass:
        weight = jnp.asarray(batch_weight(weight_fn, batch), like.weight.dtype)

        def one(weights: PyTree) -> tuple[jax.Array, PyTree]:
            return jax.value_and_grad(lambda w: loss_fn(combine(w, rest), batch))(weights)

        loss, gradient = each(one, current)
        return jax.tree.map(
            lambda x, s: weighted(weight, x.astype(s.dtype)), _Pass(jnp.ones(()), loss, gradient), like
        )

    of_all = sum_of_parts(part, example_sharding(group, axis=1), (None, None, 0))

    def add(current: PyTree, i: jax.Array, sums: _Pass) -> _Pass:
        batch = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), group)
        return jax.tree.map(jnp.add, sums, of_all(current, rest, batch))

    return add


def _step(optimizer: optax.GradientTransformation, ranks: PyTree, counts: jax.Array, state: State) -> State:
    """After a whole pass: keeps the weights if their loss is the lowest so far, and changes them."""
    loss = state.sums.loss / state.sums.weight
    better = loss < state.best_loss

    def of_chunk(x: jax.Array, like: jax.Array) -> jax.Array:
        return x.reshape(-1, *[1] * (like.ndim - 1))

    def chosen(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(of_chunk(better, new), new, old)

    def masked(gradient: jax.Array, rank: jax.Array) -> jax.Array:
        return jnp.where(rank < of_chunk(counts, gradient), 0, gradient / state.sums.weight)

    gradient = jax.tree.map(masked, state.sums.gradient, ranks)
    updates, moments = optimizer.update(gradient, state.optimizer)
    return State(
        optax.apply_updates(state.current, updates),
        moments,
        jax.tree.map(chosen, state.current, state.best),
        jnp.where(better, loss, state.best_loss),
        _no_batch(state.current, loss),
    )


def _same(state: State) -> State:
    return state
