"""Lookahead against what the removal of a weight changes, by matrices, and against loops over kernels."""

import itertools
from typing import Any

import numpy as np
import pytest
from flax import nnx, traverse_util

from jaxlimit.baselines import Layer, lookahead_layers, lookahead_scores
from jaxlimit.baselines.network import kernels
from jaxlimit.models.convolutional import Convolution, ConvolutionalNetwork, Pool
from jaxlimit.models.fully_connected import FullyConnected
from jaxlimit.models.resnet import ResNet


def changes(kernel, before, after):
    """For each weight the squared norm of what its removal changes in all products of neighbours."""
    found = np.zeros(kernel.shape)
    for index in np.ndindex(kernel.shape):
        removed = np.zeros(kernel.shape)
        removed[index] = kernel[index]
        found[index] = sum(np.sum((a @ removed @ b) ** 2) for a, b in itertools.product(before, after))
    return found


def test_dense_layers_are_scored_by_what_their_removal_changes_in_the_product():
    model = FullyConnected([3, 4, 5, 2], rngs=nnx.Rngs(0))
    weights = kernels(model)
    a, b, c = (np.asarray(weights["layers"][str(n)]["kernel"], float) for n in range(3))
    found = lookahead_scores(weights, lookahead_layers(model), normalized=False)["layers"]
    expected = changes(a, [np.eye(3)], [b]), changes(b, [a], [c]), changes(c, [b], [np.eye(2)])
    for number, each in enumerate(expected):
        np.testing.assert_allclose(found[str(number)]["kernel"], each, rtol=1e-9)
        assert found[str(number)]["bias"] is None
    normalized = lookahead_scores(weights, lookahead_layers(model))["layers"]
    for number, each in enumerate(expected):
        np.testing.assert_allclose(normalized[str(number)]["kernel"], each / np.linalg.norm(each), rtol=1e-9)


def test_a_skip_branch_adds_up_and_batch_norm_belongs_to_the_layer_before_it():
    """Y = (x a)(1 + b c) d with factors after a, b and c."""
    random = np.random.default_rng(0)
    weights = {name: random.normal(size=(3, 3)) for name in "abcd"}
    factors = {name: random.uniform(0.5, 2, size=3) for name in "abc"}
    layers = [
        Layer("a", "inputs", "stream", factors["a"]),
        Layer("b", "stream", "branch", factors["b"]),
        Layer("c", "branch", "stream", factors["c"]),
        Layer("d", "stream", "outputs"),
    ]
    scaled = {name: weights[name] * factors.get(name, 1.0) for name in weights}
    own = {name: np.diag(factors[name]) for name in factors}
    expected = {
        "a": changes(weights["a"], [np.eye(3)], [own["a"] @ weights["b"], own["a"] @ weights["d"]]),
        "b": changes(weights["b"], [scaled["a"]], [own["b"] @ weights["c"]]),
        "c": changes(weights["c"], [scaled["b"]], [own["c"] @ weights["d"]]),
        "d": changes(weights["d"], [scaled["a"], scaled["c"]], [np.eye(3)]),
    }
    found = lookahead_scores(weights, layers, normalized=False)
    for name, each in expected.items():
        np.testing.assert_allclose(found[name], each, rtol=1e-9)


def test_a_convolution_before_a_dense_layer_is_grouped_by_channel():
    model = ConvolutionalNetwork(
        [Convolution(2), Convolution(3), Pool()], [4], 2, image_shape=(8, 8, 1), rngs=nnx.Rngs(0)
    )
    weights = kernels(model)
    found = lookahead_scores(weights, lookahead_layers(model), normalized=False)
    first, second = (np.asarray(weights["convolutions"][n]["kernel"], float) for n in ("0", "1"))
    dense, last = (np.asarray(weights["dense"]["layers"][n]["kernel"], float) for n in ("0", "1"))
    # The dense layer reads pixel (i, j) of channel c in row (2 i + j) 3 + c.
    for (row, column, come, to), weight in np.ndenumerate(second):
        before = sum(first[i, j, 0, come] ** 2 for i in range(3) for j in range(3))
        after = sum(dense[pixel * 3 + to, unit] ** 2 for pixel in range(4) for unit in range(4))
        score = found["convolutions"]["1"]["kernel"][row, column, come, to]
        assert score == pytest.approx(weight**2 * before * after, rel=1e-9)
    for (row, unit), weight in np.ndenumerate(dense):
        before = np.sum(second[:, :, :, row % 3] ** 2)
        score = found["dense"]["layers"]["0"]["kernel"][row, unit]
        assert score == pytest.approx(weight**2 * before * np.sum(last[unit] ** 2), rel=1e-9)
    assert found["convolutions"]["0"]["kernel"][1, 2, 0, 1] == pytest.approx(
        first[1, 2, 0, 1] ** 2 * np.sum(second[:, :, 1] ** 2), rel=1e-9
    )


def test_channels_may_be_flattened_first():
    """As in PyTorch: all pixels of a channel, then those of the next."""
    weights = {"a": np.arange(1.0, 3.0).reshape(1, 1, 1, 2), "b": np.arange(1.0, 5.0).reshape(4, 1)}
    layers = [Layer("a", "inputs", "x"), Layer("b", "x", "outputs", rows=[0, 0, 1, 1])]
    found = lookahead_scores(weights, layers, normalized=False)
    np.testing.assert_allclose(found["a"].ravel(), [1 * (1 + 4), 4 * (9 + 16)])
    np.testing.assert_allclose(found["b"].ravel(), [1, 4, 9 * 4, 16 * 4])


def test_the_residual_network_adds_up_all_that_meet_on_a_stream():
    model = nnx.eval_shape(lambda: ResNet(18, 3, image_shape=(8, 8, 1), width=2, rngs=nnx.Rngs(0)))
    random = np.random.default_rng(0)
    for _, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Param | nnx.BatchStat):
            shape = variable.get_value().shape
            variable.set_value(random.uniform(0.5, 2.0, shape).astype(np.float32))
    scores = lookahead_scores(kernels(model), lookahead_layers(model), normalized=False)
    found: dict[str, Any] = traverse_util.flatten_dict(scores, sep=".")

    def kernel(layer):
        return np.asarray(layer.convolution.kernel[...], float)

    def factor(layer):
        return np.asarray(layer.norm.scale[...], float) ** 2 / np.asarray(layer.norm.var[...], float)

    def made(layer):
        return np.sum(kernel(layer) ** 2, axis=(0, 1, 2)) * factor(layer)

    def read(weights):
        return np.sum(weights**2, axis=(0, 1, 3))

    blocks = model.blocks
    # Before the second block: the stem and the first. After its last layer: the third, and its projection.
    before = made(model.stem) + made(blocks[0].layers[1])
    first, last = blocks[1].layers
    np.testing.assert_allclose(
        found["blocks.1.layers.0.convolution.kernel"],
        kernel(first) ** 2 * before[:, None] * factor(first) * read(kernel(last)),
        rtol=1e-6,
    )
    after = read(kernel(blocks[2].layers[0])) + read(kernel(blocks[2].shortcut[0]))
    np.testing.assert_allclose(
        found["blocks.1.layers.1.convolution.kernel"],
        kernel(last) ** 2 * made(first)[:, None] * factor(last) * after,
        rtol=1e-6,
    )
    # The projection ends the stream of the stem; its own is read by the next block, the next projection, too.
    projection = blocks[2].shortcut[0]
    before = before + made(last)
    reads = blocks[3].layers[0], blocks[4].layers[0], blocks[4].shortcut[0]
    after = np.sum([read(kernel(layer)) for layer in reads], axis=0)
    np.testing.assert_allclose(
        found["blocks.2.shortcut.0.convolution.kernel"],
        kernel(projection) ** 2 * before[:, None] * factor(projection) * after,
        rtol=1e-6,
    )
    dense = np.asarray(model.dense.kernel[...], float)
    makes = blocks[6].layers[1], blocks[6].shortcut[0], blocks[7].layers[1]
    before = np.sum([made(layer) for layer in makes], axis=0)
    np.testing.assert_allclose(found["dense.kernel"], dense**2 * before[:, None], rtol=1e-6)


def test_batch_norm_of_a_convolutional_network_is_found():
    small = ConvolutionalNetwork(
        [Convolution(2)], [], 2, image_shape=(4, 4, 1), normalize=True, rngs=nnx.Rngs(0)
    )
    small.norms[0].var[...] = np.array([4.0, 0.25])
    np.testing.assert_allclose(lookahead_layers(small)[0].factor, [0.5, 2.0], rtol=1e-6)
    small.norms[0].scale = None
    np.testing.assert_allclose(lookahead_layers(small)[0].factor, [0.5, 2.0], rtol=1e-6)


A, B = np.ones((2, 3)), np.ones((3, 1))


@pytest.mark.parametrize(
    ("weights", "layers", "message"),
    [
        ({"a": A, "b": B}, [Layer("a", "inputs", "outputs")], "missing: b; unknown: none"),
        ({"a": A}, [Layer("c", "inputs", "outputs")], "missing: a; unknown: c"),
        ({"a": A}, [Layer("a", "h", "outputs")], "a reads the stream 'h', but no earlier layer writes"),
        ({"a": A}, [Layer("a", "inputs", "h")], "a writes the stream 'h', but no later layer reads"),
        (
            {"a": A, "b": np.ones((3, 3))},
            [Layer("a", "inputs", "outputs"), Layer("b", "outputs", "outputs")],
            "a writes the stream 'outputs', but b is on its other side",
        ),
        (
            {"a": A, "b": np.ones((4, 1))},
            [Layer("a", "inputs", "h"), Layer("b", "h", "outputs")],
            "b has 4 inputs, which are no multiple of the 3 units of the stream 'h'",
        ),
        (
            {"a": A, "b": B, "c": np.ones((2, 2))},
            [Layer("a", "inputs", "h"), Layer("c", "inputs", "h"), Layer("b", "h", "outputs")],
            "c writes 2 units to the stream 'h', another layer 3",
        ),
        (
            {"a": A, "b": B},
            [Layer("a", "inputs", "h"), Layer("b", "h", "outputs", rows=[0, 1, 3])],
            "rows of b must be 3 integers from 0 to below 3",
        ),
        (
            {"a": A},
            [Layer("a", "inputs", "outputs", factor=np.ones(2))],
            r"factor of a must have shape \(3,\)",
        ),
        ({"a": np.ones(3)}, [Layer("a", "inputs", "outputs")], "unlike a"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(weights, layers, message):
    with pytest.raises(ValueError, match=message):
        lookahead_scores(weights, layers)


def test_a_network_that_is_not_known_is_refused():
    class Mine(nnx.Module):
        pass

    with pytest.raises(ValueError, match=r"of a Mine are not known.*Layer\(kernel, reads, writes\)"):
        lookahead_layers(Mine())
