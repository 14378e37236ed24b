"""Whether metrics are the means that they are taken for: the check of a loss, without gradients.

A few examples of a first, a middle and a last batch are compared in fours and in twos, at the parameters and
at two others nearby: what is no mean is none there either, while a prediction that rounding turns is. Where a
metric is 0, as the drift of a network from itself, nothing is said.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jaxlimit.core.batches import batch_length, batch_weight, examples_like, first_of, weighted
from jaxlimit.core.cuts import samples
from jaxlimit.core.programs import Program, Traced
from jaxlimit.core.trees import PyTree, frozen, thawed
from jaxlimit.curvature.data_checks import not_a_mean
from jaxlimit.curvature.loss_trace import LossTrace
from jaxlimit.curvature.mean_checks import NOISE, OTHERWISE
from jaxlimit.curvature.scattered import moved_weights

# Relative difference beyond which values differ: of float32, float16, and what has fewer binary digits.
TOLERANCE, HALF_TOLERANCE, COARSE_TOLERANCE = 1e-3, 5e-3, 0.04
COARSE = re.compile(r"\b(b?f16|f8\w*)\[")
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
        self.metrics_fn = Traced(lambda params, batch: metrics_fn(thawed(params), batch))
        self.weight_fn, self.what = weight_fn, what

    def few(self, params: PyTree, batches: list[tuple[PyTree, int]]) -> None:
        """Raises ValueError if a metric of a few examples of these batches is no mean over their parts."""
        params = frozen(params)
        for small in samples(batches):
            size = next((n for n in (2, 1) if self._takes(params, small, n)), None)
            if size is None:
                continue
            compare = Program(partial(self._in_parts, size))
            tolerance = self._tolerance(params, small)
            places = [_near(params, amount) for amount in AMOUNTS]
            near = [compare(place, small) for place in places]
            nudged, _, _ = compare(_near(places[-1], NUDGED * tolerance), small)
            noise = jax.tree.map(_noise, near[-1][0], nudged)
            largest = jax.tree.map(lambda *sizes: max(map(_sum, sizes)), *(sizes for *_, sizes in near))
            shares = [jax.tree.map(partial(_share, tolerance), *x, noise, largest) for x in near]
            for path, *found in _together(shares):
                known = [share for share in found if not np.isnan(share)]
                if len(known) > 1 and min(known) > 0:
                    self._refuse(
                        path, f"of a few examples and of their parts it differs by {known[0]:.2g} of it"
                    )

    def all(self, params: PyTree, batch: PyTree, first: PyTree, second: PyTree, least: float) -> None:
        """Raises ValueError if the means over all data differ in two cuts at every place of their arrays."""
        tolerance = self._tolerance(frozen(params), batch)
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
        batch = jax.eval_shape(first_of, small)
        whole = batch_length(batch)
        if size >= whole or whole % size:
            return False
        try:
            found = [self.metrics_fn.shape(params, examples_like(batch, number)) for number in (whole, size)]
        except Exception:  # whatever the caller's function raises
            return False
        return all(x.shape == () for x in jax.tree.leaves(found))  # else it is refused elsewhere

    def _tolerance(self, params: PyTree, small: PyTree) -> float:
        jaxpr = jax.make_jaxpr(self.metrics_fn)(params, jax.eval_shape(first_of, small))
        found = {match.group(1) for match in COARSE.finditer(str(jaxpr))}
        return max(
            (COARSE_TOLERANCE if name != "f16" else HALF_TOLERANCE for name in found), default=TOLERANCE
        )

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
