"""Fixtures that several test modules share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg  # noqa: F401, brings its own BLAS
import threadpoolctl
from hypothesis import settings

# The same examples in every run; `--hypothesis-profile default` looks for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


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
