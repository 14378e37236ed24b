"""Running statistics of batch norm, taken anew for the pruned network: those of the dense one mislead it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlimit.core.checks import require_statistics_fn
from jaxlimit.core.leaves import is_array
from jaxlimit.core.sharding import place, sharding_like, to_host
from jaxlimit.core.storage import about, ordered_sum
from jaxlimit.core.trees import PyTree, as_array, combine, flatten

# What devices may differ by in the sum of all statistics, relative to the sum of their sizes.
SAME_STATISTICS = 1e-4


@dataclass(frozen=True, eq=False)
class Statistics:
    """How statistics are taken anew.

    Attributes:
        function: from all parameters to all parameters.
        identity: what it gives for the dense network, as a JSON value for a fingerprint.
    """

    function: Callable[[PyTree], PyTree]
    identity: dict[str, float]

    def __call__(self, weights: PyTree, rest: PyTree) -> PyTree:
        """The parameters that do not move, with the statistics that these weights have."""
        return _rest_of(self.function(combine(weights, rest)), weights, rest)


def statistics(function: Any, weights: PyTree, rest: PyTree) -> Statistics:
    """Checks a function on the dense network, in one call.

    Args:
        function: `statistics_fn` of `prune`.
        weights: parameters that move, None for all others.
        rest: the others.

    Raises:
        ValueError: it is no function of the parameters, returns another tree, or changes what moves.
    """
    require_statistics_fn(function)
    params = combine(weights, rest)
    found = jax.tree.map(lambda x: as_array(x) if is_array(x) else x, function(params))
    expected, got = (jax.tree.map(_form, tree) for tree in (params, found))
    if expected != got:
        raise ValueError(
            "statistics_fn must return the parameters that it gets, all of them, with new values for the "
            f"statistics alone: expected {expected}, got {got}."
        )
    moved = jax.tree.map(lambda w, x: w is not None and _differ(w, x), weights, found, is_leaf=_is_none)
    for path, differs in jax.tree.leaves_with_path(moved):
        if differs:
            raise ValueError(
                f"statistics_fn must leave the parameters that are readjusted as they are, but it changes "
                f"{jax.tree_util.keystr(path)}: return only the statistics anew."
            )
    numbers = [x for x in jax.tree.leaves(_rest_of(found, weights, rest)) if _is_real(x)]
    values = flatten(numbers)
    within = SAME_STATISTICS * ordered_sum(np.abs(values)) + 1e-6
    return Statistics(function, about(ordered_sum(values), within))


def _rest_of(found: PyTree, weights: PyTree, rest: PyTree) -> PyTree:
    """What does not move, on its devices; what is no array stays as it is."""

    def chosen(weight: Any, old: Any, new: Any) -> Any:
        moves = weight is not None
        return old if moves or not isinstance(old, jax.Array) else place(as_array(new), sharding_like(old))

    return jax.tree.map(chosen, weights, rest, found, is_leaf=_is_none)


def _form(leaf: Any) -> Any:
    return f"{leaf.dtype}{list(leaf.shape)}" if is_array(leaf) else type(leaf).__name__


def _differ(one: jax.Array, other: jax.Array) -> bool:
    return not np.array_equal(to_host(one), to_host(other))


def _is_real(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _is_none(leaf: Any) -> bool:
    return leaf is None
