"""`benchmarks/believe.py`, in short, on scikit-learn's digits, against dense linear algebra."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import jaxlimit
from jaxlimit import data, models, training
from jaxlimit.application.assessment import TRUSTED
from jaxlimit.core.trees import flatten

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import believe
import believe_cases
import believe_tables
import common

ROOT = Path(__file__).parents[1]
HIDDEN = 8
SIZES = {"num_weights": 200_000, "num_examples": 1, "attained_code": "bracketed"}


@pytest.fixture(scope="module")
def subject():
    """64-8-10, trained for so few epochs that its Hessian has negative eigenvalues."""
    digits = data.load_digits()
    train = digits.train_images, digits.train_labels
    predict, params = models.from_nnx(models.FullyConnected([64, HIDDEN, 10], rngs=nnx.Rngs(0)))
    loss = training.classification_loss(predict)
    params = training.train(loss, params, train, jax.random.key(0), epochs=3, learning_rate=0.1)
    test = jaxlimit.batched((digits.test_images, digits.test_labels), 128)
    return believe_cases.Subject("tiny", 0.0, predict, params, jaxlimit.batched(train, 128), test)


@pytest.fixture(scope="module")
def found(subject, tmp_path_factory):
    return believe.believe(subject, tmp_path_factory.mktemp("believe") / "out")


@pytest.mark.slow
def test_widths_are_those_of_the_changed_spectrum(subject, found):
    """H+ without its negative eigenvalues, H-/2 with half of them, |H| with all, from the dense matrix."""
    curvature = jaxlimit.hessian(
        training.classification_loss(subject.predict), subject.params, subject.batches
    )
    eigenvalues = np.linalg.eigvalsh(np.asarray(curvature.dense(), np.float64))
    dim, eps = len(eigenvalues), found["loss_tolerance"]
    assert eigenvalues[0] < -1e-2 * eigenvalues[-1]
    squares = np.concatenate([[0], np.cumsum(np.sort(flatten(curvature.weights) ** 2))])

    def width(stiffness):
        within = [
            n for n in range(dim + 1) if np.mean(2 * eps / (2 * eps + stiffness * squares[n])) >= n / dim
        ]
        return within[-1] / dim

    negative = np.minimum(eigenvalues, 0)
    for name, factor in {"H+ width": 0, "H-/2 width": 0.5, "Hessian width": 1}.items():
        stiffness = np.maximum(eigenvalues, 0) - factor * negative
        assert found["predicted"][name]["sparsity"] == pytest.approx(width(stiffness), abs=1.5 / dim), name


@pytest.mark.slow
def test_what_was_measured_and_what_weights_say(subject, found):
    weights = np.abs(np.concatenate([np.ravel(x) for x in jax.tree.leaves(subject.params) if np.ndim(x) > 1]))
    assert found["num_weights"] == len(weights) == 74 * HIDDEN
    assert found["predicted"]["near zero, .01"] == {"sparsity": np.mean(weights < 0.01), "products": 0}
    measured = found["measured"]
    assert 0 < measured["cut"] < measured["attained"] < 1
    said = {name for name, about in believe_tables.SAID.items() if about != "finetuned"}
    assert {*found["predicted"]} == {name for name in said if "other networks" not in name}
    images, labels = (np.concatenate([batch[i] for batch in subject.test_batches]) for i in (0, 1))
    right = np.asarray(subject.predict(subject.params, images)).argmax(1) == labels
    assert found["dense_error"] == pytest.approx(1 - np.mean(right))


def test_errors_are_means_over_networks():
    def case(l1, predicted, cut):
        known = {"Hessian one_shot": {"sparsity": predicted, "products": 7}}
        return SIZES | {"l1": l1, "measured": {"cut": cut}, "predicted": known}

    cases = {"a": case(0, 0.5, 0.9), "b": case(1e-4, 0.8, 0.7), "c": case(1e-4, 0.7, 0.7)}
    row, median = believe_tables.summary(cases)
    means = {"all": 0.5 / 3, "L1": 0.05, "no L1": 0.4}
    assert row["mean"] == pytest.approx(dict.fromkeys(believe_tables.KINDS, means["all"]) | means)
    assert (row["worst"], row["sign"]) == pytest.approx((-0.4, -0.1))
    assert row["products"] == 7
    assert row["factor"] == pytest.approx((5 * 1.5) ** (1 / 3))  # .5 of the weights for .1, .2 for .3
    assert (median["worst"], median["sign"]) == pytest.approx((-0.2, 0))  # .7 for .9, twice .8 for .7


def test_a_search_that_the_budget_ended_is_no_measurement():
    known = {"Gauss-Newton cone": {"sparsity": 0.9, "products": 7}}
    case = SIZES | {"l1": 0, "measured": {"attained": 0.7, "cut": 0.5}, "predicted": known}
    cases = {"a": case, "b": case | {"attained_code": "out_of_products", "measured": {"attained": 0.1}}}
    rows = {row["prediction"]: row for row in believe_tables.summary(cases)}
    assert (rows["Gauss-Newton cone"]["num_cases"], rows["Gauss-Newton cone"]["worst"]) == (
        1,
        pytest.approx(0.2),
    )
    assert "median of the other networks, attained" not in rows
    assert "| > 0.100 |" in believe_tables.networks_table(cases)


@pytest.mark.slow
def test_the_tables_and_the_figure_have_a_place_for_each(found):
    cases = {"tiny": found, "another": found}
    rows = believe_tables.predictions_table(cases).splitlines()
    assert len(rows) == 2 + len(found["predicted"]) + 3  # and the medians of the other networks
    assert len(believe_tables.networks_table(cases).splitlines()) == 2 + 2
    panels = [panel for panel in believe_tables.figure({"tiny": found}).axes if panel.get_title()]
    assert len(panels) == len(believe_tables.DRAWN)


def test_the_advice_has_the_numbers_of_the_table():
    rows = {row["prediction"]: row for row in common.read_document("believe")["summary"]}

    def error(name, kind="all", digits=2):
        return f"{rows[name]['mean'][kind]:.{digits}f}"[1:]

    one_shots = [f"{name} one_shot" for name in ("Hessian", "Gauss-Newton")]
    l1, without = ([error(name, kind) for name in one_shots] for kind in ("L1", "no L1"))
    cone, readjusted = (f"Gauss-Newton {which}" for which in ("cone", "readjusted"))
    width, median = "Hessian width", "median of the other networks, attained"
    advice = " ".join((ROOT / "docs" / "limits.md").read_text().split())
    readme = (ROOT / "README.md").read_text()
    worst = [f"{abs(rows[name]['worst']):.2f}"[1:] for name in one_shots]
    cases = [rows[name]["num_cases"] for name in one_shots]
    factors = {name: row["factor"] for name, row in rows.items()}
    assert l1[0] == l1[1]
    for sentence in (
        f"{l1[0]} on average after training with an L1 term, {without[0]} to {without[1]} without",
        f"`readjusted` {error(readjusted, digits=3)} on average",
        f"`cone` {error(cone, digits=3)}, almost always too low",
        f"it was {error(width)} too low on average",
        f"even the median of the others is {error(median, digits=3)} off, no more than the cone",
        f"by a factor of {factors[median]:.1f}, the cone by {factors[cone]:.1f}",
    ):
        assert sentence in advice
    for sentence in (
        f"It was off by {error(one_shots[0])} on average, at worst by {worst[1]} (Gauss-Newton, {cases[1]} "
        f"networks) and {worst[0]} (Hessian, {cases[0]})",
        f"its `readjusted` limit was {error(readjusted, digits=3)} off on average",
        f"its `cone` {error(cone, digits=3)}, almost always too low",
        f"to a factor of {max(factors[cone], factors[readjusted]):.1f}",
        f"was {error(width)} too low on average, and its number of kept weights {factors[width]:.0f} times",
    ):
        assert sentence in readme
    beyond, known = exceeded(cone)
    assert beyond > 0.9 * known
    assert f"More than its `cone` was attained on {beyond} of {known} networks" in advice
    beyond, known = exceeded(readjusted)
    assert f"more than its `readjusted` limit on {beyond} of the {known} that have one" in advice
    below = known - exceeded(cone, with_limit=readjusted)[0]
    assert "About half of the networks" in TRUSTED
    assert abs((known - beyond - below) / known - 0.5) < 0.1
    assert "most others beyond" in TRUSTED
    assert beyond > below


def exceeded(prediction, with_limit=None):
    """On how many networks more was attained, and how many there are; of those that have the other limit."""
    cases, wanted = common.read_document("believe")["cases"].values(), {prediction, with_limit or prediction}
    cases = [x for x in cases if wanted <= {*x["predicted"]} and x["attained_code"] != "out_of_products"]
    beyond = [x["measured"]["attained"] > x["predicted"][prediction]["sparsity"] for x in cases]
    return sum(beyond), len(beyond)
