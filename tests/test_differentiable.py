"""The differentiable width dimension: its value and its gradient, on a small trained network in float64.

Oracles: `geometry.width_dimension` of the dense eigenvalues, and central differences of that.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlimit
from jaxlimit import geometry
from jaxlimit.core.trees import flatten, partition
from jaxlimit.experiments import regularizer
from jaxlimit.experiments.regularizer import Flatness, flat_loss
from jaxlimit.experiments.study import Study
from jaxlimit.geometry import differentiable
from jaxlimit.spectrum.probes import rademacher
from jaxlimit.training.losses import classification_loss


def predict(params, batch):
    return jnp.tanh(batch[0] @ params["a"] + params["b"]) @ params["c"]


def cross_entropy(outputs, batch):
    return -jnp.mean(jnp.sum(batch[1] * jax.nn.log_softmax(outputs), axis=1))


@pytest.fixture
def problem():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        batch = jnp.asarray(rng.standard_normal((30, 5))), jnp.asarray(np.eye(3)[rng.integers(0, 3, 30)])
        params = {
            "a": rng.standard_normal((5, 6)),
            "b": rng.standard_normal(6),
            "c": rng.standard_normal((6, 3)),
        }
        yield jax.tree.map(jnp.asarray, params), batch


def dense(params, batch, sparsity, eps):
    curvature = jaxlimit.gauss_newton(predict, cross_entropy, params, [batch])
    values = np.linalg.eigvalsh(curvature.dense())
    measure = jaxlimit.SpectralMeasure(values, np.full(len(values), 1 / len(values)))
    radius = float(jaxlimit.removed_norm(curvature.weights, sparsity))
    return geometry.width_dimension(measure, radius, eps)


def all_probes(params):
    """Signs whose mean of z z^T is the identity (a Hadamard matrix of order 48): the trace without error."""
    matrix = np.array([[1]])
    for _ in range(6):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    signs = matrix[:, :48].astype(float)  # 64 probes of 48 weights: columns are orthogonal
    return {
        "a": jnp.asarray(signs[:, :30].reshape(64, 5, 6)),
        "b": None,
        "c": jnp.asarray(signs[:, 30:].reshape(64, 6, 3)),
    }


@pytest.mark.parametrize(
    ("sparsity", "eps"), [(0.3, 1e-3), pytest.param(0.8, 1e-2, marks=pytest.mark.nightly), (1.0, 0.1)]
)
def test_value_and_gradient_are_those_of_the_dense_matrix(problem, sparsity, eps):
    params, batch = problem
    probes = all_probes(params)

    @jax.jit
    def dimension(params):
        return differentiable.width_dimension_of_params(
            predict,
            cross_entropy,
            params,
            batch,
            probes,
            sparsity=sparsity,
            loss_tolerance=eps,
            accuracy=1e-10,
        )

    value, gradient = jax.value_and_grad(dimension)(params)
    assert float(value) == pytest.approx(dense(params, batch, sparsity, eps), rel=1e-8)
    rng = np.random.default_rng(1)
    for name in params:  # biases as well: they are not pruned, and yet the curvature depends on them
        direction = jax.tree.map(jnp.zeros_like, params) | {
            name: jnp.asarray(rng.standard_normal(params[name].shape))
        }
        moved = [jax.tree.map(lambda p, d, h=h: p + h * d, params, direction) for h in (1e-5, -1e-5)]
        difference = (dense(moved[0], batch, sparsity, eps) - dense(moved[1], batch, sparsity, eps)) / 2e-5
        along = sum(float(jnp.vdot(gradient[key], direction[key])) for key in params)
        assert along == pytest.approx(difference, rel=1e-5, abs=1e-9), name


def test_the_regularised_loss_is_the_loss_and_the_term(problem):
    """With a probe for each batch: the same for the same examples, another for others."""
    params, (x, y) = problem
    labels = jnp.argmax(y, axis=1)

    def logits(params, inputs):
        return predict(params, (inputs,))

    term = Flatness(weight=2.0, sparsity=0.8, loss_tolerance=1e-2)
    total = flat_loss(logits, term, jax.random.key(0))
    plain = classification_loss(logits)
    terms = [
        (float(total(params, batch)) - float(plain(params, batch))) / 2
        for batch in [(x, labels), (x, labels), (x[::-1], labels[::-1]), (x[:20], labels[:20])]
    ]
    assert terms[0] == terms[1]
    assert terms[3] != terms[0]
    assert terms[0] == pytest.approx(1 - dense(params, (x, y), 0.8, 1e-2), abs=4 * np.sqrt(2 / 48))


def test_random_probes_scatter_around_it_as_their_error_says(problem):
    params, batch = problem
    weights = {"a": params["a"], "b": None, "c": params["c"]}
    exact = dense(params, batch, 0.8, 1e-2)

    @jax.jit
    def estimate(probes):
        return differentiable.width_dimension_of_params(
            predict, cross_entropy, params, batch, probes, sparsity=0.8, loss_tolerance=1e-2
        )

    estimates = [float(estimate(rademacher(jax.random.key(seed), weights, 8))) for seed in range(20)]
    # At most sqrt(2 / (D P)) for values between 0 and 1, divided by 2 since their variance is at most 1/4.
    assert abs(np.mean(estimates) - exact) < 4 * np.sqrt(2 / (48 * 8)) / 2 / np.sqrt(20)
    assert 0 < np.std(estimates) < np.sqrt(2 / (48 * 8))


@pytest.mark.slow
def test_the_gradient_of_a_training_step_is_that_of_an_exact_solve(monkeypatch):
    """On digits, where a solve that ends early has a gradient several times too large."""
    task = Study(seeds=1, epochs=5).task()
    subject = task.trained(0)
    batch = tuple(array[:128] for array in task.train)

    def gradient():
        loss = flat_loss(subject.predict, Flatness(1.0, 0.8, 0.01), jax.random.key(0))
        return flatten(partition(jax.grad(loss)(subject.params, batch))[0])

    used = gradient()
    monkeypatch.setattr(regularizer, "ACCURACY", 1e-5)
    monkeypatch.setattr(regularizer, "MAX_MATVECS", 5000)
    exact = gradient()
    assert np.linalg.norm(used - exact) < 0.1 * np.linalg.norm(exact)


def test_weights_that_are_zero_can_go(problem):
    """All directions are flat where R(s) = 0, and no step changes that."""
    params, batch = problem
    params = params | {"a": 0 * params["a"]}  # 30 of 48

    def dimension(params):
        return differentiable.width_dimension_of_params(
            predict, cross_entropy, params, batch, all_probes(params), sparsity=0.5, loss_tolerance=0.1
        )

    value, gradient = jax.value_and_grad(dimension)(params)
    assert value == dense(params, batch, 0.5, 0.1) == 1
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 0.0}, r"sparsity must be in \(0, 1\], got 0.0"),
        ({"sparsity": 1.1}, r"sparsity must be in \(0, 1\], got 1.1"),
        ({"max_matvecs": 0}, "max_matvecs must be an integer of at least 1"),
        ({"accuracy": -1.0}, "accuracy must be between 0 and 1"),
        ({"sparsity": 0.001}, "removes none of 48 weights"),
        ({"loss_tolerance": 0.0}, "loss_tolerance must be a positive finite number, got 0.0"),
    ],
)
def test_bad_arguments_are_named(problem, arguments, message):
    params, batch = problem
    with pytest.raises(ValueError, match=message):
        differentiable.width_dimension_of_params(
            predict,
            cross_entropy,
            params,
            batch,
            all_probes(params),
            **({"sparsity": 0.5, "loss_tolerance": 0.1} | arguments),
        )


@pytest.mark.parametrize("eps", [1e-2, 1e-4, 1e-6, 1e-8])
def test_a_solve_that_did_not_end_is_no_number(eps):
    """The dense value of the same probes in float64, to .01, or NaN. lambda_max / a is 2e6 and more."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=60).astype(np.float32)
    rotation = np.linalg.qr(rng.normal(size=(60, 60)))[0]
    inputs = (rotation * 10 ** np.linspace(-4, 2, 60) * np.sqrt(60)).T.astype(np.float32)
    probes = np.where(rng.random((8, 60, 1)) < 0.5, -1, 1).astype(np.float32)
    matrix, ridge = inputs.astype(float).T @ inputs / 60, 2 * eps / np.sum(np.sort(np.abs(weights))[:30] ** 2)
    solved = np.linalg.solve(matrix + ridge * np.eye(60), probes[..., 0].T.astype(float))
    dense_value = ridge * np.mean(np.sum(probes[..., 0].T * solved, axis=0)) / 60

    def found(**asked):
        return differentiable.width_dimension_of_params(
            lambda w, x: x @ w,
            lambda outputs, x: jnp.mean(outputs**2) / 2,
            jnp.asarray(weights)[:, None],
            jnp.asarray(inputs),
            jnp.asarray(probes),
            sparsity=0.5,
            loss_tolerance=eps,
            **asked,
        )

    value = found()
    assert np.isnan(value) or value == pytest.approx(dense_value, abs=0.01)
    assert np.isnan(found(max_matvecs=10))


def test_probes_are_like_the_weights(problem):
    params, batch = problem
    for probes in (jnp.ones((2, 3)), jax.tree.map(lambda x: x[:0], all_probes(params))):
        with pytest.raises(ValueError, match="probes must be vectors like the weights"):
            differentiable.width_dimension_of_params(
                predict, cross_entropy, params, batch, probes, sparsity=0.5, loss_tolerance=0.1
            )
