"""Presets against the table of the paper's experiments: schedules by hand, networks by their parameters."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlimit import data
from jaxlimit.application import presets
from jaxlimit.application.presets import PRESETS, build_network, find_preset

# Kernel weights: of 784 and 3072 inputs, of 10, 100 and 200 classes.
KERNELS = {
    "digits": 4_464,
    "mnist-fc2": 79_400,
    "mnist-fc5": 1_595_000,
    "fashion-mnist-fc5": 1_595_000,
    "cifar10-lenet": 120_920,
    "cifar10-resnet18-8": 175_192,
    "cifar10-fc5": 3_883_000,
    "cifar10-fc12": 7_263_000,
    "cifar10-alexnet": 46_778_400,
    "cifar10-vgg16": 14_715_584,
    "cifar100-resnet18": 11_164_352 + 512 * 90,
    "cifar100-resnet50": 23_467_712 + 2048 * 90,
    "tiny-imagenet-resnet18": 11_164_352 + 512 * 190,
    "tiny-imagenet-resnet50": 23_467_712 + 2048 * 190,
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if "resnet50" in name else []) for name in PRESETS],
)
def test_networks_fit_their_data(name):
    preset = find_preset(name)
    source = presets.DATASETS.get(preset.dataset)
    shape = (8, 8, 1) if source is None else source.image_shape
    inputs = (2, *shape) if preset.network in presets.NETWORKS else (2, math.prod(shape))

    def run():
        network = build_network(preset, 0)
        return nnx.state(network, nnx.Param), network(jnp.zeros(inputs))

    params, outputs = nnx.eval_shape(run)
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
    assert sum(math.prod(shape) for shape in shapes if len(shape) > 1) == KERNELS[name]
    assert outputs.shape == (2, 10 if source is None else source.num_classes)


def test_every_preset_of_the_paper_has_its_dense_control():
    for name in PRESETS:
        assert find_preset(name, l1=0.0).recipe.l1 == 0.0
    ours = PRESETS["cifar10-resnet18-8"]
    assert {preset.recipe.epochs for preset in PRESETS.values() if preset.augment and preset != ours} == {200}


def test_the_rate_warms_up_and_is_halved():
    """391 updates an epoch: 5 of warm-up, halved after 60, 120 and 160."""
    rate = find_preset("cifar10-alexnet").recipe.rate(50_000)
    epochs = [0, 2.5, 5, 59.9, 60.1, 119.9, 120.1, 159.9, 160.1, 199]
    expected = [0, 0.005, 0.01, 0.01, 0.005, 0.005, 0.0025, 0.0025, 0.00125, 0.00125]
    found = [float(rate(round(391 * epoch))) for epoch in epochs]
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_the_cosine_ends_at_zero_after_its_warm_up():
    rate = find_preset("cifar100-resnet18").recipe.rate(50_000)
    epochs = np.array([2.5, 5, 102.5, 200])
    expected = [0.05, 0.1, 0.05, 0.0]
    np.testing.assert_allclose([float(rate(round(391 * e))) for e in epochs], expected, atol=1e-4)
    assert find_preset("mnist-fc2").recipe.rate(60_000) == 0.01


def test_flat_images_are_augmented_as_images():
    images = np.random.default_rng(0).normal(size=(5, 32, 32, 3)).astype(np.float32)
    key = jax.random.key(0)
    flat = find_preset("cifar10-fc5").augmentation()(key, jnp.asarray(data.flatten_channel_first(images)))
    expected = data.flatten_channel_first(np.asarray(data.random_crop_and_flip(key, jnp.asarray(images))))
    np.testing.assert_array_equal(flat, expected)
    assert find_preset("mnist-fc2").augmentation() is None
    assert find_preset("cifar10-vgg16").augmentation() is data.random_crop_and_flip
