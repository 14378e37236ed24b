"""The stages of a run: train, limits, sweeps on the real network, comparison, report.

Each stage reads what it needs from the stages before, writes its files, and is then entered in limit.json.
A run that was interrupted goes through the same stages and loads those that are entered.
"""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from numpy.typing import NDArray

from jaxlimit import models, training
from jaxlimit.application import comparison, report, run_folder
from jaxlimit.application.presets import Arrays, Options, Preset, build_network
from jaxlimit.application.terminal import Monitor
from jaxlimit.core import batches, trees
from jaxlimit.curvature.operator import Curvature
from jaxlimit.geometry import magnitude
from jaxlimit.limits.budget import Progress
from jaxlimit.limits.dense_source import dense_fits
from jaxlimit.limits.estimate import LIMITS
from jaxlimit.limits.pruning_limit import MAX_MATVECS, pruning_limit
from jaxlimit.limits.result import PruningLimit
from jaxlimit.measuring import sweeps
from jaxlimit.measuring.loss_statistics import loss_statistics
from jaxlimit.measuring.sweeps import ACCURACY_LOSS, SPARSITIES
from jaxlimit.reference.paper_code import reference_limit
from jaxlimit.training import model_files

# Sparsities of the fine-tuned sweep: first these (in steps of .01) and the predicted limits, then steps of
# .005 between the two around the crossing of the loss.
FINETUNED_SWEEP = (*range(10, 50, 10), *range(50, 80, 5), *range(80, 100))
SPLITS = ("train", "test")
# Examples at once in sweeps: as many as fit a CPU's cache, or fill another device. Sums over examples do not
# depend on it.
CPU_BATCH, DEVICE_BATCH = 128, 1024


def config_of(preset: Preset, options: Options) -> dict[str, Any]:
    """What config.json holds."""
    return {"format": run_folder.FORMAT, "preset": asdict(preset), "options": asdict(options)}


def execute(
    folder: Path,
    preset: Preset,
    options: Options,
    arrays: tuple[Arrays, Arrays],
    command: str,
    monitor: Monitor,
) -> run_folder.Record:
    """Runs all stages that limit.json in the folder does not name yet.

    Args:
        folder: made by `record.prepare_folder`.
        preset: the experiment.
        options: what else decides the numbers.
        arrays: training and test examples, from `load_arrays`.
        command: as typed, for limit.json.
        monitor: told about the progress.

    Returns:
        The run, as on disk.

    Raises:
        FloatingPointError: training diverged.
        ValueError: a file of an earlier stage is damaged.
    """
    run = _Run(folder, preset, options, arrays, command, monitor)
    run.train()
    for name in options.curvatures:
        run.limit(name)
    run.sweep()
    if preset.finetune_steps:
        run.sweep_finetuned()
    return run.finish()


class _Run:
    """A run under way: its files so far, and the network once it is trained."""

    def __init__(
        self,
        folder: Path,
        preset: Preset,
        options: Options,
        arrays: tuple[Arrays, Arrays],
        command: str,
        monitor: Monitor,
    ):
        self.folder, self.preset, self.options, self.monitor = folder, preset, options, monitor
        self.arrays: dict[str, Arrays] = dict(zip(SPLITS, arrays, strict=True))
        self.use(build_network(preset, options.seed))
        self.document: dict[str, Any] = {
            "format": run_folder.FORMAT,
            "finished": False,
            "command": command,
            "network": {},
            "loss_statistics": {},
            "loss_tolerance": None,
            "limits": {},
            "measured": {},
            "comparison": [],
            "seconds": {},
        }
        if (folder / run_folder.LIMIT).exists():
            self.document = run_folder.read_json(folder / run_folder.LIMIT)
        self.document |= {
            "command": command,
            "versions": run_folder.versions(),
            "device": run_folder.device(),
        }
        self.columns: dict[str, NDArray[np.float64]] = {"sparsity": SPARSITIES}
        if "sweep" in self.document["seconds"]:
            self.columns = run_folder.read_columns(folder / run_folder.CURVES)

    @contextmanager
    def stage(self, name: str, title: str, total: int) -> Iterator[None]:
        """Times a stage, and enters it in limit.json once its body is through."""
        self.monitor.start(title, total)
        start = time.perf_counter()
        yield
        self.document["seconds"][name] = round(time.perf_counter() - start, 2)
        run_folder.write_json(self.folder / run_folder.LIMIT, self.document)

    def done(self, name: str, title: str) -> bool:
        """Whether a stage was done by an earlier process; tells so."""
        if name not in self.document["seconds"]:
            return False
        self.monitor.start(title, 1)
        self.monitor.finish("loaded")
        return True

    def use(self, network: nnx.Module) -> None:
        """What the stages after training need of the network."""
        self.network = network
        self.predict, self.params = models.from_nnx(network)
        self.loss = training.classification_loss(self.predict)
        self.metrics = training.classification_metrics(self.predict)

    def key(self, purpose: int) -> jax.Array:
        """Independent random keys from the seed: 0 for training, 1 for the probes."""
        return jax.random.fold_in(jax.random.key(self.options.seed), purpose)

    def batches(self, arrays: Sequence[np.ndarray], size: int | None = None) -> batches.Batches:
        """Examples in their fixed order."""
        return batches.batched(
            tuple(arrays), size or (CPU_BATCH if jax.default_backend() == "cpu" else DEVICE_BATCH)
        )

    def train(self) -> None:
        title, path = "training", self.folder / run_folder.WEIGHTS
        if self.done("training", title):
            self.use(model_files.load_model(path, self.network))
            return
        preset, arrays = self.preset, self.arrays["train"]
        checkpoint = run_folder.checkpoint_path(self.folder, "training")
        with self.stage("training", title, preset.epochs):
            trained = preset.recipe.train(
                self.network,
                arrays,
                self.key(0),
                augment=preset.augmentation(),
                on_epoch=lambda epoch, loss: self.monitor.update(epoch + 1, f"loss + L1 {loss:.4f}"),
                checkpoint=checkpoint,
            )
            self.use(trained)
            # The tolerance is defined by the batches of training, in fixed order.
            statistics = loss_statistics(self.loss, self.params, self.batches(arrays, preset.batch_size))
            tolerance = self.options.loss_tolerance or statistics.batch_std
            network = self._describe_network() | {"train_loss": statistics.mean}
            self.document |= {
                "network": network,
                "loss_statistics": {"mean": statistics.mean, "batch_std": statistics.batch_std},
                "loss_tolerance": tolerance,
            }
            model_files.save_model(path, self.network)
        shutil.rmtree(checkpoint, ignore_errors=True)
        self.monitor.finish(f"test accuracy {network['test_accuracy']:.2%}, loss tolerance {tolerance:.4g}")

    def _describe_network(self) -> dict[str, Any]:
        flat = trees.flatten(trees.partition(self.params)[0])
        described: dict[str, Any] = {
            "num_parameters": int(sum(leaf.size for leaf in jax.tree.leaves(self.params))),
            "num_weights": flat.size,
            "zero_share": float(np.mean(flat == 0)),
        }
        for split, arrays in self.arrays.items():
            sweep = sweeps.sparsity_sweep(self.metrics, self.params, self.batches(arrays), [0.0])
            described |= {f"{split}_{name}": float(values[0]) for name, values in sweep.metrics.items()}
            described[f"num_{split}"] = len(arrays[1])
        return described

    def limit(self, name: str) -> None:
        stage, title = f"limit_{name}", f"limit, {name.replace('_', '-')}"
        if self.done(stage, title):
            return
        dim = self.document["network"]["num_weights"]
        dense = dense_fits(dim)

        def progress(state: Progress) -> None:
            last = "eigendecomposition" if dense and state.num_matvecs >= dim else f"{state.stage} "
            bracket = "" if dense else f"{state.stage}, limit in [{state.lower:.3f}, {state.upper:.3f}]"
            self.monitor.update(state.num_matvecs, bracket or last)

        def limits_of(curvature: Curvature, which: Sequence[str], folder: Path) -> PruningLimit:
            return pruning_limit(
                curvature,
                self.key(1),
                loss_tolerance=self.document["loss_tolerance"],
                tolerance=self.options.tolerance,
                which=which,
                checkpoint=str(folder),
                progress=progress,
            )

        num_examples, checkpoint = self.options.num_examples, run_folder.checkpoint_path(self.folder, name)
        with self.stage(stage, title, dim if dense else MAX_MATVECS):
            curvature = self._curvature(name, num_examples)
            reference = self._reference(curvature) if name == "hessian" else {}
            found = limits_of(curvature, LIMITS, checkpoint / "all")
            run_folder.save_spectrum(run_folder.spectrum_path(self.folder, name), found, SPARSITIES)
            self.document["limits"][name] = found.to_json() | reference
            if num_examples is not None and 1 < num_examples < len(self.arrays["train"][1]):
                half = limits_of(self._curvature(name, num_examples // 2), ["width"], checkpoint / "half")
                self.document["limits"][name][comparison.HALF] = half.estimates()["width"].value
        shutil.rmtree(checkpoint, ignore_errors=True)
        self.monitor.finish(", ".join(f"{key} {value.value:.3f}" for key, value in found.estimates().items()))

    def _curvature(self, name: str, num_examples: int | None) -> Curvature:
        """Of the loss over the first so many training examples."""
        data = self.batches([array[:num_examples] for array in self.arrays["train"]])
        return training.classification_curvature(name, self.predict, self.params, data)

    def _reference(self, hessian: Curvature) -> dict[str, Any]:
        """What the paper's own code would predict, from a probe of its own."""
        key = jax.random.fold_in(self.key(1), 1)
        found = reference_limit(hessian, key, loss_tolerance=self.document["loss_tolerance"])
        return {"reference": vars(found)}

    def sweep(self) -> None:
        title = "sparsity sweep"
        if self.done("sweep", title):
            return
        with self.stage("sweep", title, 2):
            kernels = trees.partition(self.params)[0]
            self.columns["removed_norm"] = magnitude.removed_norm(kernels, SPARSITIES)
            for count, split in enumerate(self.arrays):
                found = sweeps.sparsity_sweep(
                    self.metrics, self.params, self.batches(self.arrays[split]), SPARSITIES
                )
                self.columns |= {f"{split}_{name}": values for name, values in found.metrics.items()}
                self.monitor.update(count + 1, split)
            for name in self.document["limits"]:
                spectrum = run_folder.load_spectrum(run_folder.spectrum_path(self.folder, name))
                self.columns[f"width_dimension_{name}"] = spectrum.curve.width_dimension
            self._measure("loss", "train_loss")
            self._measure("accuracy", "test_accuracy")
            run_folder.write_columns(self.folder / run_folder.CURVES, self.columns)
        self.monitor.finish(f"loss threshold {self.document['measured']['loss']['value']:.4f}")

    def sweep_finetuned(self) -> None:
        title = "fine-tuned sweep"
        if self.done("finetuned", title):
            return
        estimates = [
            found[name] for found in self.document["limits"].values() for name in LIMITS if name in found
        ]
        indices = {4 * percent for percent in FINETUNED_SWEEP}
        # The predicted limits too, rounded down to .005, so that the accuracy there is known.
        indices |= {2 * int(200 * estimate["value"]) for estimate in estimates}
        with self.stage("finetuned", title, len(indices) + 8):
            self._finetune(sorted(indices), 0)
            crossing = self._measure("finetuned", "finetuned_train_loss")
            around = round(400 * crossing["value"]) + 2, round(400 * crossing["next"])
            self._finetune(range(*around, 2), len(indices))
            self._measure("finetuned", "finetuned_train_loss")
            self._measure("finetuned_accuracy", "finetuned_test_accuracy")
            run_folder.write_columns(self.folder / run_folder.CURVES, self.columns)
        self.monitor.finish(f"fine-tuned threshold {self.document['measured']['finetuned']['value']:.4f}")

    def _finetune(self, indices: Sequence[int], before: int) -> None:
        """Enters fine-tuned metrics into the columns, at these rows."""
        if not indices:
            return
        (train, train_labels), (test, test_labels) = self.arrays["train"], self.arrays["test"]
        is_test = np.repeat([0.0, 1.0], [len(train_labels), len(test_labels)]).astype(np.float32)
        both = (np.concatenate([train, test]), np.concatenate([train_labels, test_labels]), is_test)
        found = sweeps.finetuned_sweep(
            self.loss,
            self.params,
            self.batches(self.arrays["train"]),
            SPARSITIES[list(indices)],
            metrics_fn=self._metrics_of_both,
            eval_batches=self.batches(both),
            num_steps=self.preset.finetune_steps,
            progress=lambda count, total: self.monitor.update(before + count),
        )
        scale = {"train": len(is_test) / len(train_labels), "test": len(is_test) / len(test_labels)}
        values = {"train_loss": found.metrics["loss"]}
        for name in ("train_accuracy", "test_loss", "test_accuracy"):
            values[name] = found.metrics[f"eval_{name}"] * scale[name.split("_")[0]]
        for name, column in values.items():
            whole = self.columns.setdefault(f"finetuned_{name}", np.full(len(SPARSITIES), np.nan))
            whole[list(indices)] = column

    def _metrics_of_both(self, params: Any, batch: Any) -> dict[str, jax.Array]:
        """Metrics of training and test examples in one batch, as shares of all examples in it."""
        images, labels, is_test = batch
        logits = self.predict(params, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        right = logits.argmax(-1) == labels
        return {
            "train_accuracy": jnp.mean((1 - is_test) * right),
            "test_loss": jnp.mean(is_test * losses),
            "test_accuracy": jnp.mean(is_test * right),
        }

    def _measure(self, name: str, column: str) -> dict[str, float]:
        """Enters a threshold and the sparsity measured after it.

        Of a loss: the last sparsity before it first exceeds the tolerance. Of the accuracy, which is noisier:
        the largest sparsity that keeps it.
        """
        network = self.document["network"]
        known = ~np.isnan(self.columns[column])
        sparsity, values = SPARSITIES[known], self.columns[column][known]
        if column.endswith("loss"):
            bound = network["train_loss"] + self.document["loss_tolerance"]
            value = sweeps.Sweep(sparsity, {name: values}).first_crossing(name, bound)
        else:
            bound = ACCURACY_LOSS - network["test_accuracy"]
            value = sweeps.Sweep(sparsity, {name: -values}).largest_sparsity(name, bound)
        after = sparsity[sparsity > value]
        self.document["measured"][name] = {"value": value, "next": float(after[0]) if after.size else 1.0}
        return self.document["measured"][name]

    def finish(self) -> run_folder.Record:
        rows = comparison.compare(self.document, self.columns)
        self.document["comparison"] = [asdict(row) for row in rows]
        config = run_folder.read_json(self.folder / run_folder.CONFIG)
        spectra = {
            name: run_folder.load_spectrum(run_folder.spectrum_path(self.folder, name))
            for name in self.document["limits"]
        }
        run = run_folder.Record(config, self.document, self.columns, spectra)
        with self.stage("report", "report", 1):
            report.write_report(self.folder, run)
            self.document["finished"] = True
        self.monitor.finish(str(self.folder / run_folder.REPORT))
        return run
