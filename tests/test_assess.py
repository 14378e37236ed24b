"""`assess`: predicted, attained and certified of a small network that is none of ours.

The oracle of losses and errors is NumPy; that of the answers put together are the functions that give each.
"""

import html
import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import jaxlimit
from jaxlimit import models, training
from jaxlimit.application import answers, ledger
from jaxlimit.application.answering import Answering, attained_stage
from jaxlimit.application.assessed_folder import _checksum, pruned_table
from jaxlimit.application.pruned_files import save_pruned
from jaxlimit.application.question import (
    NO_ERROR,
    NO_TEST_BATCHES,
    Misclassified,
    Question,
    certifying_of,
    default_error,
)
from jaxlimit.core.interrupt import Interrupt
from jaxlimit.core.terminal import Silent
from jaxlimit.core.trees import partition
from jaxlimit.measuring.sweeps import SPARSITIES

KEY = jax.random.key(3)
PAGE = (Path(__file__).parents[1] / "docs" / "assess.md").read_text()
# Of an example's call, so that it is quick.
FEW = 'curvatures=["gauss_newton"], max_products=5,'
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
TOLERANCE = 0.02


def predict(params, batch):
    return jnp.tanh(batch[0] @ params["first"]) @ params["second"] + params["bias"]


def loss(outputs, batch):
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(outputs) * jax.nn.one_hot(batch[1], 3), axis=-1))


def outputs_by_numpy(params, inputs):
    first, second, bias = (np.asarray(params[name], np.float64) for name in ("first", "second", "bias"))
    return np.tanh(inputs @ first) @ second + bias


def loss_by_numpy(params, inputs, labels):
    outputs = outputs_by_numpy(params, inputs)
    return np.mean(np.log(np.sum(np.exp(outputs), axis=-1)) - outputs[np.arange(len(labels)), labels])


def cut_by_numpy(params, count):
    """Without its smallest weights."""
    flat = np.concatenate([np.ravel(params[name]) for name in ("first", "second")])
    flat[np.argsort(np.abs(flat), kind="stable")[:count]] = 0
    return {**params, "first": flat[:30].reshape(6, 5), "second": flat[30:].reshape(5, 3)}


@pytest.fixture(scope="module")
def problem():
    """A network that tells three classes apart, some of whose weights matter little; 45 can be pruned."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(1200, 6)).astype(np.float32)
    labels = np.argmax(inputs[:, :3], axis=-1)
    params = {
        "first": (np.eye(6, 5) + 0.02 * rng.normal(size=(6, 5))).astype(np.float32),
        "second": (3 * np.eye(5, 3) + 0.02 * rng.normal(size=(5, 3))).astype(np.float32),
        "bias": np.zeros(3, np.float32),
    }
    data = SimpleNamespace(
        train=(inputs[:200], labels[:200]), test=(inputs[200:], labels[200:]), params=params
    )
    data.batches, data.test_batches = (jaxlimit.batched(part, 50) for part in (data.train, data.test))
    return data


@pytest.fixture(scope="module")
def assessment(problem):
    return jaxlimit.assess(
        predict,
        loss,
        problem.params,
        problem.batches,
        KEY,
        loss_tolerance=TOLERANCE,
        test_batches=problem.test_batches,
    )


def test_predicted_are_the_limits_of_both_curvatures(problem, assessment):
    curvature = jaxlimit.hessian(lambda p, b: loss(predict(p, b), b), problem.params, problem.batches)
    limit = jaxlimit.pruning_limit(curvature, KEY, loss_tolerance=TOLERANCE)
    assert assessment.predicted["hessian"].estimates() == limit.estimates()
    assert set(assessment.predicted) == {"hessian", "gauss_newton"}
    assert assessment.predicted["gauss_newton"].positive_semidefinite


def test_the_cut_is_where_the_loss_leaves_the_tolerance(problem, assessment):
    counts = np.floor(SPARSITIES * 45 + 1e-6).astype(int)
    losses = np.array([loss_by_numpy(cut_by_numpy(problem.params, n), *problem.train) for n in range(46)])
    above = np.flatnonzero(losses[counts] > losses[0] + TOLERANCE)
    assert 0.3 < assessment.cut.sparsity < 0.9
    assert assessment.cut.sparsity == SPARSITIES[above[0] - 1]
    assert assessment.cut.next == SPARSITIES[above[0]]
    at = [round(400 * s) for s in assessment.cut.sparsities]
    assert assessment.cut.losses == pytest.approx(losses[counts][at], rel=1e-5)
    test, labels = problem.test
    wrong = [
        np.mean(outputs_by_numpy(cut_by_numpy(problem.params, n), test).argmax(-1) != labels) for n in (0, 45)
    ]
    assert [assessment.cut.errors[0], assessment.cut.errors[-1]] == pytest.approx(wrong)
    assert assessment.dense_error == pytest.approx(wrong[0])


def test_attained_is_a_network_within_the_tolerance(problem, assessment):
    network = assessment.attained.pruned
    zeros = sum(np.sum(np.asarray(network.params[name]) == 0) for name in ("first", "second"))
    assert zeros == round(45 * assessment.attained.sparsity)
    assert zeros >= int(45 * assessment.cut.sparsity)
    dense = loss_by_numpy(problem.params, *problem.train)
    assert loss_by_numpy(network.params, *problem.train) <= dense + TOLERANCE + 1e-6


def test_certified_are_networks_on_the_way(problem, assessment):
    certificate, attained = assessment.certificate, assessment.attained
    within = sorted(s for s, value in attained.tried if value <= attained.dense_loss + TOLERANCE)
    assert list(certificate.sparsities) == within[: len(certificate.sparsities)]
    assert (certificate.bound, certificate.bounds, certificate.num_examples) == (0.01, (-1, 1), 1000)
    # The last of them is the attained one, which stands in the result: its error less the dense one's.
    assert certificate.sparsities[-1] == attained.sparsity
    test, labels = problem.test
    errors = [
        np.mean(outputs_by_numpy(params, test).argmax(-1) != labels)
        for params in (attained.pruned.params, problem.params)
    ]
    assert certificate.means[-1] == pytest.approx(errors[0] - errors[1])
    assert assessment.attained_error == pytest.approx(errors[0])


def test_the_table_says_it_all_and_fits_a_terminal(assessment):
    lines = repr(assessment).splitlines()
    assert max(map(len, lines)) <= 79
    readjusted = assessment.predicted["hessian"].readjusted
    (row,) = [
        line.split() for line in lines[: lines.index("Gauss-Newton")] if line.startswith("  readjusted")
    ]
    assert row[1] == f"{readjusted.value:.4f}"
    assert row[4] == f"{assessment.predicted['hessian'].rises['readjusted']:.3g}"
    assert row[5] == f"{assessment.attained.sparsity:.4f}"
    shown = "-" if assessment.certificate.sparsity is None else f"{assessment.certificate.sparsity:.4f}"
    assert row[6] == shown
    assert lines[0].startswith("Asked: how many of 45 weights")


def test_a_result_is_read_back(assessment):
    again = jaxlimit.Assessment.from_json(json.loads(json.dumps(assessment.to_json(), allow_nan=False)))
    assert repr(again) == repr(assessment)
    assert again.sentences == assessment.sentences
    assert again.attained.pruned.params is None
    with pytest.raises(ValueError, match="has no spectrum"):
        again.predicted["hessian"].curve()
    with pytest.raises(ValueError, match=r"not the values of an Assessment.*'cut'"):
        jaxlimit.Assessment.from_json({"predicted": {}, "certificate": None})


def assess(problem, **options):
    given = {"curvatures": ["gauss_newton"], "max_products": 5, "loss_tolerance": TOLERANCE} | options
    return jaxlimit.assess(predict, loss, problem.params, given.pop("batches", problem.batches), KEY, **given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curvatures": "hessian"}, "curvatures must be some of"),
        ({"curvatures": ["fisher"]}, "curvatures must be some of"),
        ({"loss_tolerance": 0}, "loss_tolerance must be a positive"),
        ({"tolerance": -1}, "tolerance must be between 0 and 1"),
        ({"error_rise": 0}, "error_rise"),
        ({"error_bound": 1.5}, "error_bound"),
        ({"error_bounds": (1, 0)}, "error_bounds"),
        ({"confidence": 95}, "confidence"),
        ({"max_products": 0}, "max_products"),
        ({"attained_tolerance": 0}, "attained_tolerance"),
    ],
)
def test_what_is_out_of_range_is_refused_before_work_starts(problem, monkeypatch, options, message):
    for name in ("hessian", "gauss_newton", "pruning_limit", "attained_limit"):
        monkeypatch.setattr(f"jaxlimit.application.answers.{name}", None)
    with pytest.raises(ValueError, match=message):
        assess(problem, test_batches=problem.test_batches, **options)


@pytest.mark.parametrize("label", [-100, -1, 3])
def test_a_test_example_without_a_class_is_refused_before_work_starts(problem, monkeypatch, label):
    """Padded rows would count as errors of both networks, and shrink the rise of errors by their share."""
    monkeypatch.setattr("jaxlimit.application.answers.gauss_newton", None)
    inputs, labels = problem.test
    labels = np.where(np.arange(len(labels)) == len(labels) - 1, label, labels)
    for batches in (jaxlimit.batched((inputs, labels), 50), [(inputs, labels)]):
        with pytest.raises(ValueError, match="leave out examples without a label, or give error_fn"):
            assess(problem, test_batches=batches)


def test_a_spread_that_is_none_is_no_tolerance(problem):
    with pytest.raises(ValueError, match="give several batches, or a loss_tolerance"):
        assess(problem, batches=jaxlimit.batched(problem.train, 200), loss_tolerance=None)


@pytest.mark.parametrize("again", [lambda data: data.batches, lambda data: jaxlimit.batched(data.train, 25)])
def test_what_prunes_does_not_certify(problem, again):
    with pytest.raises(ValueError, match="what prunes a network cannot certify it"):
        assess(problem, test_batches=again(problem))


def test_without_test_data_or_an_error_nothing_is_certified_and_says_so(problem):
    found = assess(problem)
    assert (found.certificate, found.not_certified) == (None, NO_TEST_BATCHES)
    assert "nothing is certified" in found.recommendation
    assert "no test_batches were given" in repr(found).replace("\n  ", " ")


def test_the_error_of_classification_is_taken_where_it_is_meant(problem):
    inputs, labels = problem.test
    found = default_error(predict, problem.params, problem.test_batches)
    wrong = outputs_by_numpy(problem.params, inputs).argmax(-1) != labels
    assert np.array_equal(found(problem.params, problem.test), wrong)
    assert found(problem.params, problem.test).dtype == bool  # a bound on it is certified exactly
    one_hot = jaxlimit.batched((inputs, np.eye(3, dtype=np.float32)[labels]), 50)
    assert default_error(predict, problem.params, one_hot) is None
    assert default_error(lambda params, batch: batch[0][:, 0], problem.params, problem.test_batches) is None
    assert (
        default_error(lambda params, batch: batch["x"], problem.params, [{"x": inputs, "y": labels}]) is None
    )
    assert certifying_of(predict, problem.params, problem.batches, one_hot, None) == NO_ERROR


def test_an_error_and_a_bound_of_ones_own(problem):
    def brier(params, batch):
        shares = jax.nn.softmax(predict(params, batch))
        return jnp.sum((shares - jax.nn.one_hot(batch[1], 3)) ** 2, axis=-1)

    found = assess(
        problem, test_batches=problem.test_batches, error_fn=brier, error_bounds=(0, 2), error_bound=1.0
    )
    assert (found.certificate.bound, found.certificate.bounds) == (1.0, (0, 2))
    outputs = np.exp(outputs_by_numpy(problem.params, problem.test[0]))
    shares = outputs / outputs.sum(-1, keepdims=True)
    assert found.dense_error == pytest.approx(np.mean(np.sum((shares - np.eye(3)[problem.test[1]]) ** 2, -1)))
    assert "the error is at most 1," in repr(found).replace("\n  ", " ")


@pytest.fixture(scope="module")
def folder(problem, tmp_path_factory):
    """That of a finished assessment, and what it found."""
    out = tmp_path_factory.mktemp("assessed") / "out"
    return out, assess(problem, out=out, test_batches=problem.test_batches)


def test_the_folder_has_the_report_and_the_network(folder):
    out, found = folder
    names = {path.name for path in out.iterdir() if path.name != ".lock"}
    assert names >= {
        "config.json",
        "limit.json",
        "spectrum-gauss_newton.npz",
        "pruned.safetensors",
        "report.html",
    }
    assert not [name for name in names if "checkpoint" in name or name.endswith(".tmp")]
    stored = load_file(out / "pruned.safetensors")
    for name in ("first", "second"):
        assert np.array_equal(stored[name], found.attained.pruned.params[name])
        assert np.array_equal(stored[name] != 0, stored[f"{name}.mask"])
    assert np.array_equal(stored["bias"], found.attained.pruned.params["bias"])
    document = json.loads((out / "limit.json").read_text())
    assert document["pruned"]["bytes"] == 4 * (45 + 3)
    assert document["pruned"]["kept_share"]["first"] == np.mean(stored["first.mask"])
    page = html.unescape((out / "report.html").read_text())
    for sentence in found.sentences:
        assert sentence in page
    assert "http" not in page


def test_the_certified_network_is_handed_out(problem, tmp_path):
    """Oracle: its errors by NumPy are those that were certified; and its file holds the same bits."""
    out = tmp_path / "out"
    found = assess(problem, out=out, test_batches=problem.test_batches, error_rise=0.9)
    network, certificate = found.certified, found.certificate
    assert network.sparsity == certificate.sparsity == max(certificate.sparsities)
    images, labels = problem.test
    errors = [
        np.mean(outputs_by_numpy(p, images).argmax(1) != labels) for p in (network.params, problem.params)
    ]
    assert errors[0] - errors[1] == pytest.approx(certificate.means[-1], abs=1e-6)
    assert 45 - sum(map(np.sum, jax.tree.leaves(network.mask))) == round(45 * network.sparsity)
    again = jaxlimit.load_assessment(out, problem.params).certified
    for name in ("params", "mask"):
        assert jax.tree.all(jax.tree.map(np.array_equal, getattr(again, name), getattr(network, name)))
    page = (out / "report.html").read_text()
    assert f"In certified.safetensors: the certified network of {network.sparsity:.4f}." in page
    (out / "certified.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"certified\.safetensors"):
        jaxlimit.load_assessment(out, problem.params)


def test_a_network_of_ours_is_also_written_for_pytorch(problem, tmp_path, monkeypatch):
    """Oracle: the kernels transposed. Also where the folder is from before the model was given."""
    model = models.FullyConnected([6, 5, 3], rngs=nnx.Rngs(0))
    params = models.from_nnx(model)[1]
    mask = jaxlimit.magnitude_mask(partition(params)[0], 0.5)
    params = jaxlimit.apply_mask(params, mask)
    numbers = {"dense_loss": 1.0, "num_products": 1.0, "status": ""}
    network = jaxlimit.Pruned(params, mask, 0.5, 1.1, num_steps=1, code="settled", kept_share={}, **numbers)
    found = jaxlimit.Attained(0.5, network, (), 0.1, 0.01, unpruned_loss=None, code="bracketed", **numbers)
    monkeypatch.setattr(answers, "attained", lambda *_: found)

    def stage(model):
        question = Question(predict, loss, params, problem.batches, KEY, 0.1, model=model)
        return attained_stage(Answering(question, tmp_path, True, Silent(Interrupt())))

    def require_written():
        written = load_file(tmp_path / "pruned-torch.safetensors")
        for number in ("0", "1"):
            kernel = params["layers"][number]["kernel"]
            np.testing.assert_array_equal(written[f"linear.{2 * int(number)}.weight"], kernel.T)
        (tmp_path / "pruned-torch.safetensors").unlink()

    part = stage(model).compute().to_json()
    assert part["pruned"]["torch"] == "pruned-torch.safetensors"
    assert "pruned-torch.safetensors" in pruned_table(part["pruned"]).notes[-1]
    require_written()
    stage(None).load(part)
    assert not (tmp_path / "pruned-torch.safetensors").exists()
    stage(model).load(part)
    require_written()
    with pytest.raises(ValueError, match="not those of this FullyConnected"):
        stage(models.FullyConnected([6, 4, 3], rngs=nnx.Rngs(0)))


NIGHTLY = [pytest.param(name, marks=pytest.mark.nightly) for name in ("limits", "cut", "finished")]


@pytest.mark.parametrize("when", ["third network", "attained", *NIGHTLY])
def test_a_kill_at_any_moment_loses_nothing(problem, folder, tmp_path, monkeypatch, when):
    """As if the process had died in the search, or when a stage's own files were there but not entered."""
    out, kept = tmp_path / "out", []

    def dies_entering(self, found):
        if when in found:
            raise KeyboardInterrupt
        enter(self, found)

    def dies_keeping(self, sparsity, params):
        kept.append(sparsity)
        if when == "third network" and len(kept) == 3:
            raise KeyboardInterrupt
        keep(self, sparsity, params)

    enter, keep = ledger.Ledger._enter, answers.Networks.keep
    with monkeypatch.context() as patch:
        patch.setattr(ledger.Ledger, "_enter", dies_entering)
        patch.setattr(answers.Networks, "keep", dies_keeping)
        with pytest.raises(KeyboardInterrupt):
            assess(problem, out=out, test_batches=problem.test_batches)
    assert not (out / "report.html").exists() or when == "finished"
    again = assess(problem, out=out, test_batches=problem.test_batches)
    assert repr(again) == repr(folder[1])
    assert (out / "pruned.safetensors").read_bytes() == (folder[0] / "pruned.safetensors").read_bytes()
    documents = [json.loads((where / "limit.json").read_text()) for where in (out, folder[0])]
    for document in documents:
        del document["seconds"]
    assert documents[0] == documents[1]


def test_a_finished_folder_is_read_and_nothing_computed(problem, folder, monkeypatch):
    for name in ("hessian", "gauss_newton", "pruning_limit", "attained_limit", "certify"):
        monkeypatch.setattr(f"jaxlimit.application.answers.{name}", None)
    again = assess(problem, out=folder[0], test_batches=problem.test_batches)
    assert repr(again) == repr(folder[1])
    found, stored = (x.attained.pruned for x in (folder[1], again))
    assert jax.tree.all(
        jax.tree.map(np.array_equal, (found.params, found.mask), (stored.params, stored.mask))
    )


def test_a_folder_is_loaded_without_data_and_functions(problem, folder, tmp_path):
    out, found = folder
    again = jaxlimit.load_assessment(out)
    assert repr(again) == repr(found)
    assert again.sentences == found.sentences
    assert again.attained.pruned.params is None
    limits = [x.predicted["gauss_newton"] for x in (again, found)]
    assert np.array_equal(*(limit.measure.nodes for limit in limits))
    networks = [x.attained.pruned for x in (jaxlimit.load_assessment(str(out), problem.params), found)]
    assert jax.tree.all(jax.tree.map(np.array_equal, *((x.params, x.mask) for x in networks)))
    with pytest.raises(ValueError, match="not of this network"):
        jaxlimit.load_assessment(out, {"other": np.ones((2, 2), np.float32)})
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        jaxlimit.load_assessment(tmp_path)
    for name in ("config.json", "limit.json"):
        document = json.loads((out / name).read_text())
        document.pop("finished", None)
        (tmp_path / name).write_text(json.dumps(document))
    with pytest.raises(ValueError, match="is not finished: the same call"):
        jaxlimit.load_assessment(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"loss_tolerance": 0.03}, "loss_tolerance"),
        ({"confidence": 0.9}, "confidence"),
        ({"max_products": 6}, "max_products"),
    ],
)
def test_a_folder_of_another_assessment_is_refused(problem, folder, change, named):
    with pytest.raises(ValueError, match=f"holds an assessment with .*{named} = "):
        assess(problem, out=folder[0], test_batches=problem.test_batches, **change)


def test_a_folder_of_another_certificate_is_refused(problem, folder):
    """Also where the first batch of the test data, and all but the risks, are the same."""
    inputs, labels = problem.test
    changed = np.where(np.arange(len(labels)) == len(labels) - 1, (labels + 1) % 3, labels)
    for data in (problem.test, (inputs, changed), (inputs[:-1], labels[:-1])):
        error_fn = None if data is not problem.test else lambda params, batch: 0 * batch[0][:, 0]
        with pytest.raises(ValueError, match=r"holds an assessment with .*(risk|test_data|test_examples) = "):
            assess(problem, out=folder[0], test_batches=jaxlimit.batched(data, 50), error_fn=error_fn)


def test_a_folder_of_other_moving_parameters_is_refused(problem, folder):
    for trainable in (lambda path, _: path[0].key == "bias", lambda path, _: path[0].key == "first"):
        with pytest.raises(ValueError, match="holds an assessment with trainable = "):
            assess(problem, out=folder[0], test_batches=problem.test_batches, trainable=trainable)


def test_parameters_of_another_network_are_not_filled(problem, folder):
    """Also where the number of weights fits."""
    params = problem.params
    transposed = {**params, "first": params["first"].T}
    fewer = {name: x for name, x in params.items() if name != "bias"}
    more = {**params, "scale": np.ones(2, np.float32)}
    for other in (transposed, fewer, more):
        with pytest.raises(ValueError, match="is not of this network"):
            jaxlimit.load_assessment(folder[0], other)
    with pytest.raises(ValueError, match=r"or prunable is another one: of the shape of second\.mask"):
        jaxlimit.load_assessment(folder[0], params, prunable=lambda path, _: path[0].key == "first")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a", "a.mask"), r"named a\.mask, as the mask of another one is in a file: rename it"),
        (("a", ("b", "c"), "b.c"), r"two arrays of params have the name b\.c"),
    ],
)
def test_names_that_a_file_cannot_hold_are_refused_before_work_starts(
    problem, tmp_path, monkeypatch, names, message
):
    monkeypatch.setattr("jaxlimit.application.answers.hessian", None)
    params = dict(problem.params)
    for name in names:
        inside = np.zeros((2, 2), np.float32)
        params |= {name[0]: {name[1]: inside}} if isinstance(name, tuple) else {name: inside}
    with pytest.raises(ValueError, match=message):
        assess(SimpleNamespace(params=params, batches=problem.batches), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused(problem, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"not of an assessment \(thesis.tex"):
        assess(problem, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(EXAMPLES[0], marks=pytest.mark.nightly, id="bare"),
        pytest.param(EXAMPLES[1], id="nnx"),
        pytest.param(EXAMPLES[2], marks=pytest.mark.nightly, id="linen"),
        pytest.param(EXAMPLES[3], marks=pytest.mark.nightly, id="equinox"),
    ],
)
def test_the_examples_of_the_page_run(code, tmp_path, monkeypatch, capsys):
    """After two epochs, of fewer products."""
    monkeypatch.chdir(tmp_path)
    assert "epochs=60" in code
    short = code.replace("epochs=60", "epochs=2").replace(
        "    test_batches=", f"    {FEW}\n    test_batches="
    )
    exec(compile(short, "assess.md", "exec"), {"__name__": "__main__"})
    assert re.search(r"(^|Recommended: )cut to .* as it is; .* with\s+readjustment;", capsys.readouterr().out)
    assert (tmp_path / "results" / "bare" / "report.html").exists() == ("out=" in code)


def test_another_network_in_the_place_of_one_that_was_found_is_refused(problem, tmp_path):
    """The mask of another one; and a network that has zeros of its own, more than its sparsity, is taken."""
    params = {**problem.params, "first": problem.params["first"] * (np.abs(problem.params["first"]) > 0.02)}
    asked = {"out": tmp_path, "test_batches": problem.test_batches, "error_rise": 0.9}
    found = assess(SimpleNamespace(**{**vars(problem), "params": params}), **asked)
    again = jaxlimit.load_assessment(tmp_path, params)
    for name in ("params", "mask"):
        for old, new in ((found.certified, again.certified), (found.attained.pruned, again.attained.pruned)):
            assert jax.tree.all(jax.tree.map(np.array_equal, getattr(old, name), getattr(new, name)))
    dense = jaxlimit.magnitude_mask({"first": params["first"], "second": params["second"]}, 0.1)
    for name in ("pruned.safetensors", "certified.safetensors"):
        file, kept = tmp_path / name, (tmp_path / name).read_bytes()
        save_pruned(file, params, {**dense, "bias": None})
        with pytest.raises(ValueError, match=rf"{name}.* holds a network of 41 weights, where"):
            jaxlimit.load_assessment(tmp_path, params)
        file.write_bytes(kept)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"error_fn": lambda params, batch: jnp.float32(0.5)}, "one number for each example"),
        ({"error_fn": lambda params, batch: jnp.full(len(batch[1]), 2.0)}, r"outside the bounds \[0, 1\]"),
        ({"error_fn": 3}, "error_fn must be a function, got an int"),
        ({"error_bounds": None}, "error_bounds must be two numbers"),
        ({"error_bounds": (0, 1, 2)}, "error_bounds must be two numbers"),
        ({"settings": None}, "settings must be a Settings"),
        ({"test_batches": (x for x in [1])}, "must be iterable more than once"),
        ({"test_batches": (np.ones((4, 6), np.float32), np.ones(4, int))}, "the parts of one batch"),
    ],
)
def test_what_cannot_be_certified_is_said_before_work_starts(problem, monkeypatch, asked, message):
    monkeypatch.setattr(answers, "predicted", lambda *_: pytest.fail("work has started"))
    with pytest.raises(ValueError, match=message):
        assess(problem, **({"test_batches": problem.test_batches} | asked))


def test_test_data_may_come_from_a_function(problem):
    """Oracle: the same from a list."""
    batches, again = list(problem.test_batches), []
    for some in (batches, lambda: iter(batches)):
        certifying = certifying_of(predict, problem.params, problem.batches, some, None)
        again.append(type(certifying.error_fn))
    assert again[0] is again[1]


TESTED = {
    "bfloat16": lambda ones: jnp.full((40, 8), ones, jnp.bfloat16),
    "bool": lambda ones: np.full((40, 8), bool(ones)),
    "complex": lambda ones: np.full((40, 8), 1 + ones * 1j, np.complex64),
    "random keys": lambda ones: jax.random.split(jax.random.key(ones), 40),
}


@pytest.mark.parametrize("kind", TESTED)
def test_other_data_have_another_checksum(kind):
    ones, others = (_checksum({"x": TESTED[kind](value)}) for value in (1, 0))
    assert ones != others
    assert _checksum([np.ones(3, np.float32), "text", None]) == _checksum([np.ones(3, np.float32)])


def test_a_class_of_nan_is_no_class():
    """Half of the outputs are 0 / 0, and the largest of NaN is at 0, the label."""

    def predict(w, batch):
        return batch[0] / jnp.linalg.norm(batch[0], axis=-1, keepdims=True) @ w

    inputs = np.concatenate([np.ones((5, 2)), np.zeros((5, 2))]).astype(np.float32)
    batch, weights = (inputs, np.zeros(10, np.int32)), np.array([[1.0, 0.0], [0.0, 0.5]], np.float32)
    assert Misclassified(predict)(weights, batch).tolist() == [False] * 5 + [True] * 5
    metrics = training.classification_metrics(lambda w, x: predict(w, (x,)))
    assert metrics(weights, batch)["accuracy"] == 0.5


@pytest.mark.parametrize("kind", ["int4", "complex64"])
def test_what_no_file_holds_is_refused_before_work_starts(kind, problem, tmp_path):
    params = {**problem.params, "odd": jnp.ones(2, kind)}
    other = SimpleNamespace(**{**vars(problem), "params": params})
    with pytest.raises(ValueError, match=r"params has an array odd of dtype .* do not hold"):
        assess(other, out=tmp_path / "out")
