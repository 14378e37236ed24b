"""Readjustment by conjugate gradients against a dense least-squares problem.

With H = A^T A the best loss on a support is min ||A (c - x)||^2 / 2 over x on that support, solved by
NumPy's `lstsq` (a singular value decomposition of A's columns): no products with H, no iteration.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxlimit
from jaxlimit.limits.conjugate_directions import Directions
from jaxlimit.limits.conjugate_gradients import readjusted_minimum

DIM = 40


def root_of_curvature(kind, rng):
    """A with H = A^T A."""
    vectors = np.linalg.qr(rng.standard_normal((DIM, DIM)))[0]
    values = {
        "well-conditioned": rng.uniform(0.5, 2, DIM),
        "ill-conditioned": np.geomspace(1e-6, 1, DIM),
        "singular": np.append(np.zeros(15), rng.uniform(0.1, 2, DIM - 15)),
        "rank 3": np.append(np.zeros(DIM - 3), [1.0, 2.0, 3.0]),
        "outliers": np.append(np.full(DIM - 2, 0.01), [5.0, 100.0]),
    }[kind]
    return np.sqrt(values)[:, None] * vectors.T


KINDS = ["well-conditioned", "ill-conditioned", "singular", "rank 3", "outliers"]


class Dense:
    """A random problem: A, the weights, and the support that magnitude pruning leaves."""

    def __init__(self, kind, seed=0, removed=25):
        rng = np.random.default_rng(seed)
        self.root = root_of_curvature(kind, rng)
        self.matrix = self.root.T @ self.root
        weights = rng.standard_normal(DIM)
        self.order = np.argsort(np.abs(weights))
        self.weights = weights
        self.cut(removed)

    def cut(self, removed):
        self.kept = np.ones(DIM, bool)
        self.kept[self.order[:removed]] = False
        self.c = np.where(self.kept, 0, self.weights)
        return self

    def loss(self, x=0.0):
        return float(np.sum((self.root @ (self.c - x)) ** 2) / 2)

    def minimum(self):
        x = np.zeros(DIM)
        x[self.kept] = np.linalg.lstsq(self.root[:, self.kept], self.root @ self.c)[0]
        return self.loss(x)

    def solve(self, dtype, eps, max_matvecs=400, start=None, known=None):
        """Through a tree of two leaves."""
        matrix = jnp.asarray(self.matrix, dtype)

        def split(x):
            return {"a": jnp.asarray(x[:24]).reshape(4, 6), "b": jnp.asarray(x[24:]), "none": None}

        def join(tree):
            return jnp.concatenate([tree["a"].ravel(), tree["b"]])

        products = []

        def matvec(v):
            products.append(join(v))
            return split(matrix @ join(v))

        lower, upper, x = readjusted_minimum(
            matvec,
            split(self.c.astype(dtype)),
            split(self.kept),
            split((np.zeros(DIM) if start is None else start).astype(dtype)),
            eps,
            max_matvecs,
            rounding=10 * float(np.finfo(dtype).eps) * float(np.linalg.norm(self.matrix, 2)),
            known=known,
        )
        self.num_products = len(products)
        return lower, upper, np.asarray(join(x), np.float64)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_decisions(kind, seed, dtype):
    """For eps on either side of the minimum; as close as 10 %."""
    problem = Dense(kind, seed, removed=30)
    minimum, unadjusted = problem.minimum(), problem.loss()
    rounding = 50 * float(np.finfo(dtype).eps) * unadjusted
    for factor in (0.3, 0.9, 1.1, 3.0):
        eps = factor * max(minimum, 1e-3 * unadjusted)
        lower, upper, x = problem.solve(dtype, eps)
        assert upper >= minimum - rounding
        assert upper == pytest.approx(problem.loss(x), abs=rounding)
        assert np.all(x[~problem.kept] == 0)
        assert 0 <= lower <= upper + 200 * rounding
        if minimum > eps + rounding:
            assert lower > eps
        if minimum < eps - rounding:
            assert upper <= eps


@pytest.mark.parametrize("kind", ["well-conditioned", "singular", "rank 3", "outliers"])
def test_minimum_itself(kind, x64):
    """With a tolerance out of reach the iteration stops where nothing more is to be had."""
    problem = Dense(kind, removed=30)
    minimum = problem.minimum()
    lower, upper, _ = problem.solve(np.float64, eps=1e-2 * max(minimum, 1e-6), max_matvecs=2000)
    assert upper == pytest.approx(minimum, rel=1e-3, abs=1e-6)
    assert lower <= minimum * (1 + 1e-9) + 1e-12


@settings(max_examples=40)
@given(
    st.sampled_from(KINDS), st.integers(0, 10**6), st.integers(0, DIM), st.integers(1, 30), st.floats(-6, 1)
)
def test_upper_bound_is_certain(kind, seed, removed, max_matvecs, log_eps):
    """However early the iteration is cut off, from whatever start."""
    problem = Dense(kind, seed, removed)
    with jax.enable_x64(True):
        start = np.random.default_rng(seed).standard_normal(DIM)
        lower, upper, x = problem.solve(np.float64, 10.0**log_eps, max_matvecs, start)
    assert upper >= problem.minimum() - 1e-9
    assert upper == pytest.approx(problem.loss(x), rel=1e-6, abs=1e-9)
    assert upper <= problem.loss(np.where(problem.kept, start, 0)) + 1e-9
    assert lower <= upper + 1e-12
    assert np.all(x[~problem.kept] == 0)
    assert problem.num_products <= max_matvecs


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_every_iterate_is_the_best_of_its_krylov_space(steps, x64):
    """The theorem of conjugate gradients: steepest descent, say, would be worse from the second step on."""
    problem = Dense("well-conditioned", removed=20)
    kept = problem.kept
    vectors = [np.where(kept, problem.matrix @ problem.c, 0)]
    for _ in range(steps - 1):
        vectors.append(np.where(kept, problem.matrix @ vectors[-1], 0))
    basis = np.linalg.qr(np.column_stack(vectors))[0]
    best = basis @ np.linalg.lstsq(problem.root @ basis, problem.root @ problem.c)[0]
    _, upper, x = problem.solve(np.float64, 1e-9, max_matvecs=steps + 1)
    assert problem.num_products == steps + 1
    assert upper == pytest.approx(problem.loss(best), rel=1e-8)
    np.testing.assert_allclose(x, best, atol=1e-6)


def test_losses_rise_with_nested_supports(x64):
    problem, start, bounds, exact = Dense("ill-conditioned"), None, [], []
    for removed in range(0, DIM + 1, 4):
        problem.cut(removed)
        exact.append(problem.minimum())
        _, upper, start = problem.solve(np.float64, 1e-12, 2000, start)
        bounds.append(upper)
    assert np.all(np.diff(exact) >= -1e-12)
    assert np.all(np.array(bounds) >= np.array(exact) - 1e-12)
    assert np.all(np.diff(bounds) >= -1e-3 * np.array(bounds[1:]))


@pytest.mark.parametrize("most", [0, 5, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_learned_on_smaller_supports_saves_products(kind, most, x64):
    """Supports that grow, and one that shrinks again, on which the later directions must not be used."""
    known, cold, warm = Directions(most), 0, 0
    for removed in (34, 31, 28, 25, 22, 29):
        problem = Dense(kind, removed=removed)
        known.num_removed, minimum = removed, problem.minimum()
        eps = 1e-2 * max(minimum, 1e-6)
        problem.solve(np.float64, eps)
        cold += problem.num_products
        lower, upper, x = problem.solve(np.float64, eps, known=known)
        warm += problem.num_products
        assert lower <= minimum + 1e-9
        assert upper == pytest.approx(minimum, rel=1e-2, abs=1e-6)
        assert upper == pytest.approx(problem.loss(x), rel=1e-6, abs=1e-9)
        assert np.all(x[~problem.kept] == 0)
        assert len(known) <= min(most, DIM - 22 + 2)
    assert warm < 0.75 * cold if (kind, most) == ("ill-conditioned", 100) else warm <= cold + 1


def test_directions_are_conjugate_on_every_support(x64):
    problem, known = Dense("ill-conditioned"), Directions(100)
    for removed in (30, 20):
        known.num_removed = removed
        problem.cut(removed).solve(np.float64, 1e-12, known=known)
    pairs = known.since(0)
    assert len(pairs[0]["b"]) == len(known) == 20
    directions, products = (np.hstack([x["a"].reshape(len(known), -1), x["b"]]) for x in pairs)
    np.testing.assert_allclose(directions @ problem.matrix @ directions.T, np.eye(len(known)), atol=1e-8)
    np.testing.assert_allclose(directions @ problem.matrix, products, atol=1e-8)


def test_nothing_removed_and_nothing_kept(dtype):
    nothing = Dense("well-conditioned", removed=0)
    assert nothing.solve(dtype, 0.1)[:2] == (0.0, 0.0)
    everything = Dense("well-conditioned", removed=DIM)
    lower, upper, x = everything.solve(dtype, 1e-3)
    assert lower == upper == pytest.approx(everything.loss(), rel=1e-5)
    assert np.all(x == 0)


def test_one_product_is_the_unadjusted_loss(dtype):
    problem = Dense("outliers")
    lower, upper, x = problem.solve(dtype, eps=1e-6, max_matvecs=1)
    assert upper == pytest.approx(problem.loss(), rel=1e-5)
    assert lower == 0
    assert np.all(x == 0)
    assert problem.num_products == 1


def test_a_good_start_saves_products(x64):
    problem = Dense("ill-conditioned", removed=20)
    eps = 1.5 * problem.minimum()
    _, _, x = problem.solve(np.float64, eps)
    cold = problem.num_products
    _, upper, _ = problem.solve(np.float64, eps, start=x)
    assert problem.num_products == 1 < cold
    assert upper <= eps


def test_stops_as_soon_as_eps_is_reached(x64):
    problem = Dense("ill-conditioned", removed=20)
    counts = []
    for fraction in (0.9, 0.5, 0.1):
        gap = problem.loss() - problem.minimum()
        _, upper, _ = problem.solve(np.float64, problem.minimum() + fraction * gap)
        counts.append(problem.num_products)
        assert upper <= problem.minimum() + fraction * gap
    assert counts[0] <= counts[1] <= counts[2] < DIM


def test_a_hopeless_tolerance_is_given_up_early(x64):
    """Far above eps, and no longer falling: decided long before convergence."""
    problem = Dense("ill-conditioned", removed=35)
    minimum = problem.minimum()
    lower, _, _ = problem.solve(np.float64, 1e-3 * minimum, max_matvecs=1000)
    assert lower > 1e-3 * minimum
    assert problem.num_products < 100


def test_flat_directions_gain_nothing(dtype):
    problem = Dense("singular")
    problem.root *= 0
    problem.matrix *= 0
    lower, upper, x = problem.solve(dtype, 0.1)
    assert lower == upper == 0
    assert np.all(np.isfinite(x))


def test_bounds_at_rounding_level_are_in_order():
    """One kept weight that takes up all of the loss, whatever the scale: the minimum is 0."""
    bounds = []
    for scale in np.linspace(0.1, 3, 60):
        matrix = jnp.asarray([[1.0, scale], [scale, scale**2]], jnp.float32)
        removed, mask = jnp.array([1.3, 0.0]), jnp.array([False, True])
        bounds.append(
            readjusted_minimum(lambda v, m=matrix: m @ v, removed, mask, jnp.zeros(2), 1e-12, 5)[:2]
        )
    lower, upper = np.transpose(bounds)
    assert np.all(upper < 1e-5)
    assert np.all(lower <= upper)
    assert np.all(upper >= 0)


def test_a_product_that_is_not_finite_is_no_answer():
    mask = jnp.array([False, True])
    with pytest.raises(FloatingPointError):
        readjusted_minimum(lambda v: v * jnp.nan, jnp.array([1.0, 0.0]), mask, jnp.zeros(2), 0.1, 5)


@pytest.mark.parametrize("basis_bytes", [0, 8 * 60 * 4])
def test_what_survives_a_cut_survives_readjustment(basis_bytes):
    """Where, in float32, a guess of x is worse than none. Oracle: the loss of the cut in float64."""
    rng = np.random.default_rng(2)
    inputs = np.float32(rng.normal(size=(90, 60)) * 10 ** rng.normal(size=60))
    weights = np.float32(rng.normal(size=60))
    matrix = inputs.astype(float).T @ inputs / 90
    eps = 5e-4 * float(weights @ matrix @ weights)
    order, losses = np.argsort(np.abs(weights)), []
    for n in range(61):
        removed = np.zeros(60)
        removed[order[:n]] = weights[order[:n]]
        losses.append(removed @ matrix @ removed / 2)
    survives = max(n for n in range(61) if losses[n] <= eps) / 60
    limit = jaxlimit.pruning_limit(
        jaxlimit.gauss_newton(
            lambda w, batch: batch[0] @ w,
            lambda outputs, batch: jnp.mean((outputs[:, 0] - batch[1]) ** 2) / 2,
            jnp.asarray(weights)[:, None],
            jaxlimit.batched((inputs, np.float32(inputs.astype(float) @ weights)), 90),
        ),
        jax.random.key(0),
        loss_tolerance=eps,
        num_probes=2,
        basis_bytes=basis_bytes,
        which=["one_shot", "readjusted"],
    )
    assert survives > 0.2
    assert limit.readjusted.upper >= limit.one_shot.lower
    assert limit.readjusted.value >= survives - 1 / 60
