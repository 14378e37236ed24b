"""N:M masks against a loop over (|w|, index) pairs; predicted losses against jax.hessian in float64."""

import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

from jaxlimit import (
    Pruned,
    batched,
    gauss_newton,
    hessian,
    magnitude_mask,
    models,
    nm_mask,
    predicted_loss,
    prune,
)
from jaxlimit.core.trees import combine, flatten, partition

PATH = Path(__file__).parents[1] / "docs" / "groups.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PATH.read_text(), flags=re.DOTALL)
# Few different magnitudes, of both signs: most of them are tied.
tied = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 2.0])


def kept_by_sorting(values, n, m):
    """Of each m in a row the n that come last when (|w|, index) pairs are sorted."""
    kept = []
    for start in range(0, len(values), m):
        pairs = sorted((abs(x), i) for i, x in enumerate(values[start : start + m]))
        largest = {i for _, i in pairs[len(pairs) - n :]}
        kept += [i in largest for i in range(m)]
    return kept


@settings(max_examples=60)
@given(st.integers(1, 4), st.integers(0, 3), st.integers(1, 3), st.integers(0, 2), st.data())
def test_the_n_largest_of_every_m_are_kept(n, more, count, axis, data):
    m = n + more
    shape = [2, 3, 2]
    shape[axis] = m * count
    values = data.draw(st.lists(tied, min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
    weights = np.array(values, np.float32).reshape(shape)
    mask = np.asarray(nm_mask(weights, n, m, axis))
    assert mask.dtype == bool
    others = [range(size) for number, size in enumerate(shape) if number != axis]
    for index in itertools.product(*others):
        line = (*index[:axis], slice(None), *index[axis:])
        assert mask[line].tolist() == kept_by_sorting(weights[line].tolist(), n, m)
    np.testing.assert_array_equal(mask, nm_mask(weights, n, m, axis - 3))


def test_a_leaf_that_m_does_not_divide_is_kept_whole():
    """The axis of inputs is the default, of dense and of convolution kernels."""
    rng = np.random.default_rng(0)
    weights = {
        "image": rng.normal(size=(3, 3, 3, 4)),
        "conv": rng.normal(size=(3, 3, 8, 2)),
        "dense": rng.normal(size=(8, 3)),
        "bias": None,
    }
    mask = nm_mask(weights, 2, 4)
    assert mask["bias"] is None
    assert np.all(mask["image"])
    assert np.all(np.sum(np.reshape(mask["dense"], (2, 4, 3)), axis=1) == 2)
    assert np.all(np.sum(np.reshape(mask["conv"], (3, 3, 2, 4, 2)), axis=3) == 2)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((0, 4), "n must be an integer of at least 1"),
        ((2.0, 4), "n must be an integer of at least 1"),
        ((5, 4), "n must be at most m, got 5:4"),
        ((2, 4, 1.0), "axis must be an integer"),
        ((2, 4, 2), r"axis 2 does not exist in \['a'\], of shape \(6, 8\)"),
        ((2, 5), r"m = 5 divides axis -2 of no leaf, of shapes \[\(6, 8\)\]"),
    ],
)
def test_patterns_that_cannot_be(args, message):
    with pytest.raises(ValueError, match=message):
        nm_mask({"a": np.ones((6, 8))}, *args)
    with pytest.raises(ValueError, match=r"\['a'\] holds weights that are not finite"):
        nm_mask({"a": np.full((4, 1), np.nan)}, 2, 4)


# Predicted losses.


@pytest.fixture
def quadratic(mlp):
    """Gradient, Hessian, Gauss-Newton matrix and weights of the full batch, by JAX's own transformations."""
    with jax.enable_x64(True):
        to64 = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)  # noqa: E731
        weights, rest = partition(to64(mlp.params))
        flat, unravel = ravel_pytree(weights)
        arrays = to64(mlp.arrays)

        def loss(vector):
            return mlp.loss(combine(unravel(vector), rest), arrays)

        def outputs(vector):
            return mlp.predict(combine(unravel(vector), rest), arrays)

        jacobian = jax.jacobian(outputs)(flat)
        curved = jax.hessian(lambda z: mlp.output_loss(z, arrays))(outputs(flat))
        matrix = jnp.einsum("abi,abcd,cdj->ij", jacobian, curved, jacobian)
        return np.asarray(jax.grad(loss)(flat)), np.asarray(jax.hessian(loss)(flat)), np.asarray(matrix), loss


def masks_of(weights, rng):
    yield magnitude_mask(weights, 0.4)
    yield nm_mask(weights, 2, 4)
    yield jax.tree.map(lambda x: rng.random(x.shape) < 0.5, weights)
    yield jax.tree.map(lambda x: np.zeros(x.shape, np.int32), weights)


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_the_prediction_is_that_of_the_dense_matrix(mlp, dtype, quadratic, kind):
    batches = batched(mlp.arrays, mlp.batch_size)
    args = (mlp.loss,) if kind == "hessian" else (mlp.predict, mlp.output_loss)
    curvature = {"hessian": hessian, "gauss_newton": gauss_newton}[kind](*args, mlp.params, batches)
    gradient, signed, positive, loss = quadratic
    matrix = signed if kind == "hessian" else positive
    weights, rng = flatten(curvature.weights), np.random.default_rng(0)
    for mask in masks_of(curvature.weights, rng):
        keep = flatten(mask)
        c = np.where(keep == 0, weights, 0)
        with jax.enable_x64(True):
            rise = float(loss(weights - c) - loss(weights))
        expected = [-gradient @ c + c @ matrix @ c / 2, -gradient @ c, c @ matrix @ c / 2, rise]
        found = predicted_loss(curvature, mask)
        got = [found.increase, found.linear, found.quadratic, found.rise]
        np.testing.assert_allclose(got, expected, atol=3e-6 if dtype == np.float32 else 1e-12)
        assert found.sparsity == pytest.approx(np.mean(keep == 0), abs=1e-15)


def test_one_product_a_mask_and_none_where_nothing_goes(mlp, monkeypatch):
    curvature = hessian(mlp.loss, mlp.params, batched(mlp.arrays, 5))
    products = []
    matvec = type(curvature).matvec
    monkeypatch.setattr(type(curvature), "matvec", lambda self, v: products.append(1) or matvec(self, v))
    predicted_loss(curvature, magnitude_mask(curvature.weights, 0.5))
    assert len(products) == 1
    assert predicted_loss(curvature, magnitude_mask(curvature.weights, 0)).increase == 0
    assert len(products) == 1


def test_the_mask_of_a_pruned_network_is_taken(mlp):
    """Also where biases were readjusted; the rise of the loss is that of the cut, not of the readjusting."""
    batches = batched(mlp.arrays, 5)
    args = mlp.predict, mlp.output_loss, mlp.params, batches
    mask = nm_mask(partition(mlp.params)[0], 2, 4)
    network = prune(*args, mask=mask, trainable=lambda path, leaf: True, max_products=1)
    assert isinstance(network, Pruned)
    curvature = hessian(mlp.loss, mlp.params, batches)
    assert predicted_loss(curvature, network.mask) == predicted_loss(curvature, mask)
    assert np.all(flatten(partition(network.params)[0])[flatten(mask) == 0] == 0)


def test_what_is_no_mask_is_refused(mlp):
    curvature = hessian(mlp.loss, mlp.params, batched(mlp.arrays, 5))
    mask = magnitude_mask(curvature.weights, 0.5)
    other = jax.tree.map(lambda x: x[:1], mask)
    for wrong in (None, True, flatten(mask) > 0, other, jax.tree.map(lambda x: True, mask), mask["hidden"]):
        with pytest.raises(ValueError, match=r"mask must hold bools \(or 0 and 1\) in the shapes"):
            predicted_loss(curvature, wrong)
    with pytest.raises(ValueError, match="scores are no mask"):
        predicted_loss(curvature, curvature.weights)
    with pytest.raises(ValueError, match="curvature must be a Curvature"):
        predicted_loss(mlp.loss, mask)  # pyright: ignore[reportArgumentType]


def run_example(code, names):
    few = code.replace("epochs=60", "epochs=2").replace("mask=half", "mask=half, max_products=2")
    exec(
        compile(
            few.replace("batches, 0.5, groups=labels", "batches, 0.5, groups=labels, max_products=2"),
            PATH,
            "exec",
        ),
        names,
    )


def test_the_first_example_of_the_documentation_runs(capsys):
    """With less training and fewer products."""
    assert "epochs=60" in EXAMPLES[0]
    run_example(EXAMPLES[0], {})
    found = capsys.readouterr().out
    assert re.search(r"^2:4: predicted increase .*, at sparsity 0\.5000$", found, flags=re.MULTILINE)
    assert "Pruned network of sparsity 0.5000" in found


@pytest.mark.nightly
def test_the_other_examples_of_the_documentation_run(capsys, monkeypatch):
    """In the order of the page, the one with Flax on a narrower network."""
    bare, coupled, with_flax, smaller = EXAMPLES
    names = {}
    run_example(bare, names)
    capsys.readouterr()
    run_example(coupled, names)
    assert re.fullmatch(r"32 units, one_shot .*\n0\.5 16 units are left\n", capsys.readouterr().out)
    monkeypatch.setattr(models, "digits_net", lambda *, rngs: models.FullyConnected([64, 4, 10], rngs=rngs))
    run_example(with_flax, names)
    assert "(296 weights in 68 groups, 1,438 examples)" in " ".join(capsys.readouterr().out.split())
    run_example(smaller, names)
    assert "of 160 parameters, 310 before\nsame outputs: True\n148 of 296 mult" in capsys.readouterr().out
