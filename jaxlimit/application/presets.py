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
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np
from flax import nnx

from jaxlimit import data, models
from jaxlimit.training.losses import CURVATURES
from jaxlimit.training.recipe import Recipe

Arrays = tuple[np.ndarray, np.ndarray]
Groups = Literal["units", "output_channels", "input_channels"]


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
        recipe: how the network is trained. The standard deviation of the losses of its batches is the default
            loss tolerance.
        augment: random crops and flips in training.
        finetune_steps: full-batch steps of Adam at each of some fifty sparsities, to compare with the network
            that is attained; 0 leaves them out.

    Raises:
        ValueError: a setting out of range.
    """

    name: str
    dataset: str
    network: str
    recipe: Recipe
    augment: bool = False
    finetune_steps: int = 0

    def __post_init__(self) -> None:
        if self.finetune_steps < 0:
            raise ValueError(f"finetune_steps must be at least 0, got {self.finetune_steps}.")
        if self.augment and self.dataset not in DATASETS:
            raise ValueError(f"augment crops and flips images: {self.dataset} is not meant for that.")

    def to_json(self) -> dict[str, Any]:
        """All settings side by side, without those that no preset changes.

        Examples:
            >>> find_preset("digits", l1=0.0).to_json()["l1"]
            0.0
        """
        recipe = {
            name: value
            for name, value in asdict(self.recipe).items()
            if name not in SHARED or value != getattr(SGD, name)
        }
        names = {name: getattr(self, name) for name in ("name", "dataset", "network")}
        return names | recipe | {"augment": self.augment, "finetune_steps": self.finetune_steps}

    def changed(self, **settings: Any) -> "Preset":
        """The preset with other settings, as for `find_preset`."""
        given = {name: value for name, value in settings.items() if value is not None}
        training = {field.name: given.pop(field.name) for field in fields(Recipe) if field.name in given}
        if "epochs" in training:
            warmup = min(self.recipe.warmup_epochs, training["epochs"] // 2)
            training = {"warmup_epochs": warmup} | training
        return replace(self, recipe=replace(self.recipe, **training), **given)

    def augmentation(self) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
        """The random crops and flips, for images in the shape that `load_arrays` gives them."""
        if not self.augment or self.network in NETWORKS:
            return data.random_crop_and_flip if self.augment else None
        height, width, channels = DATASETS[self.dataset].image_shape

        def augment(key: jax.Array, flat: jax.Array) -> jax.Array:
            images = flat.reshape(-1, channels, height, width).transpose(0, 2, 3, 1)
            return data.random_crop_and_flip(key, images).transpose(0, 3, 1, 2).reshape(flat.shape)

        return augment


# What the presets share. The learning rate of "steps" is halved after 60, 120 and 160 of 200 epochs.
SGD = Recipe(
    epochs=200,
    learning_rate=0.01,
    schedule="constant",
    milestones=(0.3, 0.6, 0.8),
    factor=0.5,
    weight_decay=0.0,
    l1=5e-5,
)
SHARED = ("milestones", "factor", "weight_decay")


def _preset(name: str, dataset: str, network: str, *, augment: bool = True, **changes: Any) -> Preset:
    return Preset(name, dataset, network, replace(SGD, **changes), augment)


_FC5 = "1000-600-300-100"
_FC12 = "1000-900-800-750-700-650-600-500-400-200-100"
_DIGITS: dict[str, Any] = {"epochs": 400, "learning_rate": 0.05, "schedule": "cosine", "l1": 5e-4}
_RESNET: dict[str, Any] = {"learning_rate": 0.1, "schedule": "cosine", "warmup_epochs": 5}
_SHORT: dict[str, Any] = _RESNET | {"epochs": 10, "warmup_epochs": 1}
PRESETS = {
    preset.name: preset
    for preset in (
        _preset("digits", "digits", "64-48-24-10", augment=False, **_DIGITS),
        _preset("mnist-fc2", "mnist", "784-100-10", augment=False, epochs=10),
        _preset("mnist-fc5", "mnist", f"784-{_FC5}-10", augment=False),
        _preset("fashion-mnist-fc5", "fashion-mnist", f"784-{_FC5}-10", augment=False),
        _preset("cifar10-lenet", "cifar10", "LeNet"),
        _preset("cifar10-resnet18-8", "cifar10", "ResNet18-8", **_SHORT),
        _preset("cifar10-fc5", "cifar10", f"3072-{_FC5}-10"),
        _preset("cifar10-fc12", "cifar10", f"3072-{_FC12}-10"),
        _preset("cifar10-alexnet", "cifar10", "AlexNet", schedule="steps", warmup_epochs=5, l1=3e-5),
        _preset("cifar10-vgg16", "cifar10", "VGG16", warmup_epochs=5, l1=1e-4),
        _preset("cifar100-resnet18", "cifar100", "ResNet18", **_RESNET),
        _preset("cifar100-resnet50", "cifar100", "ResNet50", **_RESNET, l1=2e-5),
        _preset("tiny-imagenet-resnet18", "tiny-imagenet", "ResNet18", **_RESNET),
        _preset("tiny-imagenet-resnet50", "tiny-imagenet", "ResNet50", **_RESNET, l1=2e-5),
    )
}


def find_preset(name: str, **settings: Any) -> Preset:
    """The preset of that name, with other settings where they are not None.

    When `epochs` is given, the preset's warm-up takes at most half of them.

    Args:
        name: of the preset.
        settings: fields of `Recipe` and of `Preset`, but for its names.

    Raises:
        ValueError: there is no such preset, or a setting is out of range.

    Examples:
        >>> find_preset("digits", l1=0.0, epochs=None).recipe.l1
        0.0
        >>> find_preset("cifar10-vgg16", epochs=4).recipe.warmup_epochs
        2
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; the presets are {', '.join(PRESETS)}.")
    return PRESETS[name].changed(**settings)


@dataclass(frozen=True)
class Options:
    """What decides the numbers of a run beside the preset.

    Attributes:
        seed: seed of the initial weights, the order of the examples and the probes.
        curvature: the matrix of the loss: Gauss-Newton foretells what is attained, the Hessian is the
            paper's.
        tolerance: wanted accuracy of the limits, in sparsity.
        loss_tolerance: eps, by how much the training loss may rise, in nats; None: the standard deviation of
            the losses of the training batches.
        num_examples: how many of the training examples give the loss that is predicted and measured, the
            first ones; training and the default loss tolerance take all. None: all.
        groups: what is pruned as a whole: units (hidden units and channels with what is coupled to them,
            which `jaxlimit.shrink` takes out), or slices of each kernel; None: single weights.
    """

    seed: int = 0
    curvature: Literal["both", "hessian", "gauss_newton"] = "both"
    tolerance: float = 1e-3
    loss_tolerance: float | None = None
    num_examples: int | None = None
    groups: Groups | None = None

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
        if self.groups not in (None, *get_args(Groups)):
            raise ValueError(f"groups must be {', '.join(get_args(Groups))} or None, got {self.groups!r}.")

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
    if options.loss_tolerance is None and preset.recipe.batch_size >= len(train):
        raise ValueError(
            f"batch_size must be below {len(train)}, the number of examples, got {preset.recipe.batch_size}: "
            "the loss tolerance is the spread over batches. Or give a loss_tolerance."
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
    rows = [_row(preset, preset.recipe) for preset in PRESETS.values()]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (heads, *rows)
    )


def _row(preset: Preset, recipe: Recipe) -> tuple[str, ...]:
    rate = f"{recipe.learning_rate:g} {recipe.schedule}"
    numbers = str(recipe.epochs), rate, f"{recipe.l1:g}", str(recipe.batch_size)
    return preset.name, preset.dataset, preset.network, *numbers
