"""Networks against hand counts, NumPy, SciPy's correlation, and the distribution they must start from."""

import math
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.signal import correlate

from jaxlimit.models import (
    VGG,
    AlexNet,
    CNet,
    FullyConnected,
    LeNet,
    ResNet,
    digits_net,
    fc2,
    fc5,
    fc12,
    fc13,
    from_nnx,
)
from jaxlimit.models.convolutional import convolve


class Everything(nnx.Module):
    """A model with all that from_nnx must carry along: lists beyond 10, batch norm, dropout."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List(nnx.Linear(6, 6, rngs=rngs) for _ in range(11))
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        for layer in self.layers:
            inputs = layer(inputs)
        return self.dropout(self.norm(inputs))


@pytest.mark.parametrize(
    ("size", "padding", "strides"),
    [(5, 0, 1), (3, 1, 1), (3, 1, 2), (1, 0, 2), pytest.param(11, 1, 4, marks=pytest.mark.nightly)],
)
def test_convolution_is_that_of_xla(size, padding, strides):
    """Values, gradients, and the derivative of the gradient."""
    rng = np.random.default_rng(0)
    images, kernel = rng.standard_normal((2, 13, 14, 3)), rng.standard_normal((size, size, 3, 4))

    def value(convolve, operands):
        layout = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
        return convolve(*operands, (strides, strides), [(padding, padding)] * 2, **layout)

    def everything(convolve, operands):
        gradient = jax.grad(lambda operands: jnp.sum(jnp.sin(value(convolve, operands))))
        return value(convolve, operands), jax.jvp(gradient, (operands,), (operands,))

    operands = jnp.asarray(images, jnp.float32), jnp.asarray(kernel, jnp.float32)
    found, expected = (everything(f, operands) for f in (convolve, jax.lax.conv_general_dilated))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


# Kernel weights and parameters by hand: kernels, biases of dense layers and of convolutions that have one,
# and two numbers a channel of batch norm. VGG16, say: 9 (3 64 + 64 64 + 64 128 + 128 128 + 128 256 +
# 2 256 256 + 256 512 + 5 512 512) + 512 10 kernel weights, 3 (2 64 + 2 128 + 3 256 + 6 512) + 10 others.
COUNTS = {
    "digits": (digits_net, 4_464, 4_546),
    "fc2": (partial(fc2, 784), 79_400, 79_510),
    "fc5-mnist": (partial(fc5, 784), 1_595_000, 1_597_010),
    "fc5": (partial(fc5, 3072), 3_883_000, 3_885_010),
    "fc12": (partial(fc12, 3072), 7_263_000, 7_269_610),
    "fc13": (partial(fc13, 3072), 7_333_000, 7_339_860),
    "lenet": (LeNet, 120_920, 121_182),
    "lenet-100": (partial(LeNet, 100), 128_480, 128_832),
    "cnet": (CNet, 305_000, 305_742),
    "alexnet": (AlexNet, 46_778_400, 46_787_978),
    "vgg11": (partial(VGG, 11), 9_222_848, 9_231_114),
    "vgg13": (partial(VGG, 13), 9_407_168, 9_416_010),
    "vgg16": (partial(VGG, 16), 14_715_584, 14_728_266),
    "vgg19": (partial(VGG, 19), 20_024_000, 20_040_522),
    "resnet18": (partial(ResNet, 18), 11_164_352, 11_173_962),
    "resnet34": (partial(ResNet, 34), 21_265_088, 21_282_122),
    "resnet50": (partial(ResNet, 50), 23_467_712, 23_520_842),
    "resnet101": (partial(ResNet, 101), 42_407_616, 42_512_970),
    "resnet152": (partial(ResNet, 152), 58_005_184, 58_156_618),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.nightly] if name in ("resnet101", "resnet152") else [])
        for name in COUNTS
    ],
)
def test_parameter_counts_are_the_hand_derived_ones(name):
    make, kernels, total = COUNTS[name]
    state = nnx.state(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))), nnx.Param)
    sizes = [(len(leaf.shape), math.prod(leaf.shape)) for leaf in jax.tree.leaves(state)]
    assert sum(size for dims, size in sizes if dims >= 2) == kernels
    assert sum(size for _, size in sizes) == total


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fully_connected_equals_numpy(dtype):
    with jax.enable_x64(dtype is np.float64):
        predict, params = from_nnx(digits_net(rngs=nnx.Rngs(3)))
        random = np.random.default_rng(0)
        # Biases start at zero; random ones make the comparison see them.
        params = jax.tree.map(
            lambda leaf: leaf.astype(dtype) + random.normal(size=leaf.shape).astype(dtype), params
        )
        inputs = random.normal(size=(5, 64)).astype(dtype)
        outputs = predict(params, jnp.asarray(inputs))
        assert outputs.dtype == dtype

        expected = inputs.astype(np.float64)
        for name in ("0", "1", "2"):
            layer = jax.tree.map(np.float64, params["layers"][name])
            expected = expected @ layer["kernel"] + layer["bias"]
            if name != "2":
                expected = np.maximum(expected, 0)
        np.testing.assert_allclose(
            outputs, expected, rtol=0, atol=20 * np.finfo(dtype).eps * np.abs(expected).max()
        )


def lenet_by_scipy(params, images: np.ndarray) -> np.ndarray:
    """LeNet in float64 from `scipy.signal.correlate`, one image and one output channel at a time."""
    logits = []
    for features in images.astype(np.float64):
        for layer in params["convolutions"].values():
            kernel, bias = np.float64(layer["kernel"]), np.float64(layer["bias"])
            maps = [correlate(features, kernel[..., out], mode="valid")[..., 0] for out in range(len(bias))]
            features = np.maximum(np.stack(maps, axis=-1) + bias, 0)
            corners = [features[i::2, j::2] for i in (0, 1) for j in (0, 1)]
            features = np.max(corners, axis=0)
        features = features.reshape(-1)
        layers = params["dense"]["layers"]
        for name in ("0", "1", "2"):
            features = features @ np.float64(layers[name]["kernel"]) + np.float64(layers[name]["bias"])
            if name != "2":
                features = np.maximum(features, 0)
        logits.append(features)
    return np.stack(logits)


def test_lenet_equals_scipy_correlation():
    predict, params = from_nnx(LeNet(rngs=nnx.Rngs(1)))
    random = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: leaf + 0.05 * random.normal(size=leaf.shape).astype(np.float32), params
    )
    images = random.normal(size=(2, 32, 32, 3)).astype(np.float32)
    expected = lenet_by_scipy(params, images)
    with jax.default_matmul_precision("highest"):
        outputs = jax.jit(predict)(params, jnp.asarray(images))
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_lenet_hessian_is_symmetric():
    """The Hessian H has u . H v = v . H u in float64, through convolutions and max pooling."""
    with jax.enable_x64(True):
        predict, params = from_nnx(LeNet(rngs=nnx.Rngs(0)))
        flat, unflatten = jax.flatten_util.ravel_pytree(jax.tree.map(jnp.float64, params))
        images, u, v = (
            jax.random.normal(jax.random.key(seed), shape)
            for seed, shape in enumerate([(2, 32, 32, 3), flat.shape, flat.shape])
        )

        @jax.jit
        def product(vector, images):
            gradient = jax.grad(lambda flat: jax.nn.logsumexp(predict(unflatten(flat), images), -1).mean())
            return jax.jvp(gradient, (flat,), (vector,))[1]

        left, right = u @ product(v, images), v @ product(u, images)
        assert abs(left) > 1
        np.testing.assert_allclose(left, right, rtol=1e-10)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_kernels_start_kaiming_normal_untruncated_and_biases_zero(seed):
    """Mean 0, variance 2 / fan_in, kurtosis 3, each within 5 standard errors of a normal sample of that size.

    The kurtosis tells the normal distribution from the one truncated at 2 standard deviations (2.37).
    """
    networks = (fc2(784, rngs=nnx.Rngs(seed)), LeNet(rngs=nnx.Rngs(seed)))
    fan_in = {(784, 100): 784, (5, 5, 16, 32): 400, (800, 120): 800}
    leaves = [leaf for network in networks for leaf in jax.tree.leaves(from_nnx(network)[1])]
    assert all(not leaf.any() for leaf in leaves if leaf.ndim == 1)
    kernels = {leaf.shape: np.float64(leaf) for leaf in leaves if leaf.shape in fan_in}
    assert kernels.keys() == fan_in.keys()
    for shape, kernel in kernels.items():
        standard = kernel.ravel() / np.sqrt(2 / fan_in[shape])
        assert abs(standard.mean()) < 5 / np.sqrt(standard.size)
        assert abs((standard**2).mean() - 1) < 5 * np.sqrt(2 / standard.size)
        assert abs((standard**4).mean() - 3) < 5 * np.sqrt(96 / standard.size)


def test_layers_do_not_share_random_numbers():
    _, params = from_nnx(FullyConnected([20, 20, 20], rngs=nnx.Rngs(0)))
    assert not np.allclose(params["layers"]["0"]["kernel"], params["layers"]["1"]["kernel"])


@pytest.mark.parametrize("widths", [[], [3], [3, 0], [-1, 2]])
def test_bad_widths_are_refused(widths):
    with pytest.raises(ValueError, match=r"widths must be at least two numbers, each 1 or more, got \["):
        FullyConnected(widths, rngs=nnx.Rngs(0))


def test_bad_number_of_classes_is_refused():
    with pytest.raises(ValueError, match=r"got \[800, 120, 84, 0\]"):
        LeNet(0, rngs=nnx.Rngs(0))


def test_inputs_of_the_wrong_shape_are_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"\(batch, 64\), got \(2, 8, 8\); images are flattened first"):
        digits_net(rngs=nnx.Rngs(0))(jnp.ones((2, 8, 8)))
    with pytest.raises(ValueError, match=r"channels last, got \(2, 3, 32, 32\)"):
        LeNet(rngs=nnx.Rngs(0))(jnp.ones((2, 3, 32, 32)))


def test_from_nnx_predicts_what_the_model_does_in_evaluation_mode():
    """Including a list longer than 10, where the order of strings is not that of positions."""
    model = Everything(nnx.Rngs(0))
    inputs = jax.random.normal(jax.random.key(0), (7, 6))
    model(inputs)  # in training mode: moves the running statistics
    predict, params = from_nnx(model)
    first, second = jax.jit(predict)(params, inputs), predict(params, inputs)
    assert not model.dropout.deterministic  # the caller's model is still in training mode
    model.eval()
    np.testing.assert_allclose(first, model(inputs), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(second, model(inputs))
    assert not np.allclose(model.norm.mean.get_value(), 0)


def test_from_nnx_params_are_the_parameters_under_string_paths():
    model = Everything(nnx.Rngs(0))
    _, params = from_nnx(model)
    paths = [path for path, _ in jax.tree.leaves_with_path(params)]
    assert all(isinstance(entry.key, str) for path in paths for entry in path)
    assert params.keys() == {"layers", "norm"}
    assert params["norm"].keys() == {"bias", "scale"}
    for position, layer in enumerate(model.layers):
        assert params["layers"][str(position)]["kernel"] is layer.kernel.get_value()


def test_from_nnx_round_trip_writes_parameters_back():
    source, target = digits_net(rngs=nnx.Rngs(0)), digits_net(rngs=nnx.Rngs(1))
    inputs = jax.random.normal(jax.random.key(0), (3, 64))
    assert not np.allclose(source(inputs), target(inputs))
    nnx.update(target, nnx.restore_int_paths(from_nnx(source)[1]))
    np.testing.assert_array_equal(source(inputs), target(inputs))


def test_from_nnx_gradient_is_that_of_the_model():
    """jax.grad of predict against the closed form: d(sum of outputs) of one dense layer."""
    predict, params = from_nnx(FullyConnected([4, 3], rngs=nnx.Rngs(0)))
    inputs = jax.random.normal(jax.random.key(0), (5, 4))
    gradient = jax.grad(lambda params: predict(params, inputs).sum())(params)["layers"]["0"]
    np.testing.assert_allclose(gradient["kernel"], np.tile(inputs.sum(0)[:, None], 3), rtol=1e-5)
    np.testing.assert_allclose(gradient["bias"], np.full(3, 5.0))


def test_from_nnx_does_not_keep_the_parameters_of_the_model():
    """Zero parameters give zero outputs: nothing of the model's own weights is left in predict."""
    predict, params = from_nnx(digits_net(rngs=nnx.Rngs(0)))
    assert not predict(jax.tree.map(jnp.zeros_like, params), jnp.ones((2, 64))).any()


def test_from_nnx_names_missing_and_unknown_parameters():
    predict, params = from_nnx(FullyConnected([4, 3], rngs=nnx.Rngs(0)))
    layer = params["layers"]["0"]
    other = {"layers": {"0": {"kernel": layer["kernel"], "offset": layer["bias"]}}}
    with pytest.raises(ValueError, match=r"missing: layers/0/bias; not of this model: layers/0/offset"):
        predict(other, jnp.ones((1, 4)))


def test_from_nnx_refuses_a_model_without_parameters():
    with pytest.raises(ValueError, match=r"at least one nnx\.Param, got a Dropout without any"):
        from_nnx(nnx.Dropout(0.5))


def test_widths_of_the_presets_are_those_of_the_paper():
    """Kernel shapes, layer by layer: what the parameter counts alone cannot tell."""
    for model, widths in [
        (fc2(784, rngs=nnx.Rngs(0)), (784, 100, 10)),
        (fc5(3072, 7, rngs=nnx.Rngs(0)), (3072, 1000, 600, 300, 100, 7)),
        (digits_net(rngs=nnx.Rngs(0)), (64, 48, 24, 10)),
        (LeNet(rngs=nnx.Rngs(0)).dense, (800, 120, 84, 10)),
    ]:
        layers = from_nnx(model)[1]["layers"]
        shapes = [layers[str(position)]["kernel"].shape for position in range(len(layers))]
        assert shapes == list(pairwise(widths))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(VGG, 12), "depth must be one of 11, 13, 16, 19, got 12"),
        (partial(ResNet, 20), "depth must be one of 18, 34, 50, 101, 152, got 20"),
        (partial(LeNet, image_shape=(8, 8, 1)), r"image_shape \(8, 8, 1\) is too small"),
    ],
)
def test_networks_that_do_not_exist_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(rngs=nnx.Rngs(0))


@pytest.mark.parametrize("make", [LeNet, CNet, AlexNet, partial(VGG, 11), partial(ResNet, 18)])
def test_other_shapes_and_numbers_of_classes(make):
    shape = (64, 64, 1)
    outputs = nnx.eval_shape(
        lambda: make(num_classes=7, image_shape=shape, rngs=nnx.Rngs(0))(jnp.ones((2, *shape)))
    )
    assert outputs.shape == (2, 7)
