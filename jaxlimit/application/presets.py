"""Complete experiments as data: which network, on which data, trained how.

The presets on CIFAR and Tiny ImageNet are those of the paper: SGD with momentum .9 and without weight decay,
batches of 128, 200 epochs, an L1 term on every parameter, random crops and flips. The settings of mnist-fc2
are those of its code for MNIST. Its code steps the learning rate once a batch; here a schedule counts epochs,
as the paper says. The dense control of each is the same with `l1` 0. Two are ours: `digits`, so small that
every limit is exact and a whole run takes two minutes on two cores; and `cifar10-resnet18-8`, a ResNet18 of 8
to 64 channels instead of 64 to 512, which trains without an accelerator.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxlimit import data, models
from jaxlimit.baselines import Recipe
from jaxlimit.training.losses import CURVATURES
from jaxlimit.training.schedule import SCHEDULES

Arrays = tuple[np.ndarray, np.ndarray]
# The learning rate of "steps" is halved after these shares of the epochs: 60, 120 and 160 of 200.
MILESTONES = (0.3, 0.6, 0.8)


class _Source(NamedTuple):
    """Where the data of a preset come from, and what they are."""

    load: Callable[..., data.Dataset]
    image_shape: tuple[int, int, int]
    num_classes: int


DATASETS = {
    "mnist": _Source(data.load_mnist, (28, 28, 1), 10),
    "fashion-mnist": _Source(data.load_fashion_mnist, (28, 28, 1), 10),
    "cifar10": _Source(data.load_cifar10, (32, 32, 3), 10),
    "cifar100": _Source(data.load_cifar100, (32, 32, 3), 100),
    "tiny-imagenet": _Source(data.load_tiny_imagenet, (64, 64, 3), 200),
}
NETWORKS: dict[str, Callable[..., nnx.Module]] = {
    "LeNet": models.LeNet,
    "CNet": models.CNet,
    "AlexNet": models.AlexNet,
    **{f"VGG{depth}": partial(models.VGG, depth) for depth in (11, 13, 16, 19)},
    **{f"ResNet{depth}": partial(models.ResNet, depth) for depth in (18, 34, 50, 101, 152)},
    "ResNet18-8": partial(models.ResNet, 18, width=8),
}


@dataclass(frozen=True)
class Preset:
    """One experiment.

    Attributes:
        name: as on the command line.
        dataset: "digits", or one of `DATASETS`.
        network: widths of a fully connected network, such as "64-48-24-10", or one of `NETWORKS`.
        epochs: passes over the training data.
        learning_rate: of SGD, after the warm-up.
        schedule: one of `SCHEDULES`: "cosine" goes to 0 over all updates, "steps" is halved at `MILESTONES`.
        l1: weight of the L1 term.
        warmup_epochs: epochs in which the learning rate grows linearly from 0.
        augment: random crops and flips in training.
        momentum: of SGD.
        batch_size: of training, and of the batches whose losses' spread is the default loss tolerance.
        finetune_steps: full-batch Adam steps of the fine-tuned sweep; 0 leaves it out.

    Raises:
        ValueError: a setting out of range.
    """

    name: str
    dataset: str
    network: str
    epochs: int
    learning_rate: float
    schedule: str
    l1: float
    warmup_epochs: int = 0
    augment: bool = False
    momentum: float = 0.9
    batch_size: int = 128
    finetune_steps: int = 400

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("warmup_epochs", 0), ("finetune_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate}.")
        if not 0 <= self.l1 < math.inf:
            raise ValueError(f"l1 must be finite and at least 0, got {self.l1}.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {self.momentum}.")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}.")
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"warmup_epochs must be at most epochs = {self.epochs}, got {self.warmup_epochs}."
            )
        if self.augment and self.dataset not in DATASETS:
            raise ValueError(f"augment crops and flips images: {self.dataset} is not meant for that.")

    @property
    def recipe(self) -> Recipe:
        """How the network is trained."""
        return Recipe(
            self.epochs,
            self.batch_size,
            self.learning_rate,
            self.schedule,
            milestones=MILESTONES,
            factor=0.5,
            warmup_epochs=self.warmup_epochs,
            momentum=self.momentum,
            weight_decay=0.0,
            l1=self.l1,
        )

    def augmentation(self) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
        """The random crops and flips, for images in the shape that `load_arrays` gives them."""
        if not self.augment or self.network in NETWORKS:
            return data.random_crop_and_flip if self.augment else None
        height, width, channels = DATASETS[self.dataset].image_shape

        def augment(key: jax.Array, flat: jax.Array) -> jax.Array:
            images = flat.reshape(-1, channels, height, width).transpose(0, 2, 3, 1)
            return data.random_crop_and_flip(key, images).transpose(0, 3, 1, 2).reshape(flat.shape)

        return augment


def _of_the_paper(
    name: str,
    dataset: str,
    network: str,
    learning_rate: float,
    l1: float,
    schedule: str = "constant",
    warmup_epochs: int = 0,
) -> Preset:
    return Preset(name, dataset, network, 200, learning_rate, schedule, l1, warmup_epochs, augment=True)


_FC5 = "1000-600-300-100"
_FC12 = "1000-900-800-750-700-650-600-500-400-200-100"
PRESETS = {
    preset.name: preset
    for preset in (
        Preset("digits", "digits", "64-48-24-10", 400, 0.05, "cosine", 5e-4),
        Preset("mnist-fc2", "mnist", "784-100-10", 10, 0.01, "constant", 5e-5),
        Preset("mnist-fc5", "mnist", f"784-{_FC5}-10", 200, 0.01, "constant", 5e-5),
        Preset("fashion-mnist-fc5", "fashion-mnist", f"784-{_FC5}-10", 200, 0.01, "constant", 5e-5),
        _of_the_paper("cifar10-lenet", "cifar10", "LeNet", 0.01, 5e-5),
        Preset("cifar10-resnet18-8", "cifar10", "ResNet18-8", 10, 0.1, "cosine", 5e-5, 1, augment=True),
        _of_the_paper("cifar10-fc5", "cifar10", f"3072-{_FC5}-10", 0.01, 5e-5),
        _of_the_paper("cifar10-fc12", "cifar10", f"3072-{_FC12}-10", 0.01, 5e-5),
        _of_the_paper("cifar10-alexnet", "cifar10", "AlexNet", 0.01, 3e-5, "steps", warmup_epochs=5),
        _of_the_paper("cifar10-vgg16", "cifar10", "VGG16", 0.01, 1e-4, warmup_epochs=5),
        _of_the_paper("cifar100-resnet18", "cifar100", "ResNet18", 0.1, 5e-5, "cosine", warmup_epochs=5),
        _of_the_paper("cifar100-resnet50", "cifar100", "ResNet50", 0.1, 2e-5, "cosine", warmup_epochs=5),
        _of_the_paper("tiny-imagenet-resnet18", "tiny-imagenet", "ResNet18", 0.1, 5e-5, "cosine", 5),
        _of_the_paper("tiny-imagenet-resnet50", "tiny-imagenet", "ResNet50", 0.1, 2e-5, "cosine", 5),
    )
}


def find_preset(name: str, **settings: Any) -> Preset:
    """The preset of that name, with other settings (fields of `Preset`) where they are not None.

    When `epochs` is given, the preset's warm-up takes at most half of them.

    Raises:
        ValueError: there is no such preset, or a setting is out of range.

    Examples:
        >>> find_preset("digits", l1=0.0, epochs=None).l1
        0.0
        >>> find_preset("cifar10-vgg16", epochs=4).warmup_epochs
        2
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; the presets are {', '.join(PRESETS)}.")
    preset, given = PRESETS[name], {key: value for key, value in settings.items() if value is not None}
    if "epochs" in given:
        given = {"warmup_epochs": min(preset.warmup_epochs, given["epochs"] // 2)} | given
    return replace(preset, **given)


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
        ValueError: a file is not what it should be; there are fewer examples than options.num_examples, or
            no two batches of training to take the loss tolerance from.
    """
    if preset.dataset == "digits":
        dataset = data.load_digits()
    else:
        load = DATASETS[preset.dataset].load
        dataset = load(None if folder is None else Path(folder) / preset.dataset)
    train, test = dataset.train_images, dataset.test_images
    if options.num_examples is not None and options.num_examples > len(train):
        raise ValueError(f"num_examples must be at most {len(train)}, got {options.num_examples}.")
    if options.loss_tolerance is None and preset.batch_size >= len(train):
        raise ValueError(
            f"batch_size must be below {len(train)}, the number of examples, got {preset.batch_size}: the "
            "loss tolerance is the spread over batches. Or give a loss_tolerance."
        )
    if preset.network not in NETWORKS and train.ndim > 2:
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
    if preset.network in NETWORKS:
        source = DATASETS[preset.dataset]
        return NETWORKS[preset.network](source.num_classes, image_shape=source.image_shape, rngs=rngs)
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
