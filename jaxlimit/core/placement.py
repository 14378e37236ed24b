"""Batches as a loss can work on them, where their examples are divided over devices."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import jax

from jaxlimit.core.batches import Batches
from jaxlimit.core.constraints import places_itself
from jaxlimit.core.passes import in_memory, passes
from jaxlimit.core.sharding import ExampleSharding, example_sharding, undivided
from jaxlimit.core.trees import PyTree


def placed_for(fn: Callable[..., PyTree], batches: Iterable[PyTree], *args: PyTree) -> Iterable[PyTree]:
    """Batches as they lie; copies on every device where `fn(*args, batch)` divides them over these itself."""
    found: dict[ExampleSharding | None, bool] = {None: False}

    def placed(batch: PyTree) -> PyTree:
        sharding = example_sharding(batch)
        if sharding not in found:
            found[sharding] = places_itself(fn, sharding, *args, batch)
        return jax.tree.map(undivided, batch) if found[sharding] else batch

    if isinstance(batches, Batches):
        return Batches(placed(batches.arrays), batches.batch_size)
    if isinstance(batches, (list, tuple)):
        return [placed(batch) for batch in in_memory(batches)]
    return _Placed(passes(batches), placed)


@dataclass(frozen=True, eq=False)
class _Placed:
    batches: Iterable[PyTree]
    placed: Callable[[PyTree], PyTree]

    def __iter__(self) -> Iterator[PyTree]:
        yield from map(self.placed, self.batches)
