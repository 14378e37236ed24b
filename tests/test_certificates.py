"""Certificates: p-values against exact sums and SciPy's tails, error rates by simulation, refusals.

Oracles: `math.comb` and `scipy.stats` for the tails; all outcomes of a few examples, with their
probabilities; the betting game written out once more, for many data sets at once.
"""

import itertools
import json
import math
import re
from pathlib import Path

import digits
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.special import ndtri

import jaxlimit
from jaxlimit import apply_mask, batched, certify, magnitude_mask, paired
from jaxlimit.core.trees import is_kernel, partition
from jaxlimit.measuring import p_values
from jaxlimit.measuring.p_values import METHODS, betting, binomial, hoeffding_bentkus

REPETITIONS = 2000


def at_most(rate, level, repetitions=REPETITIONS):
    """Whether an error rate is at most the level, within three of its binomial standard errors."""
    return rate <= level + 3 * math.sqrt(level * (1 - level) / repetitions)


def rejected(risks, bound, level):
    """Which rows of risks (repetitions, n), in this order, bets reject: the module's formulas, row by row."""
    repetitions, n = risks.shape
    capital, best = np.full(repetitions, 0.99 * level), np.zeros(repetitions)
    prior = 0.5 / (bound * (1 - bound))
    total, squares = np.zeros(repetitions), np.full(repetitions, 0.5)
    for t in range(n):
        deviation = np.sqrt(squares / (prior + t))
        stake = stats.norm.pdf(ndtri(capital)) / (deviation * math.sqrt(n - t))
        stake = np.minimum.reduce([stake, capital / (1 - bound), (1 - capital) / bound])
        capital = np.maximum(capital + np.where(best >= 0.99, 0, stake) * (bound - risks[:, t]), 0)
        best = np.maximum(best, capital)
        total += risks[:, t]
        squares += (risks[:, t] - (prior * bound + total) / (prior + t + 1)) ** 2
    return best >= 0.99


def draws(kind, mean, shape, rng):
    """Risks of this mean: errors; continuous ones, of little and of much spread; differences of errors."""
    if kind == "errors":
        return (rng.random(shape) < mean).astype(float)
    if kind == "beta":
        return rng.beta(20 * mean, 20 * (1 - mean), shape)
    if kind == "wide beta":
        return rng.beta(mean, 1 - mean, shape)
    if kind == "nearly equal":
        return mean + rng.uniform(-0.001, 0.001, shape)
    worse = 0.015 + (mean - 0.5)
    u = rng.random(shape)
    return np.where(u < worse, 1.0, np.where(u < 0.03, 0.0, 0.5))


NULLS = [("errors", 0.03), ("errors", 0.3), ("beta", 0.1), ("wide beta", 0.1), ("paired", 0.505)]


@pytest.mark.parametrize(("n", "bound"), [(1, 0.5), (30, 0.03), (200, 0.4)])
def test_the_binomial_p_value_is_the_exact_tail(n, bound):
    for count in range(0, n + 1, max(n // 10, 1)):
        exact = sum(math.comb(n, i) * bound**i * (1 - bound) ** (n - i) for i in range(count + 1))
        assert binomial(count, n, bound) == pytest.approx(exact, rel=1e-9)


def test_hoeffding_bentkus_is_its_formula():
    for n, bound, mean in itertools.product((10, 333), (0.02, 0.5, 0.9), (0.0, 0.0111, 0.3, 0.95, 1.0)):
        kl = stats.entropy([min(mean, bound), 1 - min(mean, bound)], [bound, 1 - bound])
        expected = min(np.exp(-n * kl), np.e * stats.binom.cdf(math.ceil(n * mean), n, bound), 1)
        assert hoeffding_bentkus(mean, n, bound) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("bound", [0.02, 0.3, 0.8])
def test_tails_of_counts_are_valid_at_every_level(bound):
    """By all counts of 60 errors, of which each has its probability: P[p <= p(k)] <= p(k) for every k."""
    n = 60
    counts = np.arange(n + 1)
    for p_value in (binomial, lambda k, n, a: hoeffding_bentkus(k / n, n, a)):
        found = np.array([p_value(k, n, bound) for k in counts])
        assert np.all(np.diff(found) >= 0)
        assert np.all(stats.binom.cdf(counts, n, bound) <= found + 1e-12)


@pytest.mark.parametrize("values", [(0.0, 1.0), (0.0, 0.4, 1.0), (0.1, 0.2, 0.7)])
@pytest.mark.parametrize("level", [0.05, 0.3])
def test_betting_errs_no_more_often_than_its_level_over_all_outcomes(values, level):
    """All sequences of eight risks with these values, and several laws whose mean is the bound."""
    rng = np.random.default_rng(0)
    outcomes = np.array(list(itertools.product(range(len(values)), repeat=8)))
    for _ in range(5):
        law = rng.dirichlet(np.ones(len(values)))
        bound = float(law @ values)
        chance = np.prod(law[outcomes], axis=1)
        assert chance @ rejected(np.asarray(values)[outcomes], bound, level) <= level
    assert rejected(np.full((1, 8), values[0]), 0.9, level).all()  # it can reject


@pytest.mark.parametrize(("kind", "bound"), NULLS)
@pytest.mark.parametrize("level", [0.05, 0.2])
def test_error_rates_at_the_bound_by_simulation(kind, bound, level):
    rng = np.random.default_rng(1)
    risks = draws(kind, bound, (REPETITIONS, 400), rng)
    assert at_most(rejected(risks, bound, level).mean(), level)
    assert at_most(np.mean([hoeffding_bentkus(x, 400, bound) <= level for x in risks.mean(1)]), level)
    if kind == "errors":
        wrong = stats.binom.cdf(risks.sum(1), 400, bound) <= level
        assert at_most(wrong.mean(), level)
        assert wrong.any()


@pytest.mark.parametrize(("kind", "bound"), NULLS)
def test_betting_is_the_game_in_an_order_of_its_own(kind, bound):
    rng = np.random.default_rng(2)
    risks = draws(kind, 0.5 + 0.93 * (bound - 0.5) if kind == "paired" else 0.85 * bound, (6, 500), rng)
    order = np.random.default_rng(0).permutation(500)
    for row in risks:
        p = betting(row, bound)
        assert p == 1 or rejected(row[None, order], bound, p).all()
        assert not rejected(row[None, order], bound, 0.99 * p).any()
        assert betting(row, bound) == p


def test_more_examples_than_bets_are_put_together(monkeypatch):
    rng = np.random.default_rng(3)
    risks = draws("wide beta", 0.08, (5, 1001), rng)
    before = [betting(row, 0.1) for row in risks]
    monkeypatch.setattr(p_values, "MAX_BETS", 500)  # of three examples, the last of two
    after = [betting(row, 0.1) for row in risks]
    order = np.random.default_rng(0).permutation(1001)
    for row, p in zip(risks[:, order], after, strict=True):
        means = np.array([[row[i : i + 3].mean() for i in range(0, 1001, 3)]])
        assert rejected(means, 0.1, p).all()
        assert not rejected(means, 0.1, 0.99 * p).any()
    assert before != after


@pytest.mark.parametrize("method", METHODS)
def test_p_values_fall_as_the_bound_rises_and_the_risks_fall(method):
    risks = draws("errors", 0.05, 600, np.random.default_rng(4))
    p_value = METHODS[method].p_value
    by_bound = [p_value(risks, a) for a in (0.04, 0.06, 0.08, 0.1)]
    assert by_bound == sorted(by_bound, reverse=True)
    fewer = risks.copy()
    fewer[np.flatnonzero(risks)[:10]] = 0
    assert p_value(fewer, 0.06) < p_value(risks, 0.06)


@pytest.mark.parametrize("method", METHODS)
def test_the_upper_bound_is_where_the_test_turns(method):
    """Against SciPy's Clopper and Pearson; the others by the test itself on either side of the bound."""
    risks = draws("errors", 0.05, 400, np.random.default_rng(5))
    for level in (0.05, 0.2):
        upper = METHODS[method].upper_bound(risks, 0.12, level)
        if method == "binomial":
            exact = stats.binomtest(int(risks.sum()), 400, alternative="less").proportion_ci(1 - level).high
            assert upper == pytest.approx(exact, rel=1e-9)
        elif method == "hoeffding_bentkus":
            assert hoeffding_bentkus(risks.mean(), 400, upper * (1 + 1e-6)) <= level
            assert hoeffding_bentkus(risks.mean(), 400, upper * (1 - 1e-6)) > level
        else:
            game = p_values.BettingGame(risks, 0.12)
            assert game.reaches(np.linspace(upper, 0.3, 99), level).all()
            assert not game.reaches(np.linspace(1e-6, upper - 1e-5, 99), level).any()
            assert game.reaches(upper, np.linspace(level, 0.99, 99)).all()
        assert risks.mean() < upper < 0.12


@pytest.mark.parametrize("kind", ["errors", "beta", "paired"])
def test_upper_bounds_cover_the_true_risk(kind):
    """The bound lies below the true risk as often as the true risk is rejected, by the test above."""
    true, bound = {"errors": (0.05, 0.1), "beta": (0.1, 0.14), "paired": (0.5, 0.53)}[kind]
    risks = draws(kind, true, (REPETITIONS, 300), np.random.default_rng(6))
    wrong = p_values.BettingGame(risks, bound).reaches(true, 0.2)
    assert at_most(wrong.mean(), 0.2)
    assert wrong.any()
    for row in risks[np.flatnonzero(wrong)[:3]]:
        assert METHODS["betting"].upper_bound(row, bound, 0.2) <= true
    for row in risks[np.flatnonzero(~wrong)[:3]]:
        assert METHODS["betting"].upper_bound(row, bound, 0.2) >= true
    for name in ("binomial", "hoeffding_bentkus") if kind == "errors" else ("hoeffding_bentkus",):
        method = METHODS[name]
        certain = [row for row in risks[:400] if method.p_value(row, bound) <= 0.2]
        low = sum(method.upper_bound(row, bound, 0.2) < true for row in certain)
        assert at_most(low / 400, 0.2, 400)


def test_betting_finds_as_much_as_the_exact_test_and_more_than_hoeffding_bentkus():
    """What the default rests on, at the effect of which a z-test with known variance finds 80 %."""
    n, rng = 1500, np.random.default_rng(7)
    spread = {"errors": math.sqrt(0.03 * 0.97), "beta": math.sqrt(0.09 / 21), "paired": math.sqrt(0.03) / 2}
    for kind, bound, least in (("errors", 0.03, 0.75), ("beta", 0.1, 0.62), ("paired", 0.505, 0.62)):
        mean = bound - (ndtri(0.8) - ndtri(0.05)) * spread[kind] / math.sqrt(n)
        risks = draws(kind, mean, (500, n), rng)
        by_mean = np.mean([hoeffding_bentkus(x, n, bound) <= 0.05 for x in risks.mean(1)])
        found = rejected(risks, bound, 0.05).mean()
        assert found > max(least, by_mean)
        if kind == "errors":
            assert abs(found - np.mean(stats.binom.cdf(risks.sum(1), n, bound) <= 0.05)) < 0.06
        else:
            assert by_mean == 0  # it takes all risks for errors


@pytest.mark.parametrize(
    ("method", "kind", "mean", "bound"),
    [
        ("binomial", "errors", 0.02, 0.03),
        ("binomial", "errors", 0.0, 0.03),
        ("hoeffding_bentkus", "errors", 0.02, 0.03),
        ("hoeffding_bentkus", "beta", 0.2, 0.25),
        ("betting", "errors", 0.02, 0.03),
        ("betting", "errors", 0.0, 0.03),
        ("betting", "beta", 0.29, 0.3),
        ("betting", "paired", 0.5, 0.505),
        ("betting", "nearly equal", 0.48, 0.5),
        ("betting", "nearly equal", 0.09, 0.1),
    ],
)
def test_about_the_needed_examples_do(method, kind, mean, bound):
    """So many examples reject in about four of five simulations, and a third of them in less than two."""
    rng, quantiles = np.random.default_rng(8), (np.arange(20_000) + 0.5) / 20_000
    if kind == "beta":
        risks = stats.beta.ppf(quantiles, 20 * mean, 20 * (1 - mean))
    elif kind == "nearly equal":
        risks = mean + 0.002 * (quantiles - 0.5)
    else:
        risks = {"errors": 1.0 * (quantiles < mean), "paired": 0.5 + np.sign(quantiles - 0.5) / 2}[kind]
        risks[np.abs(quantiles - 0.5) < (0.485 if kind == "paired" else 0)] = 0.5
    needed = METHODS[method].needed(risks, bound, 0.05)

    def share(n):
        if method == "betting":
            return rejected(draws(kind, mean, (300, n), rng), bound, 0.05).mean()
        drawn = (draws(kind, mean, n, rng) for _ in range(100))
        return np.mean([METHODS[method].p_value(row, bound) <= 0.05 for row in drawn])

    assert share(needed) > 0.65
    assert share(needed // 3) < 0.5


def test_the_first_true_hypothesis_is_rarely_rejected_among_many():
    """Five networks on the same data, the first two below the bound: what is certified wrongly at all."""
    rng, n, bound = np.random.default_rng(9), 500, 0.05
    thresholds = np.array([0.01, 0.03, 0.0501, 0.0502, 0.06])
    errors = (rng.random((REPETITIONS, n))[..., None] < thresholds).sum(1)
    accepted = stats.binom.cdf(errors, n, bound) <= 0.05
    num_certified = np.cumprod(accepted, axis=1).sum(1)
    assert at_most(np.mean(num_certified > 2), 0.05)
    assert np.mean(num_certified == 1) > 0.2  # the second is not always found, and nothing after it then
    assert np.any(num_certified > 2)
    # Without the order one of the wrong ones is found more often.
    assert np.mean(accepted[:, 2:].any(1)) >= np.mean(num_certified > 2)


# Of 1,000 examples 0, 1, ..., 999 the network t gets wrong those below t.
EXAMPLES = np.arange(1000.0)


def wrong(threshold, batch):
    return batch < threshold


def certified(networks=((0.5, 10.0), (0.9, 20.0), (0.95, 30.0)), metric=wrong, batches=None, **options):
    batches = batched(EXAMPLES, 100) if batches is None else batches
    return certify(metric, networks, batches, **{"bound": 0.03} | options)


def test_it_stops_at_the_first_network_that_is_not_certified():
    asked = []

    def networks():
        for sparsity, threshold in ((0.1, 5.0), (0.5, 10.0), (0.9, 40.0), (0.95, 1.0)):
            asked.append(sparsity)
            yield sparsity, threshold

    certificate = certified(networks())
    assert asked == [0.1, 0.5, 0.9]
    assert certificate.sparsity == 0.5
    assert certificate.sparsities == (0.1, 0.5, 0.9)
    np.testing.assert_allclose(certificate.means, (0.005, 0.01, 0.04))
    np.testing.assert_allclose(certificate.p_values, stats.binom.cdf([5, 10, 40], 1000, 0.03))
    assert (certificate.mean, certificate.num_examples) == (0.01, 1000)
    high = stats.binomtest(10, 1000, alternative="less").proportion_ci(0.95).high
    assert certificate.risk == pytest.approx(high)
    assert certificate.needed_examples is None
    assert "not below the bound: no number of examples" in certificate.status


def test_confidence_and_bound_decide():
    assert certified(confidence=0.99999).sparsity is None
    assert certified(bound=0.2).status == "every network is certified, up to 0.95: sparser ones can be tried."
    assert certified(bound=0.2, confidence=0.999).risk > certified(bound=0.2).risk


def test_it_says_how_many_examples_would_do():
    certificate = certified([(0.5, 3.0)], batches=batched(EXAMPLES[::10], 50))
    assert certificate.sparsity is None
    assert (certificate.risk, certificate.mean) == (None, None)
    assert certificate.means == (0.01,)
    needed = certificate.needed_examples
    assert 250 < needed < 600
    assert re.fullmatch(
        r"nothing can be certified with 100 examples at this bound. The first network, at 0.5, has an "
        rf"observed risk of 0.01, and about {-(-needed // 10) * 10} examples would do, if that is its risk.",
        certificate.status,
    )
    assert "nothing, for a risk of at most 0.03" in repr(certificate)


@pytest.mark.parametrize("method", ["binomial", "hoeffding_bentkus", "betting"])
def test_the_method_can_be_chosen_for_errors(method):
    certificate = certified(metric=lambda t, x: (x < t).astype(jnp.float32), method=method)
    assert certificate.method == METHODS[method].title
    risks = (np.arange(1000) < 10).astype(float)
    assert certificate.p_values[0] == METHODS[method].p_value(risks, 0.03)
    assert certificate.sparsity in (0.5, 0.9)
    assert 0.01 < certificate.risk <= 0.03


@pytest.mark.parametrize(
    ("dtype", "bounds", "method"),
    [
        (bool, (0, 1), "exact binomial"),
        (jnp.int32, (0, 1), "exact binomial"),
        (jnp.int32, (0, 2), "betting"),
        (jnp.int32, (-0.5, 1.5), "betting"),
        (jnp.float32, (0, 1), "betting"),
        (jnp.bfloat16, (0, 1), "betting"),
    ],
)
def test_only_the_dtype_says_that_nothing_lies_between(dtype, bounds, method):
    found = certified(metric=lambda t, x: (x < t).astype(dtype), bounds=bounds)
    assert found.method == method
    assert found.means[0] == pytest.approx(0.01)


def test_bounds_move_and_stretch_the_risks():
    """A risk in [-3, 5] with its bound is the risk in [0, 1] with its own."""

    def moved(threshold, x):
        return 8 * (x < threshold) - 3.0

    one, other = certified(method="betting"), certified(metric=moved, bound=8 * 0.03 - 3, bounds=(-3, 5))
    np.testing.assert_allclose(other.p_values, one.p_values, rtol=0.02)
    assert other.risk == pytest.approx(8 * one.risk - 3, rel=1e-3)
    np.testing.assert_allclose(other.means, 8 * np.array(one.means) - 3)


def test_however_the_examples_are_cut():
    """Sorted examples, which come worst first here, are bet on in another order."""
    cuts = batched(EXAMPLES, 64), [EXAMPLES[:999], EXAMPLES[999:]], lambda: iter([EXAMPLES])

    def metric(t, x):
        return jnp.clip(1 - x / 300, 0, 1) * t / 200

    found = [certified(metric=metric, batches=x, bound=0.0115) for x in cuts]
    assert found[0].p_values == found[1].p_values == found[2].p_values
    assert found[0].sparsity == 0.5


def test_a_convolution_is_evaluated_too():
    images = np.random.default_rng(10).uniform(0, 1, (20, 1, 8, 8)).astype(np.float32)

    def metric(kernel, x):
        return jnp.mean(jax.lax.conv(x, kernel, (1, 1), "SAME"), axis=(1, 2, 3)) / 9

    kernel = jnp.ones((1, 1, 3, 3))
    found = certified([(0.5, kernel)], metric, batched(images, 8), bound=0.9)
    assert found.num_examples == 20
    assert found.mean == pytest.approx(float(np.mean(metric(kernel, images))), rel=1e-5)


def test_all_networks_share_one_program():
    traced = []

    def metric(w, x):
        traced.append(x.shape)
        return x < w

    certified([(0.1, jnp.float32(1))], metric)
    one = len(traced)
    certified([(s / 10, jnp.float32(s)) for s in range(1, 9)], metric)
    assert len(traced) == 2 * one


def test_to_json_and_back():
    for certificate in (certified(), certified(bound=0.001)):
        text = json.dumps(certificate.to_json(), allow_nan=False)
        assert jaxlimit.Certificate.from_json(json.loads(text)) == certificate
    with pytest.raises(ValueError, match="not the values of a Certificate: missing or unknown are risk"):
        jaxlimit.Certificate.from_json({k: v for k, v in certified().to_json().items() if k != "risk"})


def test_a_paired_risk_needs_fewer_examples():
    """Both networks err on 3 %, and the pruned one on half a point more: within one point by pairs alone."""
    data = batched(np.arange(4000.0), 500)
    errors = paired(lambda t, x: x % 1000 < t, 30.0)
    together = certify(errors, [(0.8, 35.0)], data, bound=0.01, bounds=(-1, 1))
    apart = certify(lambda t, x: x % 1000 < t, [(0.8, 35.0)], data, bound=0.04)
    assert together.sparsity == 0.8
    assert together.mean == pytest.approx(0.005)
    assert 0.005 < together.risk < 0.01
    assert together.p_values[0] < 0.01 < apart.p_values[0]
    unsigned = paired(lambda t, x: (x % 1000 < t).astype(jnp.uint8), 30.0)
    assert certify(unsigned, [(0.8, 20.0)], data, bound=0.01, bounds=(-1, 1)).mean == pytest.approx(-0.01)


REFUSALS = {
    "a mean": ({"metric": lambda t, x: jnp.mean(x < t)}, r"shape \(100,\) for this batch; got shape \(\)"),
    "a column": ({"metric": lambda t, x: (x < t)[:, None]}, r"got shape \(100, 1\)"),
    "a dictionary": ({"metric": lambda t, x: {"error": x < t}}, "got shape dict"),
    "complex": ({"metric": lambda t, x: (x < t) + 0j}, "which is not real"),
    "NaN": ({"metric": lambda t, x: jnp.where(x == 7, jnp.nan, 0.0)}, "not finite for example 7"),
    "tokens": (
        {"metric": lambda t, x: jnp.ones((len(x), 7))},
        r"shape \(100, 7\): sum up what belongs to one",
    ),
    "a network that diverged": ({"networks": [(0.5, jnp.float32(np.nan))]}, "the network at 0.5 has a NaN"),
    "outside": ({"metric": lambda t, x: jnp.where(x == 999, 2.0, 0.0)}, r"2 for example 999, .*\(1 of 1,000"),
    "below": ({"metric": lambda t, x: -1.0 * (x < t)}, r"-1 for example 0, .*differences of two errors"),
    "neighbours": (
        {"metric": lambda t, x: jnp.abs(x - x.mean()) / 1000},
        "other values in other batches: .* batch norm in train",
    ),
    "between": ({"metric": lambda t, x: x / 1000, "method": "binomial"}, "betting takes any risks"),
    "not rising": ({"networks": [(0.9, 1.0), (0.5, 1.0)]}, "rising sparsity, but 0.5 comes after 0.9"),
    "twice": ({"networks": [(0.5, 1.0), (0.5, 2.0)]}, "rising sparsity"),
    "not rising later": ({"networks": iter([(0.5, 1.0), (0.4, 1.0)])}, "rising sparsity"),
    "empty": ({"networks": []}, "networks is empty"),
    "nothing left": ({"networks": iter([])}, "networks is empty"),
    "a dictionary of networks": ({"networks": {0.5: 1.0}}, "must be pairs .* got a dict"),
    "one network": ({"networks": (0.5, 1.0)}, "must be pairs"),
    "percent": ({"networks": [(50, 1.0)]}, "a sparsity must be between 0 and 1, got 50"),
    "no number": ({"networks": [("half", 1.0)]}, "a sparsity must be a finite number, got 'half'"),
    "bound at an end": ({"bound": 0}, "bound must be between the bounds, 0 and 1, got 0"),
    "bound outside": ({"bound": -0.01}, "bound must be between"),
    "no bound": ({"bound": None}, "bound must be a finite number, got None"),
    "percents": ({"confidence": 95}, "confidence must be between 0 and 1"),
    "bounds reversed": ({"bounds": (1, 0)}, "bounds must be two numbers, of which the second is larger"),
    "bounds missing": ({"bounds": 1}, "bounds must be two numbers, lowest and highest"),
    "method": ({"method": "t-test"}, "method must be one of binomial, hoeffding_bentkus, betting"),
    "methods": ({"method": ["betting"]}, "method must be one of"),
    "no function": ({"metric": 0.5}, "metric_fn must be a function"),
    "no batches": ({"batches": []}, "batches is empty"),
    "one batch": ({"batches": EXAMPLES}, "pass batched"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        certified(**options)


def test_arguments_are_looked_at_before_anything_is_evaluated():
    def metric(t, x):
        raise AssertionError

    for options in ("not rising", "bound outside", "method"):
        with pytest.raises(ValueError, match="must"):
            certified(**{"metric": metric} | REFUSALS[options][0])


def test_pairs_with_a_network_that_diverged_are_refused():
    with pytest.raises(ValueError, match=r"dense_params has a NaN in \['w'\]: its training or pruning"):
        paired(wrong, {"w": jnp.array([1.0, jnp.nan])})


def test_data_that_change_between_networks_are_refused():
    passes = iter([1000, 999])
    with pytest.raises(ValueError, match=r"changed between two passes: 1000 examples in the first, 999 in"):
        certified(batches=lambda: iter([EXAMPLES[: next(passes)]]))
    others = iter([EXAMPLES, EXAMPLES + 1])
    with pytest.raises(ValueError, match=r"changed between two passes: 1000 examples with the checksum"):
        certified(batches=lambda: iter([next(others)]))


def test_a_trained_network_pruned_by_magnitude():
    """Digits: errors as counted in NumPy; certified where it hardly errs, and not where it is destroyed."""
    network, digits_data = digits.trained("preset"), jaxlimit.data.load_digits()
    images, labels = digits_data.test_images, digits_data.test_labels

    def error(params, batch):
        return jnp.argmax(network.predict(params, batch[0]), axis=-1) != batch[1]

    def networks():
        weights, _ = partition(network.params, is_kernel)
        for sparsity in (0.0, 0.5, 0.8, 0.97):
            yield sparsity, apply_mask(network.params, magnitude_mask(weights, sparsity))

    certificate = certify(error, networks(), batched((images, labels), 100), bound=0.12)
    errors = [np.mean(np.argmax(network.predict(p, images), -1) != labels) for _, p in networks()]
    assert certificate.num_examples == len(labels)
    np.testing.assert_allclose(certificate.means, errors[: len(certificate.means)])
    expected = stats.binom.cdf(np.round(np.array(errors) * len(labels)), len(labels), 0.12)
    np.testing.assert_allclose(certificate.p_values, expected[: len(certificate.means)])
    assert certificate.sparsity == (0.0, 0.5, 0.8, 0.97)[int(np.argmax(expected > 0.05)) - 1]
    assert certificate.sparsity < 0.97


PAGE = (Path(__file__).parents[1] / "docs" / "certify.md").read_text()


def test_the_example_of_the_documentation_runs(capsys):
    """After two epochs it prints the same words about other numbers."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert "epochs=60" in code
    exec(compile(code.replace("epochs=60", "epochs=2"), "certify.md", "exec"), {})
    found = capsys.readouterr().out
    (shown,) = re.findall(r"```text\n(.*?)```", PAGE, flags=re.DOTALL)
    for line in ("exact binomial test; risks within [0, 1]", "betting test; risks within [-1, 1]"):
        assert line in found.splitlines()
        assert line in shown.splitlines()
    assert " ".join(found.split()).count("of at most 0.08 on new data (confidence 0.95, 359 examples)") == 1
    assert len(re.findall("^Certified: ", found, flags=re.MULTILINE)) == 2


def test_the_worked_numbers_of_the_documentation():
    """10,000 images, 200 and 250 errors, of which 150 are those of the dense network, too."""
    errors, rise = np.zeros(10_000), np.full(10_000, 0.5)
    errors[:250], rise[:100], rise[100:150] = 1, 1, 0
    cells = re.findall(r"\| does it err .*?\? \| (.*?) \| (.*?) \| (.*?) \|", PAGE)
    for (p_value, upper, needed), (risks, bound, method) in zip(
        cells, ((errors, 0.03, METHODS["binomial"]), (rise, 0.505, METHODS["betting"])), strict=True
    ):
        shown = float(upper.split()[0]) / 100
        assert float(p_value) == pytest.approx(method.p_value(risks, bound), rel=0.05)
        found = method.upper_bound(risks, bound, 0.05)
        assert shown == pytest.approx(found if bound < 0.5 else 2 * found - 1, rel=0.01)
        assert float(needed.replace(",", "")) == pytest.approx(method.needed(risks, bound, 0.05), rel=0.02)


@pytest.mark.parametrize(("num_examples", "errors"), [(38, 21), (76, 42), (1000, 20)])
def test_whole_numbers_of_errors_are_whole(num_examples, errors):
    """38 (21 / 38) is 21.000000000000004."""
    bound = errors / num_examples + 0.2
    found = hoeffding_bentkus(errors / num_examples, num_examples, bound)
    share = errors / num_examples
    divergence = share * np.log(share / bound) + (1 - share) * np.log((1 - share) / (1 - bound))
    tail = np.e * stats.binom.cdf(errors, num_examples, bound)
    assert tail < np.exp(-num_examples * divergence)  # so that it is the tail that is looked at
    assert found == pytest.approx(tail, rel=1e-9)
