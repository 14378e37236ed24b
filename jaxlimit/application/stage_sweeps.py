"""The stages that measure: the pruned network as it is, and after fine-tuning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from jaxlimit.application import run_folder
from jaxlimit.application.columns import read_columns, write_columns
from jaxlimit.application.job import Job, in_batches
from jaxlimit.application.spectra import load_spectrum
from jaxlimit.application.stage_limits import Limits
from jaxlimit.application.stage_training import Trained
from jaxlimit.core import trees
from jaxlimit.geometry.magnitude import removed_norm
from jaxlimit.measuring.sweeps import ACCURACY_LOSS, SPARSITIES, Sweep, finetuned_sweep, sparsity_sweep

Columns = dict[str, NDArray[np.float64]]
# Sparsities of the fine-tuned sweep: first these (in steps of .01) and the predicted limits, then steps of
# .005 between the two around the crossing of the loss.
FINETUNED_SWEEP = (*range(10, 50, 10), *range(50, 80, 5), *range(80, 100))


@dataclass(frozen=True)
class Measured:
    """Curves over the sparsity, and the thresholds read from them.

    Attributes:
        columns: of curves.csv, each over `SPARSITIES`.
        thresholds: by name, the sparsity "value" and the "next" one that was measured.
    """

    columns: Columns
    thresholds: Mapping[str, Mapping[str, float]]

    def to_json(self) -> dict[str, Any]:
        """Its part of limit.json."""
        return {"measured": {name: dict(found) for name, found in self.thresholds.items()}}


def sweep(job: Job, trained: Trained, curvatures: Sequence[str]) -> Measured:
    """Measures the pruned network on training and test examples."""
    kernels = trees.partition(trained.params)[0]
    columns: Columns = {"sparsity": SPARSITIES, "removed_norm": removed_norm(kernels, SPARSITIES)}
    for count, (split, arrays) in enumerate(job.splits.items()):
        found = sparsity_sweep(trained.metrics, trained.params, in_batches(arrays), SPARSITIES)
        columns |= {f"{split}_{name}": values for name, values in found.metrics.items()}
        job.monitor.update(count + 1, split)
    for name in curvatures:
        spectrum = load_spectrum(run_folder.spectrum_path(job.folder, name))
        columns[f"width_dimension_{name}"] = spectrum.curve.width_dimension
    write_columns(job.folder / run_folder.CURVES, columns)
    names = {"loss": "train_loss", "accuracy": "test_accuracy"}
    return Measured(columns, {name: threshold(trained, columns, of) for name, of in names.items()})


def sweep_finetuned(job: Job, trained: Trained, limits: Sequence[Limits], swept: Measured) -> Measured:
    """Measures the pruned network after fine-tuning, closer where its loss crosses the tolerance."""
    rows = finetuned_rows(limits)
    columns = _finetuned(job, trained, swept.columns, rows, 0)
    crossing = threshold(trained, columns, "finetuned_train_loss")
    around = range(round(400 * crossing["value"]) + 2, round(400 * crossing["next"]), 2)
    columns = _finetuned(job, trained, columns, around, len(rows))
    write_columns(job.folder / run_folder.CURVES, columns)
    names = {"finetuned": "finetuned_train_loss", "finetuned_accuracy": "finetuned_test_accuracy"}
    return Measured(columns, {name: threshold(trained, columns, of) for name, of in names.items()})


def load_measured(job: Job, document: Mapping[str, Any], names: Sequence[str]) -> Measured:
    """What `sweep` or `sweep_finetuned` found, whose thresholds have these names."""
    columns = read_columns(job.folder / run_folder.CURVES)
    return Measured(columns, {name: document["measured"][name] for name in names})


def finetuned_rows(limits: Sequence[Limits]) -> list[int]:
    """Rows of `SPARSITIES` that are fine-tuned first."""
    rows = {4 * percent for percent in FINETUNED_SWEEP}
    # The predicted limits too, rounded down to .005, so that the accuracy there is known.
    rows |= {2 * int(200 * value) for found in limits for value in found.predicted.values()}
    return sorted(rows)


def _finetuned(job: Job, trained: Trained, columns: Columns, rows: Sequence[int], before: int) -> Columns:
    """The columns with fine-tuned metrics at these rows; `before`: how many rows were fine-tuned already."""
    if not rows:
        return columns
    (train, train_labels), (test, test_labels) = job.train, job.test
    is_test = np.repeat([0.0, 1.0], [len(train_labels), len(test_labels)]).astype(np.float32)
    both = (np.concatenate([train, test]), np.concatenate([train_labels, test_labels]), is_test)

    def metrics(params: Any, batch: Any) -> dict[str, jax.Array]:
        """Metrics of training and test examples in one batch, as shares of all examples in it."""
        images, labels, is_test = batch
        logits = trained.predict(params, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        right = logits.argmax(-1) == labels
        return {
            "train_accuracy": jnp.mean((1 - is_test) * right),
            "test_loss": jnp.mean(is_test * losses),
            "test_accuracy": jnp.mean(is_test * right),
        }

    found = finetuned_sweep(
        trained.loss,
        trained.params,
        in_batches(job.train),
        SPARSITIES[list(rows)],
        metrics_fn=metrics,
        eval_batches=in_batches(both),
        num_steps=job.preset.finetune_steps,
        progress=lambda count, total: job.monitor.update(before + count),
    )
    scale = {"train": len(is_test) / len(train_labels), "test": len(is_test) / len(test_labels)}
    values = {"train_loss": found.metrics["loss"]}
    for name in ("train_accuracy", "test_loss", "test_accuracy"):
        values[name] = found.metrics[f"eval_{name}"] * scale[name.split("_")[0]]
    columns = dict(columns)
    for name, new in values.items():
        whole = columns.get(f"finetuned_{name}", np.full(len(SPARSITIES), np.nan)).copy()
        whole[list(rows)] = new
        columns[f"finetuned_{name}"] = whole
    return columns


def threshold(trained: Trained, columns: Columns, column: str) -> dict[str, float]:
    """The threshold of a column, and the sparsity measured after it.

    For a loss, the last sparsity before it first exceeds the tolerance. For an accuracy, which is noisier,
    the largest sparsity that keeps it but for one point.
    """
    known = ~np.isnan(columns[column])
    sparsity, values = SPARSITIES[known], columns[column][known]
    if column.endswith("loss"):
        bound = trained.network["train_loss"] + trained.loss_tolerance
        value = Sweep(sparsity, {column: values}).first_crossing(column, bound)
    else:
        bound = ACCURACY_LOSS - trained.network["test_accuracy"]
        value = Sweep(sparsity, {column: -values}).largest_sparsity(column, bound)
    after = sparsity[sparsity > value]
    return {"value": value, "next": float(after[0]) if after.size else 1.0}
