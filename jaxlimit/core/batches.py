"""Batches of examples.

A *batch* is any pytree whose leaves share a leading example axis. *Batches* are anything that can be
iterated again and again and yields the same examples each time: the result of `batched`, a list, a
re-iterable stream, or a function without arguments that starts a pass. Batches without examples count for
nothing.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxlimit.core.checks import require_count
from jaxlimit.core.checksums import PassCheck
from jaxlimit.core.display import Displayed, View
from jaxlimit.core.leaves import copied, to_arrays
from jaxlimit.core.passes import in_memory, passes
from jaxlimit.core.sharding import (
    example_sharding,
    is_explicit,
    require_context,
    sharding_like,
    undivided,
)
from jaxlimit.core.trees import PyTree


@dataclass(frozen=True, repr=False)
class Batches(Displayed):
    """Arrays in memory, cut along the example axis in the order given; the last batch may be smaller.

    Attributes:
        arrays: pytree of arrays with the same leading axis, the examples.
        batch_size: number of examples of every batch but the last.
    """

    arrays: PyTree
    batch_size: int

    @property
    def num_examples(self) -> int:
        """Number of examples in all batches together."""
        return batch_length(self.arrays)

    def __len__(self) -> int:
        return -(-self.num_examples // self.batch_size)

    def _view(self) -> View:
        arrays = ", ".join(f"{x.dtype}{list(x.shape[1:])}" for x in jax.tree.leaves(self.arrays))
        return View(
            f"{self.num_examples:,} examples in {len(self):,} batches of {self.batch_size:,}, each {arrays}"
        )

    def __iter__(self) -> Iterator[PyTree]:
        for start in range(0, self.num_examples, self.batch_size):
            yield jax.tree.map(lambda x, start=start: x[start : start + self.batch_size], self.arrays)


def batched(arrays: PyTree, batch_size: int) -> Batches:
    """Cuts arrays into batches, in order, without shuffling.

    Args:
        arrays: pytree of arrays with one common leading axis, the examples.
        batch_size: examples a batch; the last batch holds the remainder.

    Returns:
        Batches that can be iterated any number of times.

    Raises:
        ValueError: no examples, leading axes that differ, or a batch size below 1.

    Examples:
        >>> [len(batch) for batch in batched(np.zeros((5, 2)), batch_size=2)]
        [2, 2, 1]
    """
    require_count("batch_size", batch_size)
    arrays = copied(to_arrays("arrays", arrays))
    if batch_length(arrays) == 0:
        raise ValueError("arrays hold no examples (a leading axis of length 0).")
    return Batches(arrays, int(batch_size))


def batch_length(batch: PyTree) -> int:
    """Number of examples of one batch: the length of its leading axis.

    Raises:
        ValueError: the batch has no array, a scalar, or leading axes of different lengths.

    Examples:
        >>> batch_length({"image": np.zeros((3, 4)), "label": np.zeros(3)})
        3
    """
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batch)]
    if not shapes or any(len(shape) == 0 for shape in shapes):
        raise ValueError(
            "a batch must be a pytree of arrays with a leading example axis, got shapes "
            f"{str(shapes)[:200]}. A Python list counts as a tree: pass np.asarray(list); and of random keys "
            "one for each example."
        )
    lengths = {shape[0] for shape in shapes}
    if len(lengths) > 1:
        raise ValueError(f"all arrays of a batch must have the same number of examples, got shapes {shapes}.")
    return lengths.pop()


def examples_like(batch: PyTree, size: int) -> PyTree:
    """The shapes and dtypes of a batch of so many examples like these."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), batch)


def grouped(batches: Iterable[PyTree]) -> Iterable[PyTree]:
    """Stacks equal-shaped batches so that one compiled scan can run over each group.

    Arrays in memory (`Batches`, lists, tuples) become a few groups, made once and kept. Of a stream
    each batch is a group of its own, made anew in every pass and never kept.

    Returns:
        Re-iterable of pytrees whose leaves have shape (num_batches, batch_size, ...). Where the examples are
        divided over devices, each batch is, if its size divides over them, else every device has all.

    Raises:
        ValueError: no batches, or what is one batch or an iterator that can be used only once.
    """
    if isinstance(batches, Batches):
        size, stop = batches.batch_size, batches.num_examples
        require_context("batches", batches.arrays)
        arrays, sharding = batches.arrays, example_sharding(batches.arrays)
        if sharding is not None and size % sharding.num_shards:
            arrays = jax.tree.map(undivided, arrays)
        full = stop // size * size
        cuts = ((0, full, size), (full, stop, stop - full))
        return [jax.tree.map(partial(_cut, *cut), arrays) for cut in cuts if cut[0] < cut[1]]
    if isinstance(batches, (list, tuple)):
        filled = [batch for batch in in_memory(batches) if batch_length(batch)]
        if not filled:
            raise ValueError("batches is empty: at least one batch with at least one example is needed.")
        require_context("batches", filled)
        return [_stacked(list(run)) for _, run in itertools.groupby(filled, key=_signature)]
    return _Stream(passes(batches))


def _cut(start: int, stop: int, size: int, x: jax.Array) -> jax.Array:
    """Examples from start to stop as stacked batches, divided over devices as the examples were."""
    sharding = sharding_like(x, new_axes=1)
    if sharding is None:
        return _slices(start, stop, size, x)
    cut = partial(_slices, start, stop, size)
    # Where axes are explicit JAX refuses to cut what is divided, so meanwhile they are not.
    cut = jax.sharding.auto_axes(cut, out_sharding=sharding) if is_explicit(sharding.mesh) else cut
    return jax.jit(cut, out_shardings=sharding)(x)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _slices(start: int, stop: int, size: int, x: jax.Array) -> jax.Array:
    return x[start:stop].reshape(-1, size, *x.shape[1:])


@jax.jit
def _stack(batches: list[PyTree]) -> PyTree:
    return jax.tree.map(lambda *xs: jnp.stack(xs), *batches)


def _stacked(batches: list[PyTree]) -> PyTree:
    """Batches of one shape in one; those on the host are stacked there."""
    if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(batches)):
        return _stack(batches)
    return jax.tree.map(lambda *xs: jax.device_put(np.stack(xs)), *batches)


_END = object()


@dataclass(frozen=True, eq=False)
class _Stream:
    """Groups of one batch each. A pass that ends with other examples than the first did raises ValueError."""

    batches: Iterable[PyTree]
    check: PassCheck = field(default_factory=PassCheck)

    def __iter__(self) -> Iterator[PyTree]:
        with jax.ensure_compile_time_eval():  # data are known, also where JAX traces something
            batches, this_pass = iter(self.batches), self.check.begin()
        while True:
            with jax.ensure_compile_time_eval():
                batch = next(batches, _END)
                if batch is _END:
                    this_pass.end()
                    return
                batch = to_arrays("a batch", batch)
                require_context("a batch", batch)
                if not batch_length(batch):
                    continue
                batch = copied(batch)
                this_pass.add(batch, batch_length(batch))
                group = jax.tree.map(lambda x: x[None], batch)
                del batch  # another copy in memory, while the consumer works
            yield group


def group_length(group: PyTree) -> int:
    """Number of examples in a group of stacked batches."""
    num_batches, batch_size = jax.tree.leaves(group)[0].shape[:2]
    return num_batches * batch_size


def _signature(batch: PyTree) -> tuple:
    leaves, structure = jax.tree.flatten(batch)
    return structure, tuple((x.shape, x.dtype) for x in leaves)


def first_of(tree: PyTree) -> PyTree:
    """The first entry of every leaf along its leading axis."""
    return jax.tree.map(lambda x: x[0], tree)
