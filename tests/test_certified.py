"""Intervals on 20 random problems with known eigenvalues: five spectra, four seeds, definite and indefinite.

Three of the seeds are slow tests.

The loss is quadratic, so H is the matrix it was made from: H = sum_i lambda_i v_i v_i^T with random
orthonormal v_i. Truth: `truth_of_matrix`, a scan over every n in float64, and for one probe alone a sum over
all eigenvalues as this probe sees them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_limit import truth_of_matrix

import jaxlimit
from jaxlimit.geometry.magnitude import magnitude_order
from jaxlimit.limits.problem import Problem
from jaxlimit.limits.status import Code
from jaxlimit.limits.width import width_limit
from jaxlimit.spectrum import lanczos
from jaxlimit.spectrum.bracket import SpectralBracket, bracket_indefinite, bracket_semidefinite
from jaxlimit.spectrum.measure import SpectralMeasure
from jaxlimit.spectrum.probes import rademacher

DIM = 320
seeds = pytest.mark.parametrize("seeds", [(0,), pytest.param((1, 2, 3), marks=pytest.mark.nightly)])


def spectrum(name, rng):
    """Eigenvalues: the first three definite, the others indefinite."""
    if name == "power law":
        return np.arange(1, DIM + 1) ** -2.0
    if name == "log-uniform":
        return 10 ** rng.uniform(-5, 0.5, DIM)
    if name == "low rank":
        return np.where(np.arange(DIM) < 60, rng.exponential(size=DIM), 0.0)
    if name == "spike":  # as of a trained network: mass near 0 on either side, and positive outliers
        bulk = 10 ** rng.uniform(-7, -1.5, DIM) * rng.choice([1, 1, -1], DIM)
        return np.where(np.arange(DIM) < 20, 10 ** rng.uniform(-1, 0.5, DIM), bulk)
    if name == "semicircle":  # no mass at 0 in particular
        matrix = rng.standard_normal((DIM, DIM))
        return np.linalg.eigvalsh(matrix + matrix.T) / np.sqrt(8 * DIM)
    raise ValueError(name)


SPECTRA = ["power law", "log-uniform", "low rank", "spike", "semicircle"]
DEFINITE = SPECTRA[:3]


def predict(weights, batch):
    return batch[0] @ (weights - 1.0)


def signed_loss(outputs, batch):
    return jnp.mean(batch[1] * outputs[:, 0] ** 2) / 2


@functools.cache
def problem(name, seed):
    """Curvature, its eigenvalues and eigenvectors, weights w, and a tolerance of some percent of the loss."""
    rng = np.random.default_rng([seed, SPECTRA.index(name)])
    values = spectrum(name, rng)
    vectors = np.linalg.qr(rng.standard_normal((DIM, DIM)))[0]
    inputs = (np.sqrt(DIM * np.abs(values)) * vectors).T.astype(np.float32)
    batches = jaxlimit.batched((inputs, np.sign(values).astype(np.float32)), 64)
    weights = jnp.asarray(rng.standard_normal((DIM, 1)), jnp.float32)
    if name in DEFINITE:
        curvature = jaxlimit.gauss_newton(predict, signed_loss, weights, batches)
    else:
        curvature = jaxlimit.hessian(lambda w, b: signed_loss(predict(w, b), b), weights, batches)
    exact = inputs.astype(float).T @ (np.sign(values)[:, None] * inputs.astype(float)) / DIM
    flat = np.asarray(weights, float)[:, 0]
    absolute = np.abs(np.linalg.eigvalsh(exact))
    return curvature, exact, flat, 0.03 * float(np.mean(absolute) * flat @ flat) / 2


@functools.cache
def certified(name, seed):
    """Truth and result, the gradient left out of the truth for the limits that leave it out."""
    curvature, exact, flat, eps = problem(name, seed)
    gradient = np.asarray(curvature.gradient, float)[:, 0]
    truth = truth_of_matrix(exact, flat, gradient, eps)
    limit = jaxlimit.pruning_limit(curvature, jax.random.key(seed), loss_tolerance=eps, num_probes=4)
    return truth, limit


@seeds
@pytest.mark.parametrize("name", SPECTRA)
def test_brackets_hold_what_one_probe_sees(name, seeds):
    """No randomness is left: the bracket must hold every time, at every depth."""
    for seed in seeds:
        curvature, exact, _, eps = problem(name, seed)
        asked = Problem(magnitude_order(curvature.weights), eps)
        probe = rademacher(jax.random.key(seed), curvature.weights, 1)
        values, vectors = np.linalg.eigh(exact)
        seen = (np.asarray(probe, float)[0, :, 0] @ vectors) ** 2 / DIM
        truth = width_limit(SpectralBracket.exact(SpectralMeasure(values, seen)), asked)
        state, widths = lanczos.init(probe), []
        for steps in (8, 8, 16, 32, 64):
            state = lanczos.run(curvature.matmat, state, steps)
            runs, ridge = state.tridiagonals(), asked.ridge(int(truth.value * DIM))
            bracket = (
                bracket_semidefinite(runs)
                if curvature.positive_semidefinite
                else bracket_indefinite(runs, ridge=ridge)
            )
            found = width_limit(bracket, asked)
            assert found.lower <= truth.value <= found.upper
            widths.append(found.upper - found.lower)
        assert widths[-1] < widths[0]
        assert widths[-1] < 0.25


@seeds
@pytest.mark.parametrize("name", SPECTRA)
def test_every_limit_lies_in_its_interval(name, seeds):
    """With the probes: three standard errors, so that one miss in the 20 would already be bad luck."""
    missed = []
    for seed in seeds:
        truth, limit = certified(name, seed)
        for key, value in truth.items():
            estimate = limit.estimates()[key]
            assert estimate.lower <= estimate.value <= estimate.upper
            if not estimate.lower <= value <= estimate.upper:
                missed.append((seed, key, value, estimate))
    assert not missed


@seeds
@pytest.mark.parametrize("name", SPECTRA)
def test_values_are_as_good_as_their_probe_error_and_spread_say(name, seeds):
    for seed in seeds:
        truth, limit = certified(name, seed)
        for key in ("width", "cone"):
            estimate = limit.estimates()[key]
            error = abs(estimate.value - truth[key])
            assert error <= 3 * estimate.probe_error + 3 * estimate.spread + 2 / DIM, (seed, key, limit)
            assert estimate.probe_error < 0.05
            assert estimate.spread < 0.01


def test_an_indefinite_matrix_is_not_called_resolved_after_a_few_steps():
    """However loose the tolerance: agreement among the first few steps says nothing there."""
    for name, least in (("spike", 64), ("log-uniform", 16)):
        curvature, _, _, eps = problem(name, 0)
        limit = jaxlimit.pruning_limit(
            curvature, jax.random.key(0), loss_tolerance=eps, tolerance=0.5, num_probes=1
        )
        assert limit.num_steps == least
        assert limit.code is Code.CONVERGED
