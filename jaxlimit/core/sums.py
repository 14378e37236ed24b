r"""Sums over examples.

Every sum over examples in this package goes through `ExampleSum`,

    sum_b W_b f(batch_b),        W_b = number of examples of batch b, or what a weight function counts,

so that an uneven last batch counts for what it holds and no mean of batch means is ever taken.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxlimit.core.batches import batch_length, first_of, group_length
from jaxlimit.core.convolutions import convolves
from jaxlimit.core.loops import apart, scan
from jaxlimit.core.programs import Program, Traced
from jaxlimit.core.sharding import ExampleSharding, example_sharding, sum_of_parts, zeros
from jaxlimit.core.trees import PyTree


class NothingCounts(ValueError):
    """The weights of all batches are 0."""


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
        >>> from jaxlimit.core.batches import batched, grouped
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
        raise NothingCounts("weight_fn is 0 for every batch: nothing counts.")
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
