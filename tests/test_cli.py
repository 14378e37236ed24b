"""The command line, end to end, on a network small enough for seconds (592 weights)."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from dataclasses import fields, replace
from io import StringIO
from pathlib import Path

import jax
import numpy as np
import pytest
from matplotlib import image
from safetensors.numpy import load_file

import jaxlimit
from jaxlimit import __version__, data, models, training
from jaxlimit.application import pipeline, presets, run_folder
from jaxlimit.application.options import default_folder
from jaxlimit.cli import main, parse
from jaxlimit.experiments import options
from jaxlimit.measuring.finetuning import FinetunedNetwork
from jaxlimit.training import model_files
from jaxlimit.training.recipe import Recipe

TINY = presets.Preset(
    "tiny",
    "digits",
    "64-8-10",
    replace(presets.SGD, epochs=3, learning_rate=0.1, schedule="cosine", l1=5e-4),
    finetune_steps=5,
)
RUN = ["run", "tiny", "--curvature", "gauss_newton"]
FIGURES = {
    f"{name}.{kind}"
    for name in ("assessment", "loss", "accuracy", "transition", "spectrum", "sensitivity")
    for kind in ("png", "pdf")
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "tiny", TINY)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.setitem(presets.PRESETS, "tiny", TINY)
        assert main([*RUN, "--out", str(folder)]) == 0
    return folder, printed.getvalue()


def command(args):
    """The command in a process of its own, with the tiny preset.

    BLAS has one thread, as in this process (conftest.py): eigenvalues depend on their number in the last bit.
    """
    code = (
        "import sys, threadpoolctl; from jaxlimit.application.presets import *; "
        "from jaxlimit.cli import main; threadpoolctl.threadpool_limits(1, user_api='blas'); "
        f"PRESETS['tiny'] = {TINY!r}; sys.argv[1:] = {args!r}; sys.exit(main())"
    )
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def numbers(folder):
    """All of limit.json that another run of the same configuration must repeat to the bit."""
    document = json.loads((folder / "limit.json").read_text())
    return {name: value for name, value in document.items() if name not in ("seconds", "command")}


def test_a_run_writes_all_its_files(finished):
    folder, _ = finished
    document = json.loads((folder / "limit.json").read_text())
    assert document["finished"]
    assert set(document["limits"]) == {"gauss_newton"}
    assert set(document["measured"]) == {"loss", "accuracy", "finetuned", "finetuned_accuracy"}
    assert set(document["versions"]) >= {"python", "jax", "jaxlib", "numpy", "jaxlimit"}
    assert {path.name for path in (folder / "figures").iterdir()} == FIGURES
    assert {name: leaf.shape for name, leaf in load_file(folder / "weights.safetensors").items()} == {
        "layers.0.kernel": (64, 8),
        "layers.0.bias": (8,),
        "layers.1.kernel": (8, 10),
        "layers.1.bias": (10,),
    }
    pruned = load_file(folder / "pruned.safetensors")
    kept = [pruned[f"layers.{i}.kernel.mask"] for i in (0, 1)]
    assert 592 - sum(map(np.sum, kept)) == round(592 * document["attained"]["sparsity"])
    in_torch = load_file(folder / "pruned-torch.safetensors")
    assert np.array_equal(in_torch["linear.0.weight"], pruned["layers.0.kernel"].T)
    assert document["certificate"]["num_examples"] == document["network"]["num_test"]
    with (folder / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["sparsity"]) for row in rows] == pytest.approx(np.linspace(0, 1, 401))
    assert sum(row["train_loss"] != "" for row in rows) < 80  # a threshold needs no more
    assert float(rows[0]["train_loss"]) == pytest.approx(document["network"]["train_loss"], rel=1e-5)
    # A network without weights answers with its last bias, the same for all images.
    assert float(rows[-1]["test_accuracy"]) < 0.3
    leftover = [path.name for path in folder.rglob("*") if path.suffix == ".tmp" or "checkpoint" in path.name]
    assert not leftover


def test_the_printed_table_is_limit_json(finished):
    folder, printed = finished
    for line in repr(jaxlimit.load_assessment(folder)).splitlines():
        assert line in printed
    document = json.loads((folder / "limit.json").read_text())
    for name in ("one_shot", "width", "cone", "readjusted"):
        (line,) = [line for line in printed.splitlines() if re.match(rf"  {name} +\d", line)]
        limit = document["limits"]["gauss_newton"][name]
        cut, attained = document["measured"]["loss"]["value"], document["attained"]["sparsity"]
        *shown, rise, found = map(float, re.findall(r"[-+]?\d[\d.]*(?:e[-+]\d+)?", line)[:5])
        expected = [limit["value"], limit["lower"], limit["upper"], cut if name == "one_shot" else attained]
        assert [*shown, found] == pytest.approx(expected, abs=5.1e-5)
        assert rise == pytest.approx(document["limits"]["gauss_newton"]["rises"][name], rel=5.1e-3)


def test_the_measured_threshold_is_where_the_curve_crosses(finished):
    folder, _ = finished
    document = json.loads((folder / "limit.json").read_text())
    bound = document["network"]["train_loss"] + document["loss_tolerance"]
    with (folder / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    for column, kind in (("train_loss", "loss"), ("finetuned_train_loss", "finetuned")):
        measured = [(float(row["sparsity"]), float(row[column])) for row in rows if row[column]]
        first = next(i for i, (_, loss) in enumerate(measured) if loss > bound)
        assert document["measured"][kind] == {"value": measured[first - 1][0], "next": measured[first][0]}
        assert measured[first][0] - measured[first - 1][0] <= 0.005 + 1e-9


@pytest.mark.parametrize(
    ("groups", "num_groups"),
    [
        ("units", 8),
        pytest.param("output_channels", 18, marks=pytest.mark.nightly),
        pytest.param("input_channels", 72, marks=pytest.mark.nightly),
    ],
)
def test_a_run_of_whole_groups(groups, num_groups, tmp_path, capsys):
    """Every sparsity is one that whole groups reach, and every loss that of the network cut there."""
    folder = tmp_path / groups
    tuned = 2 if groups == "units" else 0
    assert main([*RUN, "--groups", groups, "--finetune-steps", str(tuned), "--out", str(folder)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"592 weights, in {num_groups} groups, can go" in said
    document = json.loads((folder / "limit.json").read_text())
    assert document["limits"]["gauss_newton"]["num_groups"] == num_groups
    weights = load_file(folder / "weights.safetensors")
    kernels = [weights["layers.0.kernel"], weights["layers.1.kernel"]]
    along = {
        "units": [np.ones((64, 1), int) * np.arange(8), np.arange(8)[:, None] * np.ones(10, int)],
        "output_channels": [np.ones((64, 1), int) * np.arange(8), 8 + np.ones((8, 1), int) * np.arange(10)],
        "input_channels": [
            np.arange(64)[:, None] * np.ones(8, int),
            64 + np.arange(8)[:, None] * np.ones(10, int),
        ],
    }[groups]
    labels, flat = (np.concatenate([x.ravel() for x in found]) for found in (along, kernels))
    sizes = np.bincount(labels)
    order = np.argsort(np.bincount(labels, flat.astype(float) ** 2) / sizes, kind="stable")
    reached = np.concatenate([[0], np.cumsum(sizes[order])]) / 592

    digits = data.load_digits()

    def loss_of(kept):
        first, last = (kernel * mask for kernel, mask in zip(kernels, kept, strict=True))
        hidden = np.maximum(digits.train_images @ first + weights["layers.0.bias"], 0)
        logits = hidden @ last + weights["layers.1.bias"]
        right = logits[np.arange(len(logits)), digits.train_labels]
        return np.mean(np.log(np.exp(logits).sum(1)) - right)

    with (folder / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == num_groups + 1
    for row, sparsity, count in zip(rows, reached, range(num_groups + 1), strict=True):
        assert float(row["sparsity"]) == pytest.approx(sparsity, abs=1e-12)
        if row["train_loss"]:
            kept = [~np.isin(part, order[:count]) for part in along]
            assert float(row["train_loss"]) == pytest.approx(loss_of(kept), rel=1e-4)
        assert bool(row.get("finetuned_train_loss")) <= bool(tuned)
    value, after = document["measured"]["loss"].values()
    assert np.count_nonzero((reached > value + 1e-9) & (reached < after - 1e-9)) == 0
    pruned = load_file(folder / "pruned.safetensors")
    masks = np.concatenate([pruned[f"layers.{i}.kernel.mask"].ravel() for i in (0, 1)])
    assert all(len(set(masks[labels == group])) == 1 for group in range(num_groups))
    left = document["pruned"]["shrunk_num_params"]
    if groups == "units":
        units = sum(masks[labels == group].any() for group in range(8))
        assert left == 64 * units + units + units * 10 + 10
    assert f"{left:,} of 610 parameters" in (folder / "report.html").read_text()


def test_a_limit_from_part_of_the_examples_says_so(tmp_path, capsys):
    """And how much it would change on half of them, at the loss tolerance of them all."""
    folder = tmp_path / "part"
    assert main([*RUN, "--num-examples", "300", "--finetune-steps", "0", "--out", str(folder)]) == 0
    document = json.loads((folder / "limit.json").read_text())
    found = document["limits"]["gauss_newton"]
    predict, like = models.from_nnx(presets.build_network(TINY, 0))
    params = model_files.load_params(folder / "weights.safetensors", like)
    images, labels = presets.load_arrays(TINY, presets.Options())[0]
    operator = jaxlimit.gauss_newton(
        lambda params, batch: predict(params, batch[0]),
        lambda outputs, batch: training.cross_entropy(outputs, batch[1]),
        params,
        jaxlimit.batched((images[:150], labels[:150]), 50),
    )
    half = jaxlimit.pruning_limit(
        operator, jax.random.key(0), loss_tolerance=document["loss_tolerance"], which=["width"]
    ).width.value
    assert found["num_examples"] == 300
    assert found["width_of_half_the_examples"] == pytest.approx(half, abs=2e-5)
    assert half != found["width"]["value"]
    # Losses are measured on the same examples; training and the loss tolerance have them all.
    loss = training.classification_loss(predict)
    expected = float(loss(params, (images[:300], labels[:300])))
    assert document["network"]["train_loss"] == pytest.approx(expected, rel=1e-5)
    assert document["network"]["num_train"] == len(labels)
    whole = jaxlimit.loss_statistics(loss, params, jaxlimit.batched((images, labels), 128))
    assert document["loss_tolerance"] == pytest.approx(whole.batch_std, rel=1e-5)
    with (folder / "curves.csv").open() as file:
        row = next(csv.DictReader(file))
    assert float(row["train_loss"]) == pytest.approx(expected, rel=1e-5)
    printed = " ".join(capsys.readouterr().out.split())
    change = f"{half:.4f} ({half - found['width']['value']:+.4f})"
    assert f"from 300 of 1,438 training examples. From half of these, width is {change}." in printed


def test_a_finished_run_is_not_overwritten(finished, capsys):
    folder, _ = finished
    before = (folder / "limit.json").read_bytes()
    assert main([*RUN, "--out", str(folder)]) == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert (folder / "limit.json").read_bytes() == before


def test_a_folder_of_something_else_is_not_touched(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    for extra in ([], ["--overwrite"]):
        assert main([*RUN, "--out", str(tmp_path), *extra]) == 2
        assert "files that are not of a run (thesis.tex" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_overwrite_replaces_the_run_and_nothing_else(finished, tmp_path, capsys):
    folder = tmp_path / "again"
    shutil.copytree(finished[0], folder)
    (folder / "notes.txt").write_text("mine")
    args = [*RUN, "--finetune-steps", "0", "--out", str(folder), "--overwrite"]
    assert main(args) == 0
    assert "ine-tuned" not in capsys.readouterr().out
    document = json.loads((folder / "limit.json").read_text())
    assert set(document["measured"]) == {"loss", "accuracy"}
    assert (folder / "notes.txt").read_text() == "mine"
    # Fine-tuning decides nothing of what comes before it.
    assert document["limits"] == json.loads((finished[0] / "limit.json").read_text())["limits"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send Ctrl-C to one process")
@pytest.mark.parametrize("after", [pytest.param("writing to", marks=pytest.mark.nightly), "training"])
def test_ctrl_c_and_going_on_gives_the_same_bits(finished, tmp_path, capsys, after):
    """After "writing to" the process trains; after the line of "training" it computes products."""
    folder = tmp_path / "run"
    process = command([*RUN, "--out", str(folder)])
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(after):
            break
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert f"jaxlimit run tiny --curvature gauss_newton --out {folder}" in stderr
    json.loads((folder / "config.json").read_text())
    assert not (folder / "report.html").exists()

    assert main([*RUN, "--out", str(folder)]) == 0
    assert ("loaded" in capsys.readouterr().err) == (after == "training")
    assert numbers(folder) == numbers(finished[0])
    for name in ("curves.csv", "weights.safetensors"):
        assert (folder / name).read_bytes() == (finished[0] / name).read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send Ctrl-C to one process")
def test_ctrl_c_ends_an_experiment_while_it_trains(tmp_path):
    process = command(["experiment", "training", "digits", "--out", str(tmp_path / "run")])
    while not (tmp_path / "run" / "config.json").exists():
        time.sleep(0.01)
    time.sleep(1)
    began = time.perf_counter()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert time.perf_counter() - began < 2
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert f"jaxlimit experiment training digits --out {tmp_path / 'run'}" in stderr


def test_what_is_wrong_with_a_folder_is_said_of_the_right_file(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    document = json.loads((folder / "limit.json").read_text())
    (folder / "limit.json").write_text(json.dumps({**document, "attained": None}))
    with pytest.raises(ValueError, match=r"limit\.json is damaged, or of another version"):
        jaxlimit.load_assessment(folder)
    (folder / "curves.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"curves\.csv is missing"):
        jaxlimit.load_assessment(folder)


def test_every_finished_stage_is_loaded(finished, tmp_path, capsys):
    """As if Ctrl-C had come just before the report."""
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    document = json.loads((folder / "limit.json").read_text())
    document["finished"] = False
    del document["seconds"]["report"]
    (folder / "limit.json").write_text(json.dumps(document))
    (folder / "report.html").unlink()
    assert main([*RUN, "--out", str(folder)]) == 0
    assert capsys.readouterr().err.count("loaded") == 6
    assert numbers(folder) == numbers(finished[0])


def test_going_on_with_other_options_is_refused(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(finished[0] / "config.json", folder)
    assert main([*RUN, "--out", str(folder), "--seed", "7", "--l1", "0"]) == 2
    message = capsys.readouterr().err
    assert "seed = 0, not 7" in message
    assert "l1 = 0.0005, not 0.0" in message


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "nonsense"], "there is no preset 'nonsense'; the presets are digits, mnist-fc2"),
        (["run", "tiny", "--epochs", "0"], "epochs must be at least 1, got 0"),
        (["run", "tiny", "--l1", "-1"], "l1 must be finite and at least 0, got -1.0"),
        (["run", "tiny", "--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["run", "tiny", "--learning-rate", "inf"], "learning_rate must be positive and finite, got inf"),
        (["run", "tiny", "--momentum", "1"], "momentum must be at least 0 and below 1, got 1.0"),
        (["run", "tiny", "--warmup-epochs", "4"], "warmup_epochs must be at most epochs = 3, got 4"),
        (
            ["run", "tiny", "--augment", "True"],
            "augment crops and flips images: digits is not meant for that",
        ),
        (["run", "tiny", "--tolerance", "0"], "tolerance must be a positive finite number, got 0.0"),
        (
            ["run", "tiny", "--loss-tolerance", "nan"],
            "loss_tolerance must be a positive finite number, got nan",
        ),
        (["run", "tiny", "--num-examples", "9999"], "num_examples must be at most 1438, got 9999"),
        (["run", "tiny", "--batch-size", "1438"], "batch_size must be below 1438, the number of examples"),
        (["run", "tiny", "--num-examples", "0"], "num_examples must be at least 1, got 0"),
        (["run", "tiny", "--seed", "-1"], "seed must lie between 0 and 4294967295, got -1"),
        (["run", "tiny", "--finetune-steps", "-5"], "finetune_steps must be at least 0, got -5"),
        (
            ["run", "mnist-fc2", "--data", "nowhere"],
            "There is no folder nowhere/mnist. Get the four official",
        ),
    ],
)
def test_bad_values_get_one_line_what_to_type_next_and_code_2(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    error, following = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert following == f"next: jaxlimit {args[0]} --help lists what can be given"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [MemoryError, FloatingPointError])
def test_failures_get_one_line_and_code_1(error, monkeypatch, capsys):
    def fail(args):
        raise error("why, and what to do.")

    monkeypatch.setattr("jaxlimit.cli.parse", fail)
    assert main(["run"]) == 1
    assert capsys.readouterr().err == "error: why, and what to do.\n"


def test_every_hyperparameter_can_be_given():
    given = {
        "epochs": 7,
        "batch_size": 64,
        "learning_rate": 0.05,
        "schedule": "steps",
        "l1": 0.0,
        "warmup_epochs": 2,
        "momentum": 0.5,
        "factor": 0.25,
        "weight_decay": 1e-3,
        "augment": False,
        "finetune_steps": 0,
    }
    words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    words += ["--milestones", "0.25", "0.5"]
    usual = presets.PRESETS["cifar10-lenet"]
    others = {name: given.pop(name) for name in ("augment", "finetune_steps")}
    given["milestones"] = (0.25, 0.5)
    expected = replace(usual, recipe=replace(usual.recipe, **given), **others)
    found = parse(["run", "cifar10-lenet", *words])
    assert found.preset == expected
    assert {field.name for field in fields(Recipe)} == given.keys()
    fixed = {"name", "dataset", "network", "recipe"}
    assert {field.name for field in fields(presets.Preset)} == fixed | others.keys()
    assert "lenet-seed0-epochs-7-learning-rate-0.05-schedule-steps-l1-0" in str(found.out)
    assert "milestones-0.25-0.5-factor-0.25-weight-decay-0.001" in str(found.out)


def test_words_that_are_no_numbers_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["run", "--seed", "seven"])
    assert stop.value.code == 2
    assert "seven" in capsys.readouterr().err


def test_presets_are_listed(capsys):
    assert main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["preset", *presets.PRESETS]
    assert lines[1].split() == ["digits", "digits", "64-48-24-10", "400", "0.05", "cosine", "0.0005", "128"]


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"jaxlimit {__version__}\n"


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "rich" else object())
    assert main(["presets"]) == 1
    assert 'needs rich: pip install "jaxlimit[cli]"' in capsys.readouterr().err


def test_the_default_folder_tells_configurations_apart():
    options = presets.Options(seed=3, num_examples=100)
    assert default_folder(TINY, options) == Path("results/tiny-seed3-num-examples-100")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
@pytest.mark.parametrize("args", [RUN, ["experiment", "crossing", "tiny"]], ids=["run", "experiment"])
def test_a_folder_in_which_another_process_works_is_left_alone(args, tmp_path, capsys):
    code = f"""if True:
        from pathlib import Path
        from jaxlimit.core.locks import lock
        held = lock(Path({str(tmp_path)!r}))
        print(flush=True)
        input()"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert main([*args, "--out", str(tmp_path)]) == 2
        assert f"error: process {other.pid} on " in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        other.communicate("\n")


def test_help_comes_before_what_it_does_not_need():
    code = "import sys; from jaxlimit.cli import main\ntry: main(['--help'])\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    modules = done.stdout.splitlines()[-1].split()
    assert "tyro" in modules
    assert not {"flax", "matplotlib", "sklearn", "rich", "jaxlimit.application"} & {*modules}


def test_the_report_is_made_again_from_the_files_alone(finished, tmp_path, capsys):
    folder = tmp_path / "moved"
    shutil.copytree(finished[0], folder)
    shutil.rmtree(folder / "figures")
    (folder / "report.html").unlink()
    (folder / "weights.safetensors").unlink()
    assert main(["report", str(folder)]) == 0
    assert str(folder / "report.html") in capsys.readouterr().out
    # Only the seconds of the report itself were not known when the run wrote it.
    regenerated = (folder / "report.html").read_text()
    original = (finished[0] / "report.html").read_text()
    regenerated = re.sub(r"<tr><th>report</th>.*?</tr>\n", "", regenerated)
    pictures = re.compile(r"data:image/png;base64,[^\"]*")
    assert pictures.sub("", regenerated) == pictures.sub("", original)
    assert len(pictures.findall(regenerated)) == len(pictures.findall(original)) > 0
    for name in FIGURES:
        again, before = folder / "figures" / name, finished[0] / "figures" / name
        if name.endswith(".pdf"):
            assert again.read_bytes() == before.read_bytes()
        else:  # a line that ends between two pixels is drawn in a shade more or less
            np.testing.assert_allclose(image.imread(again), image.imread(before), atol=4 / 255)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("limit.json", None, "limit.json is missing"),
        ("limit.json", b"{", "limit.json is damaged, it is not JSON"),
        ("limit.json", b'{"format": 1, "finished": true}', "limit.json is damaged, or of another version"),
        ("limit.json", b'{"format": 99}', "limit.json is not of a run of this version"),
        ("curves.csv", None, "curves.csv is missing"),
        ("curves.csv", b"sparsity,train_loss\n0.1,x\n", "curves.csv is damaged in line 2"),
        ("curves.csv", b"", "curves.csv is damaged: its first line must name the columns"),
        ("spectrum-gauss_newton.npz", None, "spectrum-gauss_newton.npz is missing"),
        ("spectrum-gauss_newton.npz", b"PK", "spectrum-gauss_newton.npz is damaged"),
    ],
)
def test_a_report_from_damaged_files_is_refused(finished, tmp_path, capsys, name, damage, message):
    folder = tmp_path / "damaged"
    shutil.copytree(finished[0], folder)
    (folder / name).unlink()
    if damage is not None:
        (folder / name).write_bytes(damage)
    assert main(["report", str(folder)]) == 2
    error, following = capsys.readouterr().err.splitlines()
    assert message in error
    if damage is None:
        assert following.startswith("next: give the folder of a finished run")
    else:
        again = f"the same `jaxlimit run` with --out {folder} makes it anew"
        assert following == f"next: remove {folder / name} or report another folder; {again}"


@pytest.mark.parametrize("name", ["config.json", "limit.json"])
def test_a_damaged_file_of_a_run_is_named_as_what_to_remove(finished, tmp_path, capsys, name):
    folder = tmp_path / "damaged"
    shutil.copytree(finished[0], folder)
    unfinished = json.loads((folder / "limit.json").read_text()) | {"finished": False}
    (folder / "limit.json").write_text(json.dumps(unfinished))
    (folder / name).write_text("{")
    assert main([*RUN, "--out", str(folder)]) == 2
    remove = folder if name == "config.json" else folder / name
    following = capsys.readouterr().err.splitlines()[-1]
    assert following == f"next: remove {remove} or name another --out, then type the same command"


def test_a_report_of_nothing_says_which_folder_to_give(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", "nowhere"]) == 2
    error, following = capsys.readouterr().err.splitlines()
    assert "there is no folder nowhere" in error
    assert following.startswith("next: give the folder of a finished run")


def test_a_report_of_an_unfinished_run_is_refused(finished, tmp_path, capsys):
    folder = tmp_path / "unfinished"
    shutil.copytree(finished[0], folder)
    document = json.loads((folder / "limit.json").read_text()) | {"finished": False}
    (folder / "limit.json").write_text(json.dumps(document))
    assert main(["report", str(folder)]) == 2
    assert "is not finished: go on with it first (jaxlimit run tiny" in capsys.readouterr().err


def test_the_preset_may_follow_an_option_of_several_values(tmp_path, monkeypatch):
    found = parse(["run", "--milestones", "0.25", "0.5", "tiny", "--out", "tiny"])
    assert (found.preset.name, found.preset.recipe.milestones) == ("tiny", (0.25, 0.5))
    assert found.out == Path("tiny")  # the value of an option that has one


@pytest.mark.parametrize(
    ("args", "hidden", "kept"),
    [
        (["run"], ["None:"], ["standard deviation of the training", "(default: all)"]),
        (["experiment", "gems"], ["--l1", "--networks"], ["--probes"]),
        (["experiment", "gradual"], ["--networks"], ["--l1"]),
    ],
)
def test_help_lists_what_has_an_effect_and_each_default_once(args, hidden, kept, capsys):
    with pytest.raises(SystemExit) as stop:
        parse([*args, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert [text for text in hidden if text in shown] == []
    assert [text for text in kept if text not in shown] == []


@pytest.mark.parametrize("name", ["compare", "gems", "scaling"])
def test_help_of_an_experiment_is_grouped_and_has_an_example(name, capsys):
    with pytest.raises(SystemExit):
        parse(["experiment", name, "--help"])
    shown = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out)
    groups = ["training options", "prediction options", "output options"]
    assert [group for group in groups if f" {group} " in shown] == groups[:: 2 if name == "compare" else 1]
    assert f"  jaxlimit experiment {name} digits    {options.EXAMPLES[name][1]} minutes" in shown
    assert "network, data and training: see `jaxlimit presets`" in " ".join(shown.replace("│", "").split())


def test_a_finished_folder_says_where_its_results_are(finished, capsys):
    folder = finished[0]
    assert main([*RUN, "--out", str(folder)]) == 2
    told = capsys.readouterr().err
    assert f"its results are in {folder / 'report.html'}" in told
    assert f"`jaxlimit report {folder}` makes again" in told


@pytest.mark.parametrize("out", ["--out={}", "--out {}"])
def test_ctrl_c_repeats_the_command_with_one_folder(out, tmp_path, monkeypatch, capsys):
    """Before anything was written with --overwrite, which it still takes; afterwards without."""
    given = out.format(tmp_path / "run").split()

    def pressed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_folder, "prepare_folder", pressed)
    assert main([*RUN, *given, "--overwrite"]) == 130
    told = capsys.readouterr().err
    assert told.splitlines()[-1].split()[1:] == [*RUN, *given, "--overwrite"]
    assert "Nothing was written" in told
    monkeypatch.undo()
    monkeypatch.setitem(presets.PRESETS, "tiny", TINY)
    monkeypatch.setattr(pipeline, "execute_run", pressed)
    assert main([*RUN, *given, "--overwrite"]) == 130
    assert capsys.readouterr().err.splitlines()[-1].split()[1:] == [*RUN, *given]


def test_ctrl_c_after_the_end_says_so(finished, tmp_path, monkeypatch, capsys):
    def pressed(folder, *args):
        shutil.copy(finished[0] / "limit.json", folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "execute_run", pressed)
    assert main([*RUN, "--out", str(tmp_path / "run")]) == 130
    assert "interrupted when all was done. report: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), OSError(28, "No space left on device")]
)
@pytest.mark.parametrize("args", [RUN, ["experiment", "crossing", "tiny"]], ids=["run", "experiment"])
def test_where_nothing_can_be_written_another_folder_is_advised(error, args, tmp_path, monkeypatch, capsys):
    def refused(path, content):
        raise type(error)(error.errno, error.strerror, str(path))

    monkeypatch.setattr("jaxlimit.core.storage.write_file", refused)
    assert main([*args, "--out", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert f"error: {tmp_path / 'run'} cannot be written to ({error.strerror}): name another --out." in told


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which none can be made")
def test_where_no_folder_can_be_made_another_is_advised(capsys):
    assert main([*RUN, "--out", "/proc/jaxlimit"]) == 2
    told = capsys.readouterr().err
    assert "error: /proc/jaxlimit cannot be written to (No such file or directory): name another" in told


def test_a_file_that_has_nothing_to_do_with_the_folder_is_named(tmp_path, monkeypatch, capsys):
    def refused(*args):
        raise PermissionError(13, "Permission denied", "/data/mnist")

    monkeypatch.setattr(presets, "load_arrays", refused)
    assert main([*RUN, "--out", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert "/data/mnist" in told
    assert "--out" not in told


DEEP = b'{"format": 1, "limits": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.mark.parametrize(
    "damage", [DEEP, b'{"format": 1, "finished": true}', b'{"format": 1, "finished": true, "limits": 5}']
)
def test_a_report_from_json_without_its_content_is_refused(finished, tmp_path, capsys, damage):
    folder = tmp_path / "damaged"
    shutil.copytree(finished[0], folder)
    (folder / "limit.json").write_bytes(damage)
    assert main(["report", str(folder)]) == 2
    told = capsys.readouterr().err
    assert "limit.json is damaged" in told
    assert "remove it, and the command that wrote it computes it anew" in told


def test_values_of_another_kind_are_said_of_the_file(finished, tmp_path, monkeypatch, capsys):
    """By the report; or they do not matter to it."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, file, **_: file.write(b"drawn"))
    folder, refused = tmp_path / "damaged", set()
    shutil.copytree(finished[0], folder)
    whole = json.loads((folder / "limit.json").read_text())
    for name in ("network", "limits", "measured", "attained", "pruned", "loss_tolerance", "seconds"):
        without = {key: value for key, value in whole.items() if key != name}
        for changed in (without, *(whole | {name: value} for value in (5, {}, {"gauss_newton": {}}))):
            (folder / "limit.json").write_text(json.dumps(changed))
            if main(["report", str(folder)]) == 2:
                refused.add(name)
                assert "limit.json is damaged" in capsys.readouterr().err
    assert refused >= {"network", "limits", "measured", "attained", "pruned", "loss_tolerance", "seconds"}


def test_a_run_goes_on_from_a_damaged_ledger_with_a_message(finished, tmp_path, capsys):
    folder = tmp_path / "damaged"
    shutil.copytree(finished[0], folder)
    whole = json.loads((folder / "limit.json").read_text()) | {"finished": False}
    for change in (
        {"network": {}},
        {"limits": []},
        {"limits": {"gauss_newton": {"width": 1}}},
        {"measured": {}},
    ):
        (folder / "limit.json").write_text(json.dumps(whole | change))
        assert main([*RUN, "--out", str(folder)]) == 2, change
        assert "limit.json is damaged" in capsys.readouterr().err


def test_fine_tuned_rows_are_kept(finished, tmp_path, monkeypatch):
    """A run that is killed in the fine-tuned sweep goes on with the rows that are left, to the same bits."""
    folder, done = tmp_path / "run", []
    sweep = FinetunedNetwork.sweep

    def killed(self, sparsities, **kwargs):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(list(sparsities))
        return sweep(self, sparsities, **kwargs)

    shutil.copytree(finished[0], folder)
    document = json.loads((folder / "limit.json").read_text()) | {"finished": False}
    for name in ("finetuned", "report"):
        del document["seconds"][name]
    (folder / "limit.json").write_text(json.dumps(document))
    monkeypatch.setattr(FinetunedNetwork, "sweep", killed)
    assert main([*RUN, "--out", str(folder)]) == 130
    kept, done[:] = list(done), []
    monkeypatch.setattr(
        FinetunedNetwork, "sweep", lambda self, s, **kw: (done.append(list(s)), sweep(self, s, **kw))[1]
    )
    assert main([*RUN, "--out", str(folder)]) == 0
    assert not {*map(tuple, kept)} & {*map(tuple, done)}
    assert (folder / "curves.csv").read_bytes() == (finished[0] / "curves.csv").read_bytes()
    assert not run_folder.checkpoint_path(folder, "finetuned").exists()
