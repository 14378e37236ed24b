"""PyTorch's weights in these networks. Oracle: PyTorch's own arithmetic written out in NumPy, channels first.

The golden weights come from the paper's code; the others are random, under PyTorch's names and layouts.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.lib.stride_tricks import sliding_window_view
from safetensors.numpy import load_file, save_file

from jaxlimit.core.trees import named_arrays
from jaxlimit.models import (
    VGG,
    AlexNet,
    CNet,
    Convolution,
    ConvolutionalNetwork,
    FullyConnected,
    LeNet,
    Pool,
    ResNet,
    digits_net,
    fc2,
    fc5,
    fc12,
    fc13,
    from_nnx,
    load_torch_state,
    save_torch_state,
    torch_state_dict,
)
from jaxlimit.models.torch_state import IGNORED

GOLDEN = Path(__file__).parent / "data"


def convolve(images, weight, bias=None, *, padding=0, strides=1):
    """`torch.nn.functional.conv2d`: images (N, C, H, W), weight (out, in, h, w)."""
    images = np.pad(images, [(0, 0), (0, 0), (padding, padding), (padding, padding)])
    windows = sliding_window_view(images, weight.shape[2:], axis=(2, 3))[:, :, ::strides, ::strides]
    outputs = np.einsum("ncyxhw,ochw->noyx", windows, weight, optimize=True)
    return outputs if bias is None else outputs + bias[:, None, None]


def normalize(images, state, name):
    """`torch.nn.BatchNorm2d` in evaluation mode."""
    weight, bias, mean, variance = (
        state[f"{name}.{key}"][:, None, None] for key in ("weight", "bias", "running_mean", "running_var")
    )
    return (images - mean) / np.sqrt(variance + 1e-5) * weight + bias


def pool(images):
    """The maximum over 2x2 pixels."""
    return sliding_window_view(images, (2, 2), axis=(2, 3))[:, :, ::2, ::2].max((-2, -1))


def relu(x):
    return np.maximum(x, 0)


def dense(features, state, names):
    for name in names[:-1]:
        features = relu(features @ state[f"{name}.weight"].T + state[f"{name}.bias"])
    return features @ state[f"{names[-1]}.weight"].T + state[f"{names[-1]}.bias"]


def lenet(state, images):
    for name in ("conv.0", "conv.3"):
        images = pool(relu(convolve(images, state[f"{name}.weight"], state[f"{name}.bias"])))
    return dense(images.reshape(len(images), -1), state, ["linear.0", "linear.2", "linear.4"])


def normalized_network(state, images):
    """Convolution, batch norm, ReLU, pool; convolution, batch norm, ReLU; dense."""
    images = convolve(images, state["conv.0.weight"], state["conv.0.bias"], padding=1)
    images = pool(relu(normalize(images, state, "conv.1")))
    images = relu(normalize(convolve(images, state["conv.4.weight"], state["conv.4.bias"]), state, "conv.5"))
    return dense(images.reshape(len(images), -1), state, ["linear.0", "linear.2"])


def resnet(state, images, *, bottleneck):
    """Every block as PyTorch would run it; strides from the stage's number."""
    images = relu(normalize(convolve(images, state["conv1.weight"], padding=1), state, "bn1"))
    blocks = sorted(
        {name.split(".conv")[0] for name in state if name.startswith("layer") and ".conv" in name}
    )
    for name in blocks:
        stage, number = int(name[5]), int(name.split(".")[1])
        strides = 2 if stage > 1 and number == 0 else 1
        settings = [(0, 1), (1, strides), (0, 1)] if bottleneck else [(1, strides), (1, 1)]
        residual = images
        for index, (padding, step) in enumerate(settings, 1):
            residual = convolve(residual, state[f"{name}.conv{index}.weight"], padding=padding, strides=step)
            residual = normalize(residual, state, f"{name}.bn{index}")
            residual = relu(residual) if index < len(settings) else residual
        if f"{name}.shortcut.0.weight" in state:
            images = convolve(images, state[f"{name}.shortcut.0.weight"], strides=strides)
            images = normalize(images, state, f"{name}.shortcut.1")
        images = relu(residual + images)
    return dense(images.mean((2, 3)), state, ["linear"])


def random_state(shapes, seed=0):
    """Values of the size that keeps activations near 1; variances positive."""
    rng = np.random.default_rng(seed)

    def values(name, shape):
        scale = np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 0.3
        x = scale * rng.standard_normal(shape)
        return (0.5 + np.abs(x) if name.endswith("running_var") else x).astype(np.float32)

    state = {name: values(name, shape) for name, shape in shapes.items()}
    return state | {"conv.1.num_batches_tracked": np.array(7)}


def norm_shapes(name, channels):
    return {f"{name}.{key}": (channels,) for key in ("weight", "bias", "running_mean", "running_var")}


NORMALIZED = {
    "conv.0.weight": (5, 2, 3, 3),
    "conv.0.bias": (5,),
    **norm_shapes("conv.1", 5),
    "conv.4.weight": (4, 5, 3, 3),
    "conv.4.bias": (4,),
    **norm_shapes("conv.5", 4),
    "linear.0.weight": (6, 4 * 2 * 3),
    "linear.0.bias": (6,),
    "linear.2.weight": (3, 6),
    "linear.2.bias": (3,),
}


def resnet_shapes(counts, width, expansion):
    """Names and shapes of the public CIFAR networks."""
    shapes, channels = {"conv1.weight": (width, 3, 3, 3), **norm_shapes("bn1", width)}, width
    for stage, count in enumerate(counts, 1):
        planes = width * 2 ** (stage - 1)
        for number in range(count):
            name = f"layer{stage}.{number}"
            kernels = (
                [(planes, channels, 3), (planes, planes, 3)]
                if expansion == 1
                else [(planes, channels, 1), (planes, planes, 3), (4 * planes, planes, 1)]
            )
            for index, (out, into, size) in enumerate(kernels, 1):
                shapes[f"{name}.conv{index}.weight"] = (out, into, size, size)
                shapes |= norm_shapes(f"{name}.bn{index}", out)
            if number == 0 and (stage > 1 or channels != expansion * planes):
                shapes[f"{name}.shortcut.0.weight"] = (expansion * planes, channels, 1, 1)
                shapes |= norm_shapes(f"{name}.shortcut.1", expansion * planes)
            channels = expansion * planes
    return shapes | {"linear.weight": (10, channels), "linear.bias": (10,)}


def compare(network, path, images, expected):
    """The outputs; and the state that is written is the one that was read, to the bit."""
    network = load_torch_state(network, path)
    predict, params = from_nnx(network)
    state = torch_state_dict(network)
    assert_same_arrays(state, stored(path))
    assert all(array.flags.writeable for array in state.values())  # as torch.from_numpy wants them
    with jax.default_matmul_precision("highest"):
        outputs = predict(params, jnp.asarray(images, jnp.float32))
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def stored(path):
    """What a file holds that a network has a place for."""
    state = load_file(path) if path.suffix == ".safetensors" else load_npz(path)
    return {name: array for name, array in state.items() if not name.endswith(IGNORED)}


def load_npz(path):
    with np.load(path) as file:
        return dict(file)


def assert_same_arrays(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_golden_lenet_gives_the_same_logits():
    path = GOLDEN / "golden_lenet_cifar10" / "weights.npz"
    images = np.random.default_rng(0).standard_normal((4, 3, 32, 32))
    with np.load(path) as file:
        expected = lenet(dict(file), images)
    compare(LeNet(rngs=nnx.Rngs(0)), path, images.transpose(0, 2, 3, 1), expected)


def test_golden_fc2_gives_the_same_logits():
    path = GOLDEN / "golden_fc2_mnist" / "weights.npz"
    images = np.random.default_rng(0).standard_normal((4, 784))
    with np.load(path) as file:
        expected = dense(images, dict(file), ["linear.0", "linear.2"])
    compare(fc2(784, rngs=nnx.Rngs(0)), path, images, expected)


def test_batch_norm_and_features_from_safetensors(tmp_path):
    """An image that is not square: height and width must not be mixed up."""
    path, state = tmp_path / "net.safetensors", random_state(NORMALIZED)
    save_file(state, path)
    layers = [Convolution(5, padding=1), Pool(), Convolution(4)]
    network = ConvolutionalNetwork(layers, [6], 3, image_shape=(8, 10, 2), normalize=True, rngs=nnx.Rngs(0))
    images = np.random.default_rng(1).standard_normal((3, 2, 8, 10))
    compare(network, path, images.transpose(0, 2, 3, 1), normalized_network(state, images))


@pytest.mark.parametrize(
    ("depth", "counts", "expansion"),
    [(18, (2, 2, 2, 2), 1), pytest.param(50, (3, 4, 6, 3), 4, marks=pytest.mark.nightly)],
)
def test_resnets(tmp_path, depth, counts, expansion):
    path, state = tmp_path / "net.npz", random_state(resnet_shapes(counts, 2, expansion))
    np.savez(path, **state)
    images = np.random.default_rng(1).standard_normal((2, 3, 8, 8))
    expected = resnet(state, images, bottleneck=expansion == 4)
    compare(ResNet(depth, width=2, rngs=nnx.Rngs(0)), path, images.transpose(0, 2, 3, 1), expected)


# Small images and few channels keep all but the widest quick.
NETWORKS = {
    "digits": digits_net,
    "fc2": partial(fc2, 20),
    "LeNet": partial(LeNet, image_shape=(20, 16, 2)),
    "norms": partial(ConvolutionalNetwork, [Convolution(5), Pool()], [], 3, normalize=True),
}
WIDE = {
    "fc5": partial(fc5, 20),
    "fc12": partial(fc12, 20),
    "fc13": partial(fc13, 20),
    "CNet": CNet,
    "AlexNet": AlexNet,
    **{f"VGG{depth}": partial(VGG, depth) for depth in (11, 13, 16, 19)},
    **{f"ResNet{depth}": partial(ResNet, depth, width=2) for depth in (18, 34, 50, 101, 152)},
}


@pytest.mark.parametrize(
    "name", [*NETWORKS, *(pytest.param(name, marks=pytest.mark.nightly) for name in WIDE)]
)
def test_what_is_written_is_read_to_the_bit(tmp_path, name):
    """Of pruned parameters, and of running statistics that are not those of the start."""
    make, rng = (NETWORKS | WIDE)[name], np.random.default_rng(0)
    model = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    for _, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Param | nnx.BatchStat):
            variable.set_value(jnp.asarray(rng.random(variable.get_value().shape, np.float32)))
    _, params = from_nnx(model)
    pruned = jax.tree.map(lambda x: jnp.where(x < 0.3, 0, x), params)
    save_torch_state(model, tmp_path / "net.safetensors", pruned)
    other = nnx.clone(model)
    for _, variable in nnx.iter_graph(other):
        if isinstance(variable, nnx.Param | nnx.BatchStat):
            variable.set_value(jnp.zeros_like(variable.get_value()))
    again = load_torch_state(other, tmp_path / "net.safetensors")
    assert_same_arrays(named_arrays(from_nnx(again)[1]), named_arrays(pruned))
    statistics = [named_arrays(nnx.to_pure_dict(nnx.state(m, nnx.BatchStat))) for m in (again, model)]
    assert_same_arrays(*statistics)
    assert bool(statistics[0]) == name.startswith(("norms", "CNet", "VGG", "ResNet"))


def test_what_cannot_be_written_is_refused(tmp_path):
    model = FullyConnected([4, 3], rngs=nnx.Rngs(0))
    params = from_nnx(model)[1]
    params["layers"]["0"]["kernel"] = jnp.ones((3, 4))
    with pytest.raises(ValueError, match=r"not those of this FullyConnected.*at layers\.0\.kernel\."):
        save_torch_state(model, tmp_path / "net.safetensors", params)
    del params["layers"]["0"]["bias"]
    with pytest.raises(ValueError, match=r"at layers\.0\.bias, layers\.0\.kernel\."):
        torch_state_dict(model, params)
    with pytest.raises(ValueError, match=r"must be a \.safetensors file"):
        save_torch_state(model, tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"network of jaxlimit\.models, got a Linear"):
        torch_state_dict(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    assert not list(tmp_path.iterdir())


def test_the_model_is_left_as_it_is(tmp_path):
    network = fc2(784, rngs=nnx.Rngs(0))
    before = np.array(network.layers[0].kernel.get_value())
    load_torch_state(network, GOLDEN / "golden_fc2_mnist" / "weights.npz")
    np.testing.assert_array_equal(network.layers[0].kernel.get_value(), before)


GOOD = {"linear.0.weight": np.ones((3, 4), np.float32), "linear.0.bias": np.ones(3, np.float32)}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"linear.0.weight": GOOD["linear.0.weight"]}, r"has no linear\.0\.bias"),
        (GOOD | {"linear.2.bias": np.ones(3)}, r"no place for: linear\.2\.bias"),
        (
            GOOD | {"linear.0.weight": np.ones((4, 3), np.float32)},
            r"shape \(4, 3\).*got float32 of shape \(3, 4\)",
        ),
        (GOOD | {"linear.0.bias": np.ones(3, int)}, r"floating type.*got int64"),
    ],
)
def test_states_of_other_networks_are_refused(tmp_path, state, message):
    np.savez(tmp_path / "net.npz", **state)
    with pytest.raises(ValueError, match=message):
        load_torch_state(FullyConnected([4, 3], rngs=nnx.Rngs(0)), tmp_path / "net.npz")


@pytest.mark.parametrize("name", ["net.npz", "net.safetensors"])
def test_damaged_files_are_refused(tmp_path, name):
    (np.savez if name.endswith("npz") else lambda path, **state: save_file(state, path))(
        tmp_path / name, **GOOD
    )
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged"):
        load_torch_state(FullyConnected([4, 3], rngs=nnx.Rngs(0)), tmp_path / name)


def test_pickles_missing_files_and_foreign_models_are_refused(tmp_path):
    network = digits_net(rngs=nnx.Rngs(0))
    np.savez(tmp_path / "pickled.npz", allow_pickle=True, x=np.array([{}], object))
    with pytest.raises(ValueError, match="damaged, or no npz file of arrays"):
        load_torch_state(network, tmp_path / "pickled.npz")
    (tmp_path / "net.pt").write_bytes(b"anything")
    with pytest.raises(ValueError, match=r"must be a \.safetensors or \.npz file"):
        load_torch_state(network, tmp_path / "net.pt")
    with pytest.raises(FileNotFoundError, match="is missing"):
        load_torch_state(network, tmp_path / "net.npz")
    np.savez(tmp_path / "net.npz", **GOOD)
    with pytest.raises(ValueError, match=r"network of jaxlimit\.models, got a Linear"):
        load_torch_state(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), tmp_path / "net.npz")


SMALL = {"linear.0.weight": np.arange(12).reshape(3, 4) / 4, "linear.0.bias": np.ones(3)}
SMALL = {name: x.astype(np.float32) for name, x in SMALL.items()}
MASK = np.arange(12).reshape(3, 4) % 2


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("linear.0", "linear._orig_mod.0"),
        lambda name: f"net.{name}",
    ],
)
def test_names_of_wrapped_and_compiled_networks(tmp_path, rename):
    np.savez(tmp_path / "net.npz", n_averaged=np.array(3), **{rename(name): x for name, x in SMALL.items()})
    found = load_torch_state(FullyConnected([4, 3], rngs=nnx.Rngs(0)), tmp_path / "net.npz")
    np.testing.assert_array_equal(found.layers[0].kernel.get_value(), SMALL["linear.0.weight"].T)


def test_pruned_networks_have_masked_weights(tmp_path):
    weights, bias = SMALL.values()
    state = {"linear.0.weight_orig": weights, "linear.0.weight_mask": MASK.astype(np.float32)}
    state |= {"linear.0.bias_orig": bias, "linear.0.bias_mask": np.array([1, 0, 1], np.float32)}
    np.savez(tmp_path / "net.npz", **state)
    found = load_torch_state(FullyConnected([4, 3], rngs=nnx.Rngs(0)), tmp_path / "net.npz").layers[0]
    np.testing.assert_array_equal(found.kernel.get_value(), (weights * MASK).T)
    np.testing.assert_array_equal(found.bias.get_value(), [1, 0, 1])
    del state["linear.0.weight_orig"]
    np.savez(tmp_path / "net.npz", **state)
    with pytest.raises(ValueError, match=r"weight_mask without linear\.0\.weight_orig"):
        load_torch_state(FullyConnected([4, 3], rngs=nnx.Rngs(0)), tmp_path / "net.npz")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float16, np.float64])
def test_safetensors_of_types_that_numpy_lacks(tmp_path, dtype):
    """The file is written byte by byte: a length, a header in JSON, the numbers."""
    import json
    import struct

    names = {"bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float16": "F16"}
    header, content = {}, b""
    for name, x in SMALL.items():
        values = (np.round(x * 4) / 4).astype(dtype).tobytes()
        kind = names.get(jnp.dtype(dtype).name, "F64")
        offsets = [len(content), len(content) + len(values)]
        header[name] = {"dtype": kind, "shape": x.shape, "data_offsets": offsets}
        content += values
    text = json.dumps(header).encode()
    (tmp_path / "net.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + content)
    found = load_torch_state(FullyConnected([4, 3], rngs=nnx.Rngs(0)), tmp_path / "net.safetensors").layers[0]
    expected = np.asarray(SMALL["linear.0.weight"].T.astype(dtype), np.float32)
    np.testing.assert_array_equal(found.kernel.get_value(), expected)
    assert found.kernel.get_value().dtype == jnp.float32


@pytest.mark.parametrize("content", [b"PK\x03\x04archive", b"\x80\x02pickle"])
def test_pickles_under_the_name_of_safetensors_say_how_to_convert(tmp_path, content):
    (tmp_path / "net.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"what torch\.save writes.*save_file\(torch\.load"):
        load_torch_state(FullyConnected([4, 3], rngs=nnx.Rngs(0)), tmp_path / "net.safetensors")
