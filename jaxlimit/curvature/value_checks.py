"""Whether metrics are the means that they are taken for: the check of a loss, without gradients.

A few examples of a first, a middle and a last batch are compared in fours and in twos, at the parameters and
at two others nearby: what is no mean is none there either, while a prediction that rounding turns is. Where a
metric is 0, as the drift of a network from itself, nothing is said. Batches of a function that takes no small
ones are compared with their halves, or with copies. What is computed in few bits is computed in float32 here,
for its rounding would hide a difference.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jaxlimit.core.batches import batch_length, examples_like, first_of
from jaxlimit.core.cuts import Sampled, cut_otherwise, mixed, one_batch, samples
from jaxlimit.core.programs import Program, Traced
from jaxlimit.core.sharding import example_sharding
from jaxlimit.core.sums import ExampleSum, batch_weight, mean_of_sum, weighted
from jaxlimit.core.trees import PyTree, frozen, thawed
from jaxlimit.core.widening import coarse_numbers, widened
from jaxlimit.curvature.data_checks import not_a_mean
from jaxlimit.curvature.loss_trace import LossTrace
from jaxlimit.curvature.mean_checks import OTHERWISE
from jaxlimit.curvature.scattered import moved_weights
from jaxlimit.curvature.small_batches import NOISE

# Relative difference beyond which values differ: of float32; and where operations of float16, or of fewer
# binary digits, have no form in float32.
TOLERANCE, HALF_TOLERANCE, COARSE_TOLERANCE = 1e-3, 5e-3, 0.04
# How far the other parameters are, in units of their root mean square in each array; and how far, in units of
# the tolerance, those are that differ from the last of them in what is rounding.
AMOUNTS, NUDGED = (0.0, 0.01, 0.02), 1e-3
# What is smaller than this share of its size at the other places is 0.
ZERO = 1e-4

Metrics = Callable[[PyTree, PyTree], Any]


class ValueCheck:
    """Compares metrics in several cuts of the data.

    Args:
        metrics_fn: `metrics_fn(params, batch) -> pytree of scalars`.
        weight_fn: how much a batch counts, or None.
        what: the function's name for the caller.
    """

    def __init__(self, metrics_fn: Metrics, weight_fn: Callable | None, what: str) -> None:
        as_given = Traced(lambda params, batch: metrics_fn(thawed(params), batch))
        self._as_given, self.metrics_fn = as_given, Traced(as_given, widened)
        self.weight_fn, self.what = weight_fn, what

    def is_coarse(self, params: PyTree, batch: PyTree) -> bool:
        """Whether `self.metrics_fn` computes in more binary digits than the metrics themselves."""
        return bool(
            coarse_numbers(self._as_given.jaxpr(frozen(params), jax.eval_shape(first_of, batch)).jaxpr)
        )

    def few(self, params: PyTree, batches: list[tuple[PyTree, int]]) -> None:
        """Raises ValueError if a metric of a few examples of these batches is no mean over their parts."""
        params, as_they_are = frozen(params), False
        for small in samples(batches):
            size = next((n for n in (2, 1) if self._takes(params, small, n)), None)
            if size is not None:
                in_parts = Program(partial(self._in_parts, size), once=True)
                self._compare(params, small, lambda place, f=in_parts, small=small: f(place, small))
            elif not as_they_are:
                as_they_are = True
                self._few_as_they_are(params, batches)

    def _few_as_they_are(self, params: PyTree, batches: list[tuple[PyTree, int]]) -> None:
        def with_sizes(params: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
            found = self.metrics_fn(params, batch)
            return found, jax.tree.map(jnp.abs, found)

        total = ExampleSum(with_sizes, self.weight_fn)
        for group, number in batches:
            one = one_batch(group, number)
            program = total.program(example_sharding(one, axis=1))
            if any(x.shape for x in jax.tree.leaves(jax.eval_shape(program, (params,), one)[0])):
                return  # no scalars: refused elsewhere
            others, copies = cut_otherwise(one, partial(self._is_defined, params, first_of(one)))

            def compare(
                place: PyTree, pair: tuple = (one, others), copies: int = copies, program: Program = program
            ) -> tuple[PyTree, PyTree, PyTree]:
                (whole, _), (parts, sizes) = (program((place,), stack)[0] for stack in pair)
                return whole, *(jax.tree.map(lambda x: x / copies, x) for x in (parts, sizes))

            self._compare(params, one, compare)

    def _compare(self, params: PyTree, stack: PyTree, compare: Callable[[PyTree], tuple]) -> None:
        """Raises ValueError if what `compare` finds at some places is different at every one of them.

        Args:
            params: the parameters, to which the places are near.
            stack: stacked batches, like which those are that it looks at.
            compare: from a place to weighted metrics, their sums over parts, and the sums of their sizes.
        """
        tolerance = self._tolerance(params, stack)
        places = [_near(params, amount) for amount in AMOUNTS]
        near = [compare(place) for place in places]
        nudged, _, _ = compare(_near(places[-1], NUDGED * tolerance))
        noise = jax.tree.map(_noise, near[-1][0], nudged)
        largest = jax.tree.map(lambda *sizes: max(map(_sum, sizes)), *(sizes for *_, sizes in near))
        shares = [jax.tree.map(partial(_share, tolerance), *x, noise, largest) for x in near]
        for path, *found in _together(shares):
            known = [share for share in found if not np.isnan(share)]
            if len(known) > 1 and min(known) > 0:
                self._refuse(path, f"of a few examples and of their parts it differs by {known[0]:.2g} of it")

    def metrics(self, params: PyTree, passed: Sampled) -> None:
        """`few`, and `in_memory` if they are there, of groups that were gone through."""
        self.few(params, passed.batches)
        if isinstance(passed.groups, list):
            # Rounding may turn the predictions of two examples.
            self.in_memory(params, passed.groups, least=2 / passed.num_examples)

    def in_memory(self, params: PyTree, groups: list[PyTree], least: float) -> None:
        """Raises ValueError if the means over all data differ in two cuts. Cost: four passes over them."""
        total = ExampleSum(self.metrics_fn, self.weight_fn)
        places = [_near(frozen(params), amount) for amount in (AMOUNTS[0], AMOUNTS[-1])]
        cuts = [[mean_of_sum(*total(cut(groups), place)) for place in places] for cut in (list, mixed)]
        first, second = (jax.tree.map(lambda *xs: np.asarray(xs, np.float64), *found) for found in cuts)
        self.all(params, groups[0], first, second, least)

    def all(self, params: PyTree, stack: PyTree, first: PyTree, second: PyTree, least: float) -> None:
        """Raises ValueError if the means over all data differ in two cuts at every place of their arrays."""
        tolerance = self._tolerance(frozen(params), stack)
        for path, one, other in _together([first, second]):
            known = np.isfinite(one) & np.isfinite(other)
            one, other = np.asarray(one)[known], np.asarray(other)[known]
            if known.any() and np.all(np.abs(one - other) > tolerance * np.abs(one) + least):
                values = f"{one[0]:.6g}, and {other[0]:.6g} {OTHERWISE}"
                self._refuse(path, f"its mean is {values}")

    def _refuse(self, path: str, found: str) -> NoReturn:
        what = f"{self.what}{path}"
        raise ValueError(not_a_mean(what, found, self.weight_fn, LossTrace()))

    def _takes(self, params: PyTree, small: PyTree, size: int) -> bool:
        """Whether the metrics can be computed of small batches, and of parts of this size."""
        batch = jax.eval_shape(first_of, small)
        whole = batch_length(batch)
        defined = partial(self._is_defined, params, batch)
        return size < whole and whole % size == 0 and defined(whole) and defined(size)

    def _is_defined(self, params: PyTree, arrays: PyTree, size: int) -> bool:
        """Of so many examples like these."""
        try:
            found = self.metrics_fn.shape(params, examples_like(arrays, size))
        except Exception:  # whatever the caller's function raises
            return False
        return all(x.shape == () for x in jax.tree.leaves(found))  # else it is refused elsewhere

    def _tolerance(self, params: PyTree, stack: PyTree) -> float:
        found = coarse_numbers(self.metrics_fn.jaxpr(params, jax.eval_shape(first_of, stack)).jaxpr)
        return COARSE_TOLERANCE if found - {"float16"} else HALF_TOLERANCE if found else TOLERANCE

    def _in_parts(self, size: int, params: PyTree, small: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        """Of each small batch the weighted metrics, their sum over parts, and the sum of absolute values."""

        def part(batch: PyTree) -> PyTree:
            weight = batch_weight(self.weight_fn, batch)
            return jax.tree.map(partial(weighted, weight), self.metrics_fn(params, batch))

        def compare(batch: PyTree) -> tuple[PyTree, PyTree, PyTree]:
            parts = jax.lax.map(part, jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), batch))
            sums = (jax.tree.map(partial(jnp.sum, axis=0), x) for x in (parts, jax.tree.map(jnp.abs, parts)))
            return part(batch), *sums

        return jax.lax.map(compare, small)


def _near(params: PyTree, amount: float) -> PyTree:
    """Parameters nearby; what is no floating-point number stays."""
    leaves, structure = jax.tree.flatten(params)
    moved = [i for i, x in enumerate(leaves) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    if amount and moved:
        for i, x in zip(moved, moved_weights([leaves[i] for i in moved], amount), strict=True):
            leaves[i] = x
    return structure.unflatten(leaves)


def _sum(values: ArrayLike) -> float:
    return float(np.sum(np.abs(np.asarray(values, np.float64))))


def _noise(whole: jax.Array, nudged: jax.Array) -> float:
    """Differences that are rounding."""
    return NOISE * _sum(np.asarray(whole, np.float64) - np.asarray(nudged))


def _share(
    tolerance: float, whole: jax.Array, parts: jax.Array, sizes: jax.Array, noise: float, largest: float
) -> float:
    """The relative difference; 0 where it is rounding, NaN where nothing is said, as by a loss that is 0."""
    of_whole, size = np.asarray(whole, np.float64), _sum(sizes)
    if not np.all(np.isfinite(of_whole)) or max(size, _sum(of_whole)) < ZERO * largest:
        return np.nan
    difference = _sum(of_whole - np.asarray(parts))
    if difference <= max(tolerance * size, noise):
        return 0.0
    return difference / size if size > 0 else np.inf


def _together(trees: list[PyTree]) -> list[tuple]:
    """The leaves of several trees side by side, each with its place in them."""
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(trees[0])]
    return list(zip(paths, *map(jax.tree.leaves, trees), strict=True))
