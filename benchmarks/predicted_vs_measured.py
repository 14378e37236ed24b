"""How do the predicted limits compare with what pruning really does, on trained networks?

    python benchmarks/predicted_vs_measured.py --work DIR [--cases digits fc2-mnist] [--stages predict table]

Four networks, three weights of the L1 term, two seeds: 24 cases. The loss of a case is the mean over its
first N training examples, for the tolerance, the limits, the sweep and the fine-tuning alike, so that
prediction and measurement speak of the same function. The stages:

    measure   trains the network, and finds its loss, accuracy and fine-tuned thresholds
    predict   the limits of measured cases, with the Hessian and with Gauss-Newton
    table     all measured cases, as results/predicted_vs_measured.json and .md

DIR holds a folder for each case, and there a file for each step that is done: trained.json and
weights.safetensors, measured.json, hessian.json, gauss_newton.json. An interrupted run goes on behind them;
remove a file to do its step again. MNIST and CIFAR-10 are read from $JAXLIMIT_DATA.
"""

import argparse
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import common
import jax
import numpy as np

import jaxlimit
from jaxlimit import models, training
from jaxlimit.application import run_folder
from jaxlimit.application.presets import PRESETS, SGD, Arrays, Options, Preset, build_network, load_arrays
from jaxlimit.core import trees, writing
from jaxlimit.core.batches import Batches, batched
from jaxlimit.limits import pruning_limit
from jaxlimit.limits.estimate import LIMITS
from jaxlimit.measuring import sweeps
from jaxlimit.measuring.loss_statistics import loss_statistics
from jaxlimit.measuring.sweeps import ACCURACY_LOSS, SPARSITIES
from jaxlimit.training import model_files
from jaxlimit.training.losses import CURVATURES

NAME = "predicted_vs_measured"
COMMAND = f"python benchmarks/{NAME}.py --work DIR"
STAGES = ("measure", "predict", "table")
SEEDS = (0, 1)
BATCH_SIZE = 128
# Steps of .01 for the accuracy, then of .0025 behind its threshold; of .005 fine-tuned.
TEST_SPARSITIES, FINETUNED_SPARSITIES = SPARSITIES[::4], SPARSITIES[::2]
TOLERANCE = 1e-3
# Columns of the two Markdown tables, and where their values are in a case. A measured threshold is bold, and
# stands before its predictions.
PRUNED = {
    "test accuracy": ("test_accuracy",),
    "1 point less": ("thresholds", "accuracy"),
    "**pruned**": ("thresholds", "loss"),
    "one_shot": ("hessian", "one_shot", "value"),
}
FINETUNED = {
    "**fine-tuned**": ("thresholds", "finetuned"),
    "width": ("hessian", "width", "value"),
    "cone": ("hessian", "cone", "value"),
    "readjusted": ("hessian", "readjusted", "value"),
    "GN width": ("gauss_newton", "width", "value"),
    "GN cone": ("gauss_newton", "cone", "value"),
    "GN readjusted": ("gauss_newton", "readjusted", "value"),
}


@dataclass(frozen=True)
class Case:
    """One trained network.

    Attributes:
        preset: network, data and training.
        num_examples: N, the training examples whose mean loss is predicted and measured.
        num_test: the test examples whose accuracy is measured.
        seed: of the initial weights, the order of the examples and the probes.
    """

    preset: Preset
    num_examples: int
    num_test: int
    seed: int = 0

    @property
    def name(self) -> str:
        """Of the case and of its folder."""
        return f"{self.preset.name}-l1-{self.preset.recipe.l1:g}-seed{self.seed}"

    def order(self) -> tuple[int, float, int]:
        """Where it stands in the results."""
        return NAMES.index(self.preset.name), self.preset.recipe.l1, self.seed

    def to_json(self) -> dict[str, Any]:
        """As the files of the case name it."""
        return asdict(self) | {"preset": self.preset.to_json()}


FC5 = "784-1000-600-300-100-10"
# Each network with its weights of the L1 term. Epochs and numbers of examples were chosen for the time they
# take on one core, before any limit was computed.
NETWORKS = (
    (Case(PRESETS["digits"], num_examples=1_438, num_test=359), (0.0, 1e-4, 5e-4)),
    (
        Case(Preset("fc2-mnist", "mnist", "784-100-10", replace(SGD, epochs=20, l1=0.0)), 2_048, 10_000),
        (0.0, 5e-5, 3e-4),
    ),
    (
        Case(Preset("fc5-mnist", "mnist", FC5, replace(SGD, epochs=5, l1=0.0)), 512, 2_000),
        (0.0, 5e-5, 2e-4),
    ),
    (
        Case(Preset("lenet-cifar10", "cifar10", "LeNet", replace(SGD, epochs=4, l1=0.0)), 256, 1_000),
        (0.0, 5e-5, 3e-4),
    ),
)
NAMES = tuple(case.preset.name for case, _ in NETWORKS)
CASES = tuple(
    replace(case, preset=case.preset.changed(l1=l1[i]), seed=seed)
    for seed in SEEDS
    for i in range(3)
    for case, l1 in NETWORKS
)


class Problem:
    """The data of a case, its network, and the loss that is predicted and measured."""

    def __init__(self, case: Case):
        self.train, test = load_arrays(case.preset, Options(num_examples=case.num_examples))
        self.batches = _first(self.train, case.num_examples)
        self.test_batches = _first(test, case.num_test)
        network = build_network(case.preset, case.seed)
        self.predict, self.initial = models.from_nnx(network)
        self.loss = training.classification_loss(self.predict)
        self.metrics = training.classification_metrics(self.predict)


def _first(arrays: Arrays, count: int) -> Batches:
    return batched(tuple(array[:count] for array in arrays), BATCH_SIZE)


def measure_case(case: Case, folder: Path) -> None:
    """The stage `measure` of a case."""
    if not (folder / "measured.json").exists():
        problem = Problem(case)
        params = train(case, problem, folder)
        step(folder, "measured", partial(measured, case, problem, params))


def predict_case(case: Case, folder: Path, max_matvecs: int) -> None:
    """The stage `predict` of a case."""
    missing = [name for name in CURVATURES if not (folder / f"{name}.json").exists()]
    if not (folder / "measured.json").exists():
        reporter(case.name)("not measured yet, so not predicted")
    elif missing:
        problem = Problem(case)
        params = train(case, problem, folder)
        for name in missing:
            step(folder, name, partial(predicted, case, problem, params, folder, name, max_matvecs))


def train(case: Case, problem: Problem, folder: Path) -> Any:
    """The trained parameters: read from the folder, or trained and written there."""

    def compute() -> dict[str, Any]:
        report = reporter(case.name)
        params = training.train(
            problem.loss,
            problem.initial,
            problem.train,
            jax.random.fold_in(jax.random.key(case.seed), 0),
            epochs=case.preset.recipe.epochs,
            batch_size=case.preset.recipe.batch_size,
            learning_rate=case.preset.recipe.rate(len(problem.train[1])),
            momentum=case.preset.recipe.momentum,
            l1=case.preset.recipe.l1,
            on_epoch=lambda epoch, loss: report(f"epoch {epoch + 1}, loss + L1 {loss:.4f}"),
        )
        model_files.save_params(folder / run_folder.MODEL, params)
        return {"case": case.to_json()}

    step(folder, "trained", compute)
    return model_files.load_params(folder / run_folder.MODEL, problem.initial)


def measured(case: Case, problem: Problem, params: Any) -> dict[str, Any]:
    """How sparse the network really can be pruned: what measured.json holds.

    Its thresholds are
        loss: the last sparsity before the loss of the pruned network first exceeds L* + eps;
        accuracy: the largest sparsity that costs at most one point of test accuracy;
        finetuned: the largest sparsity at which fine-tuning gets the loss down to L* + eps.
    """
    report = reporter(case.name, seconds=0)
    statistics = loss_statistics(problem.loss, params, problem.batches)
    bound = statistics.mean + statistics.batch_std
    sweep = sweeps.sparsity_sweep(problem.metrics, params, problem.batches, SPARSITIES)
    loss = sweep.first_crossing("loss", bound)
    report(f"loss {statistics.mean:.5f}, tolerance {statistics.batch_std:.5f} met up to {loss}")
    test_accuracy, accuracy = accuracy_threshold(problem, params)
    report(f"test accuracy {test_accuracy:.2%}, a point less at {accuracy}")
    finetuned, evaluated = finetuned_threshold(problem, params, loss, bound, report)
    return {
        "num_weights": sum(leaf.size for leaf in jax.tree.leaves(trees.partition(params)[0])),
        "train_loss": statistics.mean,
        "loss_tolerance": statistics.batch_std,
        "test_accuracy": test_accuracy,
        "thresholds": {"loss": loss, "accuracy": accuracy, "finetuned": finetuned},
        "finetuned": evaluated,
        "pruned_loss": sweep.metrics["loss"].tolist(),
    }


def accuracy_threshold(problem: Problem, params: Any) -> tuple[float, float]:
    """The test accuracy unpruned, and the largest sparsity that costs at most one point of it."""

    def accuracies(sparsities: np.ndarray) -> np.ndarray:
        sweep = sweeps.sparsity_sweep(problem.metrics, params, problem.test_batches, sparsities)
        return sweep.metrics["accuracy"]

    coarse = accuracies(TEST_SPARSITIES)
    bound = coarse[0] - ACCURACY_LOSS
    start = 4 * np.flatnonzero(coarse >= bound)[-1]
    fine = SPARSITIES[start : start + 4]
    return float(coarse[0]), float(fine[accuracies(fine) >= bound][-1])


def finetuned_threshold(
    problem: Problem, params: Any, low: float, bound: float, report: Callable[[str], None]
) -> tuple[float, list[dict[str, float]]]:
    """The largest sparsity, in steps of .005, whose fine-tuned loss is at most the bound.

    Found by bisection between `low`, where the pruned network meets the bound as it is, and 1, where nothing
    is left to tune. Bisection takes the fine-tuned loss as growing with the sparsity.

    Returns:
        The threshold; and the sparsities that were evaluated, with fine-tuned loss and test accuracy.
    """
    evaluated = []

    def reached(sparsity: float) -> bool:
        sweep = jaxlimit.finetuned_sweep(
            problem.loss,
            params,
            problem.batches,
            [sparsity],
            metrics_fn=problem.metrics,
            eval_batches=problem.test_batches,
        )
        loss, accuracy = (float(sweep.metrics[name][0]) for name in ("loss", "eval_accuracy"))
        evaluated.append({"sparsity": sparsity, "loss": loss, "test_accuracy": accuracy})
        report(f"fine-tuned at {sparsity}: loss {loss:.5f}, allowed {bound:.5f}")
        return loss <= bound

    threshold = common.last_reached(reached, FINETUNED_SPARSITIES, low)
    return threshold, sorted(evaluated, key=lambda found: found["sparsity"])


def predicted(
    case: Case, problem: Problem, params: Any, folder: Path, name: str, max_matvecs: int
) -> dict[str, Any]:
    """The limits with one curvature: what hessian.json and gauss_newton.json hold."""
    operator = training.classification_curvature(name, problem.predict, params, problem.batches)
    report = reporter(f"{case.name}, {name}")
    checkpoint = run_folder.checkpoint_path(folder, name)
    found = pruning_limit.pruning_limit(
        operator,
        jax.random.key(case.seed),
        loss_tolerance=writing.read_json(folder / "measured.json")["loss_tolerance"],
        tolerance=TOLERANCE,
        max_matvecs=max_matvecs,
        checkpoint=str(checkpoint),
        progress=lambda state: report(f"{state.num_matvecs} products, {state.stage}"),
    )
    shutil.rmtree(checkpoint, ignore_errors=True)
    return {"max_matvecs": max_matvecs} | found.to_json()


def step(folder: Path, name: str, compute: Callable[[], dict[str, Any]]) -> None:
    """Computes what a step finds and writes it into its file, unless that is there."""
    path = folder / f"{name}.json"
    if path.exists():
        return
    wall, cpu = time.perf_counter(), time.process_time()
    found = {"format": writing.FORMAT} | compute()
    found["seconds"] = round(time.perf_counter() - wall, 1)
    found["cpu_seconds"] = round(time.process_time() - cpu, 1)
    writing.write_json(path, found | {"environment": common.environment()})
    reporter(folder.name)(f"{name} in {found['seconds']} s")


def reporter(subject: str, seconds: float = 30) -> Callable[[str], None]:
    """Prints lines of progress, at most one in so many seconds."""
    last = -np.inf

    def report(line: str) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            print(f"{time.strftime('%H:%M:%S')} {subject}: {line}", flush=True)

    return report


def collect(work: Path) -> dict[str, Any]:
    """All measured cases as one document, with their limits as far as they are predicted."""
    rows, environments = [], []
    for case in sorted(CASES, key=Case.order):
        paths = {name: work / case.name / f"{name}.json" for name in ("trained", "measured", *CURVATURES)}
        if paths["measured"].exists():
            found = {name: writing.read_json(path) for name, path in paths.items() if path.exists()}
            environments += [part["environment"] for part in found.values()]
            rows.append(row(case, found))
    distinct = [found for i, found in enumerate(environments) if found not in environments[:i]]
    return {"command": COMMAND, "environments": distinct, "cases": rows}


def row(case: Case, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A case in the results: settings, what was measured, and the limits, None where they are missing."""
    left_out = ("format", "environment", "seconds", "cpu_seconds", "pruned_loss")
    parts = {
        name: {key: value for key, value in part.items() if key not in left_out}
        for name, part in found.items()
    }
    limits = {name: dict.fromkeys(LIMITS) | parts[name] if name in parts else None for name in CURVATURES}
    return {
        "network": case.preset.name,
        "layers": case.preset.network,
        "epochs": case.preset.recipe.epochs,
        "l1": case.preset.recipe.l1,
        "seed": case.seed,
        "num_examples": case.num_examples,
        "num_test": case.num_test,
        **parts["measured"],
        **limits,
        "seconds": {name: part["seconds"] for name, part in found.items()},
        "cpu_seconds": {name: part["cpu_seconds"] for name, part in found.items()},
    }


def markdown_table(document: Mapping[str, Any], columns: Mapping[str, Sequence[str]]) -> str:
    """Measured thresholds (bold) and the limits: means over the seeds, with half their range.

    A limit that is not resolved to the tolerance for every seed is marked with a ~, one that is not known for
    every seed with a *.
    """
    rows = [("network", "L1", *columns), ("---", *["---:"] * (1 + len(columns)))]
    for (network, l1), group in groupby(document["cases"], key=lambda case: (case["network"], case["l1"])):
        cases = list(group)
        rows.append((network, f"{l1:g}", *(_cell(cases, path) for path in columns.values())))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def _cell(cases: Sequence[Mapping[str, Any]], path: Sequence[str]) -> str:
    values = [_value(case, path) for case in cases]
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    spreads = [_value(case, (*path[:-1], "spread")) for case in cases if path[0] in CURVATURES]
    resolved = all(spread is None or spread <= TOLERANCE for spread in spreads)
    half_range = round((max(known) - min(known)) / 2, 3)
    marks = ("" if resolved else "~"), ("*" if len(known) < len(values) else "")
    return f"{marks[0]}{np.mean(known):.3f}{marks[1]}" + (f" ± {half_range:.3f}" if half_range else "")


def _value(case: Mapping[str, Any], path: Sequence[str]) -> float | None:
    found: Any = case
    for name in path:
        found = None if found is None else found[name]
    return found


def write_table(work: Path) -> None:
    """The stage `table`."""
    document = collect(work)
    common.write_document(NAME, document)
    tables = [markdown_table(document, columns) for columns in (PRUNED, FINETUNED)]
    common.write_table(NAME, "\n".join(tables))


def select(names: Sequence[str], work: Path) -> list[Case]:
    """The cases of these networks, or of these names.

    Raises:
        ValueError: a name that is none, or a folder with a network of other settings.
    """
    known = {*NAMES, *(case.name for case in CASES)}
    wrong = [name for name in names if name not in known]
    if wrong:
        raise ValueError(
            f"no case is named {wrong[0]!r}: give {', '.join(NAMES)}, or one like {CASES[0].name}."
        )
    cases = [case for case in CASES if case.preset.name in names or case.name in names]
    for case in cases:
        path = work / case.name / "trained.json"
        if path.exists() and writing.read_json(path)["case"] != case.to_json():
            raise ValueError(f"{path.parent} holds a network of other settings: name another --work.")
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of the cases")
    parser.add_argument("--cases", nargs="+", default=NAMES, metavar="CASE", help="networks or single cases")
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument(
        "--max-matvecs",
        type=int,
        default=pruning_limit.MAX_MATVECS,
        help="products a curvature (default: %(default)s)",
    )
    options = parser.parse_args()
    try:
        cases = select(options.cases, options.work)
    except ValueError as error:
        parser.error(str(error))
    if "measure" in options.stages:
        for case in cases:
            measure_case(case, options.work / case.name)
    if "predict" in options.stages:
        for case in cases:
            predict_case(case, options.work / case.name, options.max_matvecs)
    if "table" in options.stages:
        write_table(options.work)


if __name__ == "__main__":
    main()
