"""What `prune` and `attained_limit` work on: a network, what may be pruned of it, and what may move."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import numpy as np

from jaxlimit.core.checks import require_instance, require_problem
from jaxlimit.core.sharding import place, sharding_like
from jaxlimit.core.storage import Checkpoint, about, ordered_sum
from jaxlimit.core.trees import (
    Prunable,
    PyTree,
    combine,
    flatten,
    is_kernel,
    leaf_names,
    leaf_paths,
    partition,
)
from jaxlimit.curvature.makers import gauss_newton
from jaxlimit.curvature.operator import Curvature
from jaxlimit.geometry.groups import group_labels
from jaxlimit.geometry.magnitude import MagnitudeOrder, magnitude_order
from jaxlimit.geometry.patterns import require_mask
from jaxlimit.limits.problem import SAME_LOSS
from jaxlimit.pruning.statistics import Statistics, statistics
from jaxlimit.pruning.trust_region import Point, Settings, first_point, measured, step, without

# What devices may differ by in the first damping, relative to it.
SAME_DAMPING = 1e-2


@dataclass(frozen=True, eq=False)
class Readjustable:
    """A network whose weights are pruned and readjusted.

    Attributes:
        curvature: Gauss-Newton of all parameters that move, at the trained ones.
        chosen: pytree of bools like these: which may be pruned.
        scores: the order in which weights go, like the prunable ones; None: by magnitude, chosen anew from
            the readjusted weights at every sparsity.
        settings: how steps are made.
        groups: integer labels like the prunable weights, which go together where these are equal; or None.
        statistics: takes those of batch norm anew; None: they are held.
    """

    curvature: Curvature
    chosen: PyTree
    scores: PyTree | None
    settings: Settings
    groups: PyTree | None = None
    statistics: Statistics | None = None

    @cached_property
    def start(self) -> Point:
        """At the trained weights, with the statistics that came with them."""
        point = first_point(self.curvature, self.settings)
        return point if self.statistics is None else point._replace(rest=self.curvature.rest)

    @cached_property
    def dim(self) -> int:
        """Number of weights that may be pruned."""
        return sum(x.size for x in jax.tree.leaves(self.prunable(self.curvature.weights)))

    def prunable(self, weights: PyTree) -> PyTree:
        """Those of all that move."""
        return jax.tree.map(lambda chosen, x: x if chosen else None, self.chosen, weights)

    def mask(self, weights: PyTree, num_removed: int) -> PyTree:
        """Of the prunable ones: the first to go are False, so many of them, or as whole groups allow."""
        order = self._order(weights)
        return order.mask(order.within(num_removed))

    def reachable(self, weights: PyTree, wanted: int, more_than: int, less_than: int) -> int | None:
        """The number of weights that can go which is next to a wanted one; None if there is none between."""
        if self.groups is None:
            return wanted
        order = self._order(weights)
        at = max(order.within(wanted), order.within(more_than) + 1)
        found = order.counts[at] if at < len(order.counts) else less_than
        return found if found < less_than else None

    def _order(self, weights: PyTree) -> MagnitudeOrder:
        return magnitude_order(self.prunable(weights), self.scores, self.groups)

    def require_mask(self, mask: PyTree) -> PyTree:
        """A mask of the prunable weights, as arrays of bools; a ValueError if it is none."""
        return require_mask(self.prunable(self.curvature.weights), mask)

    def whole_mask(self, mask: PyTree) -> PyTree:
        """Of all that move; what may not be pruned is kept."""
        return jax.tree.map(
            lambda keep, x: np.ones(x.shape, bool) if keep is None and x is not None else keep,
            mask,
            self.curvature.weights,
            is_leaf=lambda x: x is None,
        )

    def cut(self, point: Point, mask: PyTree) -> Point:
        """The point without the weights that go, with statistics of its own, and its loss."""
        point = without(point, self.whole_mask(mask))
        if self.statistics is not None:
            point = point._replace(rest=self.statistics(point.weights, point.rest))
        return measured(self._around(point), point, self.settings)

    def step(self, point: Point, mask: PyTree) -> Point:
        """The next point with this mask."""
        return step(self._around(point), point, self.whole_mask(mask), self.settings)

    def mean_loss(self, point: Point) -> float:
        """On all data."""
        return self._around(point).mean_loss(point.weights)

    def params(self, point: Point) -> PyTree:
        """The whole tree."""
        return combine(point.weights, self._around(point).rest)

    def _around(self, point: Point) -> Curvature:
        """The curvature among the parameters that do not move, as they are at a point."""
        return self.curvature if point.rest is None else replace(self.curvature, rest=point.rest)

    def stored(self, store: Checkpoint, name: str, first: PyTree) -> PyTree:
        """What a checkpoint holds of a tree like `first`, on its devices; `first` if it holds nothing."""
        found = store.load_tree(name, first, same_shapes=False)
        if found is None:
            return first

        def placed(like: PyTree, x: PyTree) -> PyTree:
            return place(x, sharding_like(like)) if isinstance(like, jax.Array) else x

        return jax.tree.map(placed, first, found)

    def identity(self) -> dict[str, Any]:
        """What tells one network with its data from another, as JSON values."""
        flat, curvature = flatten(self.curvature.weights), self.curvature
        order = None if self.scores is None else ordered_sum(flatten(self.scores))
        groups = {}
        if self.groups is not None:
            groups["groups"] = ordered_sum(np.unique(flatten(self.groups), return_inverse=True)[1])
        return {
            "dim": self.dim,
            "num_examples": curvature.num_examples,
            "loss": about(curvature.loss, SAME_LOSS * abs(curvature.loss) + 1e-6),
            "moving": leaf_names(curvature.weights),
            "prunable": leaf_names(self.prunable(curvature.weights)),
            "weights": ordered_sum(flat),
            "scores": order,
            "first_damping": about(self.start.damping, SAME_DAMPING * self.start.damping),
            "statistics": None if self.statistics is None else self.statistics.identity,
            **vars(self.settings),
            **groups,
        }


def readjustable(
    predict_fn: Callable[[PyTree, PyTree], PyTree],
    loss_fn: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    batches: Iterable[PyTree],
    *,
    prunable: Prunable = is_kernel,
    trainable: Prunable | None = None,
    scores: PyTree | None = None,
    groups: Any = None,
    weight_fn: Callable[[PyTree], jax.Array] | None = None,
    statistics_fn: Callable[[PyTree], PyTree] | None = None,
    settings: Settings,
) -> Readjustable:
    """Checks the problem as `gauss_newton` does. Args: as for `prune`."""
    call = "prune or attained_limit(predict_fn, loss_fn, params, batches, ...)"
    require_problem(call, params, predict_fn=predict_fn, loss_fn=loss_fn)
    require_instance("settings", settings, Settings, "jaxlimit.Settings(...)")
    pruned, _ = partition(params, prunable)
    paths, moving = {*leaf_paths(pruned)}, movable(params, prunable, trainable)
    anew = None if statistics_fn is None else statistics(statistics_fn, *partition(params, moving))
    curvature = gauss_newton(
        predict_fn,
        loss_fn,
        params,
        batches,
        prunable=moving,
        weight_fn=weight_fn,
    )
    chosen = jax.tree_util.tree_map_with_path(lambda path, _: path in paths, curvature.weights)
    if scores is not None:
        magnitude_order(pruned, scores)  # refuses those that do not match
    labels = None if groups is None else group_labels(pruned, groups)
    return Readjustable(curvature, chosen, scores, settings, labels, anew)


def movable(params: PyTree, prunable: Prunable, trainable: Prunable | None) -> Callable[[tuple, Any], bool]:
    """Which parameters move: those that may be pruned, and those that are trainable, too."""
    paths = leaf_paths(partition(params, prunable)[0])
    if trainable is not None:
        try:
            paths = {*paths, *leaf_paths(partition(params, trainable)[0])}
        except ValueError as error:
            raise ValueError(f"trainable chooses nothing that can move: {error}") from error
    return lambda path, _: path in paths
