"""The stage that trains: the network, and what is measured on it before it is pruned."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from jaxlimit import models, training
from jaxlimit.application import run_folder
from jaxlimit.application.job import TRAINING, Job, in_batches
from jaxlimit.application.presets import build_network
from jaxlimit.core import trees
from jaxlimit.geometry.magnitude import magnitude_order
from jaxlimit.measuring.loss_statistics import loss_statistics
from jaxlimit.measuring.sweeps import SPARSITIES, removals, sparsity_sweep
from jaxlimit.training.losses import Loss, Predict
from jaxlimit.training.model_files import load_model, save_model


@dataclass(frozen=True)
class Trained:
    """The network after training, and what is measured on it before it is pruned.

    Attributes:
        model: the network.
        network: its numbers of parameters and weights, losses and accuracies.
        statistics: mean and standard deviation of the training batches' losses.
        loss_tolerance: eps.
        grouped: what is pruned as a whole, as in `Options`.
    """

    model: nnx.Module
    network: Mapping[str, Any]
    statistics: Mapping[str, float]
    loss_tolerance: float
    grouped: str | None = None

    @cached_property
    def _function(self) -> tuple[Predict, Any]:
        return models.from_nnx(self.model)

    @property
    def predict(self) -> Predict:
        """`predict(params, inputs) -> logits`."""
        return self._function[0]

    @property
    def params(self) -> Any:
        """The parameters."""
        return self._function[1]

    @cached_property
    def loss(self) -> Loss:
        """Mean cross entropy of a batch."""
        return training.classification_loss(self.predict)

    @cached_property
    def metrics(self) -> Any:
        """Loss and accuracy of a batch; one function for all sweeps."""
        return training.classification_metrics(self.predict)

    @cached_property
    def groups(self) -> Any:
        """Which weights go together, as `pruning_limit` takes it."""
        if self.grouped == "units":
            return models.unit_labels(self.model, trees.partition(self.params)[0])
        return self.grouped

    @cached_property
    def sparsities(self) -> NDArray[np.float64]:
        """Those at which it is measured: of `SPARSITIES`, the ones that whole groups reach."""
        order = magnitude_order(trees.partition(self.params)[0], groups=self.groups)
        return removals(order, SPARSITIES)[0]

    def to_json(self) -> dict[str, Any]:
        """Its part of limit.json."""
        return {
            "network": dict(self.network),
            "loss_statistics": dict(self.statistics),
            "loss_tolerance": self.loss_tolerance,
        }


def train_network(job: Job, checkpoint: Path) -> Trained:
    """Trains the network, keeps its weights and measures it."""
    model = job.preset.recipe.train(
        build_network(job.preset, job.options.seed),
        job.train,
        job.key(TRAINING),
        augment=job.preset.augmentation(),
        on_epoch=lambda epoch, loss: job.monitor.update(epoch + 1, f"loss + L1 {loss:.4f}"),
        checkpoint=checkpoint,
    )
    found = Trained(model, {}, {}, 0.0)
    # The tolerance is defined by the batches of training, in fixed order.
    statistics = loss_statistics(
        found.loss, found.params, in_batches(job.train, job.preset.recipe.batch_size)
    )
    network = _describe(job, found)
    if job.options.num_examples is None:
        network["train_loss"] = statistics.mean
    save_model(job.folder / run_folder.MODEL, model)
    return Trained(
        model,
        network,
        {"mean": statistics.mean, "batch_std": statistics.batch_std},
        job.options.loss_tolerance or statistics.batch_std,
        job.options.groups,
    )


def load_trained(job: Job, document: Mapping[str, Any]) -> Trained:
    """What `train` found."""
    network, statistics, tolerance = (
        document[name] for name in ("network", "loss_statistics", "loss_tolerance")
    )
    for value in (tolerance, *(network[name] for name in ("num_weights", "train_loss", "test_accuracy"))):
        math.isfinite(value)  # what later stages need is there, as numbers
    model = load_model(job.folder / run_folder.MODEL, build_network(job.preset, job.options.seed))
    return Trained(model, network, statistics, tolerance, job.options.groups)


def _describe(job: Job, trained: Trained) -> dict[str, Any]:
    flat = trees.flatten(trees.partition(trained.params)[0])
    described: dict[str, Any] = {
        "num_parameters": int(sum(leaf.size for leaf in jax.tree.leaves(trained.params))),
        "num_weights": flat.size,
        "zero_share": float(np.mean(flat == 0)),
    }
    for split, arrays in job.splits.items():
        sweep = sparsity_sweep(trained.metrics, trained.params, in_batches(arrays), [0.0])
        described |= {f"{split}_{name}": float(values[0]) for name, values in sweep.metrics.items()}
    return described | {"num_train": len(job.train[1]), "num_test": len(job.test[1])}
