r"""The loss that short training of the kept weights reaches: full-batch Adam with the mask held.

Whether it gets down to L* + eps is what `width`, `cone` and `readjusted` predict. A pass over the data adds
loss and gradient up batch by batch, so that memory does not depend on the number of batches. One compiled
program does any number of batches, and is called for about half a second at a time: Ctrl-C is heard in
between, and the bits do not depend on where the passes were cut.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxlimit.core.batches import batch_length, first_of
from jaxlimit.core.checks import (
    check_scalar,
    require_count,
    require_positive,
    require_problem,
    require_weight_fn,
)
from jaxlimit.core.convolutions import quick_in_loops
from jaxlimit.core.cuts import Sampled
from jaxlimit.core.placement import placed
from jaxlimit.core.programs import Program, Traced
from jaxlimit.core.sharding import to_host
from jaxlimit.core.sums import ExampleSum
from jaxlimit.core.terminal import Shown, takes_bar
from jaxlimit.core.trees import Prunable, PyTree, combine, is_kernel, partition
from jaxlimit.curvature.products import each
from jaxlimit.curvature.small_batches import LEAST_LOSS
from jaxlimit.curvature.value_checks import ValueCheck
from jaxlimit.measuring.adam_passes import State, advance, start
from jaxlimit.measuring.metrics import Metrics, scalars
from jaxlimit.measuring.sweeps import Sweep, chunks, joined, means, removal_ranks, removals

# progress(passes over the data done, passes in all)
Progress = Callable[[int, int], None]
# About how long a compiled call lasts.
CALL_SECONDS = 0.5


@takes_bar(partial(Shown, "fine-tuned sweep"))
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
    groups: Any = None,
    weight_fn: Callable[[PyTree], jax.Array] | None = None,
    chunk_size: int = 8,
    keep: bool = False,
    progress: Progress | bool | None = None,
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
        groups: as for `sparsity_sweep`.
        weight_fn: as for `hessian`.
        chunk_size: sparsities trained side by side; on a CPU one after the other.
        keep: whether the networks at their lowest loss are in the result, too. That takes one copy of the
            prunable weights for each sparsity, on the host: too much for a large network, hence the default.
        progress: called about every half second with (passes over the data done, passes in all); each
            sparsity takes num_steps + 1. True shows a bar.

    Returns:
        Sweep with the metric "loss" (lowest training loss, the start included), and the eval metrics; with
        `keep` the networks, (sparsity, params) in rising sparsity, as `certify` takes them.

    Raises:
        ValueError: as for `sparsity_sweep`; num_steps below 1; a learning rate that is not positive; a loss
            that is not a scalar, or not a mean; eval_batches without metrics_fn.

    Examples:
        >>> import jax.numpy as jnp
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
        groups=groups,
        weight_fn=weight_fn,
    )
    told = progress if callable(progress) else None
    return network.sweep(sparsities, chunk_size=chunk_size, keep=keep, progress=told)


class FinetunedNetwork:
    """A network sorted once, to be fine-tuned at one sparsity after the other. Its loss is traced once, too.

    Args: as for `finetuned_sweep`.

    Raises:
        ValueError: what `hessian` refuses of params; as for `finetuned_sweep`.
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
        groups: Any = None,
        weight_fn: Callable[[PyTree], jax.Array] | None = None,
    ) -> None:
        functions = {"loss_fn": loss_fn} | ({} if metrics_fn is None else {"metrics_fn": metrics_fn})
        require_problem("finetuned_sweep(loss_fn, params, batches, sparsities)", params, **functions)
        require_weight_fn(weight_fn)
        require_count("num_steps", num_steps)
        require_positive("learning_rate", learning_rate)
        if eval_batches is not None and metrics_fn is None:
            raise ValueError("eval_batches are for metrics_fn, and there is none: give both, or neither.")
        self._weights, self._rest = partition(params, prunable)
        self._order, self._ranks = removal_ranks(self._weights, scores, groups)
        cut = list(placed(loss_fn, batches, params))
        if not cut:
            raise ValueError("batches hold no examples.")
        sampled = Sampled(cut)
        self._groups = list(sampled)
        whole, loss = combine(self._weights, self._rest), Traced(loss_fn, quick_in_loops)
        check = ValueCheck(loss_fn, weight_fn, "loss_fn")
        check.few(whole, sampled.batches)
        check_scalar(loss.shape(whole, jax.eval_shape(first_of, self._groups[0])))
        check.in_memory(whole, self._groups, LEAST_LOSS)
        self._eval_groups = self._groups
        self._metrics_sum = None
        if metrics_fn is not None:
            if eval_batches is not None:
                self._eval_groups = placed(metrics_fn, eval_batches, params)
            self._metrics_sum = ExampleSum(_tuned(Traced(scalars(metrics_fn), quick_in_loops)), weight_fn)
            evaluated = Sampled(self._eval_groups)
            for _ in evaluated:
                pass
            check = ValueCheck(scalars(metrics_fn), weight_fn, "metrics_fn")
            check.metrics(whole, evaluated)
        self._num_passes, self._learning_rate = num_steps + 1, learning_rate
        self._start = Program(partial(start, loss))
        self.advance = Program(partial(advance, loss, weight_fn), donate_first=True)
        self._pace = _Pace()

    def sweep(
        self,
        sparsities: ArrayLike,
        *,
        chunk_size: int = 8,
        keep: bool = False,
        progress: Progress | None = None,
    ) -> Sweep:
        """As `finetuned_sweep`."""
        require_count("chunk_size", chunk_size)
        grid, removed = removals(self._order, sparsities)
        size = 1 if jax.default_backend() == "cpu" else chunk_size
        parts: list[dict[str, NDArray[np.float64]]] = []
        kept: list[PyTree] = []
        for number, (counts, used) in enumerate(chunks(removed, size)):

            def told(passes: int, before: int = number * size, used: int = used) -> None:
                if progress is not None:
                    progress(before * self._num_passes + used * passes, len(grid) * self._num_passes)

            part, best = self._finetuned(counts, used, told)
            parts.append(part)
            if keep:
                best = jax.tree.map(to_host, best)
                kept += [jax.tree.map(lambda x, i=i: x[i], best) for i in range(used)]
        networks = [combine(weights, self._rest) for weights in kept]
        found = joined(grid, parts)
        return replace(found, networks=tuple(zip(grid.tolist(), networks, strict=True))) if keep else found

    def _finetuned(
        self, counts: NDArray[np.int32], used: int, told: Callable[[int], None]
    ) -> tuple[dict[str, NDArray[np.float64]], PyTree]:
        """The metrics of the first `used` of a chunk, and the weights of all at their lowest losses."""
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
        return found, state.best

    def first_state(self, counts: NDArray[np.int32]) -> State:
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


def _tuned(metrics_fn: Metrics) -> Callable[[PyTree, PyTree, PyTree], PyTree]:
    return lambda weights, rest, batch: each(lambda w: metrics_fn(combine(w, rest), batch), weights)
