"""Units found by tracing, on functions that are not ours: against brute force, which takes each unit out.

A unit is taken out by hand: its entries are deleted from every array that makes or reads it. The smaller
network has the outputs of the one whose group is zero (its biases, too, for they are in no group).
"""

from itertools import pairwise

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jaxlimit import models
from jaxlimit.core.trees import flatten, partition
from jaxlimit.geometry.magnitude import apply_mask
from jaxlimit.models import from_linen, from_nnx, traced_labels, unit_labels

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def convolved(x, kernel, **keywords):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), **keywords
    )


def stack(p, x):
    """Convolutions with a norm, a pool and a depthwise one, flattened pixel by pixel, then dense."""
    x = jax.nn.relu((convolved(x, p["a"]) - p["mean"]) / jnp.sqrt(p["var"] + 1e-5) * p["scale"])
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = jnp.tanh(convolved(x, p["deep"], feature_group_count=3))
    x = jax.nn.gelu(convolved(x, p["b"]))
    x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)  # PyTorch's order of the pixels, and of its kernels
    return jax.nn.log_softmax(jax.nn.relu(x @ p["c"].T + p["bias"]) @ p["d"].T)


STACK = {
    "a": normal(3, 3, 2, 3),
    "mean": jnp.zeros(3),
    "var": jnp.ones(3),
    "scale": normal(3),
    "deep": normal(3, 3, 1, 3),
    "b": normal(3, 3, 3, 4),
    "c": normal(5, 4 * 2 * 2),
    "bias": jnp.zeros(5),
    "d": normal(3, 5),
}


def streams(p, x):
    """A stream that a shortcut without weights widens, a gate, and two paths side by side."""
    x = jax.nn.relu(jnp.einsum("bi,io->bo", x, p["stem"]))
    x = x + jax.nn.silu(x @ p["up"]) @ p["down"]
    x = jnp.pad(x, ((0, 0), (0, 2))) + x @ p["wide"]
    x = (x @ p["value"]) * jax.nn.sigmoid(x @ p["gate"])
    x = jnp.concatenate([x, jnp.tanh(x @ p["beside"])], axis=1)
    return x @ p["out"]


STREAMS = {
    "stem": normal(3, 4),
    "up": normal(4, 5),
    "down": normal(5, 4),
    "wide": normal(4, 6),
    "value": normal(6, 3),
    "gate": normal(6, 3),
    "beside": normal(3, 2),
    "out": normal(5, 2),
}
# Of each unit: the entries that make it, then those that read it, as (array, axis, indices of one unit).
UNITS = {
    "stack": [
        *([("b", 3, [i]), ("c", 1, list(range(4 * i, 4 * i + 4)))] for i in range(4)),
        *([("c", 0, [i]), ("bias", 0, [i]), ("d", 1, [i])] for i in range(5)),
    ],
    "streams": [
        *([("up", 1, [i]), ("down", 0, [i])] for i in range(5)),
        *([("value", 1, [i]), ("gate", 1, [i]), ("beside", 0, [i]), ("out", 0, [i])] for i in range(3)),
        *([("beside", 1, [i]), ("out", 0, [3 + i])] for i in range(2)),
    ],
}
CASES = {"stack": (stack, STACK, normal(2, 4, 4, 2)), "streams": (streams, STREAMS, normal(6, 3))}


@pytest.mark.parametrize("name", list(CASES))
def test_a_group_of_zeros_does_what_taking_its_unit_out_does(name):
    predict, params, inputs = CASES[name]
    labels = traced_labels(predict, params, inputs[:1])
    for (first, axis, at), *others in UNITS[name]:
        (label,) = np.unique(np.take(labels[first], at, axis))
        pruned = {
            key: x * (labels[key] != label) if key in labels and labels[key] is not None else x
            for key, x in params.items()
        }
        small = dict(params)
        for key, where, gone in [(first, axis, at), *others]:
            small[key] = jnp.delete(small[key], np.asarray(gone), where)
        np.testing.assert_allclose(predict(pruned, inputs), predict(small, inputs), rtol=1e-4, atol=1e-5)
        kept = sum(int((x == label).sum()) for x in labels.values() if x is not None)
        assert (
            0
            < kept
            == sum(int(np.sum(np.asarray(pruned[key] == 0))) for key in labels if labels[key] is not None)
        )


def test_groups_are_no_larger_than_units():
    labels = traced_labels(stack, STACK, normal(1, 4, 4, 2))
    assert np.unique(flatten(labels)).size == 3 + 3 + 4 + 5
    labels = traced_labels(streams, STREAMS, normal(1, 3))
    # 6 channels of the stream, to 4 of which the stem adds; then 5 + 3 + 2 within.
    assert np.unique(flatten(labels)).size == 6 + 5 + 3 + 2
    np.testing.assert_array_equal(labels["stem"][0], labels["wide"][0, :4])
    np.testing.assert_array_equal(labels["down"][0], labels["wide"][0, :4])


WRAPPED = {
    "jit": jax.jit(streams),
    "checkpoint": jax.checkpoint(streams),
    "vmap": lambda p, x: jax.vmap(lambda one: streams(p, one[None])[0])(x),
    "half precision": lambda p, x: streams(jax.tree.map(lambda w: w.astype(jnp.bfloat16), p), x),
    "masked": lambda p, x: streams({**p, "up": p["up"] * np.ones((4, 5), np.float32)}, x),
    "turned": lambda p, x: streams({**p, "out": jnp.flip(p["out"][::-1], 0)}, x),
}


@pytest.mark.parametrize("name", list(WRAPPED))
def test_units_do_not_depend_on_how_a_function_is_called(name):
    found, expected = (traced_labels(fn, STREAMS, normal(2, 3)) for fn in (WRAPPED[name], streams))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


class Dense(linen.Module):
    """Of Linen: convolutions whose outputs are concatenated, with batch norm, and a mean over the pixels."""

    @linen.compact
    def __call__(self, x):
        for width in (3, 2):
            y = linen.relu(linen.BatchNorm(use_running_average=True)(linen.Conv(width, (3, 3))(x)))
            x = y if width == 3 else jnp.concatenate([x, y], -1)
        x = linen.avg_pool(x, (2, 2), (2, 2)).mean((1, 2))
        return linen.Dense(4)(linen.DenseGeneral((2, 3))(x).reshape(len(x), 6))


def test_a_stranger_of_linen():
    inputs = normal(2, 4, 4, 2)
    module = Dense()
    predict, params = from_linen(module, module.init(jax.random.key(0), inputs))
    labels = traced_labels(predict, params, inputs)
    assert np.unique(flatten(labels)).size == 3 + 2 + 6
    pruned = apply_mask(params, jax.tree.map(lambda x: x != np.max(labels["Conv_1"]["kernel"]), labels))
    bare = jax.tree.map(lambda x: x, params)
    bare["DenseGeneral_0"]["kernel"] = params["DenseGeneral_0"]["kernel"].at[4].set(0)  # its reader
    np.testing.assert_allclose(predict(pruned, inputs), predict(bare, inputs), rtol=1e-4, atol=1e-5)


def test_a_stranger_of_nnx():
    layers = nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.silu, nnx.Linear(4, 5, rngs=nnx.Rngs(1)), nnx.sigmoid
    predict, params = from_nnx(nnx.Sequential(*layers, nnx.Linear(5, 2, rngs=nnx.Rngs(2))))
    kernels = [layer["kernel"] for layer in traced_labels(predict, params, normal(1, 3))["layers"].values()]
    for kernel, (first, last) in zip(kernels[:2], pairwise((0, 4, 9)), strict=True):
        np.testing.assert_array_equal(kernel, np.broadcast_to(np.arange(first, last), kernel.shape))
    np.testing.assert_array_equal(kernels[2], np.broadcast_to(np.arange(4, 9)[:, None], (5, 2)))


OURS = {
    "fully connected": (lambda: models.FullyConnected([8, 9, 7, 3], rngs=nnx.Rngs(0)), (1, 8)),
    "LeNet": (lambda: models.LeNet(10, rngs=nnx.Rngs(0)), (1, 32, 32, 3)),
    "resnet": (lambda: models.ResNet(18, 3, width=2, image_shape=(8, 8, 2), rngs=nnx.Rngs(0)), (1, 8, 8, 2)),
}


@pytest.mark.parametrize("name", list(OURS))
def test_units_of_our_networks_are_those_that_we_know(name):
    make, shape = OURS[name]
    model = make()
    predict, params = from_nnx(model)
    found, known = traced_labels(predict, params, jnp.zeros(shape)), unit_labels(model, partition(params)[0])
    pairs = np.unique(np.stack([flatten(found), flatten(known)]), axis=1)
    assert pairs.shape[1] == len(set(pairs[0])) == len(set(pairs[1]))  # the same partition


def normalized(p, x):
    hidden = x @ p["a"]
    return (hidden - hidden.mean(-1, keepdims=True)) @ p["b"]


def attention(p, x):
    heads = jax.nn.softmax((x @ p["a"]) @ (x @ p["a"]).T) @ (x @ p["a"])
    return heads @ p["b"]


def repeated(p, x):
    return lax.fori_loop(0, 3, lambda i, y: jnp.tanh(y @ p["c"]), x @ p["a"]) @ p["b"]


REFUSED = {
    "layer norm": (normalized, "the operation sub leaves open what params\\['a'\\] makes"),
    "attention": (attention, "dot_general"),
    "a loop": (repeated, "the operation (scan|while)"),
    "inputs that are added": (lambda p, x: jnp.tanh(x @ p["a"] + x.sum()) @ p["b"], "the operation add"),
    "sorted units": (lambda p, x: jnp.sort(x @ p["a"]) @ p["b"], "the operation sort"),
    "maxout": (lambda p, x: jnp.tile((x @ p["a"]).max(-1, keepdims=True), 4) @ p["b"], "reduce_max"),
    "weights that are normed": (lambda p, x: (x @ (p["a"] / jnp.linalg.norm(p["a"]))) @ p["b"], "params"),
    "a table": (lambda p, x: p["a"][x[:, 0].astype(int)] @ p["b"], "gather"),
    "weights that are used twice": (lambda p, x: p["a"][x[:, 0].astype(int)] + x @ p["a"], "gather"),
    "the loss": (lambda p, x: jnp.max(x @ p["a"] @ p["b"]), "reduce_max"),
    "another axis": (lambda p, x: ((x @ p["a"]).T @ p["c"]).T @ p["b"], "dot_general"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_is_not_sure_is_refused(name):
    predict, message = REFUSED[name]
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2)), "c": jnp.ones((3, 3))}
    if name == "a loop":
        params["c"] = jnp.ones((4, 4))
    prunable = lambda path, leaf: path[-1].key != "c"  # noqa: E731
    with pytest.raises(ValueError, match=message):
        traced_labels(predict, params, normal(3, 3), prunable=prunable)


def test_params_may_hold_functions_and_texts():
    weights = {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 3)), "act": jax.nn.relu, "name": "mlp"}
    labels = traced_labels(lambda w, x: w["act"](x @ w["a"]) @ w["b"], weights, jnp.ones((1, 4)))
    assert labels["a"].tolist() == [[0, 1]] * 4
    assert labels["b"].tolist() == [[0] * 3, [1] * 3]
