"""Streams: batches that are made anew in every pass and are never all in memory."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlimit import hessian, sparsity_sweep
from jaxlimit.core.batches import grouped

# Batch b of B holds rows of b / B: every entry of the Hessian of mean (x w)^2 / 2 is the mean of (b / B)^2.
LIMITED = """
import json, re, resource, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jaxlimit import hessian

num_batches, size, dim = (int(x) for x in sys.argv[1:])

class Stream:
    def __init__(self, num_batches):
        self.num_batches = num_batches
    def __iter__(self):
        for b in range(self.num_batches):
            yield np.full((size, dim), b / num_batches, np.float32)

def loss(w, x):
    slow = jax.lax.fori_loop(0, 20, lambda _, y: jnp.tanh(y), x)  # so that batches are made faster than used
    return jnp.mean(jnp.sum(x @ w, axis=1) ** 2) / 2 + 1e-30 * jnp.mean(slow)

def data_bytes():
    return 1024 * int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

weights = jnp.full((dim, 1), 1e-3)
hessian(loss, weights, Stream(3)).matvec(weights)  # compiles, and starts all threads
before = data_bytes()
resource.setrlimit(resource.RLIMIT_DATA, (before + 2**27, before + 2**27))
product = hessian(loss, weights, Stream(num_batches)).matvec(jnp.ones((dim, 1)))
print(json.dumps({"product": np.ravel(product).tolist(), "grown": data_bytes() - before}))
"""


@pytest.mark.nightly
def test_a_stream_larger_than_the_memory_of_the_process():
    # 4 MiB a batch, 512 MiB a pass; 128 MiB more than at the start, since the checks mix batches.
    num_batches, size, dim = 128, 1024, 1024
    found = subprocess.run(
        [sys.executable, "-c", LIMITED, str(num_batches), str(size), str(dim)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)},  # what is freed is given back at once
    )
    assert found.returncode == 0, found.stderr[-2000:]
    product = json.loads(found.stdout)["product"]
    expected = dim * np.mean((np.arange(num_batches) / num_batches) ** 2)
    np.testing.assert_allclose(product, expected, rtol=1e-4)


@pytest.mark.nightly
def test_the_limit_on_memory_is_felt():
    """The same with a batch larger than what is allowed fails: the test above can."""
    found = subprocess.run(
        [sys.executable, "-c", LIMITED, "2", "32768", "1024"], capture_output=True, text=True, check=False
    )
    assert found.returncode != 0


class Recorded:
    """Batches that note which of them were asked for."""

    def __init__(self, batches):
        self.batches, self.asked = batches, []

    def __iter__(self):
        for number, batch in enumerate(self.batches):
            self.asked.append(number)
            yield batch


@pytest.mark.parametrize("as_torch_does", [False, True])
def test_whatever_can_be_iterated_again_is_a_stream(as_torch_does):
    """A class with __iter__, or an object like a DataLoader (a length, tuples of arrays); oracle: NumPy."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((n, 4)).astype(np.float32) for n in (5, 5, 3)]

    class Loader(Recorded):
        def __len__(self):
            return len(self.batches)

    stream = (Loader if as_torch_does else Recorded)([(x, np.zeros(len(x))) for x in arrays])
    curvature = hessian(lambda w, batch: jnp.mean((batch[0] @ w) ** 2) / 2, jnp.ones((4, 1)), stream)
    whole = np.concatenate(arrays)
    expected = whole.T @ (whole @ np.arange(4.0)[:, None]) / len(whole)
    np.testing.assert_allclose(curvature.matvec(jnp.arange(4.0)[:, None]), expected, rtol=1e-5)
    assert curvature.num_examples == 13
    stream.asked.clear()
    curvature.matvec(jnp.ones((4, 1)))
    assert stream.asked == [0, 1, 2]  # nothing is kept


RNG = np.random.default_rng(1)
ROWS = RNG.standard_normal((23, 4)).astype(np.float32)
LABELS = RNG.integers(0, 3, 23)


class Changing:
    """Batches of rows and labels that `change(number of the pass)` makes, in fives."""

    def __init__(self, change):
        self.change, self.passes = change, 0

    def __iter__(self):
        self.passes += 1
        rows, labels = self.change(self.passes)
        for start in range(0, len(rows), 5):
            yield rows[start : start + 5], labels[start : start + 5]


def square(weights, batch):
    """A loss that does not change when rows turn their sign, nor with the order of the labels."""
    return jnp.mean((batch[0] @ weights) ** 2) / 2


def test_a_stream_may_shuffle_its_examples():
    def shuffled(number):
        order = np.random.default_rng(number).permutation(23)
        return ROWS[order], LABELS[order]

    curvature = hessian(square, jnp.ones((4, 1)), Changing(shuffled))
    expected = ROWS.T @ (ROWS @ np.arange(4.0)[:, None]) / 23
    for _ in range(2):
        np.testing.assert_allclose(curvature.matvec(jnp.arange(4.0)[:, None]), expected, rtol=1e-5)


ROW_TURNED = ROWS * np.where(np.arange(23) == 7, -1, 1)[:, None].astype(np.float32)
LATER = {
    "one example's sign": lambda: (ROW_TURNED, LABELS),
    "labels among themselves": lambda: (ROWS, np.roll(LABELS, 1)),
    "columns": lambda: (ROWS[:, ::-1], LABELS),
    "one example for another": lambda: (ROWS[[0, *range(22)]], LABELS[[0, *range(22)]]),
}


@pytest.mark.parametrize("what", LATER)
def test_a_stream_of_other_examples_is_refused_in_every_product(what):
    """Loss, weight and number of examples are what they were, but for the last one."""
    changed = np.inf
    stream = Changing(lambda number: LATER[what]() if number > changed else (ROWS, LABELS))
    curvature = hessian(square, jnp.ones((4, 1)), stream)
    curvature.matvec(jnp.ones((4, 1)))
    changed = stream.passes
    for call in (curvature.matvec, curvature.mean_loss, lambda _: curvature.gradient):
        with pytest.raises(
            ValueError, match=r"data changed between two passes: 23 examples with the checksum"
        ):
            call(jnp.ones((4, 1)))


def test_a_stream_that_changes_between_sparsities_is_refused():
    stream = Changing(lambda number: (ROW_TURNED if number > 1 else ROWS, LABELS))
    with pytest.raises(ValueError, match="data changed between two passes"):
        sparsity_sweep(
            lambda w, batch: {"loss": square(w, batch)}, jnp.ones((4, 1)), stream, [0, 0.5], chunk_size=1
        )


DTYPES = (np.float32, np.float16, jnp.bfloat16, jnp.float8_e4m3fn, np.int32, np.uint8, np.bool_, np.complex64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_change_in_one_number_is_seen_in_any_dtype(dtype):
    values = np.arange(12).reshape(6, 2) % 2 if dtype == np.bool_ else np.arange(12).reshape(6, 2)
    values = values.astype(dtype)
    stream = Recorded([values[:4], values[4:]])
    groups = grouped(stream)
    list(groups)
    stream.batches = [values[[5, 0, 3]], values[[1]], values[[2, 4]]]  # in another order and cut
    list(groups)
    changed = values.copy()
    changed[3, 1] = not changed[3, 1] if dtype == np.bool_ else changed[3, 1] + np.ones((), dtype)
    stream.batches = [changed[:4], changed[4:]]
    with pytest.raises(ValueError, match="data changed between two passes: 6 examples with the checksum"):
        list(groups)


def test_random_keys_are_data_too():
    keys = jax.random.split(jax.random.key(0), 6)
    stream = Recorded([keys])
    groups = grouped(stream)
    list(groups)
    stream.batches = [keys[::-1]]
    list(groups)
    stream.batches = [jax.random.split(jax.random.key(1), 6)]
    with pytest.raises(ValueError, match="data changed"):
        list(groups)
