"""The same examples in other batches: what is a mean over examples does not depend on how they are cut."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxlimit.core.batches import group_length
from jaxlimit.core.programs import Program
from jaxlimit.core.sharding import example_sharding, num_shards, place, sharding_like, to_host
from jaxlimit.core.trees import PyTree

# Memory for examples in another order, of which there is a part at a time.
MIXED_BYTES = 2**27
# Examples that are taken from each of some batches, and small batches that are made of them, at least.
SAMPLED = 8


def mixed(groups: Iterable[PyTree]) -> Iterator[PyTree]:
    """The same examples in batches of the same shapes.

    Of data in memory each batch holds examples from all over its group, and so does the part of each device.
    A batch of a stream holds the end of one batch and the beginning of the next one.
    """
    return _strided(groups) if isinstance(groups, list) else _rolled(groups)


def _strided(groups: list[PyTree]) -> Iterator[PyTree]:
    for group in groups:
        num_batches, size = group_shape(group)
        num_parts = num_batches * num_shards(example_sharding(group, axis=1))
        # Part p of a batch, or of a device's share of it, holds the examples p, p + num_parts, ...
        rows = np.arange(num_batches * size, dtype=np.int32).reshape(-1, num_parts).T
        rows = rows.reshape(num_batches, size)
        bytes_of_batch = sum(x.nbytes for x in jax.tree.leaves(group)) // num_batches
        wanted = max(1, MIXED_BYTES // max(bytes_of_batch, 1))
        count = next(n for n in range(min(wanted, num_batches), 0, -1) if num_batches % n == 0)
        for start in range(0, num_batches, count):
            yield _rearranged(rows[start : start + count], group)


def _rolled(groups: Iterable[PyTree]) -> Iterator[PyTree]:
    first = last = None
    for group in groups:
        if last is not None and _shapes(last) != _shapes(group):
            yield _end_and_beginning(last, first)
            first = last = None
        if last is None:
            first = group
        else:
            yield _end_and_beginning(last, group)
        last = group
    if last is not None:
        yield _end_and_beginning(last, first)


def _end_and_beginning(one: PyTree, next_one: PyTree) -> PyTree:
    """The second half of one batch and the first half of the next."""
    _, size = group_shape(one)
    rows = size // 2 + np.arange(size, dtype=np.int32)
    return _rearranged(rows[None], one, next_one)


def cut_otherwise(batch: PyTree, takes: Callable[[int], bool]) -> tuple[PyTree, int]:
    """The examples of a stack of one in two other batches, and how often each of them stands there.

    These are its halves, if `takes` of that size; else each holds half of the examples twice.
    """
    _, size = group_shape(batch)
    half, odd = divmod(size, 2)
    if not odd and half % num_shards(example_sharding(batch, axis=1)) == 0 and takes(half):
        return _rearranged(np.arange(size, dtype=np.int32).reshape(2, -1), batch), 1
    return _rearranged(np.repeat(np.arange(size, dtype=np.int32), 2).reshape(2, size), batch), 2


class Sampled:
    """Groups that remember how many examples they hold, and a first, a last and some batches between.

    Attributes:
        groups: themselves.
        num_examples: of the last pass.
        batches: of the last pass, as a group and the number of the batch in it.
    """

    def __init__(self, groups: Iterable[PyTree]) -> None:
        self.groups = groups
        self.num_examples: int = 0
        self.batches: list[tuple[PyTree, int]] = []

    def __iter__(self) -> Iterator[PyTree]:
        self.num_examples, kept, group = 0, [], None
        for count, group in enumerate(self.groups):
            self.num_examples += group_length(group)
            if count & (count - 1) == 0:  # 0 and the powers of two
                # The first and a later one; more of small batches.
                kept = [*kept, group] if group_shape(group)[1] < SAMPLED else [*kept[:1], group]
            yield group
        if isinstance(self.groups, list):
            every = [(group, number) for group in self.groups for number in range(group_shape(group)[0])]
            largest = max((group_shape(group)[1] for group in self.groups), default=1)
            self.batches = [every[i] for i in np.unique(_spread(len(every), max(3, SAMPLED // largest)))]
        elif group is not None:
            kept = kept if group is kept[-1] else [*kept, group]
            self.batches = [(group, 0) for group in kept]


def samples(batches: list[tuple[PyTree, int]]) -> list[PyTree]:
    """A few examples of these batches, in small batches of up to four: (number, size, ...) of each kind."""
    kinds: dict[Any, list[PyTree]] = {}
    for group, number in batches:
        _, size = group_shape(group)
        rows = number * size + _spread(size, min(size, SAMPLED))
        some = _rearranged(rows[None], group, sharded=False)
        kinds.setdefault((jax.tree.structure(some), *_kinds(some)), []).append(some)
    found = []
    for some in kinds.values():
        count = sum(group_shape(x)[1] for x in some)
        if count > 1:
            found.append(_rearranged(_small_batches(count), *some, sharded=False))
    return found


def _small_batches(count: int) -> NDArray[np.int32]:
    """Which of some examples stand together in small batches, every one several times with others."""
    size = min(count, 4)
    # Examples of all batches that they are taken from; then as chance has it, for labels may be the same.
    strided = _spread(count, count // size * size).reshape(size, -1).T
    generator = np.random.default_rng(0)
    mixed = [generator.permutation(count)[:size].astype(np.int32) for _ in range(SAMPLED - len(strided))]
    return np.concatenate([strided, *(row[None] for row in mixed)])


def _spread(count: int, wanted: int) -> NDArray[np.int32]:
    """So many of the numbers below `count`, the first and the last among them: padding stands at ends."""
    return np.round(np.linspace(0, count - 1, wanted)).astype(np.int32)


def group_shape(group: PyTree) -> tuple[int, int]:
    """Number of batches in a group, and of examples in each."""
    return jax.tree.leaves(group)[0].shape[:2]


def one_batch(group: PyTree, number: int) -> PyTree:
    """A batch of a group, as a stack of one."""
    _, size = group_shape(group)
    return _rearranged((number * size + np.arange(size, dtype=np.int32))[None], group)


def _shapes(group: PyTree) -> tuple:
    return tuple((x.shape, x.dtype) for x in jax.tree.leaves(group))


def _kinds(group: PyTree) -> tuple:
    """Shapes and dtypes of single examples."""
    return tuple((shape[2:], dtype) for shape, dtype in _shapes(group))


def _rearranged(rows: NDArray[np.int32], *groups: PyTree, sharded: bool = True) -> PyTree:
    """The examples of groups, one group after the other, at these rows, divided over devices as they are.

    With `sharded` false they are on one device: a few examples do not divide.
    """
    trees = [jax.tree.flatten(group) for group in groups]
    structure = trees[0][1]
    leaves = list(zip(*(leaves for leaves, _ in trees), strict=True))
    if example_sharding(groups, axis=1) is None:
        return structure.unflatten(_rows_of(rows, leaves))
    return structure.unflatten([_rows_by_host(rows, xs, sharded) for xs in leaves])


def _rows_by_host(rows: NDArray[np.int32], xs: tuple[jax.Array, ...], sharded: bool) -> Any:
    host = np.concatenate([_flat(to_host(x)) for x in xs])[rows]
    return place(host, sharding_like(xs[0])) if sharded else host


def _flat(x: Any) -> Any:
    return x.reshape(-1, *x.shape[2:])


# It takes leaves, since it outlives the trees, of which a structure may hold the user's objects.
_rows_of = Program(lambda rows, leaves: [jnp.concatenate([_flat(x) for x in xs])[rows] for xs in leaves])
