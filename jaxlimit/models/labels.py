"""Labels of the numbers of an array, and how they move with the numbers: for `traced_couplings`."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import JaxprEqn
from numpy.typing import NDArray

CONSTANT, FREE = -1, -2
Labels = NDArray[np.int64]


class Value(NamedTuple):
    """What is known of an array: the label of each number, and which parameter it is, -1 for none."""

    labels: Labels
    source: Labels | None = None

    @property
    def is_constant(self) -> bool:
        """Whether nothing in it depends on the inputs."""
        return bool((self.labels == CONSTANT).all())


def filled(shape: tuple[int, ...], label: int) -> Labels:
    """One label for all numbers; takes no memory."""
    return np.broadcast_to(np.int64(label), shape)


def along(units: Labels, axis: int, shape: Sequence[int]) -> Labels:
    """Labels that change along one axis."""
    sides = np.ones(len(shape), int)
    sides[axis] = -1
    return np.broadcast_to(units.reshape(sides), shape)


def largest(labels: Labels, params: dict[str, Any]) -> Labels:
    """The largest label of each window of a pool, with the parameters of its operation."""
    keys = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
    operand = jax.numpy.asarray(labels, np.int32)
    least = np.int32(np.iinfo(np.int32).min)
    sizes, strides, padding, base, dilation = (params[key] for key in keys)
    keywords: dict[str, Any] = {"base_dilation": base, "window_dilation": dilation}
    found = jax.lax.reduce_window(operand, least, jax.lax.max, sizes, strides, padding, **keywords)
    return np.asarray(found, np.int64)


def moved(eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    """Labels and parameters go where the numbers go."""
    move = MOVES[eqn.primitive.name]
    labels = move([x.labels for x in values], eqn.params)
    if all(x.source is None for x in values):
        return [Value(x) for x in labels]
    sources = [filled(x.labels.shape, -1) if x.source is None else x.source for x in values]
    return [Value(*pair) for pair in zip(labels, move(sources, eqn.params), strict=True)]


def _broadcast(x: Labels, params: dict[str, Any]) -> Labels:
    sides = np.ones(len(params["shape"]), int)
    sides[list(params["broadcast_dimensions"])] = x.shape
    return np.broadcast_to(x.reshape(sides), params["shape"])


def _slice(x: Labels, params: dict[str, Any]) -> Labels:
    strides = params["strides"] or (1,) * x.ndim
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    return x[tuple(slice(*bound) for bound in bounds)]


def _pad(x: Labels, value: Labels, params: dict[str, Any]) -> Labels:
    padded = jax.lax.pad(jax.numpy.asarray(x, np.int32), np.int32(value), params["padding_config"])
    return np.asarray(padded, np.int64)


def _split(x: Labels, params: dict[str, Any]) -> list[Labels]:
    return np.split(x, np.cumsum(params["sizes"])[:-1], params["axis"])


MOVES: dict[str, Callable[[list[Labels], dict[str, Any]], list[Labels]]] = {
    "reshape": lambda x, p: [x[0].reshape(p["new_sizes"])],
    "transpose": lambda x, p: [x[0].transpose(p["permutation"])],
    "squeeze": lambda x, p: [x[0].squeeze(tuple(p["dimensions"]))],
    "broadcast_in_dim": lambda x, p: [_broadcast(x[0], p)],
    "slice": lambda x, p: [_slice(x[0], p)],
    "rev": lambda x, p: [np.flip(x[0], p["dimensions"])],
    "pad": lambda x, p: [_pad(x[0], x[1], p)],
    "concatenate": lambda x, p: [np.concatenate(x, p["dimension"])],
    "split": lambda x, p: _split(x[0], p),
}
