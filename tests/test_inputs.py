"""What people put in: batches, parameters and arguments of every kind. Right, or refused in our words.

Oracle: a linear network with a squared error, whose Hessian 2 X^T X / N (x) I is written out in NumPy.
"""

import itertools
from collections import UserDict

import jax.numpy as jnp
import numpy as np
import pytest

import jaxlimit
from jaxlimit.core.batches import batched

RNG = np.random.default_rng(5)
X = RNG.integers(-8, 8, (11, 3)).astype(np.float32) / 4  # exact in bfloat16
Y = RNG.integers(-8, 8, (11, 2)).astype(np.float32) / 4
W = RNG.standard_normal((3, 2)).astype(np.float32)
HESSIAN = np.kron(2 * X.astype(float).T @ X / len(X), np.eye(2))
LOSS = np.mean(np.sum((X.astype(float) @ W - Y) ** 2, -1))


def loss(params, batch):
    x, y = batch
    return jnp.mean(jnp.sum((x.astype(jnp.float32) @ params["w"] - y) ** 2, -1))


def cut(convert=lambda x: x, sizes=(4, 4, 3), kind=tuple):
    ends = np.cumsum([0, *sizes])
    return [kind([convert(X[i:j]), convert(Y[i:j])]) for i, j in itertools.pairwise(ends)]


class Tensor:
    """Read as PyTorch's tensors are: by `numpy(force=True)`, which has no bfloat16."""

    def __init__(self, values, dtype="torch.float32"):
        self.values, self.dtype = np.array(values), dtype

    def detach(self):
        return self

    def float(self):
        return Tensor(self.values)

    def numpy(self, *, force=False):
        if not force:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad.")
        if self.dtype == "torch.bfloat16":
            raise TypeError("Got unsupported ScalarType BFloat16")
        return self.values


class Foreign:
    """An array of a library that nobody knows."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.values, dtype)


class Loader:
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def restarted():
    yield from cut()


BATCHES = {
    "tensors": lambda: cut(Tensor),
    "lists of tensors, as torch's DataLoader": lambda: Loader(cut(Tensor, kind=list)),
    "list of a DataLoader": lambda: list(Loader(cut(Tensor, kind=list))),
    "bfloat16 tensors": lambda: cut(lambda x: Tensor(x, "torch.bfloat16")),
    "batched tensors": lambda: batched((Tensor(X), Tensor(Y)), 4),
    "foreign arrays": lambda: cut(Foreign),
    "float64": lambda: cut(lambda x: x.astype(np.float64)),
    "another byte order": lambda: cut(lambda x: x.astype(">f8")),
    "read backwards and forwards": lambda: cut(lambda x: np.asfortranarray(x)),
    "an empty batch": lambda: cut(sizes=(4, 0, 4, 3, 0)),
    "an empty batch of a stream": lambda: Loader(cut(sizes=(4, 0, 4, 3, 0))),
    "a generator function": lambda: restarted,
    "a function that returns a list": lambda: cut,
    "a tuple of batches": lambda: tuple(cut()),
    "nothing beside": lambda: [(x, y) for x, y in cut()],
}


@pytest.mark.parametrize("kind", BATCHES)
def test_batches_of_every_kind_give_the_matrix(kind):
    curvature = jaxlimit.hessian(loss, {"w": W}, BATCHES[kind]())
    assert (curvature.num_examples, curvature.dim) == (11, 6)
    assert curvature.loss == pytest.approx(LOSS, rel=1e-5)
    np.testing.assert_allclose(curvature.dense(), HESSIAN, rtol=1e-5, atol=1e-5)
    statistics = jaxlimit.loss_statistics(loss, {"w": W}, BATCHES[kind]())
    assert (statistics.mean, statistics.num_examples) == (pytest.approx(LOSS, rel=1e-5), 11)


def test_a_mapping_that_is_no_pytree_is_a_dictionary():
    batches = [UserDict(x=x, y=y) for x, y in cut()]
    curvature = jaxlimit.hessian(lambda w, b: loss({"w": w}, (b["x"], b["y"])), W, batches)
    np.testing.assert_allclose(curvature.dense(), HESSIAN, rtol=1e-5, atol=1e-5)
