"""The risk of each example, for one network after the other: what is asked of metrics that are no means."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxlimit.core.batches import batch_length, first_of
from jaxlimit.core.checks import NOT_FINITE_CAUSES, require_problem
from jaxlimit.core.convolutions import convolves
from jaxlimit.core.cuts import Sampled
from jaxlimit.core.leaves import is_array
from jaxlimit.core.loops import apart, each_of
from jaxlimit.core.placement import placed
from jaxlimit.core.programs import Program, Traced
from jaxlimit.core.sharding import example_sharding, to_host
from jaxlimit.core.trees import PyTree, as_array, frozen, thawed
from jaxlimit.curvature.value_checks import ValueCheck

Metric = Callable[[PyTree, PyTree], jax.Array]


def per_example(values: Any, batch: PyTree) -> jax.Array:
    """What a metric returned for a batch, if it is one real number for each example.

    Examples:
        >>> per_example(jnp.float32(0.5), jnp.ones((4, 2)))
        Traceback (most recent call last):
        ...
        ValueError: metric_fn must return one number for each example, shape (4,) for this batch; got
        shape (): return the values before their mean is taken.
    """
    asked = "metric_fn must return one number for each example, shape"
    expected, shape = (batch_length(batch),), getattr(values, "shape", type(values).__name__)
    if shape != expected:
        remedy = "return the values before their mean is taken"
        if isinstance(shape, tuple) and shape:
            remedy = "sum up what belongs to one example in one number, as the mean over the other axes"
        raise ValueError(f"{asked} {expected} for this batch; got shape {shape}: {remedy}.")
    if jnp.issubdtype(values.dtype, jnp.complexfloating):
        raise ValueError(f"{asked} {expected} for this batch; got {values.dtype}, which is not real.")
    return jnp.asarray(values)


def paired(metric_fn: Metric, dense_params: PyTree) -> Metric:
    """The rise of each example's risk, metric(params) - metric(dense_params): a metric for `certify`.

    What both networks get wrong cancels, so that a rise is certified with fewer examples than a risk. Of a
    metric within (lo, hi) it lies within (lo - hi, hi - lo): `bounds=(-1, 1)` for errors. Cost: two
    evaluations of each example for each network.

    Args:
        metric_fn: `metric_fn(params, batch) -> (n,)`.
        dense_params: parameters of the network to compare with.

    Examples:
        >>> def wrong(w, x): return x > w
        >>> paired(wrong, 1.0)(2.0, jnp.array([0.5, 1.5, 2.5])).tolist()
        [0.0, -1.0, 0.0]
    """
    require_problem("paired(metric_fn, dense_params)", dense_params, metric_fn=metric_fn)
    require_no_nan("dense_params", dense_params)

    def difference(params: PyTree, batch: PyTree) -> jax.Array:
        values = [per_example(metric_fn(p, batch), batch) for p in (params, dense_params)]
        pruned, dense = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in values)
        return pruned - dense

    return difference


def require_no_nan(name: str, params: PyTree) -> None:
    """Raises ValueError if one of the arrays holds a NaN: the class of a NaN would be class 0.

    Examples:
        >>> require_no_nan("dense_params", {"w": np.array([0.0, np.nan])})
        Traceback (most recent call last):
        ...
        ValueError: dense_params has a NaN in ['w']: its training or pruning has diverged.
    """
    for path, leaf in jax.tree.leaves_with_path(params):
        if is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact) and bool(_has_nan(as_array(leaf))):
            where = jax.tree_util.keystr(path)
            raise ValueError(f"{name} has a NaN in {where}: its training or pruning has diverged.")


@jax.jit
def _has_nan(x: jax.Array) -> jax.Array:
    return jnp.isnan(x).any()


class _OwnValues(ValueCheck):
    """Whether the average over some examples is that over their parts, in the words of `certify`."""

    def _refuse(self, path: str, found: str) -> NoReturn:
        raise ValueError(
            "metric_fn gives examples other values in other batches: risks depend on each other. Likely "
            "causes: batch norm in train mode (use evaluation mode), a mean over the batch in the metric, "
            "broadcasting (N,) against (N, 1), or examples that are compared with each other."
        )


class ExampleRisks:
    """Risks of all examples, one network after the other with one program for all of a shape.

    Args:
        metric_fn: `metric_fn(params, batch) -> (n,)`.
        batches: as for `certify`.
        bounds: lowest and highest possible risk.
    """

    def __init__(self, metric_fn: Metric, batches: Iterable[PyTree], bounds: tuple[float, float]) -> None:
        self._given, self._bounds = metric_fn, bounds
        self._metric = Traced(lambda params, batch: per_example(metric_fn(params, batch), batch))
        self._of_group = Program(partial(_of_group, self._metric))
        self._batches, self._groups = batches, None
        self.num_examples = 0
        self.dtype: Any = None

    def __call__(self, params: PyTree) -> NDArray[np.float64]:
        """Risks (n,) in the order of the examples, moved and stretched from the bounds to [0, 1].

        Raises:
            ValueError: values that are not one for each example, not finite, out of bounds, or dependent on
                the rest of their batch; data that change from pass to pass.
        """
        params = frozen(params)
        if self._groups is None:
            self._groups = placed(self._given, self._batches, thawed(params))
        passed = Sampled(self._groups)
        found = [self._values(params, part) for group in passed for part in self._parts(params, group)]
        if not found:
            raise ValueError("batches hold no examples.")
        values = np.concatenate(found)
        self._require_in_bounds(values)
        if self.num_examples == 0:
            _OwnValues(self._mean, None, "metric_fn").few(params, passed.batches)
        self.num_examples = len(values)
        lower, upper = self._bounds
        return (values - lower) / (upper - lower)

    def _parts(self, params: PyTree, group: PyTree) -> Iterable[PyTree]:
        """The group, or each of its batches where a loop over them would be slow."""
        if example_sharding(group, axis=1) is None:
            one = jax.eval_shape(first_of, group)
            if convolves(self._metric.jaxpr(thawed(params), one)):
                return apart(group, batch_length(group))
        return [group]

    def _values(self, params: PyTree, group: PyTree) -> NDArray[np.float64]:
        found = to_host(self._of_group(params, group))
        self.dtype = found.dtype
        return np.ravel(found).astype(np.float64)

    def _mean(self, params: PyTree, batch: PyTree) -> jax.Array:
        return jnp.mean(self._metric(params, batch).astype(jnp.float32))

    def _require_in_bounds(self, values: NDArray[np.float64]) -> None:
        if not np.all(np.isfinite(values)):
            bad = int(np.argmin(np.isfinite(values)))
            raise ValueError(f"metric_fn is not finite for example {bad}. {NOT_FINITE_CAUSES}")
        lower, upper = self._bounds
        outside = (values < lower) | (values > upper)
        if outside.any():
            bad = int(np.argmax(outside))
            raise ValueError(
                f"metric_fn returns {values[bad]:.8g} for example {bad}, outside the bounds [{lower:g}, "
                f"{upper:g}] ({outside.sum():,} of {len(values):,} examples). Pass the bounds that hold for "
                "every possible example, or clip the risk, jnp.clip(risk, lower, upper); differences of two "
                "errors need bounds=(-1, 1)."
            )


def _of_group(metric: Traced, params: PyTree, group: PyTree) -> jax.Array:
    """(num_batches, batch_size) of stacked batches."""
    return each_of(lambda batch: metric(thawed(params), batch), group, batch_length(group))
