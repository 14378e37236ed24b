"""How the weights of a network are trained: the part of a method's recipe that methods share."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypedDict, TypeVar

import jax
import optax
from flax import nnx

from jaxlimit.core.checks import as_real, require_range
from jaxlimit.core.trees import PyTree
from jaxlimit.training.classifier import train_model
from jaxlimit.training.schedule import SCHEDULES, Schedule, learning_rate_schedule, steps_per_epoch

Model = TypeVar("Model", bound=nnx.Module)
Folder = str | os.PathLike[str] | None


class TrainingOptions(TypedDict, total=False):
    """What every method passes on to `jaxlimit.training.train_model`.

    Attributes:
        augment: `augment(key, inputs) -> inputs`, applied to every batch.
        on_epoch: `on_epoch(epoch, mean_loss)`, called after each epoch of each training.
    """

    augment: Callable[[jax.Array, jax.Array], jax.Array] | None
    on_epoch: Callable[[int, float], None] | None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Stochastic gradient descent with momentum.

    The defaults are what the papers of iterative pruning and Smart-Ratio share for ResNets on CIFAR-10: 160
    epochs at rate .1, a tenth of it after 80 and again after 120, momentum .9, weight decay 1e-4.

    Attributes:
        epochs: passes over the training data.
        learning_rate: rate after the warm-up.
        schedule: what the rate does then: cosine falls to 0, steps falls by a factor at each milestone.
        l1: lambda, the weight of the L1 term, on all parameters.
        warmup_epochs: epochs in which the rate grows linearly from 0.
        momentum: momentum of the gradient.
        batch_size: examples in an update.
        milestones: shares of the epochs after which the rate of steps falls.
        factor: what the rate of steps is multiplied by at a milestone.
        weight_decay: weight of the squared parameters, all of them.

    Raises:
        ValueError: a number outside its range.

    Examples:
        >>> rate = Recipe().rate(num_examples=50_000)  # 391 updates an epoch
        >>> [round(float(rate(epoch * 391)), 6) for epoch in (0, 79, 80, 120)]
        [0.1, 0.1, 0.01, 0.001]
    """

    epochs: int = 160
    learning_rate: float = 0.1
    schedule: Schedule = "steps"
    l1: float = 0.0
    warmup_epochs: int = 0
    momentum: float = 0.9
    batch_size: int = 128
    milestones: tuple[float, ...] = (80 / 160, 120 / 160)
    factor: float = 0.1
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("warmup_epochs", 0)):
            value = getattr(self, name)
            require_range(name, value, isinstance(value, Integral), "an integer")
            require_range(name, value, value >= least, f"at least {least}")
        warm = self.warmup_epochs <= self.epochs
        require_range("warmup_epochs", self.warmup_epochs, warm, f"at most epochs = {self.epochs}")
        require_range("schedule", self.schedule, self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
        shares = len(self.milestones) > 0 and all(0 <= share <= 1 for share in self.milestones)
        allowed = "one or more shares of the epochs, from 0 to 1"
        require_range("milestones", self.milestones, shares, allowed)
        require_range("momentum", self.momentum, 0 <= as_real(self.momentum) < 1, "at least 0 and below 1")
        for name in ("learning_rate", "factor"):
            value = getattr(self, name)
            require_range(name, value, 0 < as_real(value) < math.inf, "positive and finite")
        for name in ("weight_decay", "l1"):
            value = getattr(self, name)
            require_range(name, value, 0 <= as_real(value) < math.inf, "finite and at least 0")

    def updates(self, num_examples: int) -> int:
        """Number of updates in all epochs."""
        return self.epochs * steps_per_epoch(num_examples, self.batch_size)

    def rate(self, num_examples: int) -> float | optax.Schedule:
        """The learning rate in the form that `jaxlimit.training.train` takes."""
        return learning_rate_schedule(
            self.schedule,
            self.learning_rate,
            epochs=self.epochs,
            updates_per_epoch=steps_per_epoch(num_examples, self.batch_size),
            warmup_epochs=self.warmup_epochs,
            milestones=self.milestones,
            factor=self.factor,
        )

    def train(
        self,
        model: Model,
        arrays: tuple[Any, Any],
        key: jax.Array,
        *,
        mask: PyTree | None = None,
        epochs: int | None = None,
        learning_rate: float | optax.Schedule | None = None,
        checkpoint: Folder = None,
        augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
        on_epoch: Callable[[int, float], None] | None = None,
    ) -> Model:
        """`jaxlimit.training.train_model` with these settings, or other epochs and another rate."""
        return train_model(
            model,
            arrays,
            key,
            epochs=self.epochs if epochs is None else epochs,
            batch_size=self.batch_size,
            learning_rate=self.rate(len(arrays[1])) if learning_rate is None else learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            l1=self.l1,
            mask=mask,
            augment=augment,
            on_epoch=on_epoch,
            checkpoint=checkpoint,
        )
