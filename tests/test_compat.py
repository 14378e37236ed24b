"""What the paper's code predicts. Oracle: its own stored outputs, for two networks it trained."""

import json
import math
import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.stats import spearmanr

import jaxlimit
from jaxlimit import data, models, training
from jaxlimit.core.trees import flatten
from jaxlimit.geometry.magnitude import magnitude_order
from jaxlimit.limits.problem import Problem
from jaxlimit.limits.width import width_limit
from jaxlimit.reference import paper_code
from jaxlimit.spectrum import lanczos
from jaxlimit.spectrum.bracket import SpectralBracket

GOLDEN = Path(__file__).parent / "data"
CASES = {"golden_fc2_mnist": (0.892, 0.0), "golden_lenet_cifar10": (0.566, 0.17)}


@pytest.fixture(params=CASES)
def golden(request):
    """Its Ritz values, and what it makes of them."""
    folder = GOLDEN / request.param
    summary = json.loads((folder / "summary.json").read_text())["modes"]["det64"]
    with np.load(folder / "det64.npz") as arrays:
        return {"folder": folder, "summary": summary, "published": CASES[request.param], **arrays}


def test_prediction_from_its_ritz_values(golden):
    prediction, zero_share = golden["published"]
    nodes, weights, radii = golden["eigen"], golden["weight"], golden["R_list"]
    eps = golden["summary"]["ep=loss_std"]
    assert paper_code.reference_prediction(nodes, weights, radii, eps, zero_share) == prediction
    without = golden["summary"].get("pred_binned_intR_grid_q0", prediction)
    assert paper_code.reference_prediction(nodes, weights, radii, eps) == without


def test_radii_are_its_r_list(golden):
    with np.load(golden["folder"] / "weights.npz") as file:
        kernels = [file[name] for name in file.files if name.endswith("weight")]
    np.testing.assert_allclose(
        paper_code.reference_radii(magnitude_order(kernels)), golden["R_list"], rtol=1e-12
    )


def test_direct_root_is_the_one_it_would_find_without_binning(golden):
    with np.load(golden["folder"] / "weights.npz") as file:
        order = magnitude_order([file[name] for name in file.files if name.endswith("weight")])
    summary = golden["summary"]
    bracket = SpectralBracket.exact(jaxlimit.SpectralMeasure(golden["eigen"], golden["weight"]))
    expected = summary.get("pred_nobin_contR_root_q0", summary["pred_nobin_contR_root"])
    found = width_limit(bracket, Problem(order, summary["ep=loss_std"]))
    assert found.value == pytest.approx(expected, abs=2e-4)


def test_binned_spectrum_keeps_mass_by_chance():
    """A Gaussian narrower than the spacing: on a point it keeps too much, between two hardly any."""
    spacing = 200.02 / 99_999
    between, on = 50_000.5 * spacing - 0.01, 70_000 * spacing - 0.01
    points, mass = paper_code.binned_spectrum(
        np.array([0.0, between, on, 200.0]), np.array([0.0, 0.5, 0.5, 0.0])
    )
    assert (points[0], points[-1], len(points)) == (-0.01, 200.01, 100_000)
    assert np.sum(mass) == pytest.approx(1)
    # exp(-x^2 / 2 sigma^2) at twice half a spacing against once 0.
    expected = 2 * np.exp(-((spacing / 2) ** 2) / (2e-10 * 200.02))
    kept = np.sum(mass[np.abs(points - between) < 1]) / np.sum(mass[np.abs(points - on) < 1])
    assert kept == pytest.approx(expected, rel=1e-3)
    assert kept < 1e-9


def test_weights_without_curvature_are_counted():
    """A dead unit: a quarter of the kernel weights feed an output that is not used."""
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.standard_normal((50, 8)), jnp.float32)
    batches = jaxlimit.batched(jnp.asarray(rng.standard_normal((64, 50)), jnp.float32), 32)

    def loss(params, inputs):
        return jnp.mean((inputs @ params["kernel"])[:, :6] ** 2) + params["bias"].sum() * 0

    curvature = jaxlimit.hessian(loss, {"kernel": kernel, "bias": jnp.ones(3)}, batches)
    share = paper_code.zero_row_share(curvature, magnitude_order(curvature.weights))
    order = magnitude_order(curvature.weights).order[np.maximum(np.arange(100) * 4, 1) - 1]
    assert share == pytest.approx(np.mean(order % 8 >= 6))
    assert 0.1 < share < 0.4


def test_spectrum_leaves_out_batch_norm_and_keeps_biases():
    params = {
        "dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
        "norm": {"scale": jnp.ones(2), "bias": jnp.ones(2), "count": jnp.array(3)},
    }
    chosen = paper_code.spectrum_parameters(params)
    assert chosen == {
        "dense": {"kernel": True, "bias": True},
        "norm": {"scale": False, "bias": False, "count": False},
    }


def golden_curvature(case, make, load, num_examples, image_layout, tmp_path, dtype=np.float32):
    """The Hessian at its weights on its examples, eps, and its vectors as trees of parameters, by name."""
    folder = GOLDEN / case
    with np.load(folder / "weights.npz") as file:
        shapes = {name: file[name].shape for name in file["__order__"]}
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])[:-1]

    def parameters(file):
        predict, params = models.from_nnx(models.load_torch_state(make(rngs=nnx.Rngs(0)), file))
        return predict, jax.tree.map(lambda x: jnp.asarray(x, dtype), params)

    def as_parameters(vector):
        parts = zip(shapes.items(), np.split(vector.astype(np.float32), ends), strict=True)
        np.savez(tmp_path / "vector.npz", **{name: x.reshape(shape) for (name, shape), x in parts})
        return parameters(tmp_path / "vector.npz")[1]

    predict, params = parameters(folder / "weights.npz")
    with np.load(folder / "det64.npz") as file:
        vectors = {name: as_parameters(file[name]) for name in ("v0_sign", "Hv0")}
    found = load()
    images = image_layout(found.train_images[:num_examples]).astype(dtype)
    batches = jaxlimit.batched((images, found.train_labels[:num_examples]), 128)
    loss = training.classification_loss(predict)
    eps = jaxlimit.loss_statistics(loss, params, batches).batch_std
    return jaxlimit.hessian(loss, params, batches), eps, vectors


@pytest.mark.slow
@pytest.mark.mnist
@pytest.mark.skipif("JAXLIMIT_DATA" not in os.environ, reason="needs MNIST under $JAXLIMIT_DATA")
def test_prediction_from_its_weights(tmp_path):
    """From weights, data and start vector to the prediction, by our products and our Lanczos."""
    curvature, eps, vectors = golden_curvature(
        "golden_fc2_mnist",
        partial(models.fc2, 784),
        data.load_mnist,
        2048,
        data.flatten_channel_first,
        tmp_path,
    )
    key = jax.random.key(0)
    start = vectors["v0_sign"]
    found = paper_code.reference_limit(curvature, key, loss_tolerance=eps, num_matvecs=64, probe=start)
    assert (found.value, found.zero_share, found.num_matvecs) == (0.892, 0.0, 64)
    assert found.direct == pytest.approx(0.8894, abs=5e-4)
    other = paper_code.reference_limit(curvature, key, loss_tolerance=eps, num_matvecs=64)
    assert 0.7 < other.value < 0.97
    assert other.value != found.value


@pytest.mark.nightly
@pytest.mark.cifar10
@pytest.mark.skipif("JAXLIMIT_DATA" not in os.environ, reason="needs CIFAR-10 under $JAXLIMIT_DATA")
def test_product_of_its_convolutional_network(tmp_path, x64):
    """Loss tolerance and Hessian product of its LeNet over all parameters, in float64."""
    curvature, eps, vectors = golden_curvature(
        "golden_lenet_cifar10", models.LeNet, data.load_cifar10, 1024, np.asarray, tmp_path, np.float64
    )
    summary = json.loads((GOLDEN / "golden_lenet_cifar10" / "summary.json").read_text())["modes"]["det64"]
    assert eps == pytest.approx(summary["ep=loss_std"], rel=1e-5)
    curvature = curvature.of(lambda path, leaf: True)
    assert curvature.dim == 121_182
    product = flatten(curvature.matvec(vectors["v0_sign"])) / np.sqrt(curvature.dim)
    expected = flatten(vectors["Hv0"])
    assert np.linalg.norm(product - expected) < 1e-6 * np.linalg.norm(expected)


@pytest.mark.nightly
@pytest.mark.cifar10
@pytest.mark.skipif("JAXLIMIT_DATA" not in os.environ, reason="needs CIFAR-10 under $JAXLIMIT_DATA")
def test_prediction_of_a_convolutional_network_from_its_weights(tmp_path, monkeypatch):
    """The same for LeNet on its first 1,024 images, in order, with its row norms and with ours.

    Its 100 row norms are not of these images; its loader shuffles and augments. They are of the same weights:
    in the same order, and what vanishes here vanishes there. But 17 vanish there and 8 here.
    """
    curvature, eps, vectors = golden_curvature(
        "golden_lenet_cifar10", models.LeNet, data.load_cifar10, 1024, np.asarray, tmp_path
    )
    everything = curvature.of(paper_code.spectrum_parameters(curvature.params))
    order = magnitude_order(curvature.weights)
    with np.load(GOLDEN / "golden_lenet_cifar10" / "det64.npz") as file:
        theirs = file["row_norms"]
    rows = paper_code.row_norms(everything, paper_code.percentile_rows(everything, order))
    assert spearmanr(rows, theirs)[0] > 0.95
    assert np.all(theirs[rows < paper_code.ROW_NORM] < 1e-7)

    tridiagonal = lanczos.tridiagonalize(everything.matvec, vectors["v0_sign"], 64)
    monkeypatch.setattr(lanczos, "tridiagonalize", lambda *_: tridiagonal)  # each time the same

    def prediction(norms):
        monkeypatch.setattr(paper_code, "row_norms", lambda *_: norms)
        found = paper_code.reference_limit(
            curvature, jax.random.key(0), loss_tolerance=eps, num_matvecs=64, probe=vectors["v0_sign"]
        )
        return found.value, found.zero_share, found.num_matvecs

    # A batch's mean is 128 times what its code divides by the number of examples.
    assert prediction(128 * theirs) == (0.566, 0.17, 64)
    assert prediction(rows) == (0.533, 0.08, 64)
    assert prediction(np.ones(100)) == (0.504, 0.0, 64)


def test_the_distance_from_a_width_limit_is_explained():
    """A diagonal H, all of whose eigenvalues one Lanczos run finds: only binning and integers differ."""
    weights = jnp.asarray(np.random.default_rng(0).standard_normal((40, 1)), jnp.float32)
    scales = jnp.repeat(jnp.asarray([0.01, 0.1, 1.0, 3.0]), 10)

    def loss(w, rows):
        return jnp.mean((rows @ (w - weights)) ** 2) / 2

    curvature = jaxlimit.hessian(
        loss, weights, jaxlimit.batched(jnp.sqrt(40) * jnp.diag(jnp.sqrt(scales)), 40)
    )
    limit = jaxlimit.pruning_limit(curvature, jax.random.key(0), loss_tolerance=1.0, which=["width"])
    found = jaxlimit.reference_limit(curvature, jax.random.key(1), loss_tolerance=1.0)
    assert found.num_matvecs == 4
    # The root of a step function of s, where our limit is the last of 40 weights that are within.
    assert limit.width.value <= found.direct <= limit.width.value + 1 / 40 + 1e-6
    assert found.zero_share == 0
    change = f"{found.value:.3f} ({found.value - limit.width.value:+.4f} against width)"
    assert f"The paper's code would predict {change}" in found.against(limit.width.value)
