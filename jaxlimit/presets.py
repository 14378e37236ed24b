"""Complete experiments as data: which network, on which data, trained how.

The settings of mnist-fc2 are those of the paper's code for MNIST, the others its general ones (SGD with
momentum .9, batches of 128, L1 on every parameter, constant learning rate, 200 epochs). `digits` is ours:
small enough that every limit is exact and a whole run takes two minutes on two cores.
"""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import optax
from flax import nnx

from jaxlimit import data, models
from jaxlimit.training import steps_per_epoch

Arrays = tuple[np.ndarray, np.ndarray]
CURVATURES = ("hessian", "gauss_newton")


@dataclass(frozen=True)
class Preset:
    """One experiment.

    Attributes:
        name: as on the command line.
        dataset: "digits", "mnist" or "cifar10".
        network: widths of a fully connected network, such as "64-48-24-10", or "LeNet".
        epochs: passes over the training data.
        learning_rate: of SGD, at the start.
        schedule: "constant", or "cosine": from learning_rate to 0 over all updates.
        l1: weight of the L1 term.
        momentum: of SGD.
        batch_size: of training, and of the batches whose losses' spread is the default loss tolerance.
        finetune_steps: full-batch Adam steps of the fine-tuned sweep.
    """

    name: str
    dataset: str
    network: str
    epochs: int
    learning_rate: float
    schedule: str
    l1: float
    momentum: float = 0.9
    batch_size: int = 128
    finetune_steps: int = 400

    def rate(self, num_examples: int) -> float | optax.Schedule:
        """The learning rate in the form that `jaxlimit.training.train` takes."""
        if self.schedule == "constant":
            return self.learning_rate
        num_updates = self.epochs * steps_per_epoch(num_examples, self.batch_size)
        return optax.cosine_decay_schedule(self.learning_rate, num_updates)


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("digits", "digits", "64-48-24-10", epochs=400, learning_rate=0.05, schedule="cosine", l1=5e-4),
        Preset(
            "mnist-fc2", "mnist", "784-100-10", epochs=10, learning_rate=0.01, schedule="constant", l1=5e-5
        ),
        Preset(
            "mnist-fc5",
            "mnist",
            "784-1000-600-300-100-10",
            epochs=200,
            learning_rate=0.01,
            schedule="constant",
            l1=5e-5,
        ),
        Preset(
            "cifar10-fc5",
            "cifar10",
            "3072-1000-600-300-100-10",
            epochs=200,
            learning_rate=0.01,
            schedule="constant",
            l1=5e-5,
        ),
        Preset(
            "cifar10-lenet", "cifar10", "LeNet", epochs=200, learning_rate=0.01, schedule="constant", l1=5e-5
        ),
    )
}


def find_preset(
    name: str, *, epochs: int | None = None, l1: float | None = None, finetune_steps: int | None = None
) -> Preset:
    """The preset of that name, with other settings where they are given.

    Raises:
        ValueError: there is no such preset, or a number is out of range.

    Examples:
        >>> find_preset("digits", l1=0.0).l1
        0.0
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; the presets are {', '.join(PRESETS)}.")
    if epochs is not None and epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}.")
    if l1 is not None and not 0 <= l1 < np.inf:
        raise ValueError(f"l1 must be finite and at least 0, got {l1}.")
    if finetune_steps is not None and finetune_steps < 0:
        raise ValueError(f"finetune_steps must be at least 0, got {finetune_steps}.")
    given = {"epochs": epochs, "l1": l1, "finetune_steps": finetune_steps}
    return replace(PRESETS[name], **{key: value for key, value in given.items() if value is not None})


@dataclass(frozen=True)
class Options:
    """What decides the numbers of a run beside the preset.

    Attributes:
        seed: of the initial weights, the order of the examples and the probes.
        curvature: "hessian", "gauss_newton" or "both".
        tolerance: wanted accuracy of the limits, in sparsity.
        loss_tolerance: eps, in units of the loss; None: the spread of the training batches' losses.
        num_examples: the first so many training examples give the curvature; None: all.
    """

    seed: int = 0
    curvature: str = "both"
    tolerance: float = 1e-3
    loss_tolerance: float | None = None
    num_examples: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie between 0 and {2**32 - 1}, got {self.seed}.")
        if self.curvature not in ("both", *CURVATURES):
            raise ValueError(f"curvature must be both, hessian or gauss_newton, got {self.curvature!r}.")
        for name, value in (("tolerance", self.tolerance), ("loss_tolerance", self.loss_tolerance)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive finite number, got {value}.")
        if self.num_examples is not None and self.num_examples < 1:
            raise ValueError(f"num_examples must be at least 1, got {self.num_examples}.")

    @property
    def curvatures(self) -> tuple[str, ...]:
        """The curvatures asked for, by name."""
        return CURVATURES if self.curvature == "both" else (self.curvature,)


def load_arrays(
    preset: Preset, options: Options, folder: str | os.PathLike[str] | None = None
) -> tuple[Arrays, Arrays]:
    """Training and test (images, labels) in the shape that the preset's network takes.

    Args:
        preset: says which data.
        options: checked against the data.
        folder: holds mnist/ or cifar10/; default $JAXLIMIT_DATA. Not needed for digits.

    Raises:
        FileNotFoundError: the data are not there; the message says which files go where.
        ValueError: a file is not what it should be, or there are fewer examples than options.num_examples.
    """
    if preset.dataset == "digits":
        dataset = data.load_digits()
    else:
        loader = {"mnist": data.load_mnist, "cifar10": data.load_cifar10}[preset.dataset]
        dataset = loader(None if folder is None else Path(folder) / preset.dataset)
    train, test = dataset.train_images, dataset.test_images
    if options.num_examples is not None and options.num_examples > len(train):
        raise ValueError(f"num_examples must be at most {len(train)}, got {options.num_examples}.")
    if preset.network != "LeNet" and train.ndim > 2:
        train, test = data.flatten_channel_first(train), data.flatten_channel_first(test)
    return (train, dataset.train_labels), (test, dataset.test_labels)


def build_network(preset: Preset, seed: int) -> nnx.Module:
    """The preset's network at its random start.

    Args:
        preset: says which network.
        seed: of the random kernels.

    Examples:
        >>> build_network(find_preset("mnist-fc2"), seed=0).widths
        (784, 100, 10)
    """
    rngs = nnx.Rngs(seed)
    if preset.network == "LeNet":
        return models.LeNet(rngs=rngs)
    return models.FullyConnected([int(width) for width in preset.network.split("-")], rngs=rngs)


def presets_table() -> str:
    """All presets as text, one a line."""
    heads = ("preset", "data", "network", "epochs", "learning rate", "L1", "batch")
    rows = [
        (
            p.name,
            p.dataset,
            p.network,
            str(p.epochs),
            f"{p.learning_rate:g} {p.schedule}",
            f"{p.l1:g}",
            str(p.batch_size),
        )
        for p in PRESETS.values()
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (heads, *rows)
    )
