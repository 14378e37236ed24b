"""Scores of other orders, each against its definition in plain NumPy or a dense float64 matrix."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from jaxlimit import batched, hessian, models
from jaxlimit.baselines import (
    curvature_diagonal,
    gauss_newton_diagonal,
    obd_scores,
    orders,
    taylor_scores,
    wanda_scores,
)
from jaxlimit.core.trees import combine, flatten, partition
from jaxlimit.models.convolutional import Convolution, ConvolutionalNetwork, Pool
from jaxlimit.training.losses import classification_loss, cross_entropy


def classifier(widths=(5, 4, 3)):
    """A dense network, and seven examples in batches of four and three."""
    predict, params = models.from_nnx(models.FullyConnected(widths, rngs=nnx.Rngs(0)))
    random = np.random.default_rng(0)
    arrays = random.normal(size=(7, 5)).astype(np.float32), random.integers(0, 3, 7)
    return predict, params, arrays, batched(arrays, 4)


def on_inputs(predict):
    return lambda params, batch: predict(params, batch[0])


def dense_matrices():
    """Exact Hessian and Gauss-Newton matrix of the mean loss of all examples, float64; and its gradient."""
    predict, params, (inputs, labels), _ = classifier()
    with jax.enable_x64(True):
        weights, rest = partition(jax.tree.map(lambda x: np.asarray(x, np.float64), params))
        flat, restore = ravel_pytree(weights)
        wide = jnp.asarray(inputs, jnp.float64), jnp.asarray(labels)

        def logits(flat):
            return predict(combine(restore(flat), rest), wide[0])

        def loss(flat):
            return cross_entropy(logits(flat), wide[1])

        @jax.jit
        def found(flat):
            jacobian = jax.jacobian(logits)(flat).reshape(-1, flat.size)
            outer = jax.hessian(lambda z: cross_entropy(z.reshape(7, 3), wide[1]))(logits(flat).ravel())
            return jax.hessian(loss)(flat), jacobian.T @ outer @ jacobian, jax.grad(loss)(flat), flat

        return tuple(map(np.asarray, found(flat)))


def test_obd_and_taylor_are_those_of_the_dense_matrices():
    predict, params, _, batches = classifier()
    whole, gauss, gradient, weights = dense_matrices()
    diagonal = gauss_newton_diagonal(
        on_inputs(predict), lambda z, batch: cross_entropy(z, batch[1]), params, batches
    )
    np.testing.assert_allclose(flatten(diagonal), np.diag(gauss), rtol=1e-4, atol=1e-7)
    curvature = hessian(classification_loss(predict), params, batches)
    np.testing.assert_allclose(
        flatten(obd_scores(curvature.weights, diagonal)),
        weights**2 * np.diag(gauss) / 2,
        rtol=1e-4,
        atol=1e-7,
    )
    np.testing.assert_allclose(
        flatten(taylor_scores(curvature)), np.abs(weights * gradient), rtol=1e-3, atol=1e-6
    )
    estimated = flatten(curvature_diagonal(curvature, jax.random.key(0), num_probes=36))
    spread = np.sqrt((whole**2).sum(1) - np.diag(whole) ** 2) / 6
    assert np.all(np.abs(estimated - np.diag(whole)) <= 4 * spread + 1e-6)
    assert np.any(estimated < 0)
    lowest = np.argmin(estimated)
    assert (
        flatten(obd_scores(curvature.weights, curvature_diagonal(curvature, jax.random.key(0))))[lowest] >= 0
    )


def test_a_large_batch_is_cut_to_its_jacobians(monkeypatch):
    predict, params, _, batches = classifier()

    def loss(z, batch):
        return cross_entropy(z, batch[1])

    expected = gauss_newton_diagonal(on_inputs(predict), loss, params, batches)
    monkeypatch.setattr(orders, "JACOBIAN_SIZE", 200)  # 2 examples of 3 outputs and 32 weights
    found = gauss_newton_diagonal(on_inputs(predict), loss, params, batches)
    np.testing.assert_allclose(flatten(found), flatten(expected), rtol=1e-5)
    stream = gauss_newton_diagonal(on_inputs(predict), loss, params, list(batches))
    np.testing.assert_allclose(flatten(stream), flatten(expected), rtol=1e-5)


def test_wanda_is_the_magnitude_times_the_root_mean_square_of_the_inputs():
    predict, params, (inputs, _), batches = classifier()
    scores = wanda_scores(on_inputs(predict), params, batches)["layers"]
    first, last = (np.asarray(params["layers"][number]["kernel"], float) for number in ("0", "1"))
    hidden = np.maximum(inputs.astype(float) @ first + np.asarray(params["layers"]["0"]["bias"]), 0)
    for kernel, x, found in ((first, inputs.astype(float), scores["0"]), (last, hidden, scores["1"])):
        for row in range(kernel.shape[0]):
            for column in range(kernel.shape[1]):
                expected = abs(kernel[row, column]) * np.sqrt(np.mean(x[:, row] ** 2))
                assert found["kernel"][row, column] == pytest.approx(expected, rel=1e-5)
        assert found["bias"] is None


def patches_of(images, size, padding):
    """(places, rows, columns, channels) of every window of all images."""
    images = np.pad(np.float64(images), ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    _, height, width, _ = images.shape
    return np.concatenate(
        [
            images[:, i : i + size, j : j + size]
            for i in range(height - size + 1)
            for j in range(width - size + 1)
        ]
    )


@pytest.mark.parametrize("library", ["of ours", "of JAX"])
def test_wanda_of_a_convolution_takes_what_each_entry_of_its_kernel_meets(library):
    images = np.random.default_rng(1).normal(size=(3, 4, 4, 2)).astype(np.float32)
    network = ConvolutionalNetwork(
        [Convolution(3, 3, padding=1), Pool()], [], 2, image_shape=(4, 4, 2), rngs=nnx.Rngs(0)
    )
    predict, params = models.from_nnx(network)
    kernel = params["convolutions"]["0"]["kernel"]
    if library == "of JAX":
        dims = ("NHWC", "HWIO", "NHWC")
        convolve = partial(jax.lax.conv_general_dilated, window_strides=(1, 1), padding="SAME")
        params, predict = kernel, lambda kernel, x: convolve(x, kernel, dimension_numbers=dims)
    scores = wanda_scores(predict, params, batched(images, 2))
    squares = np.mean(patches_of(images, 3, 1) ** 2, axis=0)
    expected = np.abs(np.float64(kernel)) * np.sqrt(squares)[..., None]
    found = scores if library == "of JAX" else scores["convolutions"]["0"]["kernel"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_wanda_takes_other_layouts_and_uses_a_shared_kernel_twice():
    x = np.random.default_rng(2).normal(size=(6, 3)).astype(np.float32)
    w = np.random.default_rng(3).normal(size=(3, 3)).astype(np.float32)

    def twice(w, x):
        return jax.jit(lambda x: jnp.tanh(x @ w.T))(x) @ w.reshape(9)[::-1].reshape(3, 3)

    found = wanda_scores(twice, w, batched(x, 6))
    hidden = np.tanh(x @ w.T)
    for row in range(3):
        for column in range(3):
            mean = (np.mean(x[:, column] ** 2) + np.mean(hidden[:, 2 - row] ** 2)) / 2
            assert found[row, column] == pytest.approx(abs(w[row, column]) * np.sqrt(mean), rel=1e-5)


@pytest.mark.parametrize(
    ("predict", "message"),
    [
        (lambda w, x: x @ (2 * w), "params is used by mul"),
        (lambda w, x: w[x.astype(int)], "params is used by"),
        (lambda w, x: x, "no product of inputs with params"),
        (lambda w, x: x @ w @ jnp.dot(w, w), "params and params is used by dot_general"),
        (lambda w, x: jax.lax.scan(lambda h, _: (h @ w, None), x, length=2)[0], "params is used by scan"),
    ],
)
def test_wanda_refuses_what_is_no_product_with_inputs(predict, message):
    with pytest.raises(ValueError, match=message):
        wanda_scores(predict, jnp.ones((2, 2)), batched(jnp.ones((3, 2)), 3))


def test_squares_of_inputs_in_half_precision_are_summed_in_float32():
    """900 from each of 128 examples is beyond float16."""
    inputs, weights = np.full((128, 3), 30, np.float16), np.array([[1.0], [-2.0], [0.5]], np.float16)
    scores = wanda_scores(lambda w, x: x @ w, jnp.asarray(weights), batched(inputs, 128))
    np.testing.assert_allclose(scores, 30 * np.abs(weights.astype(np.float64)), rtol=1e-3)


def test_complex_inputs_have_no_squares_to_sum():
    batches = batched(np.full((4, 3), 1j, np.complex64), 4)
    with pytest.raises(ValueError, match="takes real inputs, but complex ones meet params"):
        wanda_scores(lambda w, x: jnp.abs(x @ w), jnp.ones((3, 1)), batches)
