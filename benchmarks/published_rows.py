"""The rows of benchmarks/published.py: those of other methods, and how ours are made."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from published_networks import is_affine

import jaxlimit
from jaxlimit.pruning.prune import AVERAGED, MAX_PRODUCTS

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)

Accuracies = tuple[float | None, ...]


@dataclass(frozen=True)
class Published:
    """A row of others: test accuracies in per cent, and gradients."""

    name: str
    accuracies: Accuracies
    gradients: int


@dataclass(frozen=True)
class Row:
    """A row of ours.

    Attributes:
        name: in words.
        num_examples: training images that it sees.
        batch_size: of the list of batches; windows are whole batches. None: `batched`, all at once.
        settings: of `jaxlimit.prune`.
        stages: to each sparsity; None: as many as the settings say.
        most: gradients; the last step is begun only if it fits, and may be tried again.
        soft: share of the dense network's outputs in the targets, beside the labels.
        trainable: which other parameters move.
        statistics: images from which those of batch norm are taken anew after each cut; 0: they are held.
        corrected: whether their noise is taken out, at the cost of those of the dense network.
        sparsities: where it is measured.
        averaged: last steps whose mean is taken.
    """

    name: str
    num_examples: int
    batch_size: int | None
    settings: jaxlimit.Settings
    stages: int | None = None
    most: float | None = None
    soft: float = 0.0
    trainable: Callable[[Any, Any], bool] | None = None
    statistics: int = 0
    corrected: bool = True
    sparsities: tuple[float, ...] = (0.0, *SPARSITIES)
    averaged: int = AVERAGED

    def max_products(self, sparsity: float) -> float:
        """Whose last step does not cross `most`, unless it is tried again."""
        if self.most is None:
            return MAX_PRODUCTS
        settings = self.settings
        step = 4 / 3 * settings.gradient_share + settings.step_products * settings.curvature_share
        return max((self.most - self.fixed_gradients(sparsity)) / self.num_examples - step, step)

    def settings_to(self, sparsity: float) -> jaxlimit.Settings:
        """Stages that each keep the same share."""
        if self.stages is None or sparsity == 0:
            return self.settings
        return replace(self.settings, stage_share=(1 - sparsity) ** (1 / self.stages))

    def fixed_gradients(self, sparsity: float) -> float:
        """Of soft targets, which are the dense network's outputs, and of statistics at each stage."""
        times = (1 if sparsity == 0 else self.stages or 0) + self.corrected
        return (self.num_examples * (self.soft > 0) + self.statistics * times) / 3


@dataclass(frozen=True)
class Trained:
    """A row of SGD, for comparison: momentum .9, batches of 64, a cosine, and batch norm as in training.

    Attributes:
        name: in words.
        num_examples: training images, each of which is seen once.
        rate: the first learning rate.
        soft: as in `Row`.
        statistics: images from which those of batch norm are taken at the end.
        sparsities: where it is measured.
    """

    name: str
    num_examples: int
    rate: float
    soft: float = 1.0
    statistics: int = 1000
    sparsities: tuple[float, ...] = (0.0, *SPARSITIES)


def shares(num_examples: int, gradient: int, curvature: int, **others: Any) -> jaxlimit.Settings:
    """Settings by numbers of images."""
    return jaxlimit.Settings(
        gradient_share=gradient / num_examples, curvature_share=curvature / num_examples, **others
    )


FEW = Row(
    "prune, 16,000",
    2000,
    25,
    shares(2000, 200, 100, step_products=3, damping=0.01),
    stages=10,
    most=15_300,
    soft=1.0,
)
MORE = Row(
    "prune, 256,000",
    32_000,
    500,
    shares(32_000, 4000, 500, step_products=5),
    stages=20,
    most=250_000,
)
# What keeps the accuracy where data are few: one thing is changed at a time.
VARIANTS = (
    replace(FEW, name="16,000, labels", soft=0.0),
    replace(FEW, name="16,000, half labels", soft=0.5),
    replace(FEW, name="16,000, damping a tenth", settings=replace(FEW.settings, damping=0.001)),
    replace(FEW, name="16,000, damping 10 times", settings=replace(FEW.settings, damping=0.1)),
    replace(FEW, name="16,000, stopped at 12,000", most=11_300),
    replace(MORE, name="256,000, half dense outputs", soft=0.5),
    replace(MORE, name="256,000, the last step alone", averaged=1),
    # With what the checks take.
    replace(
        FEW,
        name="16,000, checks among them",
        num_examples=1000,
        settings=shares(1000, 200, 100, step_products=3, damping=0.01),
        most=12_300,
    ),
    replace(
        MORE,
        name="256,000, checks among them",
        num_examples=16_000,
        settings=shares(16_000, 4000, 500, step_products=5),
        most=202_000,
    ),
)
ALL = Row("prune, all data", 60_000, None, jaxlimit.Settings(), most=6_200_000)
MLPNET_ROWS = (FEW, MORE, ALL, *VARIANTS)
MLPNET_OTHERS = (
    Published("CHITA, better solver", (94.00, 93.99, 93.86, 93.70, 92.52, 88.16, 48.39), 16_000),
    Published("CHITA++ LSB", (94.01, 94.04, 94.01, 93.76, 93.28, 91.52, 84.60), 256_000),
    Published("CHITA++ IHT", (None, None, None, 95.44, 95.33, 94.12, 88.11), 256_000),
)

AS_CHITA_PP = Row(
    "prune, 8,000",
    1000,
    50,
    shares(1000, 100, 50, step_products=2, damping=0.03),
    stages=1,
    most=7_950,
    soft=1.0,
    trainable=is_affine,
    statistics=500,
    sparsities=(0.0, 0.5, 0.6, 0.7, 0.8, 0.9),
)
AS_CHITA = replace(
    AS_CHITA_PP,
    name="prune, 1,000",
    num_examples=200,
    batch_size=25,
    settings=shares(200, 50, 25, step_products=2, damping=0.03),
    most=990,
    statistics=200,
    sparsities=(0.5, 0.6, 0.7, 0.8, 0.9),
)
# One thing is changed at a time.
RESNET20_VARIANTS = (
    replace(
        AS_CHITA_PP,
        name="8,000, statistics not corrected",
        corrected=False,
        sparsities=(0.0, 0.7, 0.8, 0.9),
    ),
    replace(
        AS_CHITA,
        name="1,000, statistics not corrected",
        corrected=False,
        sparsities=(0.6, 0.7, 0.8, 0.9),
    ),
    replace(AS_CHITA_PP, name="8,000, three stages", stages=3, sparsities=(0.9,)),
)
RESNET20_ROWS = (
    AS_CHITA_PP,
    AS_CHITA,
    Trained("SGD, 8,000", 5_700, 0.03, sparsities=(0.8, 0.9)),
    *RESNET20_VARIANTS,
)
RESNET20_OTHERS = (
    Published("CHITA, better ridge", (90.55, 88.02, 79.76, 61.67, 21.81, None, None), 1000),
    Published("CHITA++ LSB", (None, None, None, 84.13, 70.64, None, None), 8000),
)
