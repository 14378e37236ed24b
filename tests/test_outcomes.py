"""How a computation of limits may end, and what its code, sentence and interval then say.

Oracles: the dense float64 matrix of the loss (NumPy), the loss itself at the pruned weights, and brute force
over every number of removed weights.
"""

import functools
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_limit import truth_of_matrix

import jaxlimit
from jaxlimit.limits.estimate import LIMITS, Estimate
from jaxlimit.limits.one_shot import PathPoint, one_shot_limit
from jaxlimit.limits.status import Code, Findings, status_of
from jaxlimit.spectrum import lanczos
from jaxlimit.spectrum.bracket import bracket_semidefinite, negative_share
from jaxlimit.spectrum.probes import rademacher
from jaxlimit.training.descent import Settings, minimise

KEY = jax.random.key(0)


def regression(weights, batch):
    inputs, targets = batch
    return jnp.mean((inputs @ weights - targets) ** 2) / 2


def gauss_newton_of(inputs, weights, output_loss=lambda outputs, batch: jnp.mean(outputs**2) / 2):
    batches = jaxlimit.batched((jnp.asarray(inputs, jnp.float32), jnp.zeros((len(inputs), 1))), 64)
    predict = lambda w, batch: batch[0] @ (w - 1)  # noqa: E731
    return jaxlimit.gauss_newton(predict, output_loss, jnp.asarray(weights, jnp.float32), batches)


# The value is the last that is within.


def test_one_shot_is_the_last_sparsity_within_the_tolerance():
    """Ten weights, each of which adds to the loss: 0, .005, .025, ...; .02 allows one, not two."""
    curvature, weights = np.array([0.01, 0.04, *np.full(8, 1.0)]), np.ones((10, 1))
    inputs = np.diag(np.sqrt(10 * curvature))
    batches = jaxlimit.batched(
        (jnp.asarray(inputs, jnp.float32), jnp.asarray(inputs @ weights, jnp.float32)), 10
    )
    limit = jaxlimit.pruning_limit(
        jaxlimit.hessian(regression, jnp.asarray(weights, jnp.float32), batches), KEY, loss_tolerance=0.02
    )
    assert limit.one_shot.value == 0.1
    assert limit.rises["one_shot"] == pytest.approx(0.005, rel=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_every_value_is_the_last_n_of_its_equation(seed):
    """Exactly, where the matrix is dense; brute force over all n."""
    rng = np.random.default_rng(seed)
    inputs = (rng.standard_normal((40, 30)) * np.geomspace(1, 0.01, 30)).astype(np.float32)
    weights = rng.standard_normal((30, 1)).astype(np.float32)
    curvature = gauss_newton_of(inputs, weights)
    exact = inputs.astype(float).T @ inputs.astype(float) / 40
    gradient = exact @ (weights.astype(float)[:, 0] - 1)
    truth = truth_of_matrix(exact, weights.astype(float)[:, 0], gradient, 0.05)
    limit = jaxlimit.pruning_limit(curvature, KEY, loss_tolerance=0.05)
    assert {name: x.value for name, x in limit.estimates().items()} == pytest.approx(truth, abs=1e-12)


# Matrices that are not what they were declared to be.


@functools.cache
def sigmoid_regression():
    """Squared error of a sigmoid, which is not convex in the outputs; and its matrix in float64."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((200, 60)) * np.geomspace(2, 0.1, 60)
    weights = rng.standard_normal((60, 1))
    targets = 1 / (1 + np.exp(-inputs @ weights)) + 0.6 * rng.standard_normal((200, 1))
    batches = jaxlimit.batched((jnp.asarray(inputs, jnp.float32), jnp.asarray(targets, jnp.float32)), 50)
    curvature = jaxlimit.gauss_newton(
        lambda w, batch: batch[0] @ w,
        lambda outputs, batch: jnp.mean((jax.nn.sigmoid(outputs) - batch[1]) ** 2) / 2,
        jnp.asarray(weights, jnp.float32),
        batches,
    )
    p = 1 / (1 + np.exp(-inputs @ weights))
    second = p * (1 - p) * (p * (1 - p) + (p - targets) * (1 - 2 * p))
    matrix = inputs.T @ (second * inputs) / 200
    gradient = (inputs.T @ ((p - targets) * p * (1 - p)) / 200)[:, 0]
    return curvature, matrix, weights[:, 0], gradient


@pytest.mark.parametrize("num_probes", [None, 8])
def test_a_gauss_newton_matrix_with_negative_eigenvalues_is_never_called_converged(num_probes):
    curvature, matrix, weights, gradient = sigmoid_regression()
    least = np.linalg.eigvalsh(matrix)[0]
    assert least < -0.005
    limit = jaxlimit.pruning_limit(curvature, KEY, loss_tolerance=0.01, num_probes=num_probes)
    assert limit.code is Code.NOT_SEMIDEFINITE
    assert not limit.code.converged
    assert limit.status.startswith("not semidefinite: an eigenvalue lies")
    assert "converged" not in limit.status
    assert "Gauss-Newton, |H|" in repr(limit)
    truth = truth_of_matrix(matrix, weights, gradient, 0.01)
    for name, estimate in limit.estimates().items():
        assert estimate.lower - 1e-9 <= truth[name] <= estimate.upper + 1e-9, name


def test_conjugate_gradients_notice_negative_curvature():
    curvature = sigmoid_regression()[0]
    limit = jaxlimit.pruning_limit(
        curvature, KEY, loss_tolerance=0.01, num_probes=1, which=["readjusted"], max_matvecs=50
    )
    assert limit.code is Code.NOT_SEMIDEFINITE


def test_rounding_of_a_semidefinite_matrix_is_not_taken_for_a_negative_eigenvalue_and_no_bound_misses():
    """Random semidefinite matrices in float32 against all eigenvalues in float64, at every ridge."""
    rng, dim, missed = np.random.default_rng(3), 160, []
    product = jax.jit(
        lambda v, x: jnp.matmul(jnp.matmul(v, x, precision="highest"), x.T, precision="highest")
    )
    for number in range(24):
        values = [
            np.arange(1, dim + 1) ** -rng.uniform(0.5, 3),
            10 ** rng.uniform(-rng.uniform(1, 7), 0.5, dim),
            np.where(np.arange(dim) < rng.integers(5, 80), rng.exponential(size=dim), 0),
        ][number % 3]
        factor = (np.sqrt(values) * np.linalg.qr(rng.standard_normal((dim, dim)))[0]).astype(np.float32)
        eigenvalues, vectors = np.linalg.eigh(factor.astype(float) @ factor.T.astype(float))
        eigenvalues = np.maximum(eigenvalues, 0)
        start = rng.choice([-1.0, 1.0], dim).astype(np.float32)
        seen = (vectors.T @ start.astype(float)) ** 2 / dim
        state = lanczos.init(jnp.asarray(start)[None])
        for steps in (8, 24, 32):
            state = lanczos.run(lambda v, x=factor: product(v, x), state, steps, [None, 0][number % 2])
            runs = state.tridiagonals()
            assert negative_share(runs) == 0
            delta = bracket_semidefinite(runs).dimension
            for ridge in eigenvalues[-1] * 10.0 ** np.arange(-6, 1):
                truth = seen @ (ridge / (ridge + eigenvalues))
                if not delta.lower(ridge) <= truth <= delta.upper(ridge):
                    missed.append((number, steps, ridge, truth))
    assert not missed


def findings(**changed):
    limit = Estimate.between(0.5, 0.5, 0.5, 1000)
    plain = {
        "limits": dict.fromkeys(LIMITS, limit),
        "which": LIMITS,
        "rises": {"one_shot": 0.1, "everything": 5.0},
        "loss": 0.3,
        "loss_tolerance": 0.1,
        "tolerance": 0.001,
        "dim": 1000,
        "exact": False,
        "semidefinite": True,
        "negative_share": 0.0,
        "num_matvecs": 100,
        "max_matvecs": 10_000,
        "num_probes": None,
        "rounding": 1e-7,
        "reorthogonalized": True,
    }
    return Findings(**plain | changed)


def test_bounds_that_cross_are_no_interval():
    crossed = Estimate.between(0.5, 0.52, 0.48, 1000)
    assert (crossed.lower, crossed.upper, crossed.crossed) == (0.0, 1.0, True)
    code, status = status_of(findings(limits=dict.fromkeys(LIMITS) | {"width": crossed, "cone": crossed}))
    assert code is Code.IMPRECISE
    assert "the bounds of width and cone cross" in status
    # By less than a weight they are in order but for rounding.
    assert not Estimate.between(0.5, 0.5002, 0.4999, 1000).crossed


def test_converged_is_about_the_interval_that_is_printed():
    """lambda_max / a of 10^6: float32 leaves more open than the tolerance, however many products are made."""
    rng = np.random.default_rng(1)
    inputs = rng.standard_normal((200, 80)) * np.geomspace(1, 1e-4, 80)
    curvature = gauss_newton_of(inputs, rng.standard_normal((80, 1)))
    for num_probes in (None, 2):
        limit = jaxlimit.pruning_limit(
            curvature, KEY, loss_tolerance=3e-6, num_probes=num_probes, which=["width", "cone"]
        )
        half = (limit.width.upper - limit.width.lower) / 2 - 3 * limit.width.probe_error - 2 / 80
        assert limit.largest_eigenvalue / limit.ridge > 1e5
        assert half > limit.tolerance
        assert limit.code is Code.IMPRECISE
        assert "Use float64" in limit.status


def test_who_is_to_blame_for_a_wide_interval():
    wide = {"width": Estimate.between(0.5, 0.4, 0.6, 1000, spread=0.1)}
    for num_matvecs, words in ((64, "not by their number"), (9_900, "max_matvecs = 10,000: raise it")):
        code, status = status_of(findings(limits=wide, which=["width"], num_matvecs=num_matvecs))
        assert code is Code.UNDER_RESOLVED
        assert words in status


@pytest.mark.parametrize(
    ("num_probes", "words"), [(None, "raise max_matvecs"), (3, "use more than 3 probes")]
)
def test_whether_more_probes_can_be_asked_for(num_probes, words):
    noisy = {"width": Estimate.between(0.5, 0.5, 0.5, 1000, probe_error=0.01)}
    code, status = status_of(findings(limits=noisy, which=["width"], num_probes=num_probes))
    assert code is Code.FEW_PROBES  # its interval is sixty times the tolerance wide
    assert not code.converged
    assert words in status
    assert status.count("probe error") == 1


def test_the_status_is_about_what_was_wanted():
    """A wide width limit from which cone started, but that nobody sees, and one that rounding made wide."""
    sure = Estimate.between(0.5, 0.5, 0.5, 1000, probe_error=0.001)
    wide = Estimate.between(0.5, 0.4, 0.6, 1000, probe_error=0.01, spread=0.1)
    assert status_of(findings(limits={"width": wide, "cone": sure}, which=["cone"]))[0] is Code.CONVERGED
    for name in ("one_shot", "readjusted"):
        code, status = status_of(findings(limits={"width": wide, name: sure}, which=[name]))
        assert (code, status) == (
            Code.CONVERGED,
            f"converged: {name} resolved to the tolerance of 0.001.",
        )
    rounded = {"one_shot": Estimate.between(0.5, 0.4, 0.6, 1000)}
    assert status_of(findings(limits=rounded, which=["one_shot"], exact=True))[0] is Code.IMPRECISE
    step = {"readjusted": Estimate.between(0.5, 0.5, 0.6, 10)}
    assert status_of(findings(limits=step, which=["readjusted"], dim=10, exact=True))[0] is Code.EXACT


def test_a_limit_that_keeps_one_weight_of_a_hundred_thousand_is_refuted_too():
    almost = Estimate.between(0.99999, 0.99999, 0.99999, 100_000)
    code, status = status_of(findings(limits={"cone": almost}, which=["cone"], dim=100_000))
    assert code is Code.REFUTED
    assert "cone would let every weight go, but then it rises by 5." in status


# What the loss itself says.


def test_a_prediction_that_the_loss_refutes():
    """A loss that is flat to second order at the weights: the model lets every weight go."""

    def quartic(weights, batch):
        return jnp.mean(batch @ (weights - 1.0) ** 4)

    curvature = jaxlimit.hessian(quartic, jnp.ones((20, 1)), jaxlimit.batched(jnp.ones((4, 20)), 4))
    limit = jaxlimit.pruning_limit(curvature, KEY, loss_tolerance=0.5)
    assert limit.one_shot.value == limit.cone.value == 1.0
    assert limit.rises["everything"] == limit.rises["one_shot"] == pytest.approx(20.0)
    assert limit.code is Code.REFUTED
    assert "would let every weight go, but then it rises by 20" in limit.status
    assert limit.to_json()["rises"]["one_shot"] == pytest.approx(20.0)


def test_rises_are_those_of_the_loss_at_the_pruned_weights():
    curvature, *_ = sigmoid_regression()
    scores = jnp.arange(60.0)[::-1, None]  # another order than that of magnitude
    limit = jaxlimit.pruning_limit(curvature, KEY, loss_tolerance=0.01, which=["width"], scores=scores)
    n = round(60 * limit.width.value)
    pruned = curvature.weights.at[60 - n :].set(0.0)
    assert limit.rises["width"] == pytest.approx(curvature.mean_loss(pruned) - curvature.loss, abs=1e-7)
    assert set(limit.rises) == {"width", "everything"}


# Which limits are wanted.


def test_readjusted_alone_of_a_large_hessian_is_refused(monkeypatch):
    monkeypatch.setattr("jaxlimit.limits.dense_source.DENSE_DIM", 10)
    curvature = jaxlimit.hessian(
        regression, jnp.ones((20, 1)), jaxlimit.batched((jnp.eye(20), jnp.ones((20, 1))), 20)
    )
    with pytest.raises(ValueError, match="readjusted with a Hessian needs its dense matrix, and 20 weights"):
        jaxlimit.pruning_limit(curvature, KEY, loss_tolerance=0.1, which=["readjusted"])


def test_one_shot_alone_takes_few_products_and_is_that_of_the_dense_matrix():
    rng = np.random.default_rng(5)
    inputs = rng.standard_normal((300, 200)) * np.geomspace(1, 1e-2, 200)
    curvature = gauss_newton_of(inputs, rng.standard_normal((200, 1)))
    whole = jaxlimit.pruning_limit(curvature, KEY, loss_tolerance=0.1)
    alone = jaxlimit.pruning_limit(curvature, KEY, loss_tolerance=0.1, which=["one_shot"])
    assert whole.method != alone.method == "Lanczos"
    assert alone.num_matvecs < 80
    assert alone.one_shot.value == whole.one_shot.value
    assert alone.code is Code.CONVERGED


# Keys, folders, memory, progress, comparison.


def test_every_random_number_has_a_key_of_its_own(monkeypatch):
    drawn = []

    def recorded(key, like, num_probes):
        drawn.append(jax.random.key_data(key).tolist())
        return rademacher(key, like, num_probes)

    monkeypatch.setattr("jaxlimit.limits.lanczos_source.rademacher", recorded)
    rng = np.random.default_rng(5)
    curvature = gauss_newton_of(rng.standard_normal((300, 200)), rng.standard_normal((200, 1)))
    jaxlimit.pruning_limit(curvature, KEY, loss_tolerance=0.1, which=["width"], max_matvecs=180)
    drawn.append(jax.random.key_data(jax.random.fold_in(KEY, 1)).tolist())  # of `jaxlimit run`'s reference
    assert len({*map(str, drawn)}) == len(drawn) == 3


def test_training_draws_the_order_and_the_objective_from_different_keys():
    def objective(params, state, batch, key):
        return 0.0 * params, jax.random.key_data(key)

    settings = Settings(epochs=1, batch_size=1, learning_rate=0.1)
    first = jax.random.key_data(KEY)
    _, state = minimise(objective, jnp.array(0.0), first, jnp.ones(2), KEY, settings)
    epoch_key = jax.random.fold_in(KEY, 0)
    permuted_with = [epoch_key, *jax.random.split(epoch_key)]
    assert state.tolist() not in [jax.random.key_data(key).tolist() for key in permuted_with]


def test_the_folder_of_another_curvature_of_the_same_loss_is_refused(tmp_path, monkeypatch):
    weights = jnp.linspace(0.1, 1.0, 20)[:, None]

    def solve(inputs):
        curvature = jaxlimit.hessian(regression, weights, jaxlimit.batched((inputs, inputs @ weights), 20))
        assert curvature.loss == 0
        return jaxlimit.pruning_limit(
            curvature, KEY, loss_tolerance=0.1, num_probes=1, which=["width"], checkpoint=tmp_path
        )

    solve(jnp.eye(20))
    with pytest.raises(ValueError, match="of another problem: product differ"):
        solve(1.1 * jnp.eye(20))
    # Another device rounds products differently.
    matmat = jaxlimit.Curvature.matmat
    monkeypatch.setattr(
        jaxlimit.Curvature, "matmat", lambda self, v: jax.tree.map(lambda x: 1.00001 * x, matmat(self, v))
    )
    solve(jnp.eye(20))


def test_the_path_keeps_few_slopes():
    """One whole vector for each end of the interval at hand; of other points only the weights between."""
    dim, made, most = 10_000, [], [0]

    class Slope(np.ndarray):
        pass

    def path(n):
        slope = np.full(dim, 1e-4).view(Slope)
        made.append(weakref.ref(slope))
        most[0] = max(most[0], sum(known() is not None for known in made))
        return PathPoint(n, 1e-4 * n, slope)

    found = one_shot_limit(path, PathPoint(0, 0.0, np.full(dim, 1e-4)), 0.9, 1e-4)
    assert found.value == pytest.approx(0.9, abs=1e-3)
    assert len(made) > 40
    assert most[0] <= 8
    assert PathPoint(5, 0.0, np.zeros(dim)).within(3, 9).slope.base is None


def test_progress_says_what_is_resolved_and_how_far_it_is():
    rng = np.random.default_rng(5)
    inputs = rng.standard_normal((300, 200)) * np.geomspace(1, 1e-2, 200)
    curvature = gauss_newton_of(inputs, rng.standard_normal((200, 1)))
    told = []
    limit = jaxlimit.pruning_limit(curvature, KEY, loss_tolerance=0.1, num_probes=2, progress=told.append)
    assert {x.stage: x.limit for x in told} == {
        "spectrum": "width",
        "cone": "cone",
        "one_shot": "one_shot",
        "readjusted": "readjusted",
    }
    for stage in ("spectrum", "readjusted"):
        looks = [x for x in told if x.stage == stage and np.isfinite(x.spread)]
        assert looks[-1].tolerance > 0
        assert looks[-1].lower <= looks[-1].upper
    assert "cone: cone in [" in str(next(x for x in told if x.stage == "cone"))
    assert limit.code is Code.FEW_PROBES  # and resolved by its products
    assert not any(x.note for x in told)


def test_a_stage_that_will_not_resolve_is_announced():
    rng = np.random.default_rng(5)
    inputs = rng.standard_normal((300, 200)) * np.geomspace(1, 1e-2, 200)
    curvature = gauss_newton_of(inputs, rng.standard_normal((200, 1)))
    told = []
    jaxlimit.pruning_limit(
        curvature,
        KEY,
        loss_tolerance=0.1,
        num_probes=2,
        progress=told.append,
        max_matvecs=48,
        which=["width", "cone"],
    )
    notes = [x.note for x in told if x.note]
    assert notes
    assert "will not resolve: needs" in notes[0]


def test_results_can_be_compared():
    limit = jaxlimit.pruning_limit(sigmoid_regression()[0], KEY, loss_tolerance=0.01, which=["width"])
    other = jaxlimit.pruning_limit(sigmoid_regression()[0], KEY, loss_tolerance=0.01, which=["width"])
    for ours, theirs in ((limit, other), (limit.measure, other.measure), (limit.curve(), other.curve())):
        assert ours == ours
        assert (ours == theirs) is False
