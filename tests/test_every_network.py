"""Every kind of block takes a step of training and has a finite Hessian product, in one narrow network.

A Hessian is symmetric, whatever the network: u^T H v = v^T H u for random u and v. At full size the shapes
are evaluated, of the outputs and of such a product: of one network of each kind, of the others in the slow
tests and in the nightly ones, which compute both.
"""

import math
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

from jaxlimit import batched, hessian, models
from jaxlimit.models import ConvolutionalNetwork, FullyConnected, from_nnx
from jaxlimit.models.convolutional import Convolution, Pool
from jaxlimit.models.resnet import Block
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
# One of each kind, quick to trace.
ONE_OF_A_KIND = ("digits_net", "fc2", "lenet", "alexnet", "vgg11", "resnet18")


class Residual(nnx.Module):
    """Blocks of a residual network, the mean over the pixels, and a dense layer."""

    def __init__(self, *blocks, rngs):
        ends = [3, *(layers[-1].channels for layers in blocks)]
        self.blocks = nnx.List(
            Block(channels, layers, rngs=rngs) for channels, layers in zip(ends[:-1], blocks, strict=True)
        )
        self.dense = nnx.Linear(ends[-1], 10, rngs=rngs)

    def __call__(self, images):
        for block in self.blocks:
            images = block(images)
        return self.dense(images.mean((1, 2)))


SHAPE = (8, 8, 3)
THIN = Convolution(4, padding=1)
NARROW = {
    "dense": partial(FullyConnected, [12, 8, 6, 10]),
    "convolution and pool": partial(
        ConvolutionalNetwork, [Convolution(4, 5), Pool()], [6], 10, image_shape=SHAPE
    ),
    "batch norm": partial(
        ConvolutionalNetwork, [THIN, Pool(), THIN], [], 10, image_shape=SHAPE, normalize=True
    ),
    "enlarged, strides, pools that overlap": partial(
        ConvolutionalNetwork,
        [Convolution(4, 11, padding=1, strides=4), Pool(3)],
        [],
        10,
        image_shape=SHAPE,
        enlarge=7,
    ),
    "residual": partial(Residual, [THIN, THIN], [THIN, THIN], [Convolution(6, padding=1, strides=2), THIN]),
    "bottleneck": partial(
        Residual, [Convolution(3, 1), Convolution(3, padding=1, strides=2), Convolution(8, 1)]
    ),
}


@pytest.mark.parametrize("name", NARROW)
def test_a_step_of_training_and_a_hessian_product(name):
    check(NARROW[name], SHAPE)


@pytest.mark.parametrize(
    "name",
    [
        *ONE_OF_A_KIND,
        *(
            pytest.param(name, marks=pytest.mark.nightly if name in DEEP else pytest.mark.slow)
            for name in NETWORKS
            if name not in ONE_OF_A_KIND
        ),
    ],
)
def test_shapes_at_full_size(name):
    """Of the logits, and of a Hessian product, which are those of the parameters."""
    make = NETWORKS[name]
    model = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    shape = (4, model.widths[0]) if isinstance(model, FullyConnected) else (4, 32, 32, 3)

    def product(images):
        predict, params = from_nnx(make(rngs=nnx.Rngs(0)))
        loss = classification_loss(predict)
        gradient = jax.grad(lambda params: loss(params, (images, np.zeros(4, int))))
        return predict(params, images), params, jax.jvp(gradient, (params,), (params,))[1]

    logits, params, product = jax.eval_shape(product, jax.ShapeDtypeStruct(shape, np.float32))
    assert logits.shape == (4, 10)
    assert jax.tree.map(lambda x: x.shape, product) == jax.tree.map(lambda x: x.shape, params)


@pytest.mark.nightly
@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_of_training_and_a_hessian_product_at_full_size(name):
    with jax.disable_jit(name in DEEP):
        check(NETWORKS[name], (32, 32, 3))


def check(make, image_shape):
    rng = np.random.default_rng(0)
    before = build(make, rng)
    shape = (before.widths[0],) if isinstance(before, FullyConnected) else image_shape
    inputs = rng.standard_normal((4, *shape), dtype=np.float32)
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
