"""`benchmarks/char_lm.py` on a tiny network, against pruning, losses and a Hessian written out here."""

import copy
import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxlimit.core import trees

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
pytest.importorskip("safetensors", reason="needs the cli extra")
import char_lm
import common

pytestmark = pytest.mark.nightly

TINY = char_lm.Settings(
    width=8,
    num_heads=2,
    num_layers=1,
    context=8,
    num_read=600,
    epochs=4,
    learning_rate=0.02,
    warmup_steps=5,
    num_sequences=16,
    tolerance=0.01,
    max_matvecs=2_000,
    finetune_steps=5,
)
EXISTENCE = ("all kernels", "head")


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    problem = char_lm.Problem(TINY, seed=0)
    return char_lm.Network(problem, 5e-5, tmp_path_factory.mktemp("char_lm"))


@pytest.fixture(scope="module")
def found(network):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(char_lm, "EXISTENCE", EXISTENCE)
        return network.run()


def nats(problem, params, inputs, labels):
    """Mean surprise of the labels, in float64."""
    logits = np.asarray(problem.predict(params, inputs), np.float64)
    logits -= logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(logits, np.asarray(labels)[..., None], -1)[..., 0]
    return float(np.mean(np.log(np.exp(logits).sum(-1)) - chosen))


def pruned(params, accepts, sparsity):
    """Zeros in the place of the smallest kernels that are accepted."""
    weights, rest = trees.partition(params, accepts)
    flat, unravel = ravel_pytree(weights)
    flat = np.array(flat)
    flat[np.argsort(np.abs(flat), kind="stable")[: int(sparsity * flat.size + 1e-9)]] = 0
    return trees.combine(unravel(flat), rest)


def test_what_is_held_out_is_predicted_better_than_by_frequencies(network, found):
    problem = network.problem
    inputs, labels = problem.test_batches.arrays
    assert found["test_bits"] == pytest.approx(
        nats(problem, network.params, inputs, labels) / np.log(2), rel=1e-5
    )
    counts = np.bincount(problem.train[1].ravel(), minlength=96) + 1
    frequencies = -np.mean(np.log2(counts / counts.sum())[np.asarray(labels)])
    assert found["test_bits"] < frequencies
    train = {tuple(row) for row in problem.train[0].tolist()}
    assert len(problem.train[0]) + len(inputs) == TINY.num_read
    assert all(tuple(row) in train for row in np.asarray(problem.batches.arrays[0]).tolist())


def test_groups_are_parts_of_the_whole(found):
    sizes = {name: group["num_weights"] for name, group in found["groups"].items()}
    assert sizes["all kernels"] == 4 * 8 * 8 + 2 * 8 * 32 + 8 * 96
    assert sizes["attention"] + sizes["feed-forward"] + sizes["head"] == sizes["all kernels"]
    assert sizes["layer 1"] + sizes["head"] == sizes["all kernels"]


@pytest.mark.parametrize("group", ["all kernels", "attention", "head"])
def test_measured_thresholds_are_those_of_pruning(network, found, group):
    problem, threshold = network.problem, found["groups"][group]["threshold"]
    arrays = problem.batches.arrays
    bound = nats(problem, network.params, *arrays) + TINY.loss_tolerance
    below = np.searchsorted(char_lm.SPARSITIES, threshold) - 1
    losses = [
        nats(problem, pruned(network.params, TINY.groups[group], float(s)), *arrays)
        for s in char_lm.SPARSITIES[below : below + 2]
    ]
    assert losses[0] <= bound < losses[1]
    assert 0 < threshold < 1


def test_one_shot_of_the_head_is_the_crossing_of_its_quadratic(network, found):
    problem = network.problem
    weights, rest = trees.partition(network.params, TINY.groups["head"])
    flat, unravel = ravel_pytree(weights)

    def loss(flat):
        return problem.loss(trees.combine(unravel(flat), rest), problem.batches.arrays)

    gradient, matrix = (np.asarray(x, np.float64) for x in (jax.grad(loss)(flat), jax.hessian(loss)(flat)))
    order, removed = np.argsort(np.abs(flat), kind="stable"), np.zeros(flat.size)
    losses = []
    for index in order:
        removed[index] = flat[index]
        losses.append(removed @ matrix @ removed / 2 - gradient @ removed)
    truth = (1 + np.argmax(np.array(losses) > TINY.loss_tolerance)) / flat.size
    limit = found["groups"]["head"]["one_shot"]
    assert limit["lower"] <= truth <= limit["upper"]


def test_the_loss_is_convex_in_the_head_alone(found):
    """Logits are linear in the head: its Hessian is the Gauss-Newton matrix. Tuning never hurts."""
    head, whole = (found["groups"][name] for name in ("head", "all kernels"))
    for name in ("width", "cone"):
        assert head["hessian"][name]["value"] == pytest.approx(head["gauss_newton"][name]["value"], abs=2e-3)
        assert whole["hessian"][name]["value"] < whole["gauss_newton"][name]["value"]
    spectra = found["spectra"]
    semidefinite, indefinite = spectra["gauss_newton"], spectra["hessian"]
    assert semidefinite["mean_magnitude"] == pytest.approx(semidefinite["mean"], rel=1e-4)
    assert indefinite["mean_magnitude"] > 1.01 * indefinite["mean"]
    for group in (head, whole):
        assert group["finetuned"]["threshold"] >= group["threshold"] - 0.02


def test_a_finished_folder_is_read_and_another_one_refused(network, found, monkeypatch):
    def never(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr(char_lm, "EXISTENCE", EXISTENCE)
    again = char_lm.Network(network.problem, 5e-5, network.folder)
    for name in ("train", "measured", "one_shot", "existence", "spectra", "finetuned"):
        monkeypatch.setattr(again, name, never)
    assert again.run() == found
    other = char_lm.Problem(dataclasses.replace(TINY, epochs=3), seed=0)
    with pytest.raises(ValueError, match="holds a network of other settings"):
        char_lm.Network(other, 5e-5, network.folder).run()


def test_table_and_figure(found, monkeypatch, tmp_path):
    monkeypatch.setattr(char_lm, "EXISTENCE", EXISTENCE)
    document = {"settings": dataclasses.asdict(TINY), "networks": [found]}
    rows = [row.split(" | ") for row in char_lm.table(document).splitlines()]
    assert [row[1] for row in rows[2:]] == list(TINY.groups)
    assert "~" not in "".join(rows[2])
    document = copy.deepcopy(document)
    head = document["networks"][0]["groups"]["head"]["hessian"]
    head["width"] = {"value": 0.9, "lower": 0.8, "upper": 0.95, "spread": 0.02}
    (row,) = [row for row in char_lm.table(document).splitlines() if "| head |" in row]
    assert "| ~0.900 [0.80, 0.95] |" in row
    char_lm.plot(document, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_thresholds_of_a_curve():
    grid, values = np.arange(5) / 4, [1.0, 0.9, 1.2, 1.1, 2.0]
    assert common.crossing(grid, values, 1.05) == pytest.approx(0.375)
    assert common.crossing(grid, values, 2.0) == 1.0
    for bound in (0.95, 1.15, 1.5):
        rising = np.maximum.accumulate(values[1:])
        expected = max((s for s, value in zip(grid[1:], rising, strict=True) if value <= bound), default=0.25)
        reached = {s: value <= bound for s, value in zip(grid[1:].tolist(), rising, strict=True)}
        assert common.last_reached(reached.__getitem__, grid, 0.3) == expected
