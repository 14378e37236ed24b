"""Loops over stacked entries; of one entry without a loop, in which convolutions are slow on a CPU."""

from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxlimit.core.programs import Program
from jaxlimit.core.trees import PyTree


def scan(
    step: Callable[[Any, Any], tuple[Any, Any]], start: PyTree, stacked: PyTree, length: int
) -> tuple[PyTree, PyTree]:
    """`jax.lax.scan` over so many entries."""
    if length > 1:
        return jax.lax.scan(step, start, stacked, length)
    end, found = step(start, jax.tree.map(lambda x: x[0], stacked))
    return end, jax.tree.map(lambda x: x[None], found)


def each_of(fn: Callable[[PyTree], PyTree], stacked: PyTree, length: int) -> PyTree:
    """`jax.lax.map` over so many entries."""
    return scan(lambda _, x: (None, fn(x)), None, stacked, length)[1]


def apart(stacked: PyTree, length: int) -> Iterator[PyTree]:
    """Every entry as a stack of its own."""
    one_of = Program(lambda i: jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1), stacked))
    return (one_of(i) for i in range(length))
