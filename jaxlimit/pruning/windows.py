"""A part of the data: every step takes the next one, in the order of the data, so that nothing is random."""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from jaxlimit.core.batches import batch_length, group_length
from jaxlimit.core.sharding import example_sharding
from jaxlimit.core.sums import ExampleSum, NothingCounts
from jaxlimit.core.trees import PyTree
from jaxlimit.curvature.operator import Curvature

# A part of a batch holds as many where there are so many, for few do not stand for the whole. A tenth of fc2,
# 1,000 examples, has a lower loss than all of them after 100 gradients: benchmarks/pruning.py.
LEAST_EXAMPLES = 1024


def window(curvature: Curvature, share: float, number: int) -> Curvature:
    """The curvature of a share of the data: whole batches, or a part of one; of a stream at least one.

    Args:
        curvature: of all the data.
        share: in (0, 1]; with 1 the curvature is returned as it is.
        number: which window; they follow each other through the data and begin anew at their end. One in
            which nothing counts is passed over.
    """
    if share == 1:
        return curvature
    groups = curvature.groups
    for which in range(number, number + math.ceil(1 / share)):
        part = _part(groups, share, which) if isinstance(groups, list) else _Strided(groups, share, which)
        try:
            num_examples, total_weight = _counted(curvature, part)
        except NothingCounts:  # all of it is padding
            continue
        return replace(curvature, groups=part, num_examples=num_examples, total_weight=total_weight)
    return curvature


def _part(groups: list[PyTree], share: float, number: int) -> list[PyTree]:
    """Consecutive batches of each group that is large enough, or examples of a batch that is too large.

    Where all groups are too small, those at least half as large as the largest take turns. Always as many of
    each: nothing compiles anew.
    """
    counts = [round(share * batch_length(group)) for group in groups]
    if not any(counts):
        most = max(map(group_length, groups))
        large = [group for group in groups if 2 * group_length(group) >= most]
        turn, which = divmod(number, len(large))
        return [_part_of_a_batch(large[which], share, turn)]
    found = []
    for group, count in zip(groups, counts, strict=True):
        if count:
            start = _start(batch_length(group), count, number)
            found.append(jax.tree.map(lambda x, a=start, b=start + count: x[a:b], group))
    return found


def _start(length: int, count: int, number: int) -> int:
    """Where a part of so many begins; parts overlap where they do not go into the length."""
    parts = math.ceil(length / count)
    return round(number % parts * (length - count) / max(parts - 1, 1))


def _part_of_a_batch(group: PyTree, share: float, number: int) -> PyTree:
    """Examples of one batch, which stand beside each other; a whole one where devices divide it."""
    num_batches = batch_length(group)
    size = group_length(group) // num_batches
    count = min(size, max(LEAST_EXAMPLES, round(share * group_length(group))))
    if example_sharding(group, axis=1) is not None:
        count = size
    parts = math.ceil(size / count)
    batch, part = divmod(number % (num_batches * parts), parts)
    start = _start(size, count, part)
    return jax.tree.map(lambda x: x[batch : batch + 1, start : start + count], group)


@dataclass(frozen=True, eq=False)
class _Strided:
    """Every so many batches of a stream, which is not kept."""

    groups: Iterable[PyTree]
    share: float
    number: int

    def __iter__(self) -> Iterator[PyTree]:
        stride = max(1, round(1 / self.share))
        found = itertools.islice(self.groups, self.number % stride, None, stride)
        first = next(found, None)
        # In a stream of few batches the window may lie beyond the end.
        yield from itertools.islice(self.groups, 1) if first is None else itertools.chain([first], found)


def _counted(curvature: Curvature, groups: Iterable[PyTree]) -> tuple[int, float]:
    """Number of examples, and what their weights add up to."""
    if curvature.product.weight_fn is None and isinstance(groups, list):
        num_examples = sum(map(group_length, groups))
        return num_examples, num_examples
    lengths: list[int] = []

    def counted() -> Iterator[PyTree]:
        for group in groups:
            lengths.append(group_length(group))
            yield group

    _, total_weight = ExampleSum(lambda batch: jnp.zeros(()), curvature.product.weight_fn)(counted())
    return sum(lengths), total_weight
