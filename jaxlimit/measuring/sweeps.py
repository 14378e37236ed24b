"""The truth to compare with: what the real loss does when the network is really pruned.

`sparsity_sweep` evaluates w_pruned(s) as it is; its loss threshold is what `one_shot` predicts.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxlimit.core.checks import as_real, require_count, require_problem, require_range, require_weight_fn
from jaxlimit.core.convolutions import quick_in_loops
from jaxlimit.core.cuts import Sampled
from jaxlimit.core.display import Displayed, View, few
from jaxlimit.core.placement import placed
from jaxlimit.core.programs import Traced
from jaxlimit.core.sums import ExampleSum
from jaxlimit.core.terminal import Shown, takes_bar
from jaxlimit.core.trees import Prunable, PyTree, combine, is_kernel, partition, unflatten
from jaxlimit.curvature.products import each
from jaxlimit.curvature.value_checks import ValueCheck
from jaxlimit.geometry.magnitude import MagnitudeOrder, magnitude_order, num_removed
from jaxlimit.measuring.metrics import Metrics, require_known, require_numbers, scalars

# Sparsities at which thresholds are measured: steps of .0025.
SPARSITIES = np.arange(401) / 400
# The accuracy threshold is the largest sparsity that costs at most a point of test accuracy. A hair more, for
# a point may be lost exactly, up to rounding.
ACCURACY_LOSS = 0.01 + 1e-6


@dataclass(frozen=True, repr=False)
class Sweep(Displayed):
    """Metrics of a network against its sparsity. Prints as a table, of many sparsities a few.

    Attributes:
        sparsities: (m,) ascending.
        metrics: name -> (m,) float64.
        networks: (sparsity, params) of each sparsity, as `certify` takes them; None unless they were to be
            kept.

    Examples:
        >>> sweep = Sweep(np.array([0.0, 0.5, 0.9]), {"loss": np.array([0.1, 0.2, 1.0])})
        >>> sweep.largest_sparsity("loss", 0.3)
        0.5
        >>> sweep
        Sweep of 3 sparsities
        sparsity  loss
        0.0000     0.1
        0.5000     0.2
        0.9000       1
    """

    sparsities: NDArray[np.float64]
    metrics: dict[str, NDArray[np.float64]]
    networks: tuple[tuple[float, PyTree], ...] | None = None

    def largest_sparsity(self, metric: str, bound: float) -> float:
        """Largest s of the grid at which the metric is at most `bound`; 0 if there is none.

        Raises:
            ValueError: no such metric, or one that is not a number somewhere; a bound that is no number.
        """
        _require_bound(bound)
        require_known(self.metrics, metric, self.sparsities)
        within = self.sparsities[self.metrics[metric] <= bound]
        return float(within[-1]) if within.size else 0.0

    def first_crossing(self, metric: str, bound: float) -> float:
        """Last s of the grid before the metric first exceeds `bound`; 0 if it does so from the start.

        Raises:
            ValueError: no such metric, or one that is not a number somewhere; a bound that is no number.
        """
        _require_bound(bound)
        require_known(self.metrics, metric, self.sparsities)
        above = np.flatnonzero(self.metrics[metric] > bound)
        if above.size == 0:
            return float(self.sparsities[-1])
        return float(self.sparsities[above[0] - 1]) if above[0] > 0 else 0.0

    def _view(self) -> View:
        columns = zip(*self.metrics.values(), strict=True)
        rows = [
            (f"{s:.4f}", *(f"{x:.4g}" for x in found))
            for s, found in zip(self.sparsities, columns, strict=True)
        ]
        shown = few(rows)
        title = f"Sweep of {len(rows)} sparsities"
        if len(shown) < len(rows):
            title += f", {len(shown)} of them shown"
        return View(title, ("sparsity", *self.metrics), shown)


def _require_bound(bound: float) -> None:
    require_range("bound", bound, not np.isnan(as_real(bound)), "a number")


@takes_bar(partial(Shown, "sparsity sweep"))
def sparsity_sweep(
    metrics_fn: Metrics,
    params: PyTree,
    batches: Iterable[PyTree],
    sparsities: ArrayLike,
    *,
    prunable: Prunable = is_kernel,
    scores: PyTree | None = None,
    groups: Any = None,
    chunk_size: int = 8,
    weight_fn: Callable[[PyTree], jax.Array] | None = None,
    progress: Callable[[int, int], None] | bool | None = None,
) -> Sweep:
    """Metrics of the one-shot magnitude-pruned network at each sparsity, without any retraining.

    One compiled function serves all sparsities: the number of removed weights is its argument. Cost: one
    forward pass over the data for each sparsity; memory: `chunk_size` copies of weights and activations, on a
    CPU one.

    Args:
        metrics_fn: `metrics_fn(params, batch) -> {name: scalar}`, means over the batch's examples, or over
            what `weight_fn` counts, of any precision; their sums are float32 at least.
        params: pytree of parameters.
        batches: `batched(...)`, a list of batches, or any re-iterable of batches.
        sparsities: fractions of the prunable weights to remove, in [0, 1]; sorted on return.
        prunable: as for `hessian`.
        scores: as for `pruning_limit`: another order than that of the magnitudes.
        groups: as for `pruning_limit`: weights that go together. The sparsities of the result are then those
            that whole groups reach: the largest ones that do not exceed those that were given.
        chunk_size: sparsities of a call, evaluated side by side; on a CPU one after the other.
        weight_fn: how much a batch counts, as for `hessian`.
        progress: called after each chunk with (sparsities done, sparsities in all); True shows a bar.

    Raises:
        ValueError: a sparsity outside [0, 1], none at all, or what `hessian` refuses of params; metrics that
            are no scalars, no means, or finite at no sparsity.

    Examples:
        >>> from jaxlimit import batched
        >>> def metrics(w, x): return {"output": jnp.mean(x @ w)}
        >>> sweep = sparsity_sweep(metrics, jnp.array([[1.0], [3.0]]), [jnp.ones((1, 2))], [0, 0.5, 1])
        >>> sweep.metrics["output"].tolist()
        [4.0, 3.0, 0.0]
    """
    call = "sparsity_sweep(metrics_fn, params, batches, sparsities)"
    require_problem(call, params, metrics_fn=metrics_fn)
    network = PrunedNetwork(
        params, metrics_fn, prunable=prunable, scores=scores, groups=groups, weight_fn=weight_fn
    )
    told = progress if callable(progress) else None
    return network.sweep(batches, sparsities, chunk_size=chunk_size, progress=told)


class PrunedNetwork:
    """A network sorted once, for metrics at one sparsity after the other. The metrics are traced once, too.

    Args:
        params: as for `sparsity_sweep`.
        metrics_fn: as for `sparsity_sweep`.
        prunable: as for `sparsity_sweep`.
        scores: as for `sparsity_sweep`.
        groups: as for `sparsity_sweep`.
        weight_fn: as for `sparsity_sweep`.

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
        groups: Any = None,
        weight_fn: Callable[[PyTree], jax.Array] | None = None,
    ) -> None:
        require_weight_fn(weight_fn)
        self.params, self.metrics_fn = params, metrics_fn
        metrics = scalars(metrics_fn)
        self.metrics_sum = ExampleSum(_PrunedMetrics(Traced(metrics, quick_in_loops)), weight_fn)
        self._check, self._checked = ValueCheck(metrics, weight_fn, "metrics_fn"), []
        self.weights, self.rest = partition(params, prunable)
        self.order, self.ranks = removal_ranks(self.weights, scores, groups)

    def sweep(
        self,
        batches: Iterable[PyTree],
        sparsities: ArrayLike,
        *,
        chunk_size: int = 8,
        progress: Callable[[int, int], None] | None = None,
    ) -> Sweep:
        """As `sparsity_sweep`."""
        require_count("chunk_size", chunk_size)
        grid, counts = removals(self.order, sparsities)
        groups, parts = placed(self.metrics_fn, batches, self.params), []
        for chunk, used in chunks(counts, chunk_size):
            passed = Sampled(groups)
            found = self._means(passed, chunk)
            if not any(known is batches for known in self._checked):
                self._check.metrics(combine(self.weights, self.rest), passed)
                self._checked.append(batches)
            parts.append({name: values[:used] for name, values in found.items()})
            if progress is not None:
                progress(min(len(parts) * chunk_size, len(grid)), len(grid))
        return joined(grid, parts)

    def _means(self, groups: Iterable[PyTree], counts: NDArray[np.int32]) -> dict[str, NDArray[np.float64]]:
        total, weight = self.metrics_sum(groups, self.weights, self.rest, self.ranks, counts)
        return means(total, weight, len(counts))


def removal_ranks(weights: PyTree, scores: PyTree | None, groups: Any) -> tuple[MagnitudeOrder, PyTree]:
    """The order of the weights, and the removal that takes each of them, shaped like them."""
    order = magnitude_order(weights, scores, groups)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.int32), order.like)
    return order, unflatten(order.rank, like)


def removals(order: MagnitudeOrder, sparsities: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The sparsities, ascending, and how many removals each allows; a ValueError if there are none.

    Where groups go, the sparsities are those that they reach.
    """
    grid = np.unique(np.asarray(sparsities))
    if grid.size == 0:
        raise ValueError("sparsities is empty.")
    counts = num_removed(order.dim, grid)  # knows the precision in which they were given
    if order.num_removals == order.dim:
        return grid.astype(np.float64), counts
    reached = np.unique([order.within(count) for count in counts])
    return np.array([order.sparsity(n) for n in reached]), reached


def chunks(counts: NDArray[np.int64], size: int) -> Iterable[tuple[NDArray[np.int32], int]]:
    """Equal-sized chunks, the last one filled up with its own last entry, and how many entries count."""
    for start in range(0, len(counts), size):
        chunk = counts[start : start + size].astype(np.int32)
        yield np.pad(chunk, (0, min(size, len(counts)) - len(chunk)), mode="edge"), len(chunk)


def means(total: dict[str, jax.Array], weight: float, used: int) -> dict[str, NDArray[np.float64]]:
    """Sums over examples as means, of the first `used` sparsities of a chunk."""
    return {name: np.asarray(x, np.float64)[:used] / weight for name, x in total.items()}


def joined(grid: NDArray[np.float64], parts: list[dict[str, NDArray[np.float64]]]) -> Sweep:
    """The sweep of chunks one after the other."""
    metrics = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    require_numbers(metrics)
    return Sweep(grid, metrics)


def pruned(weights: PyTree, ranks: PyTree, count: jax.Array) -> PyTree:
    """The weights without the first `count` in the order of their ranks."""
    return jax.tree.map(lambda w, rank: jnp.where(rank < count, 0, w), weights, ranks)


@dataclass(frozen=True, eq=False)
class _PrunedMetrics:
    metrics_fn: Metrics

    def __call__(
        self, weights: PyTree, rest: PyTree, ranks: PyTree, counts: jax.Array, batch: PyTree
    ) -> PyTree:
        return each(lambda n: self.metrics_fn(combine(pruned(weights, ranks, n), rest), batch), counts)
