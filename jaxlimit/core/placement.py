"""Batches as a loss can work on them, where their examples are divided over devices.

A loss that divides its arrays over devices itself gets copies on every device; all others what there is.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import jax

from jaxlimit.core.batches import Batches, first_of, grouped
from jaxlimit.core.constraints import places_itself
from jaxlimit.core.passes import in_memory
from jaxlimit.core.sharding import ExampleSharding, example_sharding, undivided
from jaxlimit.core.trees import PyTree


def placed_batches(fn: Callable[..., PyTree], batches: Iterable[PyTree], *args: PyTree) -> Iterable[PyTree]:
    """Batches in memory, placed for `fn(*args, batch)`; streams as they are."""
    place = _Placed(fn, args)
    if isinstance(batches, Batches):
        return Batches(place(batches.arrays, batches.arrays), batches.batch_size)
    if isinstance(batches, (list, tuple)):
        return [place(batch, batch) for batch in in_memory(batches)]
    return batches


def placed_groups(fn: Callable[..., PyTree], groups: Iterable[PyTree], *args: PyTree) -> Iterable[PyTree]:
    """Groups of a stream, placed for `fn(*args, batch)`; those in memory as they are."""
    return groups if isinstance(groups, list) else _PlacedGroups(groups, _Placed(fn, args))


def placed(fn: Callable[..., PyTree], batches: Iterable[PyTree], *args: PyTree) -> Iterable[PyTree]:
    """Groups of batches, also of a stream, as `fn(*args, batch)` can work on them."""
    return placed_groups(fn, grouped(placed_batches(fn, batches, *args)), *args)


class _Placed:
    """What is placed for a function, of which every division of the examples is looked at once."""

    def __init__(self, fn: Callable[..., PyTree], args: tuple[PyTree, ...]) -> None:
        self._fn, self._args = fn, args
        self._found: dict[ExampleSharding | None, bool] = {None: False}

    def __call__(self, arrays: PyTree, batch: PyTree, axis: int = 0) -> PyTree:
        """The arrays, examples along `axis`, of which `batch` is one batch or its type."""
        sharding = example_sharding(arrays, axis)
        if sharding not in self._found:
            self._found[sharding] = places_itself(self._fn, sharding, *self._args, batch)
        return jax.tree.map(undivided, arrays) if self._found[sharding] else arrays


@dataclass(frozen=True, eq=False)
class _PlacedGroups:
    groups: Iterable[PyTree]
    place: _Placed

    def __iter__(self) -> Iterator[PyTree]:
        for group in self.groups:
            yield self.place(group, jax.eval_shape(first_of, group), axis=1)
