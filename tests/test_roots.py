"""The solvers for the pruning limits against brute force over every number of removed weights.

Brute force evaluates the function everywhere and applies the definition: the largest s with f(s) >= s, the
last n before the first with f(n) > eps, the largest n that reaches eps. No bisection, no stride, no start.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlimit.geometry.dimensions import cone_dimension, fixed_point
from jaxlimit.geometry.magnitude import magnitude_order
from jaxlimit.limits.budget import BudgetSpent
from jaxlimit.limits.cone import Slope, cone_limit, cone_point, look_at, points_beside
from jaxlimit.limits.estimate import Estimate
from jaxlimit.limits.one_shot import PathPoint, loss_between, one_shot_limit
from jaxlimit.limits.problem import Problem
from jaxlimit.limits.readjusted import readjusted_limit
from jaxlimit.limits.width import width_limit
from jaxlimit.spectrum.bracket import SpectralBracket
from jaxlimit.spectrum.measure import SpectralMeasure

# Brackets are widened by so many weights to either side.
WIDENED = 2
quick = settings(max_examples=200)


def counted(function):
    calls = []

    def wrapped(n):
        calls.append(n)
        return function(n)

    return wrapped, calls


# delta(s) / D = s


def brute_fixed_point(values, dim):
    """Supremum of the s in [0, 1] with values[floor(s D)] >= s."""
    best = 0.0
    for n in range(dim + 1):
        # On [n / D, (n + 1) / D) the function is constant.
        if values[n] >= n / dim:
            best = max(best, min(values[n], (n + 1) / dim, 1.0))
    return best


@quick
@given(st.lists(st.floats(0, 1), min_size=2, max_size=50))
def test_fixed_point_of_random_steps(values):
    values, dim = sorted(values, reverse=True), len(values) - 1
    function, calls = counted(lambda n: values[n])
    assert fixed_point(function, dim) == brute_fixed_point(values, dim)
    assert all(0 <= n <= dim for n in calls)
    assert len(calls) <= np.ceil(np.log2(dim + 2)) + 1


@quick
@given(st.integers(1, 40), st.data())
def test_fixed_point_where_values_lie_on_the_grid(dim, data):
    """Ties of delta / D with n / D, the cases a strict inequality would get wrong."""
    values = data.draw(st.lists(st.integers(0, dim), min_size=dim + 1, max_size=dim + 1))
    values = [n / dim for n in sorted(values, reverse=True)]
    assert fixed_point(lambda n: values[n], dim) == brute_fixed_point(values, dim)


@pytest.mark.parametrize(
    ("value", "expected"), [(0.0, 0.0), (1.0, 1.0), (0.25, 0.25), (0.3, 0.3), (0.999, 0.999), (1e-9, 1e-9)]
)
def test_fixed_point_of_a_constant(value, expected):
    assert fixed_point(lambda n: value, 10) == pytest.approx(expected, abs=1e-15)


def test_fixed_point_at_a_jump():
    assert fixed_point(lambda n: 1.0 if n < 7 else 0.0, 10) == 0.7
    assert fixed_point(lambda n: 1.0 if n < 10 else 0.0, 10) == 1.0
    assert fixed_point(lambda n: 1.0 if n < 1 else 0.0, 10) == 0.1


def test_fixed_point_of_many_weights_needs_few_evaluations():
    function, calls = counted(lambda n: 1 - n / 10**9)
    assert fixed_point(function, 10**9) == pytest.approx(0.5, abs=1e-9)
    assert len(calls) <= 32


def diagonal_problem(kind, seed):
    """Weights and their eigenvalues in order of magnitude, and eps.

    flat: along small weights, so that rho is infinite near the root. steep: along them, so that the root
    creeps. blocks: eigenvalues that jump, so that rho bends.
    """
    dim, least, most = {"flat": (100, -3, -1), "steep": (1000, -3, 0), "blocks": (2000, -6, -0.2)}[kind]
    rng = np.random.default_rng(seed)
    if kind == "blocks":
        weights = np.sort(np.exp(rng.uniform(0.3, 3) * rng.normal(size=dim)))
        num_blocks = rng.integers(1, 7)
        block = np.searchsorted(np.sort(rng.integers(0, dim, num_blocks - 1)), np.arange(dim), side="right")
        eigenvalues = 10 ** (rng.uniform(-6, 1, num_blocks)[block] + rng.uniform(0, 2) * rng.normal(size=dim))
    else:
        weights, eigenvalues = rng.normal(size=dim), np.sort(10 ** rng.uniform(-6, 1, dim))
        if kind == "steep":
            weights, eigenvalues = weights * np.exp(2 * rng.normal(size=dim)), eigenvalues[::-1]
        weights = weights[np.argsort(np.abs(weights))]
    return weights, eigenvalues, np.sum(weights**2 * eigenvalues) / 2 * 10 ** rng.uniform(least, most)


@pytest.mark.parametrize("tolerance", [0.0, 1e-3])
@pytest.mark.parametrize(
    ("kind", "seed"),
    [(kind, seed) for kind in ("flat", "steep") for seed in range(12)] + [("blocks", 232), ("blocks", 1697)],
)
def test_the_cone_limit_is_that_of_its_equation_at_every_sparsity(kind, seed, tolerance):
    weights, eigenvalues, eps = diagonal_problem(kind, seed)
    dim = len(weights)
    problem = Problem(magnitude_order(weights), eps)
    measure = SpectralMeasure(eigenvalues, np.full(dim, 1 / dim))

    def seen_from(n):
        squares = weights[:n] ** 2
        return SpectralMeasure(eigenvalues[:n], squares / squares.sum())

    def reaches(n):
        return cone_dimension(measure, seen_from(n), problem.radius(n), eps) >= n / dim

    last = max((n for n in range(1, dim + 1) if reaches(n)), default=0)
    bracket = SpectralBracket.exact(measure)
    found = cone_limit(
        bracket,
        lambda n: look_at(SpectralBracket.exact(seen_from(n)), problem, n),
        problem,
        width_limit(bracket, problem).value,
        tolerance,
    )[0]
    assert found.spread == 0
    assert found.lower - tolerance <= last / dim <= found.upper + tolerance


@pytest.mark.parametrize("indefinite", [False, True])
def test_a_look_at_the_cone_tells_its_ridge_to_either_side(indefinite):
    """Of a dense H, whose weights interact: off by a fraction of what changes."""
    rng, dim, n = np.random.default_rng(0), 400, 320
    vectors = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    eigenvalues = 10 ** rng.uniform(-4, 0, dim) * (rng.choice([-1, 1], dim) if indefinite else 1)
    magnitudes = np.abs(eigenvalues)
    weights = rng.standard_normal(dim).astype(np.float32)
    weights = weights[np.argsort(np.abs(weights))]
    problem = Problem(magnitude_order(weights), 0.5)

    def seen_from(n):
        coordinates = vectors.T @ np.where(np.arange(dim) < n, weights, 0)
        measure = SpectralMeasure(eigenvalues, coordinates**2 / np.sum(coordinates**2))
        return coordinates, cone_point(SpectralBracket.exact(measure), problem, n)

    coordinates, point = seen_from(n)
    a = problem.ridge(n) * np.exp(point.log_rho.value)
    stiff = magnitudes / (magnitudes + a)
    part = coordinates**2 * stiff
    slope = Slope(vectors @ (stiff * coordinates), np.mean(stiff), part @ (1 - stiff) / np.sum(part))
    for within, most in ((4, 0.005), (8, 0.012)):
        beside = points_beside(point, slope, problem, within)
        assert {x.num_removed for x in beside} == {n - within, n + within}
        true = np.array([seen_from(x.num_removed)[1].log_rho.value for x in beside])
        errors = np.abs(true - [x.log_rho.value for x in beside])
        assert np.max(errors) < most
        assert np.sum(errors) < 0.5 * np.sum(np.abs(true - point.log_rho.value))
        assert all(x.log_rho.lower <= y <= x.log_rho.upper for x, y in zip(beside, true, strict=True))


# The first crossing of the loss.


class Quadratic:
    """q(n) = -g^T c + c^T H c / 2 of a dense H, in order of removal, at every n."""

    def __init__(self, matrix, gradient, weights):
        self.matrix, self.gradient, self.weights = matrix, gradient, weights
        self.dim = len(weights)
        self.evaluated = []
        self.losses = np.array([self.point(n).loss for n in range(self.dim + 1)])

    def point(self, n):
        c = np.where(np.arange(self.dim) < n, self.weights, 0)
        slope = (self.matrix @ c - self.gradient) * self.weights
        return PathPoint(n, float(-self.gradient @ c + c @ self.matrix @ c / 2), slope)

    def path(self, n):
        self.evaluated.append(n)
        return self.point(n)

    def limit(self, eps, tolerance=0.0):
        self.evaluated = []
        return one_shot_limit(self.path, self.point(0), eps, tolerance)

    def first(self, eps):
        """The smallest n with q(n) > eps; None if there is none."""
        above = np.flatnonzero(self.losses > eps)
        return int(above[0]) if above.size else None


def sorted_normal(rng, dim):
    weights = rng.standard_normal(dim)
    return weights[np.argsort(np.abs(weights))]


def quadratic(kind, dim=300, seed=0):
    rng = np.random.default_rng(seed)
    weights, noise = sorted_normal(rng, dim), rng.standard_normal((dim, dim))
    gradient = 0.02 * rng.standard_normal(dim)
    if kind == "no interaction":
        return Quadratic(np.diag(rng.exponential(size=dim) ** 2), 10 * gradient, weights)
    if kind == "as one":  # q is a parabola in n
        return Quadratic(np.outer(1 / weights, 1 / weights), 5 / weights, weights)
    if kind == "semidefinite":
        return Quadratic(noise @ noise.T / dim, gradient, weights)
    if kind == "indefinite":  # smooth, and falls before it rises
        vectors = np.linalg.qr(noise)[0]
        return Quadratic((vectors * rng.uniform(-0.5, 1, dim)) @ vectors.T, gradient, weights)
    if kind == "wave":  # a loss that crosses, comes back and crosses again
        curvature = 30 * np.cos(np.linspace(0, 6 * np.pi, dim)) + 8
        return Quadratic(np.diag(curvature / weights**2), np.zeros(dim), weights)
    raise ValueError(kind)


QUADRATICS = ["no interaction", "as one", "semidefinite", "indefinite", "wave"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", QUADRATICS)
def test_loss_between_two_points(kind, seed):
    """Exact at the end; within the stated uncertainty where weights do not interact, or act as one."""
    problem = quadratic(kind, 60, seed)
    for start, end in ((0, 60), (0, 1), (10, 35), (59, 60), (30, 32)):
        losses, uncertainty = loss_between(problem.point(start), problem.point(end))
        assert len(losses) == end - start
        assert losses[-1] == pytest.approx(problem.losses[end], rel=1e-9, abs=1e-9)
        assert uncertainty >= 0
        if kind in ("no interaction", "as one"):
            error = np.abs(losses - problem.losses[start + 1 : end + 1])
            assert np.max(error) <= uncertainty * (1 + 1e-9) + 1e-9


def test_loss_between_knows_which_weights_matter():
    """All of the curvature in one weight: the step is put where that weight goes, by the slopes alone."""
    curvature = np.zeros(40)
    curvature[25] = 8.0
    problem = Quadratic(np.diag(curvature), np.zeros(40), np.ones(40))
    losses, uncertainty = loss_between(problem.point(0), problem.point(40))
    assert losses[25] - losses[24] == pytest.approx(4.0, abs=0.1)
    assert np.max(np.abs(losses - problem.losses[1:])) <= min(uncertainty, 4 / 8 + 1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", QUADRATICS)
def test_first_crossing(kind, seed):
    problem = quadratic(kind, seed=seed)
    dim, top = problem.dim, np.max(problem.losses)
    for eps in (1e-3 * top, 0.05 * top, 0.3 * top, 0.7 * top, 0.9 * top):
        first = problem.first(eps)
        exact = problem.limit(eps)
        assert exact.value == pytest.approx((first - 1) / dim, abs=1e-12)
        assert len(problem.evaluated) < dim  # fewer products than brute force
        for tolerance in (0.005, 0.02, 0.1):
            found = problem.limit(eps, tolerance)
            assert found.lower <= (first - 1) / dim + 1e-12
            assert found.upper >= min((first + 1) / dim, 1) - 1e-12
            assert problem.losses[round(found.value * dim)] <= eps
            assert found.lower <= found.value <= found.upper
            assert found.upper - found.lower <= tolerance + (1 + 2 * WIDENED) / dim + 1e-12


def test_the_wave_does_what_it_is_for():
    problem = quadratic("wave")
    eps = 0.1 * np.max(problem.losses)
    above = problem.losses > eps
    assert np.sum(np.diff(above.astype(int)) == 1) >= 2
    assert np.sum(np.diff(above.astype(int)) == -1) >= 1


@quick
@given(st.integers(1, 40), st.integers(0, 10**6), st.floats(-4, 1))
def test_first_crossing_of_any_loss_without_interaction(dim, seed, log_eps):
    """Semidefinite and diagonal: the uncertainty then is a bound, so no crossing may be missed."""
    rng = np.random.default_rng(seed)
    curvature = rng.exponential(size=dim) * (rng.random(dim) < 0.5)
    problem = Quadratic(np.diag(curvature), rng.standard_normal(dim), sorted_normal(rng, dim))
    eps = 10.0**log_eps
    first, found = problem.first(eps), problem.limit(eps)
    if first is None:
        assert (found.value, found.upper) == (1.0, 1.0)
        assert found.lower == pytest.approx(max(1 - WIDENED / dim, 0))
    else:
        assert found.value == pytest.approx((first - 1) / dim, abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_a_narrow_excursion_between_two_points_is_looked_for(seed):
    """A tolerance that the loss exceeds only at its highest point, inside an interval of the grid."""
    rng = np.random.default_rng(seed)
    curvature = 0.2 * rng.exponential(size=320) * (rng.random(320) < 0.3)
    problem = Quadratic(np.diag(curvature), 0.1 * rng.standard_normal(320), sorted_normal(rng, 320))
    peak = int(np.argmax(problem.losses[:200]))
    eps = problem.losses[peak] * (1 - 1e-9)
    assert peak == problem.first(eps)
    assert problem.limit(eps).value == pytest.approx((peak - 1) / 320, abs=1e-12)


def test_no_crossing():
    problem = quadratic("semidefinite", 100)
    assert problem.limit(1.001 * np.max(problem.losses)) == Estimate(1.0, 1 - WIDENED / 100, 1.0)
    assert len(problem.evaluated) < 60


def test_a_loss_equal_to_the_tolerance_is_within_it():
    problem = Quadratic(np.diag([2.0, 0.0, 2.0, 2.0]), np.zeros(4), np.ones(4))
    assert problem.losses.tolist() == [0, 1, 1, 2, 3]
    assert problem.limit(1.0).value == 0.5


def test_number_of_evaluations_does_not_grow_with_the_number_of_weights():
    counts = []
    for dim in (400, 1600):
        problem = quadratic("no interaction", dim)
        problem.limit(0.3 * np.max(problem.losses), tolerance=0.005)
        counts.append(len(problem.evaluated))
    assert max(counts) <= 60


@pytest.mark.parametrize("kind", ["no interaction", "semidefinite", "indefinite"])
def test_a_one_shot_limit_out_of_products_is_the_interval_so_far(kind):
    """With every budget: nothing, a true interval that says how wide it is, or all that was to be found."""
    problem, narrow = quadratic(kind), 0.01
    eps = 0.3 * np.max(problem.losses)
    whole, truth = problem.limit(eps, narrow), (problem.first(eps) - 1) / problem.dim
    needed, spreads = len(problem.evaluated), []
    for budget in range(needed + 1):
        left = [budget]

        def path(n, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise BudgetSpent
            return problem.path(n)

        try:
            found = one_shot_limit(path, problem.point(0), eps, narrow)
        except BudgetSpent:
            assert not spreads
            continue
        assert found.lower <= truth <= found.upper
        assert found.spread in (0, pytest.approx(found.upper - found.lower - 2 * WIDENED / problem.dim))
        spreads.append(found.spread)
    assert found == whole
    assert spreads[0] > narrow
    assert spreads[-1] == 0


def test_a_point_that_is_known_is_not_computed_again():
    """Its second value may differ by rounding, and lie on the other side of eps."""
    seen = set()

    def path(n):
        assert n not in seen
        seen.add(n)
        return PathPoint(n, 1 + 1e-7 * (n - 499.5), np.full(1000, 1e-7))

    found = one_shot_limit(path, PathPoint(0, 0.0, np.zeros(1000)), 1.0, 1e-3)
    assert found.lower <= 0.5 <= found.upper


def test_a_predicted_loss_that_is_not_finite_is_no_answer():
    def path(n):
        return PathPoint(n, np.nan, np.full(100, np.nan))

    with pytest.raises((FloatingPointError, ValueError)):
        one_shot_limit(path, PathPoint(0, 0.0, np.zeros(100)), 1.0, 1e-3)


# The readjusted limit.

starts = st.floats(0, 1) | st.sampled_from([0.0, 1.0])


def brute_readjusted(values, eps):
    """The largest n with values[n] <= eps; removing nothing always reaches it."""
    return max(n for n, value in enumerate(values) if n == 0 or value <= eps)


@quick
@given(st.lists(st.integers(0, 20), min_size=2, max_size=60), st.integers(0, 20), starts)
def test_readjusted_limit_of_random_sequences(values, eps, start):
    values = [0, *np.cumsum(sorted(values)).tolist()]
    eps, dim = eps * 7, len(values) - 1
    function, calls = counted(lambda n: (values[n], values[n]))
    found = readjusted_limit(function, dim, eps, 0.0, start)
    n = brute_readjusted(values, eps)
    # s between n / D, which reaches eps, and (n + 1) / D, which does not.
    assert found.value == pytest.approx(n / dim, abs=1e-15)
    assert found.lower <= n / dim
    assert found.upper >= min((n + 1) / dim, 1.0)
    assert found.lower >= (n - WIDENED) / dim - 1e-15
    assert found.upper <= (n + 1 + WIDENED) / dim + 1e-15
    assert all(1 <= n <= dim for n in calls)
    assert len(set(calls)) == len(calls)


def test_readjusted_limit_from_every_start():
    dim = 37
    for n in range(dim + 1):
        for start in range(dim + 1):
            found = readjusted_limit(
                lambda m, n=n: (float(m), float(m)), dim, n + 0.5, tolerance=0.0, start=start / dim
            )
            assert found.value == pytest.approx(n / dim, abs=1e-15)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-2, 0.3])
def test_readjusted_limit_to_a_tolerance(tolerance):
    for threshold in (1, 5_000, 77_777, 99_999):
        for start in (0.0, 0.05, 0.78, 1.0):
            function, calls = counted(lambda n: (n, n))
            found = readjusted_limit(function, 10**5, threshold, tolerance, start)
            true = threshold / 10**5
            assert found.lower <= true <= found.upper
            assert true - tolerance - 1e-5 <= found.value <= true
            assert len(calls) <= 20


def test_readjusted_limit_with_bounds_that_decide():
    """Loose bounds on the right side of eps are as good as exact ones."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        dim = int(rng.integers(1, 60))
        values = np.append(0, np.cumsum(rng.random(dim)))
        eps = float(rng.random() * values[-1] * 1.2)

        def bounds(n, values=values, eps=eps):
            return (0.0, eps) if values[n] <= eps else (np.nextafter(eps, np.inf), np.inf)

        found = readjusted_limit(bounds, dim, eps, 0.0, float(rng.random()))
        assert found.value == pytest.approx(brute_readjusted(values, eps) / dim)


@quick
@given(st.integers(3, 60), st.data(), starts)
def test_readjusted_limit_says_where_it_cannot_tell(dim, data, start):
    """Between two counts eps lies within the bounds: the answer lies there, its bracket around all of it."""
    first = data.draw(st.integers(1, dim))
    last = data.draw(st.integers(first, dim))

    def bounds(n):
        if n < first:
            return 0.0, 0.5
        return (2.0, 3.0) if n > last else (0.5, 2.0)

    found = readjusted_limit(bounds, dim, 1.0, 0.0, start)
    assert found.value == (first - 1) / dim
    assert found.lower <= (first - 1) / dim + 1e-15
    assert found.spread == pytest.approx(min((last + 1) / dim, 1.0) - (first - 1) / dim)
    assert found.upper >= min((last + 1) / dim, 1.0)


def test_estimate_prints_its_bracket():
    assert str(Estimate(0.5, 0.25, 0.75)) == "0.5000 [0.2500, 0.7500]"
