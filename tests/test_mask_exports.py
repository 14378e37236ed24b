"""Masks for PyTorch and optax. Oracles: the zeros in the weights for PyTorch; masking after every step."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

import jaxlimit
from jaxlimit.core.trees import partition
from jaxlimit.models import (
    Convolution,
    ConvolutionalNetwork,
    FullyConnected,
    Pool,
    from_nnx,
    torch_state_dict,
)


def pruned(model):
    params = from_nnx(model)[1]
    mask = jaxlimit.magnitude_mask(partition(params)[0], 0.6)
    return jaxlimit.apply_mask(params, mask), mask


@pytest.fixture(scope="module")
def convolutional():
    """A network of ours, its pruned parameters and their mask; images of 8x10 pixels."""
    layers = [Convolution(4), Pool()]
    model = ConvolutionalNetwork(layers, [6], 3, image_shape=(8, 10, 2), rngs=nnx.Rngs(0))
    return model, *pruned(model)


def test_masks_lie_where_pytorch_has_the_zeros(convolutional):
    model, params, mask = convolutional
    found, state = jaxlimit.torch_masks(mask, model=model), torch_state_dict(model, params)
    assert list(found) == ["conv.0.weight", "linear.0.weight", "linear.2.weight"]
    for name, kept in found.items():
        np.testing.assert_array_equal(kept, state[name] != 0)
        assert kept.flags.c_contiguous
        assert kept.flags.writeable


def test_names_and_layouts_of_any_network():
    rng = np.random.default_rng(0)
    kernel, conv = rng.random((2, 3)) < 0.5, rng.random((5, 4, 3, 2)) < 0.5
    mask = {"dense": [{"kernel": kernel, "bias": None}], "conv": jnp.asarray(conv)}
    as_they_are = jaxlimit.torch_masks(mask)
    assert as_they_are.keys() == {"dense.0.kernel", "conv"}
    np.testing.assert_array_equal(as_they_are["conv"], conv)
    names = {
        "dense.0.kernel": ("fc.weight", np.transpose),
        "conv": ("body.0.weight", lambda x: x.transpose(3, 2, 0, 1)),
    }
    found = jaxlimit.torch_masks(mask, names=names)
    np.testing.assert_array_equal(found["fc.weight"], kernel.T)
    np.testing.assert_array_equal(found["body.0.weight"], np.einsum("hwio->oihw", conv))
    np.testing.assert_array_equal(jaxlimit.torch_masks(kernel, names={"params": "weight"})["weight"], kernel)


MASK = {"a": np.array([[True, False]]), "b": np.array([True, True]), "c": None}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": {"a": "x"}}, "they differ at b"),
        ({"names": {"a": "x", "b": "y", "c": "z"}}, "they differ at c"),
        ({"names": {"a": "x", "b": "x"}}, "names must differ: x is given to several"),
        ({"names": {"a": ("x", lambda x: x[:, :1]), "b": "y"}}, "layout of a must keep every entry"),
        ({"names": {}, "model": FullyConnected([2, 1], rngs=nnx.Rngs(0))}, "either a model or names"),
        (
            {"model": FullyConnected([2, 1], rngs=nnx.Rngs(0))},
            r"not of this FullyConnected: a of shape \(1, 2\)",
        ),
    ],
)
def test_what_names_no_mask_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        jaxlimit.torch_masks(MASK, **options)


@pytest.mark.parametrize("export", [jaxlimit.torch_masks, jaxlimit.keep_zeros])
@pytest.mark.parametrize(
    ("mask", "message"), [({"a": np.ones(2)}, "a of dtype float64"), ({"a": None}, "got none")]
)
def test_what_is_no_mask_is_refused(export, mask, message):
    with pytest.raises(ValueError, match=f"mask must hold arrays of bools.*{message}"):
        export(mask)


def test_pytorch_prunes_with_the_masks(convolutional):
    """As the docstring says, the layers of the unpruned network."""
    torch = pytest.importorskip("torch")
    from torch.nn.utils import prune

    model, params, mask = convolutional
    dense, state = torch_state_dict(model), torch_state_dict(model, params)
    layers = {"linear.0": torch.nn.Linear(48, 6), "linear.2": torch.nn.Linear(6, 3)}
    net = torch.nn.Module()
    net.add_module("conv", torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3)))
    net.add_module("linear", torch.nn.Sequential(layers["linear.0"], torch.nn.ReLU(), layers["linear.2"]))
    net.load_state_dict({name: torch.from_numpy(array) for name, array in dense.items()})
    for name, kept in jaxlimit.torch_masks(mask, model=model).items():
        layer, _, parameter = name.rpartition(".")
        prune.custom_from_mask(net.get_submodule(layer), parameter, torch.from_numpy(kept))
    for name, array in state.items():
        layer, _, parameter = name.rpartition(".")
        np.testing.assert_array_equal(getattr(net.get_submodule(layer), parameter).detach().numpy(), array)


def train(optimizer, params, *, after=lambda params: params):
    """Five steps on a loss whose gradient is nowhere zero."""

    def loss(params):
        outputs = jnp.tanh(jnp.ones((3, 5)) @ params["first"] + params["bias"]) @ params["second"]
        return jnp.mean((outputs - 2.0) ** 2)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return after(optax.apply_updates(params, updates)), state

    state = optimizer.init(params)
    for _ in range(5):
        params, state = step(params, state)
    return params


@pytest.fixture(scope="module")
def network():
    rng = np.random.default_rng(0)
    params = {"first": rng.normal(size=(5, 4)), "second": rng.normal(size=(4, 2)), "bias": np.zeros(4)}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    mask = jaxlimit.magnitude_mask(partition(params)[0], 0.5)
    return params, mask, jaxlimit.apply_mask(params, mask)


@pytest.mark.parametrize(
    "optimizer", [optax.adamw(0.1), pytest.param(optax.sgd(0.1, momentum=0.9), marks=pytest.mark.slow)]
)
def test_zeros_stay_zeros_and_all_else_is_trained(network, optimizer):
    _, mask, start = network
    found = train(optax.chain(optimizer, jaxlimit.keep_zeros(mask)), start)
    expected = train(optimizer, start, after=lambda params: jaxlimit.apply_mask(params, mask))
    kept = {**mask, "bias": np.ones(4, bool)}
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6)
        np.testing.assert_array_equal(found[name] != start[name], kept[name])
        assert np.all(np.asarray(found[name])[~np.asarray(kept[name])] == 0)


def test_a_start_that_is_not_pruned_is_refused(network):
    params, mask, start = network
    keep = jaxlimit.keep_zeros(mask)
    with pytest.raises(ValueError, match="14 weights that the mask prunes are not zero"):
        keep.init(params)
    with pytest.raises(ValueError, match=r"mask has an array first of shape \(5, 4\).* one of shape"):
        keep.init({**start, "first": start["second"]})
    with pytest.raises(ValueError, match=r"mask has an array first of shape .* none of that name"):
        keep.init({name: x for name, x in start.items() if name != "first"})
    jax.jit(keep.init)(params)  # no value is known there
    optimizer = optax.chain(optax.adam(0.1), keep)
    doubled = optax.tree_utils.tree_map_params(optimizer, lambda x: 2 * x, optimizer.init(start))
    assert jax.tree.structure(doubled) == jax.tree.structure(optimizer.init(start))


def test_zeros_stay_in_a_model_of_flax_that_is_trained_by_its_own_optimizer():
    model = nnx.Sequential(nnx.Linear(6, 5, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(5, 3, rngs=nnx.Rngs(1)))
    _, params = from_nnx(model)
    mask = jaxlimit.magnitude_mask({"layers": {"0": {"kernel": params["layers"]["0"]["kernel"]}}}, 0.5)
    keep = np.asarray(mask["layers"]["0"]["kernel"])
    inputs = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
    optimizer = optax.chain(optax.adamw(0.1), jaxlimit.keep_zeros(mask))
    with pytest.raises(ValueError, match="15 weights that the mask prunes are not zero"):
        nnx.Optimizer(model, optimizer, wrt=nnx.Param)
    kernel = model.layers[0].kernel
    kernel.set_value(jnp.where(keep, kernel.get_value(), 0))
    start, trained = kernel.get_value(), nnx.Optimizer(model, optimizer, wrt=nnx.Param)

    @nnx.jit
    def step(model, trained):
        trained.update(model, nnx.grad(lambda model: jnp.mean((model(inputs) - 1) ** 2))(model))

    for _ in range(3):
        step(model, trained)
    moved = np.asarray(kernel.get_value() != start)
    assert not np.any(moved[~keep])
    assert moved.mean() > 0.4  # a relu may be off
    assert np.all(np.asarray(kernel.get_value())[~keep] == 0)


def test_masks_of_optax_are_for_whole_arrays(network):
    """Why `keep_zeros` is there; and the mask of arrays that the documentation makes."""
    _, mask, start = network
    with pytest.raises(ValueError, match="truth value"):
        optax.masked(optax.set_to_zero(), {**mask, "bias": False}).init(start)
    whole = jax.tree.map(lambda keep: keep is not None, mask, is_leaf=lambda keep: keep is None)
    assert whole == {"first": True, "second": True, "bias": False}


@pytest.mark.slow
def test_the_page_runs(tmp_path, monkeypatch):
    """After an epoch; its other blocks are of PyTorch, or use what this one makes."""
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "export.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (optimizer,) = re.findall(r"```py\n(prunable = .*?)```", page, flags=re.DOTALL)
    assert "    0.9,\n" in code
    made = {}
    short = code.replace("epochs=60", "epochs=1").replace("    0.9,\n", "    0.9,\n    max_products=1,\n")
    exec(compile(short, "export.md", "exec"), made)
    kernel, start = (x["layers"]["0"]["kernel"] for x in (made["params"], made["network"].params))
    np.testing.assert_array_equal(kernel == 0, ~np.asarray(made["network"].mask["layers"]["0"]["kernel"]))
    assert np.any(kernel != start)
    written, masks = (load_file(f"{name}-torch.safetensors") for name in ("pruned", "masks"))
    np.testing.assert_array_equal(written["linear.0.weight"] != 0, masks["linear.0.weight"])
    exec(compile(optimizer, "export.md", "exec"), made)
    made["optimizer"].init(made["params"])


def test_what_is_not_finite_elsewhere_is_no_fault_of_the_mask(network):
    _, mask, start = network
    jaxlimit.keep_zeros(mask).init({**start, "bias": np.full_like(start["bias"], np.nan)})
    gone = ~np.asarray(mask["first"])
    odd = np.array(start["first"])
    odd[tuple(np.argwhere(gone)[0])] = np.nan
    with pytest.raises(ValueError, match="1 weights that the mask prunes are not zero"):
        jaxlimit.keep_zeros(mask).init({**start, "first": odd})
