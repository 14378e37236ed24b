"""Which batches are linearised, and how many examples at once: what memory and caches allow."""

import jax

from jaxlimit.core.batches import batch_length, examples_like
from jaxlimit.core.loops import apart
from jaxlimit.core.sharding import example_sharding, num_shards
from jaxlimit.core.trees import PyTree
from jaxlimit.curvature.products import LinearGroup, Product

# Memory of a linearised batch, and so the examples at once in a product. On a CPU it should stay in the
# cache; but it may take five times the memory of the weights, which are read for every batch, and with fewer
# than four examples the calls of a deep network cost more than its products: measured by
# benchmarks/products.py. Elsewhere it is 2 GiB, which fills the device.
BATCH_BYTES = {"cpu": 2**24}
WEIGHT_COPIES, LEAST_EXAMPLES = 5, 4
# Times as much where the network itself has loops, whose steps cost calls: benchmarks/products_strangers.py.
LOOP_FACTOR = 4


def num_bytes(tree: PyTree) -> int:
    """Of all leaves, arrays or their shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def linearize_groups(
    product: Product, weights: PyTree, rest: PyTree, groups: list[PyTree], linear_bytes: int
) -> list[LinearGroup] | None:
    """Grouped batches, linearised; None where they take more than `linear_bytes` on each device.

    A compiled scan over stacked batches copies each before its use; one that does not stay in the cache, or
    that a loop makes slow, is not worth that, and becomes a group of its own.
    """
    measured = []
    for group in groups:
        sharding = example_sharding(group, axis=1)
        batch_bytes = linear_batch_bytes(product, weights, rest, group)
        slow_in_loops = product.convolves(weights, rest, _one_batch(group))
        measured.append((group, sharding, batch_bytes, slow_in_loops))
    if sum(batch_length(group) * batch_bytes for group, _, batch_bytes, _ in measured) > linear_bytes:
        return None
    return [
        product.group_linearizer(sharding)(weights, rest, part)
        for group, sharding, batch_bytes, slow_in_loops in measured
        for part in (
            apart(group, batch_length(group)) if batch_bytes > _batch_bytes() or slow_in_loops else [group]
        )
    ]


def suitable_batch_size(product: Product, weights: PyTree, rest: PyTree, arrays: PyTree) -> int:
    """Examples at once in a product: see `BATCH_BYTES`; a divisor of all if there is one near it.

    With a divisor all batches have one shape, and a product compiles once. Of examples that are divided over
    devices so many on each.
    """
    shards = num_shards(example_sharding(arrays))
    num_examples = batch_length(arrays) // shards
    two, four = (_linear_bytes(product, weights, rest, arrays, size) for size in (2, 4))
    per_example = max((four - two) // 2, 1)
    batch_bytes, least = _batch_bytes(), 1
    if jax.default_backend() in BATCH_BYTES:
        batch_bytes, least = max(batch_bytes, WEIGHT_COPIES * num_bytes(weights)), LEAST_EXAMPLES
        if product.has_loops(weights, rest, examples_like(arrays, 2)):
            batch_bytes *= LOOP_FACTOR
    wanted = _in_loops(
        product, weights, rest, arrays, min(max(batch_bytes // per_example, least), num_examples)
    )
    smallest = max(wanted // 2 + 1, min(least, wanted))
    divisors = (size for size in range(wanted, smallest - 1, -1) if num_examples % size == 0)
    return shards * next(divisors, wanted)


def _in_loops(product: Product, weights: PyTree, rest: PyTree, like: PyTree, wanted: int) -> int:
    """As many examples at once as wanted, or fewer whose convolutions a loop does not make slow."""
    size = wanted
    while size >= LEAST_EXAMPLES:
        if not product.convolves(weights, rest, examples_like(like, size)):
            return size
        size //= 2
    return wanted


def _batch_bytes() -> int:
    return BATCH_BYTES.get(jax.default_backend(), 2**31)


def linear_batch_bytes(product: Product, weights: PyTree, rest: PyTree, group: PyTree) -> int:
    """Memory of one linearised batch of a group, on each device; the loss is traced for batches like it."""
    batch = _one_batch(group)
    size = batch_length(batch) // num_shards(example_sharding(group, axis=1))
    return _linear_bytes(product, weights, rest, batch, size)


def _one_batch(group: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), group)


def _linear_bytes(product: Product, weights: PyTree, rest: PyTree, like: PyTree, size: int) -> int:
    """Memory of `size` linearised examples like these."""
    return num_bytes(product.linearize.shape(weights, rest, examples_like(like, size)))
