"""Softmax cross entropy in closed form: the same matrix, whoever wrote the loss, in little memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from jaxlimit.core.jaxprs import primitives
from jaxlimit.core.softmax import softmax_in_closed_form
from jaxlimit.curvature.dense_matrix import unit_vectors
from jaxlimit.curvature.linearizing import num_bytes
from jaxlimit.curvature.products import GaussNewtonProduct, HessianProduct
from jaxlimit.training import cross_entropy

WORDS = 7


def picked(values, labels):
    return jnp.take_along_axis(values, labels[..., None], -1)[..., 0]


def by_hand(z, y):
    z = z - jax.lax.stop_gradient(z.max(-1, keepdims=True))
    return jnp.mean(jnp.log(jnp.exp(z).sum(-1)) - picked(z, y))


def masked(z, y):
    """A word that cannot be, one that is unlikely, smoothed labels, and tokens that count differently."""
    z = jnp.where(jnp.arange(WORDS) == WORDS - 1, -jnp.inf, z).at[..., 0].add(-90)
    labels = optax.smooth_labels(jax.nn.one_hot(y % (WORDS - 1), WORDS), 0.1)
    logs = jax.nn.log_softmax(z)
    losses = -jnp.sum(jnp.where(jnp.isfinite(logs), labels * logs, 0), -1)
    return jnp.sum(losses * (1 + y)) / jnp.sum(1 + y)


LOSSES = {
    "own": cross_entropy,
    "optax": lambda z, y: optax.softmax_cross_entropy_with_integer_labels(z, y).mean(),
    "log_softmax": lambda z, y: -picked(jax.nn.log_softmax(z), y).mean(),
    "logsumexp": lambda z, y: (jax.nn.logsumexp(z, -1) - picked(z, y)).mean(),
    "one_hot": lambda z, y: optax.softmax_cross_entropy(z, jax.nn.one_hot(y, WORDS)).mean(),
    "by_hand": by_hand,
    "words_first": lambda z, y: -jnp.mean(picked(jax.nn.log_softmax(z.T, 0).T, y)),
    "masked": masked,
}


def predict(params, batch):
    return jnp.tanh(batch[0] @ params["a"]) @ params["b"]


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(3, 4)), "b": 2 * rng.normal(size=(4, WORDS))}  # float64
    data = rng.normal(size=(6, 3)), rng.integers(0, WORDS, 6)
    return params, data


def oracle(loss, unravel, flat, x, y):
    """Both matrices, from jax.hessian and jax.jacobian of the loss as it was written."""

    def logits(w):
        return predict(unravel(w), (x, y))

    jacobian = jax.jacobian(logits)(flat)
    outputs = jax.hessian(lambda z: loss(z, y))(logits(flat))
    gauss = jnp.einsum("icp,icjd,jdq->pq", jacobian, outputs, jacobian)
    return jax.hessian(lambda w: loss(logits(w), y))(flat), gauss


@pytest.mark.parametrize("name", ["own", "log_softmax", "by_hand", "masked"])
def test_both_curvatures_are_those_of_a_dense_oracle(name, problem):
    """In float64, of the loss as it was written."""
    params, (x, y) = problem
    loss = LOSSES[name]
    with jax.enable_x64(True):
        flat, unravel = ravel_pytree(params)
        full, gauss = map(np.asarray, jax.jit(oracle, static_argnums=(0, 1))(loss, unravel, flat, x, y))
    data = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32)
    weights = unravel(jnp.asarray(flat, jnp.float32))
    rest = jax.tree.map(lambda _: None, weights)
    units = unit_vectors(np.arange(flat.size), weights)
    whole = HessianProduct(lambda p, b: loss(predict(p, b), b[1]), "highest")
    parts = GaussNewtonProduct(predict, lambda z, b: loss(z, b[1]), "highest")
    for product, expected in ((whole, full), (parts, gauss)):
        rows = jax.tree.leaves(jax.jit(product)(weights, rest, units, data))
        found = np.concatenate([np.reshape(x, (flat.size, -1)) for x in rows], 1)
        np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("name", LOSSES)
def test_every_way_to_write_it_is_recognised(name):
    """No exponential is left that is not under a rule of its own."""
    traced = jax.make_jaxpr(LOSSES[name])(jnp.zeros((6, WORDS)), jnp.zeros(6, jnp.int32))
    assert "custom_jvp_call" in primitives(softmax_in_closed_form(traced).jaxpr)


def test_what_is_no_such_sum_stays_as_it_is():
    """Logarithms of other sums, and of exponentials that are summed in part."""
    for fn in (
        lambda z: jnp.log(jnp.sum(z**2, -1)),
        lambda z: jnp.log(1 + jnp.sum(jnp.exp(z), -1)),
        lambda z: jnp.log(jnp.exp(z)),
        lambda z: jnp.log(jnp.broadcast_to(jnp.sum(jnp.exp(z), -1, keepdims=True), z.shape)),
    ):
        traced = jax.make_jaxpr(fn)(jnp.ones((2, 3)))
        assert softmax_in_closed_form(traced) is traced


@pytest.mark.parametrize("name", ["own", "optax", "logsumexp"])
def test_large_vocabulary_takes_few_arrays_of_logits(name):
    """A Hessian keeps two, a Gauss-Newton matrix one; its product takes what a gradient does."""
    words, tokens, units = 5_000, 64, 4
    shape = jax.ShapeDtypeStruct
    params = {"a": shape((units, units), jnp.float32), "b": shape((units, words), jnp.float32)}
    batch = shape((tokens, units), jnp.float32), shape((tokens,), jnp.int32)
    rest, logits = jax.tree.map(lambda _: None, params), 4 * words * tokens
    loss = LOSSES[name]
    full = HessianProduct(lambda p, b: loss(predict(p, b), b[1]), "highest")
    gauss = GaussNewtonProduct(predict, lambda z, b: loss(z, b[1]), "highest")
    for product, arrays in ((full, 2), (gauss, 1)):
        assert num_bytes(product.linearize.shape(params, rest, batch)) < (arrays + 0.2) * logits
    vectors = jax.tree.map(lambda x: shape((1, *x.shape), x.dtype), params)
    program = jax.jit(gauss).lower(params, rest, vectors, batch).compile()
    memory = program.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 2.2 * logits
