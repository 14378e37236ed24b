"""Memory of a device: how much there is, what arrays take of it, and what to do when it runs out.

The *host memory* of a device is memory of the machine that the device reads and writes directly; JAX calls it
"pinned_host". Arrays that lie there are divided over the devices as before, but programs do not compute with
them.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from jaxlimit.core.trees import PyTree

# Bytes that a container may use under Linux (cgroup v2), or "max".
CONTAINER_MEMORY = Path("/sys/fs/cgroup/memory.max")
HOST_MEMORY = "pinned_host"


def device_bytes(tree: PyTree) -> int:
    """Memory that a pytree of arrays takes on each of its devices."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def device_memory() -> int:
    """Bytes that JAX may use on a device; of the processor's memory each of its devices has a part.

    The processor's is that of the machine, or what a container is allowed. Where neither JAX nor the system
    tells: 8 GiB.
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    if not hasattr(os, "sysconf"):  # as on Windows
        return 2**33
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    allowed = CONTAINER_MEMORY.read_text().strip() if CONTAINER_MEMORY.exists() else "max"
    return min(memory, int(allowed) if allowed.isdigit() else memory) // jax.local_device_count()


def require_host_memory(name: str) -> None:
    """A ValueError where the devices have no host memory; `name` is the argument that asks for it."""
    kinds = {memory.kind for memory in jax.local_devices()[0].addressable_memories()}
    if HOST_MEMORY not in kinds:
        raise ValueError(
            f"{name} needs devices with memory of the kind {HOST_MEMORY}; JAX has {', '.join(sorted(kinds))} "
            f"on {jax.local_devices()[0]}. Leave {name} at 0."
        )


def in_host_memory(tree: PyTree) -> PyTree:
    """The arrays in host memory."""
    return _moved(tree, HOST_MEMORY)


def in_device_memory(tree: PyTree) -> PyTree:
    """The arrays where programs compute with them."""
    return _moved(tree, jax.local_devices()[0].default_memory().kind)


def _moved(tree: PyTree, kind: str) -> PyTree:
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind(kind)), tree)


@contextmanager
def advice_on_memory() -> Iterator[None]:
    """Says what needs less memory where a device runs out of it, as a MemoryError."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # JAX raises either, depending on the backend
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(
            "a device ran out of memory. Give pruning_limit a smaller basis_bytes (0 keeps three vectors); "
            "give hessian or gauss_newton linear_bytes=0, or smaller batches: list(batched(arrays, 16))."
        ) from error
