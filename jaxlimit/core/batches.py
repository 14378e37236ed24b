r"""Batches of examples, and sums over them.

A *batch* is any pytree whose leaves share a leading example axis. *Batches* are anything that can be
iterated again and again and yields the same batches each time: the result of `batched`, a list, a re-iterable
stream, or a function without arguments that starts a pass. Batches without examples count for nothing. Every
sum over examples in this package goes through `ExampleSum`,

    sum_b W_b f(batch_b),        W_b = number of examples of batch b, or what a weight function counts,

so that an uneven last batch counts for what it holds and no mean of batch means is ever taken.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxlimit.core.checks import require_count
from jaxlimit.core.checksums import PassCheck
from jaxlimit.core.convolutions import convolves
from jaxlimit.core.leaves import copied, to_arrays
from jaxlimit.core.loops import apart, scan
from jaxlimit.core.passes import in_memory, passes
from jaxlimit.core.programs import Program, Traced
from jaxlimit.core.sharding import (
    ExampleSharding,
    automatic,
    example_sharding,
    sharding_like,
    sum_of_parts,
    undivided,
    zeros,
)
from jaxlimit.core.trees import PyTree


@dataclass(frozen=True)
class Batches:
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
        return [_stacked(list(run)) for _, run in itertools.groupby(filled, key=_signature)]
    return _Stream(passes(batches))


def _cut(start: int, stop: int, size: int, x: jax.Array) -> jax.Array:
    """Examples from start to stop as stacked batches, divided over devices as the examples were."""
    sharding = sharding_like(x, new_axes=1)
    if sharding is None:
        return _slices(start, stop, size, x)
    # Where axes are explicit JAX refuses to cut what is divided, so meanwhile they are not.
    here = jax.device_put(x, automatic(x.sharding))  # pyright: ignore[reportArgumentType]
    cut = jax.jit(partial(_slices, start, stop, size), out_shardings=automatic(sharding))(here)
    return jax.device_put(cut, sharding)


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
                if not batch_length(batch):
                    continue
                batch = copied(batch)
                this_pass.add(batch, batch_length(batch))
                group = jax.tree.map(lambda x: x[None], batch)
            yield group


def group_length(group: PyTree) -> int:
    """Number of examples in a group of stacked batches."""
    num_batches, batch_size = jax.tree.leaves(group)[0].shape[:2]
    return num_batches * batch_size


def _signature(batch: PyTree) -> tuple:
    leaves, structure = jax.tree.flatten(batch)
    return structure, tuple((x.shape, x.dtype) for x in leaves)


class ExampleSum:
    """sum_b W_b fn(*args, batch_b) over grouped batches, and the total weight sum_b W_b.

    One compiled scan for each shape of group, or a call for each batch where a loop would be slow
    (`core.convolutions`); `args` and the data are arguments of the compiled function, and the running sum is
    donated. `fn` is traced once for each shape of a batch in the life of this object.
    Memory: one batch's work and two results. Where the batches are divided over devices, each device sums
    over its own examples, with their weight, and one reduction a group adds these up. Sums are float32 at
    least, whatever the dtype of the results.

    Args:
        fn: `fn(*args, batch) -> pytree`, a mean over what the weight of the batch counts.
        weight_fn: `weight_fn(batch) -> scalar`, W_b; None: the number of examples.

    Examples:
        >>> data = grouped(batched(np.array([1.0, 2.0, 6.0]), batch_size=2))
        >>> ExampleSum(lambda scale, x: jnp.mean(scale * x))(data, 10.0)
        (Array(90., dtype=float32), 3)
        >>> ExampleSum(lambda x: jnp.average(x, weights=x), weight_fn=jnp.sum)(data)
        (Array(41., dtype=float32), 9.0)
    """

    def __init__(
        self, fn: Callable[..., PyTree], weight_fn: Callable[[PyTree], jax.Array] | None = None
    ) -> None:
        self._fn, self._programs = Traced(fn), {}
        self._weight_fn = None if weight_fn is None else Traced(weight_fn)

    def __call__(self, groups: Iterable[PyTree], *args: PyTree) -> tuple[PyTree, Any]:
        """The sum, and the total weight: a number, or an array where JAX traces something.

        Args:
            groups: as `grouped` returns them.
            *args: pytrees handed to `fn`.

        Raises:
            ValueError: there was no batch at all, or a weight that is negative or not finite, or all are 0.
        """
        num_examples, weights = 0, []

        def parts() -> Iterator[PyTree]:
            nonlocal num_examples
            for group in groups:
                sharding = example_sharding(group, axis=1)
                program = self.program(sharding)
                for part in [group] if sharding else self._parts(args, group):
                    total, of_batches = program(args, part)
                    weights.append(of_batches)
                    yield total
                num_examples += group_length(group)

        total = running_sum(parts())
        if num_examples == 0:
            raise ValueError("batches hold no examples.")
        return total, num_examples if self._weight_fn is None else sum_of_weights(weights)

    def _parts(self, args: tuple[PyTree, ...], group: PyTree) -> Iterable[PyTree]:
        """The group, or each of its batches as one."""
        slow_in_loops = convolves(self._fn.jaxpr(*args, jax.eval_shape(first_of, group)))
        return apart(group, batch_length(group)) if slow_in_loops else [group]

    def program(self, sharding: ExampleSharding | None) -> Program:
        """`(args, group) -> sum over a group, weights` of batches that are divided so."""
        if sharding not in self._programs:
            self._programs[sharding] = Program(partial(_group_sum, self._fn, self._weight_fn, sharding))
        return self._programs[sharding]


def batch_weight(weight_fn: Callable[[PyTree], Any] | None, batch: PyTree) -> Any:
    """How much a batch counts: its number of examples, or a float32 or float64 scalar, NaN if unusable."""
    if weight_fn is None:
        return batch_length(batch)
    weight = weight_fn(batch)
    if not hasattr(weight, "dtype") and not isinstance(weight, (int, float)):
        raise ValueError(f"weight_fn must return a scalar for a batch; got a {type(weight).__name__}.")
    weight = jnp.asarray(weight)
    if weight.shape != ():
        raise ValueError(f"weight_fn must return a scalar for a batch; got shape {weight.shape}.")
    weight = weight.astype(sum_dtype(weight.dtype))
    return jnp.where((weight >= 0) & (weight < jnp.inf), weight, jnp.nan)


def weighted(weight: Any, value: jax.Array) -> jax.Array:
    """Their product in float32 at least; 0 where the weight is 0, whatever a mean over nothing is."""
    value = jnp.asarray(value)
    value = value.astype(sum_dtype(value.dtype))
    if isinstance(weight, int):
        return weight * value
    return jnp.where(weight == 0, 0, weight.astype(value.dtype) * value)


def sum_dtype(dtype: Any) -> Any:
    """In which sums of such numbers are taken: float32 at least."""
    return jnp.promote_types(dtype, jnp.float32)


def sum_of_weights(weights: list[Any]) -> Any:
    """Of batches, in float64, unless JAX traces something.

    Raises:
        ValueError: one is not usable, or all are 0.
    """
    if any(isinstance(x, Tracer) for x in weights):
        return sum(jnp.sum(x) for x in weights)
    values = np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in weights])
    if not np.all(np.isfinite(values)):
        raise ValueError(
            "weight_fn must return a finite number of at least 0 for every batch; it does not for batch "
            f"{int(np.argmin(np.isfinite(values)))}."
        )
    if not np.any(values):
        raise ValueError("weight_fn is 0 for every batch: nothing counts.")
    return float(np.sum(values))


def running_sum(parts: Iterable[PyTree]) -> PyTree:
    """Sum of pytrees that are computed one after the other; None of none.

    A part begins while the device works on the one before, but gets no further ahead: streams do not pile up,
    and devices that are parts of one processor do not wait for each other in several calls at once.
    """
    total = previous = None
    for part in parts:
        jax.block_until_ready(previous)
        total, previous = part if total is None else _add(total, part), part
    return total


# Programs, for JAX's own compiled functions would become part of what is being traced, if anything is.
# They take leaves, since they outlive the trees, of which a structure may hold the user's objects.
_add_leaves = Program(lambda total, part: list(map(jnp.add, total, part)), donate_first=True)
_divide_leaves = Program(lambda total, divisor: [x / divisor for x in total])


def _add(total: PyTree, part: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(total)
    return structure.unflatten(_add_leaves(leaves, jax.tree.leaves(part)))


def mean_of_sum(total: PyTree, weight: Any) -> PyTree:
    """A sum over examples, divided by their number or total weight."""
    leaves, structure = jax.tree.flatten(total)
    return structure.unflatten(_divide_leaves(leaves, weight))


def _group_sum(
    fn: Traced,
    weight_fn: Traced | None,
    sharding: ExampleSharding | None,
    args: tuple[PyTree, ...],
    group: PyTree,
) -> tuple[PyTree, jax.Array | None]:
    """The sum, and the weights (num_batches,) where they are not numbers of examples."""

    def batch_sum(args: tuple[PyTree, ...], group: PyTree) -> tuple[PyTree, jax.Array | None]:
        def add(total: PyTree, batch: PyTree) -> tuple[PyTree, jax.Array | None]:
            weight = batch_weight(weight_fn, batch)
            total = jax.tree.map(lambda t, x: t + weighted(weight, x), total, fn(*args, batch))
            return total, None if weight_fn is None else weight

        like = fn.shape(*args, first_of(group))
        start = jax.tree.map(lambda x: zeros(x, sum_dtype(x.dtype)), like)
        return scan(add, start, group, batch_length(group))

    return sum_of_parts(batch_sum, sharding, (None, 1))(args, group)


def first_of(tree: PyTree) -> PyTree:
    """The first entry of every leaf along its leading axis."""
    return jax.tree.map(lambda x: x[0], tree)


def check_scalar(loss: PyTree) -> None:
    """Refuses a loss that is not a scalar, with a ValueError; for use while tracing."""
    shape = () if isinstance(loss, (int, float)) else getattr(loss, "shape", type(loss).__name__)
    if shape != ():
        raise ValueError(
            f"loss_fn must return a scalar, the mean over the batch's examples; got shape {shape}. Of (loss, "
            "more) return the loss alone."
        )
    if not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise ValueError(f"loss_fn must return a real floating scalar, got {jnp.result_type(loss)}.")
