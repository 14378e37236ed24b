r"""The loss that short training of the kept weights reaches: full-batch Adam with the mask held.

Whether it gets down to L* + eps is what `width`, `cone` and `readjusted` predict. A pass over the data adds
loss and gradient up batch by batch, so that memory does not depend on the number of batches. One compiled
program does any number of batches, and is called for about half a second at a time: Ctrl-C is heard in
between, and the bits do not depend on where the passes were cut.
"""

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import ArrayLike, NDArray

from jaxlimit.core.batches import (
    ExampleSum,
    batch_length,
    batch_weight,
    check_scalar,
    first_of,
    grouped,
    weighted,
)
from jaxlimit.core.checks import require_count, require_problem, require_weight_fn
from jaxlimit.core.convolutions import quick_in_loops
from jaxlimit.core.cuts import Sampled
from jaxlimit.core.placement import placed_batches
from jaxlimit.core.programs import Program, Traced
from jaxlimit.core.sharding import example_sharding, sum_of_parts
from jaxlimit.core.trees import Prunable, PyTree, combine, is_kernel, partition
from jaxlimit.curvature.mean_checks import LEAST_LOSS
from jaxlimit.curvature.products import each
from jaxlimit.curvature.value_checks import ValueCheck
from jaxlimit.measuring.metrics import Metrics, scalars
from jaxlimit.measuring.sweeps import Sweep, chunks, joined, means, pruned, removal_ranks, removals

# progress(passes over the data done, passes in all)
Progress = Callable[[int, int], None]
# About how long a compiled call lasts.
CALL_SECONDS = 0.5


def finetuned_sweep(
    loss_fn: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    batches: Iterable[PyTree],
    sparsities: ArrayLike,
    *,
    metrics_fn: Metrics | None = None,
    eval_batches: Iterable[PyTree] | None = None,
    num_steps: int = 400,
    learning_rate: float = 1e-3,
    prunable: Prunable = is_kernel,
    scores: PyTree | None = None,
    weight_fn: Callable[[PyTree], jax.Array] | None = None,
    chunk_size: int = 8,
    progress: Progress | None = None,
) -> Sweep:
    """Lowest loss that short training of the kept weights reaches at each sparsity.

    Full-batch Adam from w_pruned(s) on the mean loss, mask held, parameters that are not prunable fixed.

    Cost: `num_steps` gradients over all data for each sparsity; memory: the data, one batch's gradient, and
    `chunk_size` times the optimiser's, on a CPU once.

    Args:
        loss_fn: `loss_fn(params, batch) -> scalar`, mean over the batch's examples.
        params: pytree of parameters.
        batches: training data, in memory.
        sparsities: in [0, 1]; sorted on return.
        metrics_fn: metrics of the network at its lowest loss, evaluated on `eval_batches`; in the result
            their names begin with "eval_".
        eval_batches: default: `batches`.
        num_steps: Adam steps; a convention, on which the measured threshold depends.
        learning_rate: of Adam; its customary .001.
        prunable: as for `hessian`.
        scores: as for `pruning_limit`.
        weight_fn: as for `hessian`.
        chunk_size: sparsities trained side by side; on a CPU one after the other.
        progress: called about every half second with (passes over the data done, passes in all); each
            sparsity takes num_steps + 1.

    Returns:
        Sweep with the metric "loss" (lowest training loss, the start included), and the eval metrics.

    Raises:
        ValueError: as for `sparsity_sweep`; num_steps below 1; a loss that is not a scalar, or not a mean.

    Examples:
        >>> def loss(w, x): return jnp.mean((x @ w - 2.0) ** 2)
        >>> weights, data = jnp.array([[0.5], [1.5]]), [jnp.ones((1, 2))]
        >>> sweep = finetuned_sweep(loss, weights, data, [0.5, 1], learning_rate=0.1)
        >>> sweep.metrics["loss"].round(3).tolist()  # 1.5 alone can learn to be 2; nothing is left at s = 1
        [0.0, 4.0]
    """
    network = FinetunedNetwork(
        loss_fn,
        params,
        batches,
        metrics_fn=metrics_fn,
        eval_batches=eval_batches,
        num_steps=num_steps,
        learning_rate=learning_rate,
        prunable=prunable,
        scores=scores,
        weight_fn=weight_fn,
    )
    return network.sweep(sparsities, chunk_size=chunk_size, progress=progress)


class FinetunedNetwork:
    """A network sorted once, to be fine-tuned at one sparsity after the other. Its loss is traced once, too.

    Args: as for `finetuned_sweep`.

    Raises:
        ValueError: what `hessian` refuses of params; num_steps below 1.
    """

    def __init__(
        self,
        loss_fn: Callable[[PyTree, PyTree], jax.Array],
        params: PyTree,
        batches: Iterable[PyTree],
        *,
        metrics_fn: Metrics | None = None,
        eval_batches: Iterable[PyTree] | None = None,
        num_steps: int = 400,
        learning_rate: float = 1e-3,
        prunable: Prunable = is_kernel,
        scores: PyTree | None = None,
        weight_fn: Callable[[PyTree], jax.Array] | None = None,
    ) -> None:
        functions = {"loss_fn": loss_fn} | ({} if metrics_fn is None else {"metrics_fn": metrics_fn})
        require_problem("finetuned_sweep(loss_fn, params, batches, sparsities)", params, **functions)
        require_weight_fn(weight_fn)
        require_count("num_steps", num_steps)
        self._weights, self._rest = partition(params, prunable)
        self._dim, self._ranks = removal_ranks(self._weights, scores)
        groups = list(grouped(placed_batches(loss_fn, batches, params)))
        if not groups:
            raise ValueError("batches hold no examples.")
        sampled = Sampled(groups)
        self._groups = list(sampled)
        whole, loss = combine(self._weights, self._rest), Traced(loss_fn, quick_in_loops)
        check_scalar(loss.shape(whole, jax.eval_shape(first_of, self._groups[0])))
        check = ValueCheck(loss_fn, weight_fn, "loss_fn")
        check.few(whole, sampled.batches)
        check.in_memory(whole, self._groups, LEAST_LOSS)
        self._eval_groups = self._groups if eval_batches is None else grouped(eval_batches)
        self._metrics_sum = None
        if metrics_fn is not None:
            self._metrics_sum = ExampleSum(_tuned(Traced(scalars(metrics_fn), quick_in_loops)), weight_fn)
            evaluated = Sampled(self._eval_groups)
            for _ in evaluated:
                pass
            check = ValueCheck(scalars(metrics_fn), weight_fn, "metrics_fn")
            check.metrics(whole, evaluated)
        self._num_passes, self._learning_rate = num_steps + 1, learning_rate
        self._start = Program(partial(_start, loss))
        self.advance = Program(partial(_advance, loss, weight_fn), donate_first=True)
        self._pace = _Pace()

    def sweep(self, sparsities: ArrayLike, *, chunk_size: int = 8, progress: Progress | None = None) -> Sweep:
        """As `finetuned_sweep`."""
        grid, removed = removals(self._dim, sparsities)
        size = 1 if jax.default_backend() == "cpu" else chunk_size
        parts: list[dict[str, NDArray[np.float64]]] = []
        for number, (counts, used) in enumerate(chunks(removed, size)):

            def told(passes: int, before: int = number * size, used: int = used) -> None:
                if progress is not None:
                    progress(before * self._num_passes + used * passes, len(grid) * self._num_passes)

            parts.append(self._finetuned(counts, used, told))
        return joined(grid, parts)

    def _finetuned(
        self, counts: NDArray[np.int32], used: int, told: Callable[[int], None]
    ) -> dict[str, NDArray[np.float64]]:
        """The metrics of the first `used` of a chunk."""
        state, done = self.first_state(counts), 0
        num_batches = sum(batch_length(group) for group in self._groups)
        while done < self._num_passes * num_batches:
            until = min(done + self._pace.num_batches, self._num_passes * num_batches)
            with self._pace:
                state = jax.block_until_ready(self.advance(state, *self.arguments(counts), done, until))
            done = until
            told(done // num_batches)
        found = {"loss": np.asarray(state.best_loss, np.float64)[:used]}
        if self._metrics_sum is not None:
            values = means(*self._metrics_sum(self._eval_groups, state.best, self._rest), used)
            found |= {f"eval_{name}": value for name, value in values.items()}
        return found

    def first_state(self, counts: NDArray[np.int32]) -> "_State":
        """Before the first pass."""
        return self._start(self._weights, self._rest, self._ranks, counts, self._groups)

    def arguments(self, counts: NDArray[np.int32]) -> tuple[PyTree, ...]:
        """What `advance` takes between the state and the batches from and to which it goes."""
        return self._rest, self._ranks, counts, self._groups, self._learning_rate


class _Pace:
    """How many batches make a call of about `CALL_SECONDS`: at first one, then by the last call."""

    def __init__(self) -> None:
        self.num_batches, self._began = 1, 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        factor = CALL_SECONDS / max(time.perf_counter() - self._began, 1e-9)
        self.num_batches = max(int(self.num_batches * min(max(factor, 0.5), 2.0)), 1)


class _Pass(NamedTuple):
    """Sums over the batches of a pass so far: weights of the batches, losses (chunk,), gradients."""

    weight: jax.Array
    loss: jax.Array
    gradient: PyTree


class _State(NamedTuple):
    """Of a chunk of sparsities, which is the leading axis of the arrays."""

    current: PyTree
    optimizer: PyTree
    best: PyTree
    best_loss: jax.Array
    sums: _Pass


def _tuned(metrics_fn: Metrics) -> Callable[[PyTree, PyTree, PyTree], PyTree]:
    return lambda weights, rest, batch: each(lambda w: metrics_fn(combine(w, rest), batch), weights)


def _start(
    loss_fn: Traced, weights: PyTree, rest: PyTree, ranks: PyTree, counts: jax.Array, groups: list[PyTree]
) -> _State:
    current = jax.vmap(lambda count: pruned(weights, ranks, count))(counts)
    loss = loss_fn.shape(combine(weights, rest), first_of(groups[0]))
    best_loss = jnp.full(counts.shape, jnp.inf, jnp.promote_types(loss.dtype, jnp.float32))
    optimizer = optax.adam(0.0).init(current)
    return _State(current, optimizer, current, best_loss, _no_batch(current, best_loss))


def _no_batch(current: PyTree, loss: jax.Array) -> _Pass:
    """Sums over no batch, float32 at least."""
    gradient = jax.tree.map(
        lambda w: jnp.zeros_like(w, dtype=jnp.promote_types(w.dtype, jnp.float32)), current
    )
    return _Pass(jnp.zeros((), loss.dtype), jnp.zeros_like(loss), gradient)


def _advance(
    loss_fn: Traced,
    weight_fn: Callable[[PyTree], jax.Array] | None,
    state: _State,
    rest: PyTree,
    ranks: PyTree,
    counts: jax.Array,
    groups: list[PyTree],
    learning_rate: jax.Array,
    start: jax.Array,
    stop: jax.Array,
) -> _State:
    """The state after batches `start` to `stop` of all passes, counted through; each pass ends in a step."""
    add = [_adder(loss_fn, weight_fn, rest, group, state.sums) for group in groups]
    lengths = [batch_length(group) for group in groups]
    optimizer = optax.adam(learning_rate)

    def rest_of_pass(carry: tuple[jax.Array, _State]) -> tuple[jax.Array, _State]:
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


def _step(optimizer: optax.GradientTransformation, ranks: PyTree, counts: jax.Array, state: _State) -> _State:
    """After a whole pass: keeps the weights if their loss is the lowest so far, and changes them."""
    loss = state.sums.loss / state.sums.weight
    better = loss < state.best_loss

    def of_chunk(x: jax.Array, like: jax.Array) -> jax.Array:
        return x.reshape(-1, *[1] * (like.ndim - 1))

    def chosen(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(of_chunk(better, new), new, old)

    def masked(gradient: jax.Array, rank: jax.Array, weights: jax.Array) -> jax.Array:
        mean = jnp.where(rank < of_chunk(counts, gradient), 0, gradient / state.sums.weight)
        return mean.astype(weights.dtype)

    gradient = jax.tree.map(masked, state.sums.gradient, ranks, state.current)
    updates, moments = optimizer.update(gradient, state.optimizer)
    return _State(
        optax.apply_updates(state.current, updates),
        moments,
        jax.tree.map(chosen, state.current, state.best),
        jnp.where(better, loss, state.best_loss),
        _no_batch(state.current, loss),
    )


def _same(state: _State) -> _State:
    return state
