"""Every network at its full size takes a step of training and has a finite Hessian product.

A Hessian is symmetric, whatever the network: u^T H v = v^T H u for random u and v.
"""

import math
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

from jaxlimit import batched, hessian, models
from jaxlimit.models import from_nnx
from jaxlimit.training import classification_loss, train_model

NETWORKS = {
    "digits_net": models.digits_net,
    "fc2": partial(models.fc2, 784),
    "fc5": partial(models.fc5, 3072),
    "fc12": partial(models.fc12, 3072),
    "fc13": partial(models.fc13, 3072),
    "lenet": models.LeNet,
    "cnet": models.CNet,
    "alexnet": models.AlexNet,
    **{f"vgg{depth}": partial(models.VGG, depth) for depth in (11, 13, 16, 19)},
    **{f"resnet{depth}": partial(models.ResNet, depth) for depth in (18, 34, 50, 101, 152)},
}
# The blocks of ResNet50 more often: minutes to compile, but operation by operation they compile once.
DEEP = ("resnet101", "resnet152")


@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_of_training_and_a_hessian_product(name):
    with jax.disable_jit(name in DEEP):
        check(name)


def check(name):
    rng = np.random.default_rng(0)
    before = build(NETWORKS[name], rng)
    width = before.widths[0] if isinstance(before, models.FullyConnected) else None
    inputs = rng.standard_normal((4, 32, 32, 3) if width is None else (4, width), dtype=np.float32)
    arrays = inputs, rng.integers(0, 10, 4)

    after = train_model(before, arrays, jax.random.key(0), epochs=1, batch_size=4, learning_rate=1e-4)
    for old, new in zip(parameters(before), parameters(after), strict=True):
        assert np.all(np.isfinite(new))
        # Every kernel moves; a bias in front of a batch norm, which cancels it, need not.
        assert old.ndim < 2 or np.any(old != new)

    predict, params = from_nnx(after)
    curvature = hessian(classification_loss(predict), params, batched(tuple(x[:1] for x in arrays), 1))
    vectors = [
        jax.tree.map(lambda x: rng.standard_normal(x.shape, dtype=np.float32), curvature.weights)
        for _ in range(2)
    ]
    products = [curvature.matvec(vector) for vector in vectors]
    forms = np.array([[inner(v, p) for p in products] for v in vectors])
    assert np.all(np.isfinite(forms))
    assert abs(forms[0, 1] - forms[1, 0]) <= 1e-3 * np.max(np.abs(forms))
    assert np.max(np.abs(forms)) > 0


def build(make, rng):
    """The network with kernels drawn by NumPy, which compiles nothing."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))

    def start(path, leaf):
        if path[-1] == "kernel":
            drawn = rng.standard_normal(leaf.shape, dtype=np.float32)
            return leaf.replace(drawn * np.float32(math.sqrt(2 / math.prod(leaf.shape[:-1]))))
        return leaf.replace((np.ones if path[-1] in ("scale", "var") else np.zeros)(leaf.shape, np.float32))

    return nnx.merge(graphdef, nnx.map_state(start, state))


def parameters(model):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]


def inner(x, y):
    return sum(np.vdot(a, b) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))
