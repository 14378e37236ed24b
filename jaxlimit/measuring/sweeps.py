r"""The truth to compare with: what the real loss does when the network is really pruned.

`sparsity_sweep` evaluates w_pruned(s) as it is; its loss threshold is what `one_shot` predicts.
`finetuned_sweep` first trains the kept weights for a short while, with the mask held and everything else
fixed; whether the loss then gets down to L* + eps is what `width`, `cone` and `readjusted` predict.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import ArrayLike, NDArray

from jaxlimit.core.batches import ExampleSum, batch_length, group_length, grouped
from jaxlimit.core.checks import require_count
from jaxlimit.core.programs import Program, Traced
from jaxlimit.core.trees import Prunable, PyTree, combine, is_kernel, partition, unflatten
from jaxlimit.curvature.products import each
from jaxlimit.geometry.magnitude import magnitude_order, num_removed

Metrics = Callable[[PyTree, PyTree], dict[str, jax.Array]]
# Sparsities at which thresholds are measured: steps of .0025.
SPARSITIES = np.arange(401) / 400
# The accuracy threshold is the largest sparsity that costs at most a point of test accuracy. A hair more, for
# a point may be lost exactly, up to rounding.
ACCURACY_LOSS = 0.01 + 1e-6


@dataclass(frozen=True)
class Sweep:
    """Metrics of a network against its sparsity.

    Attributes:
        sparsities: (m,) ascending.
        metrics: name -> (m,) float64.

    Examples:
        >>> sweep = Sweep(np.array([0.0, 0.5, 0.9]), {"loss": np.array([0.1, 0.2, 1.0])})
        >>> sweep.largest_sparsity("loss", 0.3)
        0.5
    """

    sparsities: NDArray[np.float64]
    metrics: dict[str, NDArray[np.float64]]

    def largest_sparsity(self, metric: str, bound: float) -> float:
        """Largest s of the grid at which the metric is at most `bound`; 0 if there is none."""
        within = self.sparsities[self.metrics[metric] <= bound]
        return float(within[-1]) if within.size else 0.0

    def first_crossing(self, metric: str, bound: float) -> float:
        """Last s of the grid before the metric first exceeds `bound`; 0 if it does so from the start."""
        above = np.flatnonzero(~(self.metrics[metric] <= bound))
        if above.size == 0:
            return float(self.sparsities[-1])
        return float(self.sparsities[above[0] - 1]) if above[0] > 0 else 0.0


def sparsity_sweep(
    metrics_fn: Metrics,
    params: PyTree,
    batches: Iterable[PyTree],
    sparsities: ArrayLike,
    *,
    prunable: Prunable = is_kernel,
    scores: PyTree | None = None,
    chunk_size: int = 8,
) -> Sweep:
    """Metrics of the one-shot magnitude-pruned network at each sparsity, without any retraining.

    One compiled function serves all sparsities: the number of removed weights is its argument. Cost: one
    forward pass over the data for each sparsity; memory: `chunk_size` copies of weights and activations, on a
    CPU one.

    Args:
        metrics_fn: `metrics_fn(params, batch) -> {name: scalar}`, means over the batch's examples.
        params: pytree of parameters.
        batches: `batched(...)`, a list of batches, or any re-iterable of batches.
        sparsities: fractions of the prunable weights to remove, in [0, 1]; sorted on return.
        prunable: as for `hessian`.
        scores: as for `pruning_limit`: another order than that of the magnitudes.
        chunk_size: sparsities of a call, evaluated side by side; on a CPU one after the other.

    Raises:
        ValueError: a sparsity outside [0, 1], none at all, or what `hessian` refuses of params.

    Examples:
        >>> from jaxlimit import batched
        >>> def metrics(w, x): return {"output": jnp.mean(x @ w)}
        >>> sweep = sparsity_sweep(metrics, jnp.array([[1.0], [3.0]]), [jnp.ones((1, 2))], [0, 0.5, 1])
        >>> sweep.metrics["output"].tolist()
        [4.0, 3.0, 0.0]
    """
    network = PrunedNetwork(params, metrics_fn, prunable=prunable, scores=scores)
    return network.sweep(batches, sparsities, chunk_size=chunk_size)


class PrunedNetwork:
    """A network sorted once, for metrics at one sparsity after the other. The metrics are traced once, too.

    Args:
        params: as for `sparsity_sweep`.
        metrics_fn: as for `sparsity_sweep`.
        prunable: as for `sparsity_sweep`.
        scores: as for `sparsity_sweep`.

    Raises:
        ValueError: what `hessian` refuses of params.
    """

    def __init__(
        self,
        params: PyTree,
        metrics_fn: Metrics,
        *,
        prunable: Prunable = is_kernel,
        scores: PyTree | None = None,
    ) -> None:
        self.metrics_sum = ExampleSum(_PrunedMetrics(metrics_fn))
        self.weights, self.rest = partition(params, prunable)
        self.dim, self.ranks = _ranks(self.weights, scores)

    def sweep(self, batches: Iterable[PyTree], sparsities: ArrayLike, *, chunk_size: int = 8) -> Sweep:
        """As `sparsity_sweep`."""
        grid, counts = _removals(self.dim, sparsities)
        groups, parts = grouped(batches), []
        for chunk, used in _chunks(counts, chunk_size):
            total, num_examples = self.metrics_sum(groups, self.weights, self.rest, self.ranks, chunk)
            parts.append(_means(total, num_examples, used))
        return _joined(grid, parts)


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
    chunk_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Sweep:
    """Lowest loss that short training of the kept weights reaches at each sparsity.

    Full-batch Adam from w_pruned(s) on the mean loss, mask held, parameters that are not prunable fixed.

    Cost: `num_steps` gradients over all data for each sparsity; memory: `chunk_size` times the optimiser's.

    Args:
        loss_fn: `loss_fn(params, batch) -> scalar`, mean over the batch's examples.
        params: pytree of parameters.
        batches: training data, in memory; large batches are faster here.
        sparsities: in [0, 1]; sorted on return.
        metrics_fn: metrics of the network at its lowest loss, evaluated on `eval_batches`; in the result
            their names begin with "eval_".
        eval_batches: default: `batches`.
        num_steps: Adam steps; a convention, on which the measured threshold depends.
        learning_rate: of Adam; its customary .001.
        prunable: as for `hessian`.
        scores: as for `pruning_limit`.
        chunk_size: sparsities trained side by side.
        progress: called with (sparsities done, sparsities in all).

    Returns:
        Sweep with the metric "loss" (lowest training loss, the start included), and the eval metrics.

    Raises:
        ValueError: as for `sparsity_sweep`; num_steps below 1.

    Examples:
        >>> def loss(w, x): return jnp.mean((x @ w - 2.0) ** 2)
        >>> weights, data = jnp.array([[0.5], [1.5]]), [jnp.ones((1, 2))]
        >>> sweep = finetuned_sweep(loss, weights, data, [0.5, 1], learning_rate=0.1)
        >>> sweep.metrics["loss"].round(3).tolist()  # 1.5 alone can learn to be 2; nothing is left at s = 1
        [0.0, 4.0]
    """
    require_count("num_steps", num_steps)
    weights, rest = partition(params, prunable)
    dim, ranks = _ranks(weights, scores)
    grid, removed = _removals(dim, sparsities)
    groups = list(grouped(batches))
    eval_groups = groups if eval_batches is None else grouped(eval_batches)
    finetune = Program(partial(_finetune, Traced(loss_fn), num_steps))
    metrics_sum = None if metrics_fn is None else ExampleSum(_TunedMetrics(metrics_fn))
    parts: list[dict[str, NDArray[np.float64]]] = []
    for counts, used in _chunks(removed, chunk_size):
        losses, tuned = finetune(weights, rest, ranks, counts, groups, learning_rate)
        part = {"loss": np.asarray(losses, np.float64)[:used]}
        if metrics_sum is not None:
            means = _means(*metrics_sum(eval_groups, tuned, rest), used)
            part |= {f"eval_{name}": values for name, values in means.items()}
        parts.append(part)
        if progress is not None:
            progress(sum(len(p["loss"]) for p in parts), len(grid))
    return _joined(grid, parts)


def _ranks(weights: PyTree, scores: PyTree | None) -> tuple[int, PyTree]:
    """Number of weights, and when each of them is removed, shaped like them."""
    order = magnitude_order(weights, scores)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.int32), order.like)
    return order.dim, unflatten(order.rank, like)


def _removals(dim: int, sparsities: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The sparsities, ascending, and how many weights each removes; a ValueError if there are none."""
    grid = np.unique(np.asarray(sparsities, np.float64))
    if grid.size == 0:
        raise ValueError("sparsities is empty.")
    return grid, num_removed(dim, grid)


def _chunks(counts: NDArray[np.int64], size: int) -> Iterable[tuple[NDArray[np.int32], int]]:
    """Equal-sized chunks, the last one filled up with its own last entry, and how many entries count."""
    for start in range(0, len(counts), size):
        chunk = counts[start : start + size].astype(np.int32)
        yield np.pad(chunk, (0, min(size, len(counts)) - len(chunk)), mode="edge"), len(chunk)


def _means(total: dict[str, jax.Array], num_examples: int, used: int) -> dict[str, NDArray[np.float64]]:
    return {name: np.asarray(x, np.float64)[:used] / num_examples for name, x in total.items()}


def _joined(grid: NDArray[np.float64], parts: list[dict[str, NDArray[np.float64]]]) -> Sweep:
    return Sweep(grid, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def _prune(weights: PyTree, ranks: PyTree, count: jax.Array) -> PyTree:
    return jax.tree.map(lambda w, rank: jnp.where(rank < count, 0, w), weights, ranks)


@dataclass(frozen=True, eq=False)
class _PrunedMetrics:
    metrics_fn: Metrics

    def __call__(
        self, weights: PyTree, rest: PyTree, ranks: PyTree, counts: jax.Array, batch: PyTree
    ) -> PyTree:
        return each(lambda n: self.metrics_fn(combine(_prune(weights, ranks, n), rest), batch), counts)


@dataclass(frozen=True, eq=False)
class _TunedMetrics:
    metrics_fn: Metrics

    def __call__(self, weights: PyTree, rest: PyTree, batch: PyTree) -> PyTree:
        return each(lambda w: self.metrics_fn(combine(w, rest), batch), weights)


def _finetune(loss_fn, num_steps, weights, rest, ranks, counts, groups, learning_rate):
    """Lowest losses (chunk,) and the weights there, leading axis chunk."""
    optimizer = optax.adam(learning_rate)
    num_examples = sum(group_length(group) for group in groups)

    def mean_loss(weights: PyTree) -> jax.Array:
        def add(total: jax.Array, batch: PyTree) -> tuple[jax.Array, None]:
            return total + batch_length(batch) * loss_fn(combine(weights, rest), batch), None

        total = jnp.zeros((), jax.tree.leaves(weights)[0].dtype)
        for group in groups:
            total, _ = jax.lax.scan(add, total, group)
        return total / num_examples

    def finetune(count: jax.Array) -> tuple[jax.Array, PyTree]:
        def step(carry: tuple, _: None) -> tuple[tuple, None]:
            current, state, best_loss, best = carry
            loss, gradient = jax.value_and_grad(mean_loss)(current)
            better = loss < best_loss
            best = jax.tree.map(lambda new, old: jnp.where(better, new, old), current, best)
            gradient = jax.tree.map(lambda g, rank: jnp.where(rank < count, 0, g), gradient, ranks)
            updates, state = optimizer.update(gradient, state)
            return (
                optax.apply_updates(current, updates),
                state,
                jnp.where(better, loss, best_loss),
                best,
            ), None

        start = _prune(weights, ranks, count)
        carry = start, optimizer.init(start), jnp.asarray(jnp.inf, mean_loss(start).dtype), start
        (_, _, loss, best), _ = jax.lax.scan(step, carry, None, length=num_steps + 1)
        return loss, best

    return jax.vmap(finetune)(counts)
