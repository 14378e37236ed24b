"""How the tests are compiled, and fixtures that several test modules share."""

import gc
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jaxlib.version

# Compiling takes longer than computing in almost every test. So XLA optimises little, unless XLA_FLAGS says
# otherwise, and keeps what it compiled for later runs. The processes that tests start inherit both.
LITTLE_OPTIMIZATION = {"xla_backend_optimization_level": "1", "xla_llvm_disable_expensive_passes": "true"}
if jaxlib.version.__version_info__ < (0, 11):  # Later versions do not know this option, and stop at it.
    LITTLE_OPTIMIZATION["xla_cpu_use_fusion_emitters"] = "false"  # they compile for up to twice as long
flags = os.environ.get("XLA_FLAGS", "")
if not any(name in flags for name in LITTLE_OPTIMIZATION):
    added = [f"--{name}={value}" for name, value in LITTLE_OPTIMIZATION.items()]
    os.environ["XLA_FLAGS"] = " ".join([*added, flags]).strip()
CACHE = Path(__file__).parents[1] / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg  # noqa: F401, brings its own BLAS
import threadpoolctl
from hypothesis import settings

# JAX's own bound, jax_compilation_cache_max_size, lists the whole folder for each new entry: minutes in all.
CACHE_BYTES = 2**30

# The same examples in every run; `--hypothesis-profile default` looks for new ones, `thorough` at three times
# as many. Tests whose examples take long do a fifth or less.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=100)
settings.register_profile("thorough", derandomize=True, deadline=None, max_examples=300)
settings.load_profile("repeatable")


def pytest_configure(config):
    """Empty the checkout's own cache, where it has grown too large, once, before workers start."""
    if hasattr(config, "workerinput") or not CACHE.is_dir():
        return
    if sum(path.stat().st_size for path in CACHE.iterdir()) > CACHE_BYTES:
        shutil.rmtree(CACHE)


def pytest_collection_finish(session):
    """Look for garbage less often: going through what JAX has traced so far took a twelfth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture(autouse=True, scope="session")
def one_blas_thread():
    """Matrices of order 400 gain nothing from threads, and on busy cores these wait for each other."""
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        yield


@pytest.fixture
def x64():
    """float64 on the device for one test, and for no other."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    """Either precision of the device; the host's float64 does not depend on it."""
    with jax.enable_x64(request.param == "float64"):
        yield np.dtype(request.param)


@dataclass(frozen=True)
class Problem:
    """A network with data: 17 examples in batches of 5, so the last batch holds 2."""

    params: Any
    arrays: Any
    batch_size: int
    predict: Callable
    output_loss: Callable
    loss: Callable


def predict(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["out"]["kernel"] + params["out"]["bias"]


def output_loss(outputs, batch):
    return -jnp.mean(jnp.sum(batch["y"] * jax.nn.log_softmax(outputs), axis=-1))


def loss(params, batch):
    return output_loss(predict(params, batch), batch)


def linear(params, batch):
    """Outputs of one dense layer without biases."""
    return batch[0] @ params


def squared_error(outputs, batch):
    """The mean over the examples, of outputs."""
    return jnp.mean((outputs - batch[1]) ** 2)


def make_mlp(dtype) -> Problem:
    """A tanh network 4-5-3 with softmax cross-entropy: 35 prunable weights and 8 biases, in `dtype`."""
    rng = np.random.default_rng(0)

    def normal(*shape):  # the same numbers in both precisions
        return rng.standard_normal(shape, dtype=np.float32)

    with jax.enable_x64(True):
        params = {
            "hidden": {"kernel": normal(4, 5), "bias": normal(5)},
            "out": {"kernel": normal(5, 3), "bias": normal(3)},
        }
        arrays = {"x": normal(17, 4), "y": np.eye(3)[rng.integers(0, 3, 17)]}
        params, arrays = jax.tree.map(lambda x: jnp.asarray(x, dtype), (params, arrays))
    return Problem(params, arrays, 5, predict, output_loss, loss)


@pytest.fixture
def mlp(dtype) -> Problem:
    """`make_mlp` in the precision of the test."""
    return make_mlp(dtype)
