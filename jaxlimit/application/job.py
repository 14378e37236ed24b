"""What all stages of a run share."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from jaxlimit.application.presets import Arrays, Options, Preset
from jaxlimit.core.batches import Batches, batched
from jaxlimit.core.terminal import Monitor

# Examples at once in sweeps: as many as fit a CPU's cache, or fill another device. Sums over examples do not
# depend on it.
CPU_BATCH, DEVICE_BATCH = 128, 1024
# What `fold_in` makes of the seed: independent random numbers for each purpose.
TRAINING, PROBES = 0, 1


@dataclass(frozen=True)
class Job:
    """What all stages of a run share.

    Attributes:
        folder: of the run.
        preset: the experiment.
        options: what else decides the numbers.
        train: training (inputs, labels).
        test: test (inputs, labels).
        monitor: told about the progress.
    """

    folder: Path
    preset: Preset
    options: Options
    train: Arrays
    test: Arrays
    monitor: Monitor

    def key(self, purpose: int) -> jax.Array:
        """Random numbers for training, or for the probes."""
        return jax.random.fold_in(jax.random.key(self.options.seed), purpose)

    @property
    def examples(self) -> Arrays:
        """The training examples whose loss is predicted and measured: the first `num_examples`."""
        inputs, labels = self.train
        return inputs[: self.options.num_examples], labels[: self.options.num_examples]

    @property
    def splits(self) -> dict[str, Arrays]:
        """The examples that are measured on, by name."""
        return {"train": self.examples, "test": self.test}


def in_batches(arrays: Sequence[np.ndarray], size: int | None = None) -> Batches:
    """Examples in their fixed order."""
    return batched(tuple(arrays), size or (CPU_BATCH if jax.default_backend() == "cpu" else DEVICE_BATCH))
