"""Sparsities from the weights alone, and the law of the pruned error, against known answers."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import optimize, stats

from jaxlimit.baselines import (
    PrunedError,
    effective_number,
    fit_pruned_error,
    near_zero_share,
    pq_sparsity,
)

QUANTILES = (np.arange(200_000) + 0.5) / 200_000


@pytest.mark.parametrize(("distribution", "share"), [(stats.norm, 2 / np.pi), (stats.laplace, 0.5)])
def test_the_effective_number_of_known_distributions(distribution, share):
    """E|w|^2 / E w^2: 2 / pi for a Gaussian, 1 / 2 for Laplace's; any scale, split into any arrays."""
    weights = 3 * distribution.ppf(QUANTILES).astype(np.float32)
    tree = {"a": weights[:1000].reshape(10, 100), "b": weights[1000:]}
    assert effective_number(tree) / len(weights) == pytest.approx(share, abs=2e-3)
    assert pq_sparsity(tree, 1.0, 2.0) == pytest.approx(1 - share, abs=2e-3)
    small, large = (sum(abs(x) < t for x in weights.tolist()) / len(weights) for t in (0.01, 0.1))
    assert (near_zero_share(tree, 0.01), near_zero_share(tree, 0.1)) == pytest.approx((small, large))
    assert near_zero_share(tree, 0.1, relative=True) == np.mean(np.abs(weights) < 0.1 * np.abs(weights).max())


def test_the_pq_index_is_the_formula():
    weights, p, q = np.random.default_rng(0).standard_normal(50), 0.5, 1.0
    index = 1 - 50 ** (1 / q - 1 / p) * np.sum(np.abs(weights) ** p) ** (1 / p) / np.sum(np.abs(weights))
    kept = 1.1 ** (-q / (q - p)) * (1 - index) ** (p * q / (q - p))
    assert pq_sparsity(weights, slack=0.1) == pytest.approx(1 - kept, rel=1e-12)
    assert pq_sparsity(np.eye(40)) == 0.9  # a round removes no more
    assert pq_sparsity(np.full(7, -2.0)) == pytest.approx(0, abs=1e-12)
    assert pq_sparsity(1e30 * weights) == pytest.approx(pq_sparsity(weights))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: near_zero_share(np.ones(3), 0), "threshold must be positive"),
        (lambda: pq_sparsity(np.ones(3), 2.0, 1.0), "p and q must be"),
        (lambda: pq_sparsity(np.ones(3), slack=-1), "slack must be at least 0"),
        (lambda: effective_number(np.zeros(3)), "nothing is left to count"),
        (lambda: effective_number(np.array([1.0, np.nan])), "not finite"),
        (lambda: effective_number({}), "nothing is left to count"),
        (lambda: fit_pruned_error([0.5, 0.1], [0.1, 0.2], 0.1), "at least 3"),
        (lambda: fit_pruned_error([0.5, 0.1, 0], [0.1, 0.2, 0.3], 0.1), "densities must be above 0"),
        (lambda: fit_pruned_error([0.5, 0.1, 0.2], [0.1, 0, 0.3], 0.1), "errors must be positive"),
        (lambda: fit_pruned_error([0.5, 0.1, 0.2], [0.1, 0.1, 0.3], 0), "dense must be positive"),
    ],
)
def test_what_is_out_of_range_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_law_has_its_plateaus_and_its_exponent():
    law = PrunedError(dense=1e-4, upper=0.9, exponent=1.3, transition=1e-5)
    assert law.error([1.0, 0.0]) == pytest.approx([1e-4, 0.9], rel=1e-3)
    middle = np.array([3e-4, 6e-4])  # between p and the other corner, p (upper / dense)^(1 / gamma) = .011
    slope = np.diff(np.log(law.error(middle))) / np.diff(np.log(middle))
    assert slope == pytest.approx([-1.3], abs=0.01)


def test_the_threshold_of_the_law_is_its_root():
    law = PrunedError(dense=0.02, upper=0.8, exponent=1.5, transition=0.01)
    root = optimize.brentq(lambda s: law.error(1 - s) - 0.03, 0, 1)
    assert law.sparsity(0.03) == pytest.approx(root, abs=1e-9)
    assert (law.sparsity(0.01), law.sparsity(0.9)) == (0, 1)


@pytest.mark.parametrize("seed", range(3))
def test_the_law_is_found_again_from_eight_noisy_networks(seed):
    """With 1 % of noise its threshold is right to a percent of sparsity."""
    rng = np.random.default_rng(seed)
    law = PrunedError(dense=0.05, upper=0.9, exponent=rng.uniform(0.5, 2), transition=0.01)
    densities = np.geomspace(0.5, 0.01, 8)
    noisy = law.error(densities) * (1 + 0.01 * rng.standard_normal(8))
    found = fit_pruned_error(densities, noisy, 0.05)
    assert found.sparsity(0.1) == pytest.approx(law.sparsity(0.1), abs=0.01)


def test_a_law_of_a_small_exponent_stays_within_floats():
    """(err_up / err_dense)^(2 / gamma) is 40^200 here."""
    law = PrunedError(dense=0.02, upper=0.8, exponent=0.01, transition=1e-200)
    np.testing.assert_allclose(law.error([1.0, 0.0]), [0.02, 0.8])
    assert law.sparsity(0.1) == 1.0
    assert replace(law, transition=0.1).sparsity(0.1) == 0.0


def test_zeros_are_near_zero():
    assert near_zero_share(np.zeros(3), 0.01) == 1
    with pytest.raises(ValueError, match="nothing is left to count"):
        near_zero_share(np.zeros(3), 0.01, relative=True)
