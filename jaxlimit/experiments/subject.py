"""A network at work in an experiment: trained as its preset says, and asked for its limits and its accuracy.

The loss that is predicted and measured is the mean over the first training examples, in batches of the
preset's size; the tolerance is the standard deviation of these batches' losses, as in the paper.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from numpy.typing import ArrayLike

from jaxlimit.application.answers import COARSE
from jaxlimit.application.presets import Arrays, Preset, build_network
from jaxlimit.baselines.network import subfolder
from jaxlimit.core.batches import Batches, batched
from jaxlimit.core.trees import PyTree, partition
from jaxlimit.curvature.operator import Curvature
from jaxlimit.experiments.experiment import Note, on_epoch
from jaxlimit.limits.pruning_limit import MAX_MATVECS, pruning_limit
from jaxlimit.limits.result import PruningLimit
from jaxlimit.measuring.loss_statistics import LossStatistics, loss_statistics
from jaxlimit.measuring.metrics import Metrics
from jaxlimit.measuring.sweeps import ACCURACY_LOSS, SPARSITIES, PrunedNetwork, Sweep
from jaxlimit.models import from_nnx
from jaxlimit.training.losses import (
    Loss,
    classification_curvature,
    classification_loss,
    classification_metrics,
)
from jaxlimit.training.recipe import TrainingOptions

DEFAULT_LIMITS = ("one_shot", "width", "cone")
# Test examples of a step of its search: a tenth of those of CIFAR-10 and MNIST.
PART = 1000


@dataclass(frozen=True)
class Task:
    """A preset with its data.

    Attributes:
        preset: network and training.
        train: (inputs, labels), all of them, for training.
        test: (inputs, labels).
        num_examples: the first so many training examples are predicted and measured; None: all.
        num_probes: of the limits; None: as `pruning_limit` chooses.
        max_matvecs: of every limit.
        networks: folder of trained networks.
        checkpoint: folder of the piece at work, for what it has finished so far; None: nothing is kept.
        note: told what is being done.
    """

    preset: Preset
    train: Arrays
    test: Arrays
    num_examples: int | None = None
    num_probes: int | None = None
    max_matvecs: int = MAX_MATVECS
    networks: Path | None = None
    checkpoint: Path | None = None
    note: Note = lambda text: None

    def trained(self, seed: int, *, l1: float | None = None, until: int | None = None) -> "Subject":
        """The network after its training, with what is asked about it; arguments as for `network`."""
        return self.subject(self.network(seed, l1=l1, until=until), seed)

    def network(self, seed: int, *, l1: float | None = None, until: int | None = None) -> nnx.Module:
        """The network after its training.

        Args:
            seed: of the initial weights, of the order of the examples, and of the probes of its limits.
            l1: in place of the preset's.
            until: epochs after which the training is looked at, its schedule being that of all epochs; 0 is
                the random start.
        """
        preset = self.preset.changed(l1=l1)
        recipe = preset.recipe
        model = build_network(preset, seed)
        epochs = recipe.epochs if until is None else until
        name = f"{preset.name}-l1-{recipe.l1:g}-epoch-{epochs}-of-{recipe.epochs}-seed{seed}"
        if epochs:
            model = recipe.train(
                model,
                self.train,
                jax.random.fold_in(jax.random.key(seed), 0),
                epochs=epochs,
                checkpoint=subfolder(self.networks, name),
                **self.training_options(),
            )
        return model

    def training_options(self) -> TrainingOptions:
        """What every training of the preset's data is given."""
        return {"augment": self.preset.augmentation(), "on_epoch": on_epoch(self.note)}

    def subject(self, model: nnx.Module, seed: int) -> "Subject":
        """A network with what is asked about it."""
        first = tuple(array[: self.num_examples] for array in self.train)
        size = self.preset.recipe.batch_size
        batches, test = batched(first, size), batched(self.test, size)
        numbers = seed, self.num_probes, self.max_matvecs
        return Subject(
            *from_nnx(model), batches, test, *numbers, self.note, subfolder(self.checkpoint, "limit")
        )


@dataclass(frozen=True)
class Subject:
    """A network whose limits are asked for.

    Attributes:
        predict: `predict(params, inputs) -> logits`.
        params: its parameters.
        batches: the examples whose loss is predicted and measured.
        test: the test examples, in batches.
        seed: of the probes.
        num_probes, max_matvecs: of the limits, as for `pruning_limit`.
        note: told what is being done.
        checkpoint: folder of the products of its limit, or None. Another limit needs another one.
    """

    predict: Callable[..., jax.Array]
    params: PyTree
    batches: Batches
    test: Batches
    seed: int
    num_probes: int | None
    max_matvecs: int
    note: Note
    checkpoint: Path | None = None

    def outputs(self, params: PyTree, batch: Arrays) -> jax.Array:
        """The logits of a batch."""
        return self.predict(params, batch[0])

    @cached_property
    def loss(self) -> Loss:
        """Mean cross entropy of a batch."""
        return classification_loss(self.predict)

    @cached_property
    def metrics(self) -> Metrics:
        """Loss and accuracy of a batch."""
        return classification_metrics(self.predict)

    @cached_property
    def statistics(self) -> LossStatistics:
        """Mean loss L, and the standard deviation of its batches' losses, which is the tolerance eps."""
        return loss_statistics(self.loss, self.params, self.batches)

    @property
    def weights(self) -> PyTree:
        """The prunable weights."""
        return partition(self.params)[0]

    def curvature(self, batches: Batches | None = None) -> Curvature:
        """The Hessian of the loss over these batches; None: over its own."""
        return classification_curvature("hessian", self.predict, self.params, batches or self.batches)

    def limit(
        self,
        which: Sequence[str] = DEFAULT_LIMITS,
        *,
        batches: Batches | None = None,
        loss_tolerance: float | None = None,
        scores: PyTree | None = None,
    ) -> PruningLimit:
        """`pruning_limit` with the Hessian.

        Args:
            which: as for `pruning_limit`.
            batches: in place of its own.
            loss_tolerance: in place of the standard deviation of its batches' losses.
            scores: as for `pruning_limit`.
        """
        return pruning_limit(
            self.curvature(batches),
            jax.random.fold_in(jax.random.key(self.seed), 1),
            loss_tolerance=self.statistics.batch_std if loss_tolerance is None else loss_tolerance,
            num_probes=self.num_probes,
            max_matvecs=self.max_matvecs,
            which=which,
            scores=scores,
            checkpoint=self.checkpoint,
            progress=lambda at: self.note(f"{at.stage}, {at.num_matvecs} of {at.max_matvecs} products"),
        )

    def sweep(self, sparsities: ArrayLike, batches: Batches, scores: PyTree | None = None) -> Sweep:
        """Loss and accuracy of the network as it is pruned, without fine-tuning."""
        return PrunedNetwork(self.params, self.metrics, scores=scores).sweep(batches, sparsities)

    def test_accuracy(self, sparsities: Sequence[float], scores: PyTree | None = None) -> list[float]:
        """Test accuracies of the pruned network, in the order of the sparsities."""
        found = self.sweep(sparsities, self.test, scores)
        return [float(x) for x in found.metrics["accuracy"][np.searchsorted(found.sparsities, sparsities)]]

    def thresholds(self) -> dict[str, float]:
        """How sparse it can really be pruned, without fine-tuning, for the loss and for the accuracy."""
        return {"loss": self.loss_threshold(), "accuracy": self.accuracy_threshold()}

    def loss_threshold(self, scores: PyTree | None = None) -> float:
        """The last sparsity before the training loss first exceeds L + eps."""
        network = PrunedNetwork(self.params, self.metrics, scores=scores)
        bound = self.statistics.mean + self.statistics.batch_std
        threshold = 0.0  # a network as it is loses nothing
        for grid in SPARSITIES[1:].reshape(-1, 8):
            self.note(f"measured loss, s = {grid[0]:.2f}")
            crossing = network.sweep(self.batches, grid).first_crossing("loss", bound)
            threshold = crossing or threshold
            if crossing < grid[-1]:
                break
        return threshold

    def accuracy_threshold(self, scores: PyTree | None = None) -> float:
        """The largest sparsity that costs at most one point of test accuracy.

        From above, at every `COARSE`-th sparsity and then at those between; and of each network no more of
        the test examples than it takes to see that it costs more.
        """
        network = PrunedNetwork(self.params, self.metrics, scores=scores)
        parts = [batched(part, self.test.batch_size) for part in batched(self.test.arrays, PART)]

        def errors(sparsity: float, part: Batches) -> int:
            found = network.sweep(part, [sparsity], chunk_size=1)
            return round(part.num_examples * (1 - found.metrics["accuracy"][0]))

        allowed = sum(errors(0.0, part) for part in parts) + ACCURACY_LOSS * self.test.num_examples

        def costs_little(index: int) -> bool:
            self.note(f"measured accuracy, s = {SPARSITIES[index]:.2f}")
            found = itertools.accumulate(errors(float(SPARSITIES[index]), part) for part in parts)
            return all(so_far <= allowed for so_far in found)

        coarse = next(filter(costs_little, range(len(SPARSITIES) - 1, 0, -COARSE)), 0)
        beyond = range(min(coarse + COARSE, len(SPARSITIES)) - 1, coarse, -1)
        return float(SPARSITIES[next(filter(costs_little, beyond), coarse)])


def trace(limit: PruningLimit) -> float:
    """The trace of H, from the spectral measure of a limit."""
    return limit.dim * limit.measure.integrate(lambda x: x)[0]


def values(limit: PruningLimit) -> dict[str, Any]:
    """What the pieces keep of a limit: JSON values."""
    left_out = {"num_examples", "method", "tolerance", "positive_semidefinite"}
    return {key: value for key, value in limit.to_json().items() if key not in left_out}
