"""Convolutions and pools of any library, in a form whose derivatives are quick within loops on a CPU.

XLA:CPU runs a convolution inside a loop many times slower than outside (jax-ml/jax#12868), and looks for the
maximum of a pool anew in every derivative. Here a convolution becomes one matrix product with the patches of
its input, and a pool a sum over its windows, whichever library wrote it: in what was traced, before
derivatives are taken. Values and derivatives stay the same: where several entries of a window are its
maximum, the first one has the derivative, as in JAX.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn

from jaxlimit.core.jaxprs import call_instead, has_plain_numbers, primitives, rewritten

# Patches that leave the cache cost more than the loop, and take memory: such a convolution stays. Measured by
# benchmarks/products.py. Those in groups are so slow that they never do.
PATCH_BYTES = 2**22
# Places of a window, each of which is a slice.
MAX_PLACES = 256

Rule = Callable[..., Callable[..., jax.Array] | None]


def quick_in_loops(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
    """The same function with other convolutions and pools, on a CPU; elsewhere as it is."""
    return rewritten(jaxpr, _instead) if jax.default_backend() == "cpu" else jaxpr


def convolves(jaxpr: ClosedJaxpr) -> bool:
    """Whether there is a convolution that a loop makes slow."""
    return jax.default_backend() == "cpu" and "conv_general_dilated" in primitives(jaxpr.jaxpr)


# Equations are replaced by calls; all else in a jaxpr, and in those that it calls, stays as it is.


def _instead(eqn: JaxprEqn) -> JaxprEqn | None:
    name, avals = eqn.primitive.name, [x.aval for x in eqn.invars]
    if name in _RULES:
        call = _RULES[name](*avals, **eqn.params) if all(map(has_plain_numbers, avals)) else None
        return eqn if call is None else call_instead(call, eqn)
    return eqn if name.startswith("custom_") else None  # it brings its own derivative


class _Window(NamedTuple):
    """Windows along all axes of an array, which is dilated and padded before.

    Attributes:
        sizes: places of a window along each axis.
        strides: from one window to the next.
        padding: entries before and after; fewer than 0 are cut.
        base_dilation: from one entry of the array to the next, with padding between.
        dilation: from one place of a window to the next.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    base_dilation: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def num_places(self) -> int:
        """Places of one window."""
        return math.prod(self.sizes)

    @property
    def is_apart(self) -> bool:
        """Whether windows lie side by side, without overlap."""
        return self.sizes == self.strides and set(self.dilation) <= {1}

    def within(self) -> "_Window":
        """With an axis before and one after, along which windows are single entries."""
        return _Window(
            (1, *self.sizes, 1),
            (1, *self.strides, 1),
            ((0, 0), *self.padding, (0, 0)),
            (1, *self.base_dilation, 1),
            (1, *self.dilation, 1),
        )

    def counts(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Number of windows along each axis, for an array of this shape."""
        dilated = [base * (length - 1) + 1 for length, base in zip(shape, self.base_dilation, strict=True)]
        return self._counts(low + x + high for x, (low, high) in zip(dilated, self.padding, strict=True))

    def _counts(self, shape: Iterable[int]) -> tuple[int, ...]:
        """Of an array that is padded already."""
        axes = zip(shape, self.sizes, self.strides, self.dilation, strict=True)
        return tuple((x - (size - 1) * dilation - 1) // stride + 1 for x, size, stride, dilation in axes)

    def padded(self, x: jax.Array, value: float) -> jax.Array:
        """The array as the windows see it."""
        axes = zip(self.padding, self.base_dilation, strict=True)
        ends = [(low, high, base - 1) for (low, high), base in axes]
        return jax.lax.pad(x, jnp.asarray(value, x.dtype), ends) if any(map(any, ends)) else x

    def slices(self, padded: jax.Array) -> list[jax.Array]:
        """For each place, in order, what is there in all windows."""
        counts = self._counts(padded.shape)
        reach = [(count - 1) * stride + 1 for count, stride in zip(counts, self.strides, strict=True)]
        found = []
        for place in itertools.product(*map(range, self.sizes)):
            starts = [i * dilation for i, dilation in zip(place, self.dilation, strict=True)]
            ends = [start + length for start, length in zip(starts, reach, strict=True)]
            found.append(jax.lax.slice(padded, starts, ends, self.strides))
        return found

    def split(self, padded: jax.Array) -> jax.Array:
        """Windows that lie side by side: each axis becomes two, its windows and their places."""
        pairs = list(zip(self._counts(padded.shape), self.sizes, strict=True))
        used = padded[tuple(slice(count * size) for count, size in pairs)]
        return used.reshape([length for pair in pairs for length in pair])


def _places_last(split: jax.Array) -> jax.Array:
    return split.transpose(*range(0, split.ndim, 2), *range(1, split.ndim, 2))


# Convolutions.


def _convolution_rule(lhs: Any, rhs: Any, **params: Any) -> Callable[..., jax.Array] | None:
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    window = _Window(
        tuple(rhs.shape[axis] for axis in numbers.rhs_spec[2:]),
        tuple(params["window_strides"]),
        tuple(params["padding"]),
        tuple(params["lhs_dilation"]),
        tuple(params["rhs_dilation"]),
    )
    examples, channels, *space = (lhs.shape[axis] for axis in numbers.lhs_spec)
    counts = window.counts(space)
    unknown = params["batch_group_count"] != 1 or params.get("out_sharding") is not None
    if unknown or lhs.dtype != rhs.dtype or min(counts, default=1) < 1:
        return None
    if window.num_places > 1 and not window.is_apart:
        patches = examples * math.prod(counts) * window.num_places * channels
        too_large = groups == 1 and patches * lhs.dtype.itemsize > PATCH_BYTES
        if too_large or window.num_places > MAX_PLACES:
            return None
    product = partial(
        jnp.matmul, precision=params["precision"], preferred_element_type=params["preferred_element_type"]
    )
    return partial(_convolve, window=window.within(), numbers=numbers, groups=groups, product=product)


def _convolve(
    lhs: jax.Array, rhs: jax.Array, *, window: _Window, numbers: Any, groups: int, product: Callable
) -> jax.Array:
    """`jax.lax.conv_general_dilated` of images and kernels whose channels are moved to the end, and back."""
    (example, feature, *space), (out, into, *places) = numbers.lhs_spec, numbers.rhs_spec
    images = window.padded(lhs.transpose(example, *space, feature), 0.0)
    kernel = rhs.transpose(*places, into, out).reshape(-1, rhs.shape[into], rhs.shape[out])
    by_channel = groups > 1 and kernel.shape[1:] == (1, groups) and lhs.dtype.itemsize >= 4
    found = (
        _by_channel(images, kernel, window)
        if by_channel
        else _by_patches(images, kernel, window, product, groups)
    )
    example, feature, *space = numbers.out_spec
    return found.transpose(*np.argsort([example, *space, feature]))


def _by_channel(images: jax.Array, kernel: jax.Array, window: _Window) -> jax.Array:
    """Every channel has a kernel of its own, which makes no matrix."""
    parts = [x * factor for x, factor in zip(window.slices(images), kernel[:, 0], strict=True)]
    return reduce(jnp.add, parts)


def _by_patches(
    images: jax.Array, kernel: jax.Array, window: _Window, product: Callable, groups: int
) -> jax.Array:
    """Padded images (examples, *space, channels) times a kernel (places, channels in of a group, out)."""
    num_places, channels_in, channels_out = kernel.shape
    if window.is_apart:
        patches = jnp.moveaxis(_places_last(window.split(images)), images.ndim - 1, -1)
        shape = patches.shape[: images.ndim - 1]
    else:
        slices = window.slices(images)
        patches = jnp.stack(slices, axis=-2) if num_places > 1 else slices[0]
        shape = slices[0].shape[:-1]
    num_patches = math.prod(shape)
    if groups == 1:
        found = product(patches.reshape(num_patches, -1), kernel.reshape(-1, channels_out))
        return found.reshape(*shape, channels_out)
    patches = patches.reshape(num_patches, num_places, groups, channels_in).transpose(2, 0, 1, 3)
    kernels = kernel.reshape(-1, groups, channels_out // groups).transpose(1, 0, 2)
    found = product(patches.reshape(groups, num_patches, -1), kernels)
    return found.transpose(1, 0, 2).reshape(*shape, channels_out)


# Pools.


def _pool_rule(kind: str, operand: Any, **params: Any) -> Callable[..., jax.Array] | None:
    names = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
    window = _Window(*(tuple(params[name]) for name in names))
    too_many = window.num_places > MAX_PLACES and not window.is_apart
    if too_many or min(window.counts(operand.shape), default=1) < 1:
        return None
    pool = _sum_pool if kind == "sum" else partial(_extreme_pool, kind)
    return partial(pool, window=window)


def _sum_pool(x: jax.Array, window: _Window) -> jax.Array:
    x = window.padded(x, 0.0)
    if window.is_apart:
        return window.split(x).sum(range(1, 2 * x.ndim, 2))
    parts = window.slices(x)
    return reduce(jnp.add, parts)


def _extreme_pool(kind: str, x: jax.Array, window: _Window) -> jax.Array:
    """The sum over a window of what is at the place of its first largest or smallest entry, or NaN."""
    find = jax.lax.argmax if kind == "max" else jax.lax.argmin
    x = window.padded(x, -jnp.inf if kind == "max" else jnp.inf)
    known = jax.lax.stop_gradient(x)
    if not window.is_apart:
        best = find(jnp.stack(window.slices(known), axis=-1), x.ndim, jnp.int32)
        parts = [jnp.where(best == i, part, 0) for i, part in enumerate(window.slices(x))]
        return reduce(jnp.add, parts)
    split, places = window.split(x), range(1, 2 * x.ndim, 2)
    entries = _places_last(window.split(known))
    best = find(entries.reshape(*entries.shape[: x.ndim], -1), x.ndim, jnp.int32)
    number = jax.lax.iota(jnp.int32, window.num_places)
    number = number.reshape([length for size in window.sizes for length in (1, size)])
    return jnp.where(jnp.expand_dims(best, places) == number, split, 0).sum(places)


_RULES: dict[str, Rule] = {
    "conv_general_dilated": _convolution_rule,
    "reduce_window_sum": partial(_pool_rule, "sum"),
    "reduce_window_max": partial(_pool_rule, "max"),
    "reduce_window_min": partial(_pool_rule, "min"),
}
