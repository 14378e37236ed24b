"""Networks of Linen, Equinox and Haiku as pure functions. Oracle: the library's own call in evaluation mode.

Every library builds one network, on images of 6 x 6: a convolution with two channels, batch norm, relu,
dropout, and a dense layer with three outputs. By hand: 3 3 2 + (4 4 2) 3 = 114 kernel weights.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, traverse_util
from flax.core import FrozenDict

import jaxlimit
from jaxlimit.core.trees import partition
from jaxlimit.models import from_equinox, from_linen
from jaxlimit.training import classification_loss, classification_metrics
from jaxlimit.training.model_files import load_params, save_params

KERNEL_WEIGHTS, PARAMETERS = 114, 114 + (2 + 3) + (2 + 2)
IMAGES = jax.random.normal(jax.random.key(7), (8, 6, 6, 1))
CHANNELS_FIRST = IMAGES.transpose(0, 3, 1, 2)
LABELS = jnp.arange(8) % 3


class LinenNetwork(linen.Module):
    @linen.compact
    def __call__(self, images, train=True):
        hidden = linen.Conv(2, (3, 3), padding="VALID")(images)
        hidden = linen.relu(linen.BatchNorm(use_running_average=not train)(hidden))
        hidden = linen.Dropout(0.5, deterministic=not train)(hidden)
        return linen.Dense(3)(hidden.reshape(len(images), -1))


class EquinoxNetwork(eqx.Module):
    convolution: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    layers: list

    def __init__(self, key, mode="batch"):
        first, second = jax.random.split(key)
        self.convolution = eqx.nn.Conv2d(1, 2, 3, key=first)
        self.norm = eqx.nn.BatchNorm(2, axis_name="examples", mode=mode)
        self.dropout = eqx.nn.Dropout(0.5)
        self.layers = [jax.nn.relu, eqx.nn.Linear(32, 3, key=second)]

    def __call__(self, image, state, key=None):
        hidden, state = self.norm(self.convolution(image), state)
        activation, dense = self.layers
        return dense(self.dropout(activation(hidden).ravel(), key=key)), state


def haiku_network(images, is_training):
    hidden = hk.Conv2D(2, 3, padding="VALID")(images)
    norm = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.5)
    hidden = jax.nn.relu(norm(hidden, is_training))
    if is_training:
        hidden = hk.dropout(hk.next_rng_key(), 0.5, hidden)
    return hk.Linear(3)(hk.Flatten()(hidden))


def linen_variables():
    """With running statistics of a step in training mode."""
    module = LinenNetwork()
    variables = module.init(jax.random.key(0), IMAGES, train=False)
    _, changed = module.apply(
        variables, 3 + IMAGES, rngs={"dropout": jax.random.key(1)}, mutable=["batch_stats"]
    )
    return module, {**variables, **changed}


def equinox_model(mode="batch"):
    """With running statistics of a step in training mode."""
    model, state = eqx.nn.make_with_state(EquinoxNetwork)(jax.random.key(0), mode)
    keys = jax.random.split(jax.random.key(1), len(IMAGES))
    step = jax.vmap(model, in_axes=(0, None, 0), out_axes=(0, None), axis_name="examples")
    return model, step(3 + CHANNELS_FIRST, state, keys)[1]


def equinox_outputs(model, state, images):
    """Equinox's own way to call a model on a batch without training it."""
    model = eqx.nn.inference_mode(model)
    return jax.vmap(model, in_axes=(0, None), out_axes=(0, None), axis_name="examples")(images, state)[0]


def not_a_bias(path, leaf):
    return jaxlimit.is_kernel(path, leaf) and path[-1].key != "bias"


@dataclass(frozen=True)
class Network:
    predict: Callable
    params: Any
    images: jax.Array
    prunable: Callable = jaxlimit.is_kernel


def linen_network():
    module, variables = linen_variables()
    return Network(*from_linen(module, variables, train=False), IMAGES)


def equinox_network():
    return Network(*from_equinox(*equinox_model()), CHANNELS_FIRST, not_a_bias)


def haiku_recipe():
    network = hk.transform_with_state(haiku_network)
    params, state = network.init(jax.random.key(0), 3 + IMAGES, is_training=True)

    def predict(params, images):
        return network.apply(params, state, None, images, is_training=False)[0]

    return Network(predict, params, IMAGES, lambda path, leaf: path[-1].key == "w")


@pytest.fixture(params=[linen_network, equinox_network, haiku_recipe])
def network(request):
    return request.param()


def test_all_of_jaxlimit_takes_the_parameters(network, tmp_path):
    params, arrays, prunable = network.params, (network.images, LABELS), network.prunable
    loss = classification_loss(network.predict)
    batches = jaxlimit.batched(arrays, 8)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PARAMETERS

    curvature = jaxlimit.hessian(loss, params, batches, prunable=prunable)
    assert curvature.dim == KERNEL_WEIGHTS
    limit = jaxlimit.pruning_limit(curvature, jax.random.key(0), loss_tolerance=0.1)
    assert "(114 weights, 8 examples)" in str(limit)

    mask = jaxlimit.magnitude_mask(curvature.weights, 0.5)
    pruned = jaxlimit.apply_mask(params, mask)
    removed = jax.tree.map(lambda w, p: int((w != p).sum()), params, pruned)
    assert sum(jax.tree.leaves(removed)) == KERNEL_WEIGHTS // 2

    metrics = classification_metrics(network.predict)
    sweep = jaxlimit.sparsity_sweep(metrics, params, batches, [0, 0.5], prunable=prunable)
    expected = [float(loss(params, arrays)), float(loss(pruned, arrays))]
    np.testing.assert_allclose(sweep.metrics["loss"], expected, rtol=1e-5)

    save_params(tmp_path / "weights", params)
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path / "weights", params), params)


@pytest.mark.parametrize("collection", [dict, FrozenDict])
def test_from_linen_predicts_what_the_module_does_in_evaluation_mode(collection):
    module, variables = linen_variables()
    variables = collection(variables)
    before = jax.tree.map(np.array, variables)
    predict, params = from_linen(module, variables, train=False)
    expected = module.apply(variables, IMAGES, train=False)
    np.testing.assert_array_equal(predict(params, IMAGES), expected)
    np.testing.assert_allclose(jax.jit(predict)(params, IMAGES), expected, rtol=1e-5, atol=1e-6)
    params["Dense_0"] = jax.tree.map(jnp.zeros_like, params["Dense_0"])
    assert not predict(params, IMAGES).any()  # nothing of the module's own parameters is left in predict
    jax.tree.map(np.testing.assert_array_equal, before, variables)
    assert not np.allclose(variables["batch_stats"]["BatchNorm_0"]["mean"], 0)


def test_from_linen_gradient_is_that_of_the_module():
    module, variables = linen_variables()
    predict, params = from_linen(module, variables, train=False)

    def theirs(params):
        return module.apply({**variables, "params": params}, IMAGES, train=False).var()

    gradient = jax.grad(lambda params: predict(params, IMAGES).var())(params)
    jax.tree.map(np.testing.assert_array_equal, gradient, jax.grad(theirs)(variables["params"]))
    assert all(leaf.any() for leaf in jax.tree.leaves(gradient["Conv_0"]))


@pytest.mark.parametrize(
    "layer", [linen.BatchNorm(use_running_average=False), linen.Dropout(0.5, deterministic=False)]
)
def test_from_linen_says_that_the_module_is_in_training_mode(layer):
    module = linen.Sequential([linen.Dense(3), layer])
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    predict, params = from_linen(module, module.init(keys, IMAGES))
    with pytest.raises(ValueError, match=r"Sequential seems to run in training mode: .* train=False\)"):
        predict(params, IMAGES)


def test_from_linen_takes_partitioning_metadata_off():
    kernel_init = linen.with_partitioning(linen.initializers.lecun_normal(), (None, "model"))
    module = linen.Dense(3, kernel_init=kernel_init)
    variables = module.init(jax.random.key(0), IMAGES)
    predict, params = from_linen(module, variables)
    assert params["kernel"] is variables["params"]["kernel"].value
    np.testing.assert_array_equal(predict(params, IMAGES), module.apply(variables, IMAGES))


def test_from_linen_refuses_variables_without_parameters():
    with pytest.raises(ValueError, match=r'collection "params"; got the collections: Conv_0, Dense_0'):
        from_linen(LinenNetwork(), {"Conv_0": {}, "Dense_0": {}})
    with pytest.raises(ValueError, match=r"got the collections: none"):
        from_linen(linen.Dropout(0.5, deterministic=True), {})


@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_from_equinox_predicts_what_the_model_does_in_inference_mode(mode):
    model, state = equinox_model(mode)
    predict, params = from_equinox(model, state)
    expected = equinox_outputs(model, state, CHANNELS_FIRST)
    np.testing.assert_allclose(predict(params, CHANNELS_FIRST), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(predict)(params, CHANNELS_FIRST), expected, rtol=1e-5, atol=1e-6)
    assert not model.dropout.inference  # the caller's model is still in training mode
    assert not model.norm.inference
    params["layers"]["1"] = jax.tree.map(jnp.zeros_like, params["layers"]["1"])
    assert not predict(params, CHANNELS_FIRST).any()  # nothing of the model's own arrays is left in predict


def test_from_equinox_without_state():
    """A model with a function, dropout, and a list longer than 10, where strings are not in order."""
    keys = jax.random.split(jax.random.key(0), 12)
    layers = [eqx.nn.Linear(6, 6, key=key) for key in keys]
    model = eqx.nn.Sequential([*layers, eqx.nn.Lambda(jax.nn.relu), eqx.nn.Dropout(0.5)])
    predict, params = from_equinox(model)
    inputs = jax.random.normal(jax.random.key(1), (5, 6))
    np.testing.assert_allclose(predict(params, inputs), jax.vmap(eqx.nn.inference_mode(model))(inputs))
    assert all(params["layers"][str(i)]["weight"] is layer.weight for i, layer in enumerate(layers))


def test_from_equinox_takes_a_model_that_still_holds_its_initial_state():
    """`eqx.nn.State(model)` leaves initial running statistics in the model: they are no parameters."""
    model = EquinoxNetwork(jax.random.key(0))
    _, params = from_equinox(model, eqx.nn.State(model))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PARAMETERS


def test_from_equinox_gradient_is_that_of_the_model():
    model, state = equinox_model()
    predict, params = from_equinox(model, state)
    gradient = jax.grad(lambda params: predict(params, CHANNELS_FIRST).var())(params)
    theirs = eqx.filter_grad(lambda model: equinox_outputs(model, state, CHANNELS_FIRST).var())(model)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    close(gradient["convolution"]["weight"], theirs.convolution.weight)
    close(gradient["convolution"]["bias"], theirs.convolution.bias)
    close(gradient["norm"]["weight"], theirs.norm.weight)
    close(gradient["layers"]["1"]["bias"], theirs.layers[1].bias)
    assert gradient["convolution"]["bias"].any()


def test_biases_of_equinox_convolutions_count_as_kernels_by_default():
    """What the recommended `prunable` is for: two biases of shape (2, 1, 1)."""
    _, params = from_equinox(*equinox_model())
    for prunable, expected in ((jaxlimit.is_kernel, KERNEL_WEIGHTS + 2), (not_a_bias, KERNEL_WEIGHTS)):
        weights, _ = partition(params, prunable)
        assert sum(leaf.size for leaf in jax.tree.leaves(weights)) == expected


def test_from_equinox_parameters_are_written_back_as_documented():
    source, target = equinox_model()[0], EquinoxNetwork(jax.random.key(5))
    flat = traverse_util.flatten_dict(from_equinox(source)[1], sep="/")
    name = partial(jax.tree_util.keystr, simple=True, separator="/")
    target = jax.tree.map_with_path(lambda path, leaf: flat.get(name(path), leaf), target)
    np.testing.assert_array_equal(target.layers[1].weight, source.layers[1].weight)
    np.testing.assert_array_equal(target.convolution.bias, source.convolution.bias)


def test_from_equinox_refuses_a_model_without_parameters():
    with pytest.raises(ValueError, match=r"a floating-point array, got a Dropout without one"):
        from_equinox(eqx.nn.Dropout())


def test_from_equinox_without_equinox_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "equinox", None)
    with pytest.raises(ImportError, match=r'pip install "jaxlimit\[equinox\]"'):
        from_equinox(None)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("make", [linen_network, equinox_network])
def test_missing_and_unknown_parameters_are_named(make):
    network = make()
    name = next(iter(network.params))
    other = {key: value for key, value in network.params.items() if key != name} | {
        "more": {"x": jnp.ones(1)}
    }
    with pytest.raises(ValueError, match=rf"missing: {name}/bias, .*; not of this model: more/x"):
        network.predict(other, network.images)


PAGE = (Path(__file__).parents[1] / "docs" / "networks.md").read_text()
# The complete ones, which print a limit.
EXAMPLES = [x for x in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL) if "print(" in x]
# By hand: 64 8 + 8 10 everywhere but in Equinox's example, which has 3 3 4 in its convolution and 36 10.
WEIGHTS = [592, 592, 396, 592, 592, 592]


@pytest.mark.parametrize(
    ("code", "weights"),
    [
        pytest.param(code, weights, marks=[pytest.mark.slow] if number else [], id=str(number))
        for number, (code, weights) in enumerate(zip(EXAMPLES, WEIGHTS, strict=True))
    ],
)
def test_examples_of_the_documentation_run(code, weights, capsys):
    exec(compile(code, "networks.md", "exec"), {"__name__": "__main__"})
    assert f"({weights} weights, 512 examples)" in capsys.readouterr().out
