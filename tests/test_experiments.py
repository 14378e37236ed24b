"""`jaxlimit experiment compare`, end to end, on a network small enough for seconds."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from jaxlimit.application import machine, presets, run_folder
from jaxlimit.cli import main
from jaxlimit.experiments.compare import figure, table
from jaxlimit.experiments.methods import METHODS, settings_of

TINY = presets.Preset(
    "tiny",
    "digits",
    "64-8-10",
    replace(presets.SGD, epochs=2, learning_rate=0.1, schedule="cosine", l1=5e-4),
)
COMPARE = ["experiment", "compare", "tiny", "--methods", "dense", "lomp", "--seeds", "2"]
COMPARE += ["--sparsities", "0.9", "0.5", "--epochs", "2"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "tiny", TINY)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of an uninterrupted comparison."""
    folder = tmp_path_factory.mktemp("experiments") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "tiny", TINY)
        assert main([*COMPARE, "--out", str(folder)]) == 0
    return folder


def pieces(folder):
    """What was found, without the seconds it took."""
    found = json.loads((folder / "results.json").read_text())["pieces"]
    return {
        name: {key: value for key, value in piece.items() if key != "seconds"}
        for name, piece in found.items()
    }


def test_a_comparison_writes_results_table_and_figure(finished):
    names = [f"{name}-seed{seed}" for name in ("dense", "lomp") for seed in (0, 1)]
    document = json.loads((finished / "results.json").read_text())
    assert list(document["pieces"]) == names
    assert document["config"]["settings"]["lomp"]["l1"] == 5e-4
    assert document["config"]["settings"]["dense"]["l1"] == 0
    assert document["config"]["sparsities"] == [0.5, 0.9]
    made = {"device": machine.device(), "versions": machine.versions()}
    assert all(made.items() <= piece.items() for piece in document["pieces"].values())
    assert (finished / "figures" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in finished.iterdir()} == {
        "config.json",
        "results.json",
        "table.md",
        "figures",
        "pieces",
    }
    dim = 64 * 8 + 8 * 10
    for name in names[2:]:
        rows = document["pieces"][name]["networks"]
        assert [row["kept"] for row in rows] == [dim - dim // 2, dim - int(0.9 * dim)]
        assert all(sum(kept for kept, _ in row["layers"].values()) == row["kept"] for row in rows)


def test_the_table_has_the_means_and_spreads_of_the_pieces(finished):
    lines = (finished / "table.md").read_text().splitlines()
    found = pieces(finished)
    (line,) = [line for line in lines if line.startswith("| LOMP |")]
    shown = [tuple(map(float, pair)) for pair in re.findall(r"(\d+\.\d) ± (\d+\.\d)", line)]
    for column, (mean, spread) in enumerate(shown):
        values = [100 * found[f"lomp-seed{seed}"]["networks"][column]["test_accuracy"] for seed in (0, 1)]
        assert mean == pytest.approx(np.mean(values), abs=0.051)
        assert spread == pytest.approx(abs(values[0] - values[1]) / np.sqrt(2), abs=0.051)
    assert len(shown) == 2
    (line,) = [line for line in lines if line.startswith("| dense |")]
    assert len(set(re.findall(r"\d+\.\d ± \d+\.\d", line))) == 1


def test_ctrl_c_and_the_same_command_goes_on(finished, tmp_path, monkeypatch, capsys):
    """Interrupted in the third piece: two are kept and not computed again, and the end is the same."""
    folder, started = tmp_path / "run", []

    def interrupted(method, number):
        def run(*args, **kwargs):
            started.append(number)
            if len(started) == 3:
                raise KeyboardInterrupt
            return method.run(*args, **kwargs)

        return method._replace(run=run)

    for name in ("dense", "lomp"):
        monkeypatch.setitem(METHODS, name, interrupted(METHODS[name], name))
    assert main([*COMPARE, "--out", str(folder)]) == 130
    assert "the same command goes on with the rest" in capsys.readouterr().err
    assert started == ["dense", "dense", "lomp"]
    assert not (folder / "results.json").exists()
    assert main([*COMPARE, "--out", str(folder)]) == 0
    assert started[3:] == ["lomp", "lomp"]
    assert pieces(folder) == pieces(finished)
    left = run_folder.checkpoint_path(folder, "lomp-seed1")  # by a kill after its piece was written
    left.mkdir()
    assert main([*COMPARE, "--out", str(folder)]) == 0  # nothing is left to do
    assert len(started) == 5
    assert not left.exists()


def test_a_folder_of_fewer_seeds_goes_on_with_the_others(finished, tmp_path):
    folder = tmp_path / "run"
    one = [*COMPARE, "--methods", "dense", "--out", str(folder), "--seeds"]
    assert main([*one, "1"]) == 0
    first = folder / "pieces" / "dense-seed0.json"
    written = first.stat().st_mtime_ns
    assert main([*one, "2"]) == 0
    assert first.stat().st_mtime_ns == written
    assert json.loads((folder / "config.json").read_text())["seeds"] == 2
    assert pieces(folder) == {k: v for k, v in pieces(finished).items() if k.startswith("dense")}


def test_a_folder_with_other_options_or_other_files_is_refused(finished, tmp_path, capsys):
    assert main([*COMPARE, "--out", str(finished), "--l1", "0"]) == 2
    assert "holds an experiment with other options (preset, settings)" in capsys.readouterr().err
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main([*COMPARE, "--out", str(tmp_path)]) == 2
    assert "holds something that is not of an experiment" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nonsense"], "there is no experiment 'nonsense'; the experiments are compare"),
        (["compare", "nonsense"], "there is no preset 'nonsense'"),
        (["compare", "--methods", "obd"], "methods must be some of dense, lomp, imp,"),
        (["compare", "--methods", "lomp", "lomp"], "each once, got lomp lomp"),
        (["compare", "--sparsities", "1.0"], "sparsities must be one or more numbers from 0 to below 1"),
        (["compare", "--sparsities", "0.99"], "Smart-Ratio cannot keep 45 of 4,464 weights"),
        (["compare", "--seeds", "0"], "seeds must be at least 1, got 0"),
        (["compare", "--epochs", "0"], "epochs must be at least 1, got 0"),
        (
            ["compare", "--methods", "imp", "--l1", "1"],
            "l1 is of lomp and prune, which are not among the methods",
        ),
        (["gems", "--l1", "1"], "l1 has no effect on this experiment"),
        (["gems", "--networks", "nets"], "networks has no effect on this experiment"),
        (["gradual", "--networks", "nets"], "networks has no effect on this experiment"),
        (["compare", "--l1", "-1"], "l1 must be finite and at least 0, got -1.0"),
        (["compare", "mnist-fc2", "--data", "nowhere"], "There is no folder nowhere/mnist."),
        (["crossing", "--seeds", "0"], "seeds must be at least 1, got 0"),
        (["regularizer", "--sparsity", "1e-5"], "sparsity must remove one of the 4,464 weights"),
        (
            ["regularizer", "--sparsity", "1.5"],
            "sparsity must remove one of the 4,464 weights and be at most 1",
        ),
        (["regularizer", "--loss-tolerance", "inf"], "loss_tolerance must be positive and finite, got inf"),
        (["regularizer", "--networks", "nets"], "networks has no effect on this experiment"),
        (["lambda", "--l1", "1", "--lambdas", "0.1"], "l1 has no effect on this experiment"),
        (["crossing", "--num-examples", "128"], "num_examples must be above the batch size, 128, got 128"),
        (["scaling", "--factors", "1"], "factors must be one or more positive numbers other than 1, got []"),
        (["regularizer", "--weights", "0"], "weights must be one or more positive finite numbers"),
        (["crossing", "--probes", "-1"], "probes must be at least 0, got -1"),
        (["crossing", "--max-matvecs", "15"], "max_matvecs must be at least 16, got 15"),
        (["crossing", "--probes", "20", "--max-matvecs", "16"], "max_matvecs must be at least 20, got 16"),
        (["crossing", "--num-examples", "2000"], "num_examples must be at most 1438, got 2000"),
        (["distance", "--seeds", "1"], "seeds must be at least 2, got 1"),
        (["gems", "--sparsities", "1"], "sparsities must be one or more numbers from 0 to below 1"),
        (["gradual", "--rounds", "0"], "rounds must be an integer of at least 1, got 0"),
        (["gradual", "--learning-rate", "0"], "learning_rate must be positive and finite, got 0.0"),
        (["lambda", "--lambdas", "-1"], "lambdas must be one or more finite numbers of at least 0"),
        (["rows", "--num-rows", "3"], "num_rows must be an integer of at least 20, got 3"),
        (
            ["scaling", "--factors", "0"],
            "factors must be one or more positive numbers other than 1, got [0.0]",
        ),
        (["training", "--at", "401"], "at must hold epochs from 0 to 400, got [401]"),
    ],
)
def test_bad_values_get_one_line_and_code_2_before_any_work(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["experiment", *args]) == 2
    error, following = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert following.startswith("next: jaxlimit experiment ")
    assert not list(tmp_path.iterdir())


def test_recipes_are_those_of_the_papers_and_of_the_preset():
    digits, vgg = presets.PRESETS["digits"], presets.PRESETS["cifar10-vgg16"]
    lomp, dense = settings_of("lomp", digits, 1438), settings_of("dense", digits, 1438)
    steps = np.arange(0, 4800, 100)
    assert [lomp.rate(1438)(step) for step in steps] == [digits.recipe.rate(1438)(step) for step in steps]
    cosine = 0.05 * (1 + np.cos(np.pi * steps / 4800)) / 2
    np.testing.assert_allclose([lomp.rate(1438)(step) for step in steps], cosine, atol=1e-6)
    assert (lomp.l1, dense.l1, lomp.weight_decay) == (5e-4, 0.0, 0.0)
    for preset, steps, epochs in (("cifar10-lenet", 1000, 160), ("cifar10-vgg16", 2000, 200)):
        imp = settings_of("imp", presets.PRESETS[preset], 50_000)
        assert (imp.rewind_steps, imp.recipe.epochs, imp.recipe.batch_size) == (steps, epochs, 128)
        rates = [float(imp.recipe.rate(50_000)(391 * epoch)) for epoch in (79, 80, 119, 120)]
        assert rates == pytest.approx([0.1, 0.01, 0.01, 0.001])
    assert settings_of("smart-ratio", vgg, 50_000).vgg
    assert not settings_of("smart-ratio", digits, 1438).vgg
    assert settings_of("hybrid", digits, 1438).hybrid
    short = settings_of("rare-gems", digits, 1438, epochs=30)
    assert (short.epochs, short.drop_every, short.num_drops, short.finetune.epochs) == (30, 1, 29, 30)
    for preset, epochs, tenth in (("digits", None, 16), ("mnist-fc2", 10, 1)):
        pushed = settings_of("greg-2", presets.PRESETS[preset], 1438, epochs=epochs)
        assert (pushed.choose_epochs, pushed.stabilise_epochs) == (tenth, tenth)
        assert pushed.grow_epochs == pushed.recipe.epochs == pushed.finetune.epochs == (epochs or 160)
        assert (pushed.finetune.learning_rate, pushed.learning_rate) == (0.01, 0.001)
    assert settings_of("greg-1", digits, 1438).choose_first
    readjusted = [settings_of(name, digits, 1438).recipe for name in ("prune", "prune-dense")]
    assert readjusted == [lomp, dense]
    slow = {name: settings_of(name, digits, 1438, learning_rate=0.02) for name in METHODS}
    assert [slow[name].recipe.learning_rate for name in ("imp", "hybrid", "smart-ratio")] == [0.02] * 3
    assert slow["imp"].recipe.epochs == 160
    scores, weights = slow["rare-gems"].learning_rate, slow["rare-gems"].finetune.learning_rate
    assert (scores, weights) == (0.1, 0.02)


def piece(method, seed, accuracies, collapsed=()):
    rows = [
        {"sparsity": s, "test_accuracy": accuracy, "collapsed": list(collapsed)}
        for s, accuracy in zip((0.5, 0.9), accuracies, strict=False)
    ]
    return {"method": method, "seed": seed, "networks": rows}


def test_divergence_and_collapse_are_in_the_table():
    results = {
        "a": piece("lomp", 0, [0.9, 0.5]),
        "b": piece("lomp", 1, [0.8, 0.1], ["layers.0.kernel"]),
        "c": piece("imp", 0, [0.9, 0.8]),
        "d": {"method": "imp", "seed": 1, "diverged": "in epoch 3", "networks": []},
    }
    assert figure(results).axes[0].get_legend_handles_labels()[1] == ["LOMP"]
    text = table(results, [0.5, 0.9])
    assert "| LOMP | one for all s | 85.0 ± 7.1 † | 30.0 ± 28.3 † |" in text
    assert "| iterative, rewound | one a round | diverged in 1 of 2 | diverged in 1 of 2 |" in text
    assert "† a layer kept nothing in at least one run" in text


def test_the_table_has_a_column_for_every_sparsity():
    """Of the control alone, at sparsity 0, and where every run diverged; one run has no spread."""
    dense = {"a": piece("dense", 0, [0.9])}
    dense["a"]["networks"][0]["sparsity"] = 0.0
    assert table(dense, [0.0, 0.5]).splitlines() == [
        "| method | trainings | 0 | 0.5 |",
        "| --- | --- | ---: | ---: |",
        "| dense | one | 90.0 | 90.0 |",
    ]
    assert figure(dense).axes[0].lines
    nothing = {"a": {"method": "lomp", "seed": 0, "diverged": "in epoch 0", "networks": []}}
    assert "| LOMP | one for all s | diverged in 1 of 1 | diverged in 1 of 1 |" in table(nothing, [0.5, 0.9])


def test_a_divergence_is_a_result(tmp_path, monkeypatch):
    def diverges(*_, **__):
        raise FloatingPointError("training diverged in epoch 0")

    monkeypatch.setitem(METHODS, "lomp", METHODS["lomp"]._replace(run=diverges))
    args = [
        "experiment",
        "compare",
        "tiny",
        "--methods",
        "lomp",
        "--seeds",
        "1",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(args) == 0
    assert pieces(tmp_path / "run")["lomp-seed0"]["diverged"] == "training diverged in epoch 0"
