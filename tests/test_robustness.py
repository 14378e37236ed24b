"""Problems that are extreme, degenerate or broken: a limit, a status or a clear error, and never a NaN.

The oracle of the fuzz test is `truth_of_matrix` of test_limit.py: dense eigenvalues in float64, all n tried.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_limit import truth_of_matrix

import jaxlimit
from jaxlimit.core import memory

KINDS = pytest.mark.parametrize("num_probes", [None, 1])
NAMES = ("one_shot", "width", "cone", "readjusted")


def quadratic_loss(w, batch):
    """Mean of sign (x^T w)^2 / 2 + slope: with signs of both kinds the Hessian is indefinite."""
    x, sign, slope = batch
    y = x @ w[:, 0]
    return jnp.mean(sign * y**2 / 2 + slope * y)


def predict(w, batch):
    return batch[0] @ w[:, 0]


def output_loss(outputs, batch):
    return jnp.mean(outputs**2 / 2 + batch[2] * outputs)


def quadratic(weights, x, sign=None, slope=None, batch_size=16):
    """Curvature of a quadratic loss, by default least at the weights; Gauss-Newton without signs."""
    n = len(x)
    slope = -(x @ weights) * (1 if sign is None else sign) if slope is None else slope
    arrays = [np.asarray(a, np.float32) for a in (x, np.ones(n) if sign is None else sign, slope)]
    batches = jaxlimit.batched(tuple(arrays), batch_size)
    w = jnp.asarray(np.reshape(weights, (-1, 1)), jnp.float32)
    if sign is None:
        return jaxlimit.gauss_newton(predict, output_loss, w, batches)
    return jaxlimit.hessian(quadratic_loss, w, batches)


def check(limit):
    """Every number is finite and in order, and the limit can be printed."""
    for estimate in limit.estimates().values():
        values = [estimate.lower, estimate.value, estimate.upper, estimate.spread, estimate.probe_error]
        assert np.all(np.isfinite(values)), (limit, values)
        assert 0 <= estimate.lower <= estimate.value <= estimate.upper <= 1, limit
    assert np.isfinite([limit.ridge, limit.largest_eigenvalue]).all()
    assert "nan" not in repr(limit)


@KINDS
@pytest.mark.parametrize("hessian", [True, False])
def test_one_weight(num_probes, hessian):
    """D = 1: it goes if eps allows; limits are known to one weight, which is everything here."""
    for weight, removable in ((1.0, False), (1e-3, True)):
        curvature = quadratic(np.array([weight]), np.ones((4, 1)), np.ones(4) if hessian else None)
        limit = jaxlimit.pruning_limit(
            curvature, jax.random.key(0), loss_tolerance=1e-4, num_probes=num_probes
        )
        check(limit)
        assert limit.one_shot.lower <= removable <= limit.one_shot.upper
        assert limit.cone.lower <= removable <= limit.cone.upper


@KINDS
@pytest.mark.parametrize("hessian", [True, False])
def test_no_curvature_at_all(num_probes, hessian):
    """A loss that does not depend on the weights: all of them can go."""
    curvature = quadratic(np.arange(1.0, 41.0), np.zeros((4, 40)), np.ones(4) if hessian else None)
    limit = jaxlimit.pruning_limit(curvature, jax.random.key(0), loss_tolerance=1e-6, num_probes=num_probes)
    check(limit)
    assert [limit.estimates()[name].value for name in limit.estimates()] == [1.0] * 4


@KINDS
def test_weights_that_are_all_equal(num_probes):
    curvature = quadratic(np.ones(50), np.eye(50) * np.sqrt(50))
    limit = jaxlimit.pruning_limit(curvature, jax.random.key(0), loss_tolerance=5.0, num_probes=num_probes)
    check(limit)
    assert limit.one_shot.value == pytest.approx(0.2, abs=0.021)  # n / 2 = 5, to one weight


@KINDS
def test_weights_almost_all_zero(num_probes):
    weights = np.where(np.arange(50) == 7, 3.0, 0.0)
    limit = jaxlimit.pruning_limit(
        quadratic(weights, np.eye(50)), jax.random.key(0), loss_tolerance=1e-6, num_probes=num_probes
    )
    check(limit)
    for name in ("one_shot", "cone", "readjusted"):  # known to three weights at worst
        assert limit.estimates()[name].lower == pytest.approx(0.98, abs=0.061)
        assert limit.estimates()[name].upper >= 0.98


@pytest.mark.parametrize(
    ("hessian", "basis_bytes"),
    [
        (True, 0),
        (False, 40 * 300 * 4),
        pytest.param(True, 40 * 300 * 4, marks=pytest.mark.nightly),
        pytest.param(False, 0, marks=pytest.mark.nightly),
    ],
)
def test_a_basis_that_does_not_fit_is_said_and_the_limits_are_the_same(basis_bytes, hessian):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 300)) * np.geomspace(1, 1e-2, 300)
    curvature = quadratic(rng.standard_normal(300), x, np.ones(400) if hessian else None)
    arguments = {"loss_tolerance": 0.05, "num_probes": 2, "which": ("width", "cone")}
    whole = jaxlimit.pruning_limit(curvature, jax.random.key(0), **arguments)
    less = jaxlimit.pruning_limit(curvature, jax.random.key(0), **arguments, basis_bytes=basis_bytes)
    assert whole.reorthogonalized
    assert "basis_bytes" not in whole.status
    assert not less.reorthogonalized
    assert "Lanczos kept its first vectors only (basis_bytes)" in less.status
    assert less.to_json()["reorthogonalized"] is False
    for name in ("width", "cone"):
        a, b = less.estimates()[name], whole.estimates()[name]
        assert a.value == pytest.approx(b.value, abs=a.spread + b.spread + 1e-4), name
    arguments |= {"basis_bytes": basis_bytes, "host_bytes": 2**20}
    on_host = jaxlimit.pruning_limit(curvature, jax.random.key(0), **arguments)
    assert on_host.reorthogonalized
    assert on_host.num_matvecs == whole.num_matvecs
    for name in ("width", "cone"):
        assert on_host.estimates()[name].value == pytest.approx(whole.estimates()[name].value, abs=1e-4), name


@pytest.mark.parametrize("name", ["basis_bytes", "host_bytes"])
def test_memory_that_cannot_be_meant_is_refused(name):
    curvature = quadratic(np.ones(300), np.eye(300), np.ones(300))
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 0, got -1"):
        jaxlimit.pruning_limit(curvature, jax.random.key(0), loss_tolerance=0.1, **{name: -1})


def test_devices_without_host_memory_are_told_before_work_starts(monkeypatch):
    monkeypatch.setattr(memory, "HOST_MEMORY", "elsewhere")
    curvature = quadratic(np.ones(300), np.eye(300), np.ones(300))
    with pytest.raises(ValueError, match="host_bytes needs devices with memory of the kind elsewhere"):
        jaxlimit.pruning_limit(curvature, jax.random.key(0), loss_tolerance=0.1, host_bytes=1)


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_a_device_without_memory_says_what_needs_less(error, monkeypatch):
    curvature = quadratic(np.ones(50), np.eye(50))

    def exhausted(self, vectors):
        raise error("RESOURCE_EXHAUSTED: Out of memory allocating 8388608 bytes.")

    monkeypatch.setattr(jaxlimit.Curvature, "matmat", exhausted)
    with pytest.raises(MemoryError, match=r"smaller basis_bytes .* linear_bytes=0, or smaller batches"):
        jaxlimit.pruning_limit(curvature, jax.random.key(0), loss_tolerance=0.1)


def test_other_errors_of_a_device_pass(monkeypatch):
    def broken(self, vectors):
        raise RuntimeError("INTERNAL: something else")

    monkeypatch.setattr(jaxlimit.Curvature, "matmat", broken)
    with pytest.raises(RuntimeError, match="something else"):
        jaxlimit.pruning_limit(quadratic(np.ones(9), np.eye(9)), jax.random.key(0), loss_tolerance=0.1)


@st.composite
def problems(draw):
    """Weights, data, signs, slopes, eps and how to solve it. Few shapes, so that little is compiled."""
    dim, n = draw(st.sampled_from([1, 2, 5, 40])), draw(st.sampled_from([1, 7, 40]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    decades, scale = draw(st.floats(0, 5)), 10 ** draw(st.floats(-6, 4))
    x = rng.standard_normal((n, dim)) * np.geomspace(1, 10**-decades, dim)
    if draw(st.booleans()):
        x = np.where(rng.random(x.shape) < 0.5, x, 0)
    weights = scale * rng.standard_normal(dim) * 10 ** (draw(st.floats(0, 6)) * rng.random(dim))
    if draw(st.booleans()):  # ties and zeros
        weights = scale * np.round(weights / scale)
    if not np.any(weights):
        weights[0] = scale
    sign = draw(st.sampled_from([None, 1.0, 0.7, 0.0]))
    sign = None if sign is None else np.where(rng.random(n) < (1 + sign) / 2, 1.0, -1.0)
    slope = rng.standard_normal(n) * draw(st.sampled_from([0.0, 1e-3, 1.0]))
    # eps relative to the loss of removing everything, so that the limit is rarely 0 or 1
    gram = x.T @ ((1.0 if sign is None else sign)[:, None] * x if sign is not None else x) / n
    rise = abs(weights @ gram @ weights) / 2 + abs(weights @ (x.T @ slope)) / n
    eps = max(rise, 1e-20) * 10 ** draw(st.floats(-8, 2))
    probes = draw(st.sampled_from([None, None, 1, 3]))
    which = draw(st.sampled_from([NAMES, ("width",), ("one_shot", "readjusted"), ("cone",)]))
    basis = draw(st.sampled_from([None, None, 0]))
    matvecs = draw(st.sampled_from([16, 50, 10_000]))
    return weights, x, sign, slope, eps, probes, which, basis, matvecs


def solved_and_checked(problem):
    """The limit; where it is exact, every interval holds the dense truth to a weight and a half."""
    weights, x, sign, slope, eps, probes, which, basis, matvecs = problem
    curvature = quadratic(weights, x, sign, slope)
    limit = jaxlimit.pruning_limit(
        curvature,
        jax.random.key(0),
        loss_tolerance=eps,
        num_probes=probes,
        which=which,
        basis_bytes=basis,
        max_matvecs=matvecs,
    )
    check(limit)
    if {"width", "cone"} <= limit.estimates().keys():
        assert limit.width.lower <= limit.cone.upper
    if limit.method != "Lanczos":
        flat, gradient = (np.ravel(a).astype(np.float64) for a in (curvature.weights, curvature.gradient))
        truth = truth_of_matrix(curvature.dense(), flat, gradient, eps)
        for name, estimate in limit.estimates().items():
            slack = 1.5 / curvature.dim
            assert estimate.lower - slack <= truth[name] <= estimate.upper + slack, (name, truth, limit)
    return limit


@pytest.mark.parametrize("share", [20, pytest.param(5, marks=pytest.mark.nightly)])
def test_random_problems(share):
    """`benchmarks/fuzz.py` does 2,000 of them."""
    count = settings.default.max_examples // share

    @settings(max_examples=count, suppress_health_check=[HealthCheck.too_slow])
    @given(problem=problems())
    def solve(problem):
        solved_and_checked(problem)

    solve()
