"""Whether two passes over a stream hold the same examples, in whichever order and batches.

A number of 32 bits stands for every example: its words of 32 bits, each well mixed with the number of its
place, added up. So the change of a single word is always seen. The checksum of a pass is the sum of such
numbers, well mixed, over all examples: 64 bits, computed where the data are, while they are there.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes

from jaxlimit.core.programs import Program
from jaxlimit.core.trees import PyTree

MODES = "The same function is needed every time: fix what is random, and use evaluation mode."
# Unsigned integers as wide as floating-point numbers of so many bits.
UNSIGNED = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32, 64: jnp.uint64}
# Odd numbers whose binary digits look random: 2^32 / golden ratio, and two factors of MurmurHash3.
GOLDEN, FIRST, SECOND = 0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35


class PassCheck:
    """Compares every whole pass over the data with the first."""

    def __init__(self) -> None:
        self._first: tuple[int, int] | None = None

    def begin(self) -> "_Pass":
        """A new pass."""
        return _Pass(self)

    def require_same(self, found: tuple[int, int]) -> None:
        """Raises ValueError if a pass of so many examples, and of this checksum, is not like the first."""
        self._first = self._first or found
        (count, checksum), (other_count, other) = self._first, found
        if count != other_count:
            raise ValueError(data_changed(f"{count} examples", f"{other_count}"))
        if checksum != other:
            raise ValueError(data_changed(f"{count} examples with the checksum {checksum:x}", f"{other:x}"))


class _Pass:
    def __init__(self, check: PassCheck) -> None:
        self._check, self._count, self._sums, self._last = check, 0, (0, 0), None

    def add(self, batch: PyTree, count: int) -> None:
        """A batch of so many examples; its checksum is computed while the next one is made."""
        self._take_in()
        self._count, self._last = self._count + count, _checksum(jax.tree.leaves(batch))

    def end(self) -> None:
        """Raises ValueError if the pass is not like the first."""
        self._take_in()
        low, high = self._sums
        self._check.require_same((self._count, high << 32 | low))

    def _take_in(self) -> None:
        """Waits for the last batch, so that no more than one is kept in memory."""
        if self._last is not None:
            low, high = (
                (total + int(part)) % 2**32
                for total, part in zip(self._sums, np.asarray(self._last), strict=True)
            )
            self._sums, self._last = (low, high), None


def data_changed(first: str, second: str) -> str:
    """What is said where two passes over the data differ."""
    return (
        f"the data changed between two passes: {first} in the first, {second} in the second. Likely causes: "
        "shuffling that leaves out other examples each time, random augmentation, dropout, or batch norm in "
        f"train mode. {MODES}"
    )


@Program
def _checksum(leaves: list[jax.Array]) -> jax.Array:
    """(2,) sums over examples modulo 2^32."""
    examples = jnp.uint32(0)
    for number, words in enumerate(word for leaf in leaves for word in _words(leaf)):
        shape = words.shape[1:]
        place = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
        known = _mixed(words ^ _mixed(place * jnp.uint32(GOLDEN) + jnp.uint32(number * SECOND % 2**32)))
        examples += jnp.sum(known, axis=tuple(range(1, words.ndim)), dtype=jnp.uint32)
    sums = [jnp.sum(_mixed(x), dtype=jnp.uint32) for x in (examples, examples ^ jnp.uint32(GOLDEN))]
    return jnp.stack(sums)


def _words(x: jax.Array) -> list[jax.Array]:
    """Unsigned integers of 32 bits that hold the same information."""
    if jnp.issubdtype(x.dtype, dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return [*_words(x.real), *_words(x.imag)]
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = x if jnp.finfo(x.dtype).bits in UNSIGNED else x.astype(jnp.float32)
        x = jax.lax.bitcast_convert_type(x, UNSIGNED[jnp.finfo(x.dtype).bits])
    parts = [x, x >> 32] if x.dtype.itemsize == 8 else [x]
    return [part.astype(jnp.uint32) for part in parts]


def _mixed(x: jax.Array) -> jax.Array:
    """A permutation of the 32-bit integers, in which every digit depends on all (MurmurHash3, A. Appleby)."""
    x = (x ^ (x >> 16)) * jnp.uint32(FIRST)
    x = (x ^ (x >> 13)) * jnp.uint32(SECOND)
    return x ^ (x >> 16)
