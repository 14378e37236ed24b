"""The stages that measure: the pruned network as it is, and, if that is asked for, after fine-tuning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from jaxlimit.application import run_folder
from jaxlimit.application.answers import COARSE
from jaxlimit.application.columns import read_columns, write_columns
from jaxlimit.application.job import Job, in_batches
from jaxlimit.application.spectra import load_spectrum
from jaxlimit.application.stage_limits import Limits
from jaxlimit.application.stage_training import Trained
from jaxlimit.core.storage import Checkpoint
from jaxlimit.geometry.magnitude import removed_norm
from jaxlimit.measuring.finetuning import FinetunedNetwork
from jaxlimit.measuring.sweeps import ACCURACY_LOSS, SPARSITIES, PrunedNetwork, Sweep
from jaxlimit.training.losses import are_right

Columns = dict[str, NDArray[np.float64]]
# Sparsities of the fine-tuned sweep: first these (in steps of .01) and the predicted limits, then steps of
# `FINE` between the two around the crossing of the loss.
FINETUNED_SWEEP = (*range(10, 50, 10), *range(50, 80, 5), *range(80, 100))
FINE = 0.005
# About how many those are, for the progress; at most one for each step of the largest gap.
AROUND = 8
# Sparsities that are fine-tuned and kept together.
AT_ONCE = 4
NUM_SWEPT = 2 * (len(SPARSITIES[::COARSE]) + 2 * COARSE)
"""Networks that `sweep` measures, about: each of them on training and on test examples."""


@dataclass(frozen=True)
class Measured:
    """Curves over the sparsity, and the thresholds read from them.

    Attributes:
        columns: of curves.csv, one of them "sparsity", all of its length; NaN where it was not measured.
        thresholds: by name, the sparsity "value" and the "next" one that was measured.
    """

    columns: Columns
    thresholds: Mapping[str, Mapping[str, float]]

    def to_json(self) -> dict[str, Any]:
        """Its part of limit.json."""
        return {"measured": {name: dict(found) for name, found in self.thresholds.items()}}


def sweep(job: Job, trained: Trained, limits: Sequence[Limits]) -> Measured:
    """Measures the pruned network on training and test examples, closer where it crosses a bound.

    First at every `COARSE`-th of the sparsities and at the predicted limits; then between the two around the
    crossing of the loss, and around the loss of a point of accuracy.
    """
    network, grid = PrunedNetwork(trained.params, trained.metrics, groups=trained.groups), trained.sparsities
    columns: Columns = {"sparsity": grid}
    columns["removed_norm"] = removed_norm(network.weights, grid, groups=trained.groups)
    names = {"loss": "train_loss", "accuracy": "test_accuracy"}
    rows = {*range(0, len(grid), COARSE), len(grid) - 1} | rows_at(grid, predicted(limits))
    columns = _swept(job, network, columns, sorted(rows), 0)
    crossings = [threshold(trained, columns, name, sorted(rows)) for name in names.values()]
    between = {row for found in crossings for row in range(*np.searchsorted(grid, [*found.values()]))}
    if between - rows:
        columns = _swept(job, network, columns, sorted(between - rows), len(rows))
    rows = sorted(rows | between)
    for limit in limits:
        spectrum = load_spectrum(run_folder.spectrum_path(job.folder, limit.curvature))
        columns[f"width_dimension_{limit.curvature}"] = spectrum.curve.width_dimension
    write_columns(job.folder / run_folder.CURVES, columns)
    return Measured(columns, {name: threshold(trained, columns, of, rows) for name, of in names.items()})


def _swept(job: Job, network: PrunedNetwork, columns: Columns, rows: Sequence[int], before: int) -> Columns:
    """The columns with loss and accuracy at these rows; `before`: how many rows were measured already."""
    columns = dict(columns)
    for count, (split, arrays) in enumerate(job.splits.items()):

        def progress(done: int, total: int, count: int = count, split: str = split) -> None:
            job.monitor.update(2 * before + count * total + done, split)

        found = network.sweep(in_batches(arrays), columns["sparsity"][rows], progress=progress)
        for name, values in found.metrics.items():
            columns[f"{split}_{name}"] = _entered(columns, f"{split}_{name}", rows, values)
    return columns


def _entered(
    columns: Columns, name: str, rows: Sequence[int], values: NDArray[np.float64]
) -> NDArray[np.float64]:
    """A column with the values at these rows; a new one is NaN elsewhere."""
    column = columns.get(name, np.full(len(columns["sparsity"]), np.nan)).copy()
    column[rows] = values
    return column


def sweep_finetuned(
    job: Job, trained: Trained, limits: Sequence[Limits], swept: Measured, checkpoint: Path
) -> Measured:
    """Measures the pruned network after fine-tuning, closer where its loss crosses the tolerance."""
    grid = trained.sparsities
    rows = finetuned_rows(grid, limits)
    with Checkpoint(checkpoint, {"network": dict(trained.network)}) as store:
        finetune = partial(_finetuned, job, _network(job, trained), store)
        columns = finetune(swept.columns, rows, 0)
        crossing = threshold(trained, columns, "finetuned_train_loss", rows)
        steps = np.arange(crossing["value"] + FINE, crossing["next"] - FINE / 2, FINE)
        around = sorted(rows_at(grid, steps) - {*rows})
        columns = finetune(columns, around, len(rows))
    write_columns(job.folder / run_folder.CURVES, columns)
    names = {"finetuned": "finetuned_train_loss", "finetuned_accuracy": "finetuned_test_accuracy"}
    rows = sorted({*rows, *around})
    return Measured(columns, {name: threshold(trained, columns, of, rows) for name, of in names.items()})


def load_measured(job: Job, document: Mapping[str, Any], names: Sequence[str]) -> Measured:
    """What `sweep` or `sweep_finetuned` found, whose thresholds have these names."""
    columns = read_columns(job.folder / run_folder.CURVES)
    return Measured(columns, {name: document["measured"][name] for name in names})


def predicted(limits: Sequence[Limits]) -> NDArray[np.float64]:
    """All predicted limits."""
    return np.array([value for found in limits for value in found.predicted.values()])


def rows_at(grid: NDArray[np.float64], sparsities: NDArray[np.float64]) -> set[int]:
    """The last rows of an ascending grid that do not exceed these sparsities, but for rounding."""
    return set((np.searchsorted(grid, sparsities + 1e-9, side="right") - 1).tolist())


def finetuned_rows(grid: NDArray[np.float64], limits: Sequence[Limits]) -> list[int]:
    """Rows that are fine-tuned first; the predicted limits too, in steps of `FINE`."""
    steps = np.floor(predicted(limits) / FINE + 1e-6) * FINE
    return sorted(rows_at(grid, np.concatenate([np.array(FINETUNED_SWEEP) / 100, steps])))


def num_finetuning_steps(job: Job, trained: Trained, limits: Sequence[Limits]) -> int:
    """About how many passes over the examples `sweep_finetuned` takes."""
    return (len(finetuned_rows(trained.sparsities, limits)) + AROUND) * (job.preset.finetune_steps + 1)


def _network(job: Job, trained: Trained) -> FinetunedNetwork:
    """The network to be fine-tuned, with metrics of training and test examples in one pass."""
    (train, train_labels), (test, test_labels) = job.examples, job.test
    is_test = np.repeat([0.0, 1.0], [len(train_labels), len(test_labels)]).astype(np.float32)
    both = (np.concatenate([train, test]), np.concatenate([train_labels, test_labels]), is_test)

    def metrics(params: Any, batch: Any) -> dict[str, jax.Array]:
        """Shares of all examples in the batch."""
        images, labels, is_test = batch
        logits = trained.predict(params, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        right = are_right(logits, labels)
        return {
            "train_accuracy": jnp.mean((1 - is_test) * right),
            "test_loss": jnp.mean(is_test * losses),
            "test_accuracy": jnp.mean(is_test * right),
        }

    return FinetunedNetwork(
        trained.loss,
        trained.params,
        in_batches(job.examples),
        metrics_fn=metrics,
        eval_batches=in_batches(both),
        num_steps=job.preset.finetune_steps,
        groups=trained.groups,
    )


def _finetuned(
    job: Job, network: FinetunedNetwork, store: Checkpoint, columns: Columns, rows: Sequence[int], before: int
) -> Columns:
    """The columns with fine-tuned metrics at these rows; `before`: how many rows were fine-tuned already."""
    num_train, num_test = len(job.examples[1]), len(job.test[1])
    scales = {"train": (num_train + num_test) / num_train, "test": (num_train + num_test) / num_test}
    columns = dict(columns)
    for start in range(0, len(rows), AT_ONCE):
        part = list(rows[start : start + AT_ONCE])
        found = _kept(job, network, store, columns["sparsity"][part], part, before + start)
        values = {"train_loss": found["loss"]}
        for name in ("train_accuracy", "test_loss", "test_accuracy"):
            values[name] = found[f"eval_{name}"] * scales[name.split("_")[0]]
        for name, new in values.items():
            columns[f"finetuned_{name}"] = _entered(columns, f"finetuned_{name}", part, new)
    return columns


def _kept(
    job: Job,
    network: FinetunedNetwork,
    store: Checkpoint,
    sparsities: NDArray[np.float64],
    rows: list[int],
    before: int,
) -> Columns:
    """Metrics at a few rows: from the checkpoint, or computed and kept there."""
    passes, name = job.preset.finetune_steps + 1, "rows-" + "-".join(map(str, rows))

    def progress(done: int, _: int) -> None:
        sparsity = sparsities[min(done // passes, len(rows) - 1)]
        job.monitor.update(before * passes + done, f"s = {sparsity:.3f}")

    metrics = ("loss", "eval_train_accuracy", "eval_test_loss", "eval_test_accuracy")
    stored = store.load_tree(name, dict.fromkeys(metrics, np.zeros(len(rows))))
    if stored is not None:
        return stored
    found = network.sweep(sparsities, progress=progress).metrics
    store.save_tree(name, found)
    return found


def threshold(
    trained: Trained, columns: Columns, column: str, rows: Sequence[int] | None = None
) -> dict[str, float]:
    """The threshold of a column, and the sparsity measured after it.

    For a loss, the last sparsity before it first exceeds the tolerance. For an accuracy, which is noisier,
    the largest sparsity that keeps it but for one point.

    Args:
        trained: the network, unpruned.
        columns: of curves.csv.
        column: which one.
        rows: where it was measured. None: everywhere.

    Raises:
        ValueError: it is not a number there.
    """
    chosen = slice(None) if rows is None else list(rows)
    sparsity, values = columns["sparsity"][chosen], columns[column][chosen]
    if column.endswith("loss"):
        bound = trained.network["train_loss"] + trained.loss_tolerance
        value = Sweep(sparsity, {column: values}).first_crossing(column, bound)
    else:
        bound = ACCURACY_LOSS - trained.network["test_accuracy"]
        value = Sweep(sparsity, {column: -values}).largest_sparsity(column, bound)
    after = sparsity[sparsity > value]
    return {"value": value, "next": float(after[0]) if after.size else 1.0}
