"""Quadrature rules against the discrete measures they are rules for.

A measure with known nodes and weights is turned into its Jacobi matrix by Householder reflections (SciPy's
`hessenberg` of the diagonal matrix in a basis that begins with the square roots of the weights), which knows
no Lanczos. The truth is then a plain sum over the nodes. That the bounds are the best possible is checked by
linear programming over all measures on a grid. Probe errors are compared with the average over all sign
vectors.
"""

from dataclasses import replace
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.linalg import circulant, hessenberg
from scipy.optimize import linprog

from jaxlimit import geometry
from jaxlimit.core.batches import batched
from jaxlimit.curvature.makers import hessian
from jaxlimit.spectrum.bracket import (
    SIXTEENTHS,
    Bracketed,
    SpectralBracket,
    bracket_indefinite,
    bracket_semidefinite,
    spread,
)
from jaxlimit.spectrum.measure import SpectralMeasure, spectral_measure, stack_rules
from jaxlimit.spectrum.probes import rademacher
from jaxlimit.spectrum.rules import gauss, gauss_radau, least_rules
from jaxlimit.spectrum.tridiagonal import Tridiagonal

quick = settings(max_examples=60)
# A measure of no dimension: it bounds nothing from below.
FAR = SpectralMeasure([[1e300]], [[1.0]])


def jacobi(nodes, weights, steps):
    """The tridiagonal matrix of a discrete measure, cut after `steps` or where the measure is exhausted."""
    nodes, weights = np.asarray(nodes, float), np.asarray(weights, float) / np.sum(weights)
    basis = np.linalg.qr(np.column_stack([np.sqrt(weights), np.eye(len(nodes))[:, 1:]]))[0]
    full = hessenberg(basis.T @ (nodes[:, None] * basis))
    diagonal, off_diagonal = np.diag(full), np.append(np.abs(np.diag(full, -1)), 0.0)
    small = np.flatnonzero(off_diagonal <= 1e-12 * np.max(np.abs(nodes)))
    end = small[0] + 1  # the last one is 0
    k = min(steps, end)
    residual = 0.0 if k == end else float(off_diagonal[k - 1])
    return Tridiagonal(diagonal[:k].copy(), off_diagonal[: k - 1].copy(), residual, breakdown=bool(k == end))


def integrate(rule, f):
    return float(np.sum(rule[1] * f(rule[0])))


def random_measure(size=25, seed=0, low=-1.0):
    rng = np.random.default_rng(seed)
    weights = rng.exponential(size=size)
    return rng.uniform(low, 1, size), weights / np.sum(weights)


def at_ridge(bracket, ridge):
    """The effective dimension there, as bounds, value and other estimates."""
    return bracket.dimension.map(lambda delta: delta(ridge))


# What each rule is exact for.


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_gauss_is_exact_to_degree_2k_minus_1(steps):
    measure = random_measure()
    rule = gauss(jacobi(*measure, steps))
    for degree in range(2 * steps):
        assert integrate(rule, lambda x, d=degree: x**d) == pytest.approx(
            integrate(measure, lambda x, d=degree: x**d), abs=1e-13
        )
    beyond = [integrate(r, lambda x: x ** (2 * steps)) for r in (rule, measure)]
    assert beyond[0] < beyond[1] - 1e-9


@pytest.mark.parametrize("node", [-1.5, 1.5, 0.0, 0.3])
@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_radau_has_its_node_and_is_exact_to_degree_2k(steps, node):
    measure = random_measure()
    nodes, weights = gauss_radau(jacobi(*measure, steps), node)
    assert len(nodes) == steps + 1
    assert np.min(np.abs(nodes - node)) < 1e-12
    for degree in range(2 * steps + 1):
        assert integrate((nodes, weights), lambda x, d=degree: x**d) == pytest.approx(
            integrate(measure, lambda x, d=degree: x**d), rel=1e-10, abs=1e-13
        )
    beyond = [integrate(r, lambda x: x ** (2 * steps + 1)) for r in ((nodes, weights), measure)]
    assert abs(beyond[0] - beyond[1]) > 1e-9


@pytest.mark.parametrize("rule", [gauss, lambda t: gauss_radau(t, 0.1), lambda t: gauss_radau(t, -3.0)])
@pytest.mark.parametrize("steps", [1, 2, 10, 24])
def test_weights_sum_to_one(rule, steps):
    nodes, weights = rule(jacobi(*random_measure(), steps))
    assert np.sum(weights) == pytest.approx(1, abs=1e-13)
    assert np.all(weights >= 0)
    assert np.all(np.diff(nodes) > 0)


@pytest.mark.parametrize(
    ("nodes", "weights", "message"),
    [
        ([1.0, 2.0], [1.0, 1.0], "sum to 1"),
        ([1.0, 2.0], [1.5, -0.5], "at least 0"),
        ([1.0, 2.0], [np.nan, 1.0], "at least 0"),
        ([1.0, np.nan], [0.5, 0.5], "real and finite"),
        ([1.0, np.inf], [0.5, 0.5], "real and finite"),
        ([1.0, 2.0j], [0.5, 0.5], "real and finite"),
        ([[1.0, 2.0], [3.0, 4.0]], [[0.5, 0.5], [0.5, 0.4]], "sum to 1"),
    ],
)
def test_what_is_no_probability_measure_is_refused(nodes, weights, message):
    with pytest.raises(ValueError, match=message):
        SpectralMeasure(nodes, weights)


def test_full_depth_gives_the_measure_back():
    nodes, weights = random_measure(size=12)
    order = np.argsort(nodes)
    tridiagonal = jacobi(nodes, weights, 100)
    assert tridiagonal.breakdown
    for rule in (gauss(tridiagonal), gauss_radau(tridiagonal, 0.3)):
        np.testing.assert_allclose(rule[0], nodes[order], atol=1e-12)
        np.testing.assert_allclose(rule[1], weights[order], atol=1e-12)


@pytest.mark.parametrize(("diagonal", "off_diagonal", "node"), [([2.0], [], 2.0), ([2.0, 2.0], [1.0], 3.0)])
def test_radau_at_an_eigenvalue(diagonal, off_diagonal, node):
    """In the limit one node is infinite, with weight 0, and the others are Gauss nodes."""
    nodes, weights = gauss_radau(Tridiagonal(np.array(diagonal), np.array(off_diagonal), 1.0), node)
    np.testing.assert_allclose(np.sum(weights[np.abs(nodes - node) < 1e-6]), 1 / len(diagonal), atol=1e-6)


# Rigorous brackets.

eigenvalues = st.lists(
    st.floats(1e-8, 1).map(lambda x: float(np.float32(x))) | st.sampled_from([0.0, 1e-6, 0.5, 1.0]),
    min_size=1,
    max_size=30,
)
signed = st.lists(
    st.floats(-1, 1, width=32, allow_subnormal=False)
    | st.sampled_from([0.0, 0.25, -0.25, 0.5, -0.5, 1e-5, -1e-5]),
    min_size=1,
    max_size=30,
)


def seeded_weights(size, seed):
    weights = np.random.default_rng(seed).exponential(size=size)
    return weights / np.sum(weights)


@settings(max_examples=300)
@given(eigenvalues, st.integers(1, 30), st.integers(0, 1000), st.floats(-6, 2))
def test_semidefinite_bracket_contains_the_truth(values, steps, seed, log_ridge):
    """Gauss <= truth <= Gauss-Radau for the completely monotone a / (a + x)."""
    values, ridge = np.array(values), 10.0**log_ridge
    assume(values.max() > 0)
    weights = seeded_weights(len(values), seed)
    tridiagonal = jacobi(values, weights, steps)
    bracket = bracket_semidefinite([tridiagonal])

    def f(x):
        return ridge / (ridge + x)

    truth = integrate((values, weights), f)
    lower, upper = bracket.lower[0].integrate(f)[0], bracket.upper.integrate(f)[0]
    # Nodes are known to about 1e-15 of the largest, which matters in units of the ridge.
    rounding = 1e-12 + 1e-13 / ridge
    assert lower <= truth + rounding
    assert truth <= upper + rounding
    assert bracket.dimension.lower(ridge) == pytest.approx(lower, abs=1e-14)
    assert bracket.dimension.upper(ridge) == pytest.approx(upper, abs=1e-14)
    assert bracket.dimension.value(ridge) == pytest.approx((lower + upper) / 2, abs=1e-14)
    assert np.all(bracket.lower[0].nodes >= 0)
    assert np.all(bracket.upper.nodes >= 0)
    # Half of the bracket is what it calls spread.
    assert spread(at_ridge(bracket, ridge)) == pytest.approx(abs(upper - lower) / 2, abs=1e-12)


def test_semidefinite_bracket_where_the_eigenvalue_zero_is_resolved():
    ridge = 1e-5
    for seed in range(10):
        values = np.append(np.zeros(5), 10 ** np.random.default_rng(seed).uniform(-1, 0, 20))
        weights = seeded_weights(25, seed)
        truth = integrate((values, weights), lambda x: ridge / (ridge + x))
        for steps in range(3, 21):
            bracket = bracket_semidefinite([jacobi(values, weights, steps)])
            assert bracket.dimension.lower(ridge) <= truth + 1e-7
            assert truth <= bracket.dimension.upper(ridge) + 1e-7


def test_semidefinite_bracket_closes():
    values = np.geomspace(1e-4, 1, 60)
    weights = np.full(60, 1 / 60)

    def f(x):
        return 0.01 / (0.01 + x)

    widths = []
    for steps in (2, 5, 10, 20):
        bracket = bracket_semidefinite([jacobi(values, weights, steps)])
        widths.append(bracket.upper.integrate(f)[0] - bracket.lower[0].integrate(f)[0])
    assert widths[0] > 0.1
    assert np.all(np.diff(widths) < 0)
    assert widths[-1] < 1e-4


def chebyshev_programme(nodes, weights, degree, ridge, sign):
    """Largest (sign = 1) or smallest integral of f over measures on a grid with the moments to `degree`."""
    grid = np.unique(np.concatenate([np.linspace(-1, 1, 801), nodes]))
    moments = np.polynomial.chebyshev.chebvander(nodes, degree).T @ weights
    conditions = np.polynomial.chebyshev.chebvander(grid, degree).T
    values = ridge / (ridge + np.abs(grid))
    accuracy = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    found = linprog(-sign * values, A_eq=conditions, b_eq=moments, method="highs", options=accuracy)
    assert found.status == 0
    return -sign * found.fun


@pytest.mark.parametrize("ridge", [0.03, 0.5])
@pytest.mark.parametrize("low", [-1.0, -0.1, 0.05])
@pytest.mark.parametrize("steps", [2, 3, 4])
def test_bounds_are_the_best_possible(steps, low, ridge):
    """Oracle: a linear programme over all measures on a grid, which knows no quadrature."""
    for seed in range(3):
        nodes, weights = random_measure(seed=seed, low=low)
        run = jacobi(nodes, weights, steps)
        upper = integrate(gauss_radau(run, 0.0), lambda x: ridge / (ridge + np.abs(x)))
        lower = integrate(least_rules(run, [ridge])[0], lambda x: ridge / (ridge + np.abs(x)))
        # The rules may have nodes beyond the grid on [-1, 1].
        highest, lowest = (chebyshev_programme(nodes, weights, 2 * steps, ridge, sign) for sign in (1, -1))
        assert (
            lowest - 1e-9
            < integrate((nodes, weights), lambda x: ridge / (ridge + np.abs(x)))
            < highest + 1e-9
        )
        assert highest < upper + 1e-3
        assert lowest > lower - 1e-3
        if np.all(np.abs(gauss_radau(run, 0.0)[0]) <= 1):
            assert highest > upper - 1e-3
        if np.all(np.abs(least_rules(run, [ridge])[0][0]) <= 1):
            assert lowest < lower + 1e-3


@settings(max_examples=200)
@given(signed, st.integers(1, 20), st.integers(0, 1000), st.floats(-3, 1), st.floats(-6, 6))
def test_no_rule_with_the_same_moments_lies_outside(values, steps, seed, log_ridge, entry):
    values, ridge = np.array(values), 10.0**log_ridge
    assume(np.max(np.abs(values)) > 1e-3)
    run = jacobi(values, seeded_weights(len(values), seed), steps)
    assume(not run.breakdown)
    # Any last diagonal entry gives a rule that is exact to degree 2k.
    extended = Tridiagonal(
        np.append(run.diagonal, np.sinh(entry)), np.append(run.off_diagonal, run.residual_norm), 0.0
    )

    def f(x):
        return ridge / (ridge + np.abs(x))

    found = integrate(gauss(extended), f)
    assert found <= integrate(gauss_radau(run, 0.0), f) + 1e-7
    # The least rule is found to an accuracy that is far below what bounds are quoted to.
    assert found >= integrate(least_rules(run, [ridge])[0], f) - 1e-4


def test_bounds_tighten_with_every_step():
    nodes, weights = random_measure(200, seed=3)
    bounds = [
        [
            integrate(rule, lambda x: 0.05 / (0.05 + np.abs(x)))
            for rule in (gauss_radau(run, 0.0), least_rules(run, [0.05])[0])
        ]
        for run in (jacobi(nodes, weights, steps) for steps in range(2, 60, 3))
    ]
    assert np.all(np.diff(bounds, axis=0)[:, 0] < 1e-12)
    assert np.all(np.diff(bounds, axis=0)[:, 1] > -1e-5)
    assert bounds[0][0] - bounds[0][1] > 0.4
    assert bounds[-1][0] - bounds[-1][1] < 0.01


@settings(max_examples=100)
@given(signed, signed, st.integers(1, 25), st.integers(0, 1000), st.floats(-3, 1), st.floats(-2, 2))
def test_indefinite_bracket_contains_the_truth_of_each_probe(
    first, second, steps, seed, log_ridge, log_ratio
):
    ridge = 10.0**log_ridge
    measures, runs = [], []
    for values in (first, second):
        assume(np.max(np.abs(values)) > 1e-3)
        measures.append((np.array(values), seeded_weights(len(values), seed)))
        runs.append(jacobi(*measures[-1], steps))
    bracket = bracket_indefinite(runs, ridge=ridge)
    at = ridge * 10.0**log_ratio  # bounds are resolved around the ridge and valid everywhere

    def f(x):
        return at / (at + np.abs(x))

    for row, measure in enumerate(measures):
        truth = integrate(measure, f)
        *lower, upper = (
            float(np.sum(side.weights[row] * f(side.nodes[row]))) for side in (*bracket.lower, bracket.upper)
        )
        assert min(lower) <= truth + 1e-7
        assert truth <= upper + 1e-7
    for measure in (*bracket.lower, bracket.upper, *bracket.rules):
        assert np.all(measure.weights >= 0)
        np.testing.assert_allclose(np.sum(measure.weights, axis=1), 1, atol=1e-12)


def spike(seed, size=600):
    """A spectrum like that of a trained network: most of it near 0 on either side, and positive outliers."""
    rng = np.random.default_rng(seed)
    bulk = 10 ** rng.uniform(-8, -1.5, size - 30) * rng.choice([1, 1, -1], size - 30)
    return np.append(bulk, 10 ** rng.uniform(-1, 0.5, 30)), np.full(size, 1 / size)


@pytest.mark.parametrize("seed", range(4))
def test_the_extrapolated_value_is_right_long_before_the_bounds_close(seed):
    measure, ridge = spike(seed), 5e-4
    truth = integrate(measure, lambda x: ridge / (ridge + np.abs(x)))
    longest = jacobi(*measure, 192)
    widths, errors, spreads, later = [], [], [], []
    for steps in (96, 128, 160, 192):
        bracket = bracket_indefinite([longest.truncate(steps)], ridge=ridge)
        found = at_ridge(bracket, ridge)
        assert found.lower <= truth <= found.upper
        widths.append(found.upper - found.lower)
        errors.append(abs(found.value - truth))
        spreads.append(spread(at_ridge(bracket, ridge)))
        # All estimates but what the value was after three quarters of the steps, when it was less good.
        later.append(max(abs(found.others[i] - found.value) for i in (0, 1, 3)))
    assert np.all(np.array(errors) < 0.15 * np.array(widths))
    assert np.all(np.array(errors) < 3 * np.array(spreads))
    assert spreads[-1] < 0.3 * widths[0]
    assert later[-1] < 0.3 * widths[-1]


@pytest.mark.parametrize("seed", range(4))
def test_the_spread_covers_what_the_value_was_after_three_quarters_of_the_steps(seed):
    measure, ridge = spike(seed), 5e-4
    longest = jacobi(*measure, 128)
    for steps in (32, 64, 96, 128):
        bracket, earlier = (bracket_indefinite([longest.truncate(k)]) for k in (steps, steps * 3 // 4))
        moved = abs(bracket.dimension.value(ridge) - earlier.dimension.value(ridge))
        assert spread(at_ridge(bracket, ridge)) >= moved


def test_the_value_does_not_leave_the_bounds():
    """What is extrapolated from a few steps would: here the differences hardly shrink."""
    terms = 0.9 - 0.4 * (1 - 0.99 ** (np.array(SIXTEENTHS) - 4))
    rules = tuple(SpectralMeasure([[1 / term - 1]], [[1.0]]) for term in terms)
    free = SpectralBracket((FAR,), rules[0], rules)
    assert free.dimension.value(1.0) == pytest.approx(0.5)
    bracket = SpectralBracket((SpectralMeasure([[0.25]], [[1.0]]),), rules[0], rules)
    assert bracket.dimension.value(1.0) == bracket.dimension.lower(1.0) == 0.8


def test_geometric_convergence_is_extrapolated_to_its_limit():
    """delta(a) / D of one eigenvalue x is a / (a + x): rules are made so that it is 0.5 + 0.3 r^j."""
    terms = 0.5 + 0.3 * 0.7 ** np.array(SIXTEENTHS)
    rules = tuple(SpectralMeasure([[1 / term - 1]], [[1.0]]) for term in terms)
    bracket = SpectralBracket((FAR,), rules[-1], rules)
    found = at_ridge(bracket, 1.0)
    assert (found.value, *found.others[:3]) == pytest.approx([0.5] * 4, abs=1e-12)
    assert found.others[3] == pytest.approx(0.5 + 0.25 * 0.3 * 0.7**16, abs=1e-12)
    assert spread(at_ridge(bracket, 1.0)) == pytest.approx(0.25 * 0.3 * 0.7**16)


def test_what_does_not_converge_geometrically_is_not_extrapolated():
    terms = 0.9 - 0.025 * (np.array(SIXTEENTHS) - 4)
    rules = tuple(SpectralMeasure([[1 / term - 1]], [[1.0]]) for term in terms)
    bracket = SpectralBracket((FAR,), rules[-1], rules)
    assert bracket.dimension.value(1.0) == pytest.approx(terms[-1], abs=1e-12)
    assert spread(at_ridge(bracket, 1.0)) == pytest.approx(0.1)


@pytest.mark.parametrize("num_steps", [8, 12])
def test_rounding_widens_the_bounds_and_leaves_the_value(num_steps):
    run = jacobi(*random_measure(12, low=0), num_steps)
    assert run.breakdown == (num_steps == 12)
    rounded = replace(run, rounding=1e-3)
    for bracket in (bracket_semidefinite, lambda runs: bracket_indefinite(runs, ridge=0.1)):
        plain, wide = bracket([run]), bracket([rounded])
        assert wide.dimension.value(0.1) == plain.dimension.value(0.1)
        # By d / dx of a / (a + x), at most 1 / a.
        assert 0 < wide.dimension.upper(0.1) - plain.dimension.upper(0.1) < 2e-3 / 0.1
        assert 0 < plain.dimension.lower(0.1) - wide.dimension.lower(0.1) < 2e-3 / 0.1


def test_indefinite_bracket_without_a_ridge_knows_nothing_from_below():
    bracket = bracket_indefinite([jacobi(*random_measure(), 5)])
    assert bracket.dimension.lower(0.1) == pytest.approx(0, abs=1e-12)
    assert bracket.dimension.upper(0.1) < 1


def test_without_a_ridge_a_run_that_ended_is_exact_and_the_others_are_bounded_by_0():
    values, weights = np.array([-0.2, 0.5, 1.0]), np.array([0.5, 0.2, 0.3])
    ended, other = jacobi(values, weights, 20), jacobi(*random_measure(40), 20)
    truth = integrate((values, weights), lambda x: 0.3 / (0.3 + np.abs(x)))
    delta = bracket_indefinite([ended, other]).dimension.lower
    assert delta(0.3) == pytest.approx((truth + 0) / 2, abs=1e-12)
    assert delta(np.inf) == 1


def test_two_quantities_join_bound_by_bound():
    few, more = Bracketed(1, 2, 3, (4,)), Bracketed(10, 20, 30, (40, 50))
    assert few.join(lambda x, y: x + y, more) == Bracketed(11, 22, 33, (44, 52))
    assert Bracketed.known(2).join(lambda x, y: x * y, more) == Bracketed(20, 40, 60, (80, 100))
    assert few.map(str) == Bracketed("1", "2", "3", ("4",))


@pytest.mark.parametrize("signs", [np.ones(3), np.array([1, -1, 1])])
def test_breakdown_makes_all_measures_coincide(signs):
    values, weights = signs * np.array([0.2, 0.5, 1.0]), np.array([0.5, 0.2, 0.3])
    run = jacobi(values, weights, 10)
    assert run.breakdown
    truth = integrate((values, weights), lambda x: 0.3 / (0.3 + np.abs(x)))
    brackets = [bracket_indefinite([run, run]), bracket_indefinite([run], ridge=0.3)]
    if np.all(signs > 0):
        brackets.append(bracket_semidefinite([run, run]))
    for bracket in brackets:
        found = at_ridge(bracket, 0.3)
        for estimate in (found.lower, found.value, found.upper, *found.others):
            assert estimate == pytest.approx(truth, abs=1e-12)


def test_a_run_that_ended_is_exact_beside_others_that_did_not():
    values, weights = np.array([-0.2, 0.5, 1.0]), np.array([0.5, 0.2, 0.3])
    ended, other = jacobi(values, weights, 20), jacobi(*random_measure(40), 20)
    assert ended.breakdown
    assert not other.breakdown
    truth = integrate((values, weights), lambda x: 0.3 / (0.3 + np.abs(x)))
    bracket = bracket_indefinite([ended, other], ridge=0.3)
    for measure in (*bracket.lower, bracket.upper, bracket.rules[-1]):
        found = np.sum(measure.weights[0] * 0.3 / (0.3 + np.abs(measure.nodes[0])))
        assert found == pytest.approx(truth, abs=1e-12)


def test_infinite_ridge():
    semidefinite = bracket_semidefinite([jacobi(*random_measure(low=0), 5)])
    for bracket in (semidefinite, bracket_indefinite([jacobi(*random_measure(), 5)])):
        assert bracket.dimension.value(np.inf) == 1
        assert bracket.probe_error(np.inf) == 0


# Measures.


def test_measure_made_by_hand():
    nodes = np.array([-1.0, 0.5, 2.0, 4.0])
    measure = SpectralMeasure(nodes, np.full(4, 0.25))
    assert measure.nodes.shape == measure.weights.shape == (1, 4)
    assert measure.integrate(np.exp) == (pytest.approx(np.mean(np.exp(nodes))), 0.0)
    assert measure.probe_error(np.exp) == 0.0


def test_measure_of_several_probes():
    nodes = np.array([[1.0, 2.0], [0.0, 4.0], [3.0, 3.0]])
    weights = np.array([[0.5, 0.5], [0.25, 0.75], [0.1, 0.9]])
    mean, error = SpectralMeasure(nodes, weights, dim=10).integrate(lambda x: x**2)
    values = np.array([2.5, 12.0, 9.0])
    assert mean == pytest.approx(np.mean(values))
    assert error == pytest.approx(np.sqrt(np.sum((values - np.mean(values)) ** 2) / 2 / 3))


def test_measure_is_a_pytree():
    measure = SpectralMeasure([[1.0, 2.0]], [[0.5, 0.5]], dim=7)
    turned = jax.tree.map(lambda x: x[:, ::-1], measure)
    assert turned.dim == 7
    np.testing.assert_array_equal(turned.nodes, [[2.0, 1.0]])
    assert jax.tree.structure(measure) == jax.tree.structure(turned)


def test_nodes_and_weights_of_different_shapes():
    with pytest.raises(ValueError, match=r"one shape, got \(1, 2\) and \(1, 3\)"):
        SpectralMeasure([1.0, 2.0], [0.2, 0.3, 0.5])


def test_rules_of_different_length_in_one_measure():
    rules = [(np.array([1.0]), np.array([1.0])), (np.array([2.0, 5.0]), np.array([0.25, 0.75]))]
    measure = stack_rules(rules, dim=3)
    np.testing.assert_array_equal(np.sum(measure.weights, axis=1), [1, 1])
    assert measure.integrate(lambda x: x + 1)[0] == pytest.approx((2 + 0.25 * 3 + 0.75 * 6) / 2)
    assert measure.dim == 3


def test_functions_that_are_not_finite_at_zero():
    rules = [(np.array([1.0]), np.array([1.0])), (np.array([2.0, 4.0]), np.array([0.5, 0.5]))]
    assert stack_rules(rules).integrate(lambda x: 1 / x)[0] == pytest.approx((1 + 0.375) / 2)


# Probes.


def all_signs(dim):
    return np.array(list(product([-1.0, 1.0], repeat=dim)))


@pytest.mark.parametrize("seed", range(5))
def test_probe_error_bounds_the_exact_error(seed):
    """All 2^9 sign vectors: the variance is 2 sum_{i != j} F_ij^2 / D^2, and the bound is above it."""
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((9, 9))
    values, vectors = np.linalg.eigh(root @ root.T)

    def f(x):
        return 2.0 / (2.0 + x)

    matrix = (vectors * f(values)) @ vectors.T
    means = np.einsum("si,ij,sj->s", all_signs(9), matrix, all_signs(9)) / 9
    off_diagonal = matrix - np.diag(np.diag(matrix))
    assert np.var(means) == pytest.approx(2 * np.sum(off_diagonal**2) / 81, rel=1e-10)
    assert np.mean(means) == pytest.approx(np.mean(f(values)), rel=1e-12)
    measure = SpectralMeasure(values, np.full(9, 1 / 9), dim=9)
    assert np.std(means) <= measure.probe_error(f) <= 2 * np.std(means)
    assert measure.probe_error(f) == measure.integrate(f)[1]


def test_probe_error_is_sharp():
    """The bound is the error itself where F has a constant diagonal, as circulant matrices have."""
    matrix = circulant([3.0, 1.0, 0.2, 0.0, 0.0, 0.0, 0.2, 1.0])
    values, vectors = np.linalg.eigh(matrix)
    inverse = (vectors / (1 + values)) @ vectors.T
    means = np.einsum("si,ij,sj->s", all_signs(8), inverse, all_signs(8)) / 8
    measure = SpectralMeasure(values, np.full(8, 1 / 8), dim=8)
    assert measure.probe_error(lambda x: 1 / (1 + x)) == pytest.approx(np.std(means), rel=1e-10)
    tiled = SpectralMeasure(np.tile(values, (4, 1)), np.full((4, 8), 1 / 8), dim=8)
    assert tiled.probe_error(lambda x: 1 / (1 + x)) == pytest.approx(np.std(means) / 2, rel=1e-10)


def test_a_multiple_of_the_identity_has_no_probe_error():
    assert SpectralMeasure([[2.0]], [[1.0]], dim=5).probe_error(lambda x: 1 / (1 + x)) == 0


def test_sign_vectors(dtype):
    like = {"a": jnp.zeros((30, 20), dtype), "b": None, "c": [jnp.zeros(500, dtype)]}
    probes = rademacher(jax.random.key(0), like, 3)
    assert jax.tree.map(jnp.shape, probes) == {"a": (3, 30, 20), "b": None, "c": [(3, 500)]}
    for leaf in jax.tree.leaves(probes):
        assert leaf.dtype == dtype
        assert set(np.unique(leaf)) == {-1.0, 1.0}
        assert abs(float(leaf.mean())) < 4 / np.sqrt(leaf.size)
    first = jax.random.split(jax.random.key(0), 2)[0]
    with jax.enable_x64(False):  # the same signs in either precision
        np.testing.assert_array_equal(probes["a"], jax.random.rademacher(first, (3, 30, 20)))
    again, other = rademacher(jax.random.key(0), like, 3), rademacher(jax.random.key(1), like, 3)
    np.testing.assert_array_equal(again["a"], probes["a"])
    assert np.any(np.asarray(other["a"]) != np.asarray(probes["a"]))
    flat = np.concatenate([np.reshape(x, (3, -1)) for x in jax.tree.leaves(probes)], axis=1)
    # Rows and leaves are independent.
    correlation = flat @ flat.T / 1100 - np.eye(3)
    assert np.max(np.abs(correlation)) < 4 / np.sqrt(1100)
    assert abs(np.mean(flat[0, :500] * flat[0, 600:])) < 4 / np.sqrt(500)


def squared_error(params, batch):
    return jnp.mean((batch["x"] @ params["kernel"]) ** 2) / 2


@pytest.fixture(scope="module")
def least_squares():
    """A curvature that is X^T X / N, with its exact eigenvalues."""
    x = np.random.default_rng(0).standard_normal((40, 12)) * np.geomspace(1, 0.03, 12)
    mix = np.linalg.qr(np.random.default_rng(1).standard_normal((12, 12)))[0]
    x = np.asarray(x @ mix, np.float32)
    curvature = hessian(squared_error, {"kernel": jnp.ones((12, 1)), "b": jnp.ones(1)}, batched({"x": x}, 16))
    return curvature, np.linalg.eigvalsh(x.astype(float).T @ x.astype(float) / 40)


def falling(x):
    return 0.05 / (0.05 + np.abs(x))


def test_spectral_measure_within_its_error(least_squares):
    curvature, values = least_squares
    truth = np.mean(falling(values))
    deviations, errors = [], []
    for seed in range(8):
        measure = spectral_measure(curvature, jax.random.key(seed), num_probes=40, num_matvecs=12)
        assert measure.nodes.shape == (40, 12)
        assert measure.dim == 12
        mean, error = measure.integrate(falling)
        assert abs(mean - truth) <= 4 * error
        assert error <= 1.5 * measure.probe_error(falling)
        deviations.append(mean - truth)
        errors.append(error)
    assert len(set(deviations)) == 8
    # The reported error is neither much too small nor much too large.
    assert 0.4 < np.sqrt(np.mean(np.square(deviations))) / np.mean(errors) < 2.5


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_spectral_measure_depends_on_the_key_alone(reorthogonalize, least_squares):
    curvature, values = least_squares

    def measure(seed, steps=6):
        return spectral_measure(
            curvature, jax.random.key(seed), num_probes=2, num_matvecs=steps, reorthogonalize=reorthogonalize
        )

    first, again, other = measure(0), measure(0), measure(1)
    np.testing.assert_array_equal(first.nodes, again.nodes)
    np.testing.assert_array_equal(first.weights, again.weights)
    assert np.all(first.nodes != other.nodes)
    assert np.any(first.nodes[0] != first.nodes[1])
    # The moments of each row up to the second are z^T H^j z / D with the probe z itself.
    probes = np.asarray(rademacher(jax.random.key(0), curvature.weights, 2)["kernel"], float).reshape(2, 12)
    matrix = curvature.dense()
    for row, z in enumerate(probes):
        for power in (0, 1, 2):
            expected = z @ np.linalg.matrix_power(matrix, power) @ z / 12
            assert np.sum(first.weights[row] * first.nodes[row] ** power) == pytest.approx(expected, rel=1e-4)
    assert np.max(first.nodes) == pytest.approx(values[-1], rel=1e-2)


@pytest.mark.parametrize("numbers", [(0, 5), (5, 0), (-1, 5)])
def test_no_probes_or_steps(numbers, least_squares):
    probes, steps = numbers
    with pytest.raises(ValueError, match=f"must be an integer of at least 1, got {min(numbers)}"):
        spectral_measure(least_squares[0], jax.random.key(0), num_probes=probes, num_matvecs=steps)


@pytest.mark.parametrize(
    ("radius", "eps"),
    [(np.float16(300), 1.0), (jnp.float32(1e20), 1e38), (np.float32(1e-25), 1e-50), (1e-200, 1.0), (0, 1)],
)
def test_the_width_does_not_depend_on_the_precision_of_its_numbers(radius, eps):
    """Oracle: the formula with logarithms."""
    measure = SpectralMeasure([[0.0, 1.0]], [[0.5, 0.5]])
    log_ridge = np.log(2.0) + np.log(eps) - 2 * np.log(float(radius)) if radius else np.inf
    expected = 0.5 + 0.5 / (1 + np.exp(-log_ridge))
    assert geometry.width_dimension(measure, radius, eps) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bad", [np.nan, -1.0, np.inf, "1", None, np.ones(2)])
def test_numbers_that_make_no_sense_are_refused(bad):
    measure = SpectralMeasure([[0.0, 1.0]], [[0.5, 0.5]])
    for ask in (
        lambda: geometry.width_dimension(measure, bad, 1.0),
        lambda: geometry.width_dimension(measure, 1.0, bad),
        lambda: geometry.cone_dimension(measure, measure, bad, 1.0),
        lambda: geometry.cone_ridge(lambda a: 1.0, 1.0, bad),
        lambda: geometry.width_ridge(bad, 1.0),
        lambda: geometry.transition_halfwidth(bad, 0.5),
        lambda: geometry.transition_halfwidth(10, bad),
        lambda: geometry.effective_dimension(measure, -1.0 if bad is np.inf else bad),
        lambda: SpectralMeasure([[1.0]], [[1.0]], dim=0 if bad is None else bad),
    ):
        with pytest.raises(ValueError, match="must be"):
            ask()
    with pytest.raises(ValueError, match="measure must be a SpectralMeasure"):
        geometry.effective_dimension(np.ones(2), 1.0)
