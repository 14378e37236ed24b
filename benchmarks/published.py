"""The benchmark of the field: test accuracy after pruning without SGD, beside published methods.

    python benchmarks/published.py --work DIR [--networks mlpnet resnet20]

Networks and data: published_networks.py. The rows of other methods are constants here, as measured with their
authors' public code: CHITA and CHITA++ (ICML 2023), which choose and update weights by a low-rank Fisher
matrix, and need no SGD either.

Our rows are `jaxlimit.prune`, for each sparsity from the dense network. "Gradients" are images whose
gradients a row takes: a Gauss-Newton product or a gradient over N images counts as N, a loss as N / 3, and so
do the dense network's outputs where these are the targets. What changes no weight is given apart as "checks":
two gradients and two losses of each image in `gauss_newton`, and the pruned network's loss. Settings of a row
are the same at all sparsities. For MLPNet with few gradients they were chosen by the accuracy on training
images that the row does not see, for ResNet20 they were not varied.

Each result is stored in DIR as soon as it is there. Results are in results/published.json, and tables in
results/published_NETWORK.md; the figure is published.png.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import common
import jax
import jax.numpy as jnp
import numpy as np
import published_networks
from published_networks import Network

import jaxlimit
from jaxlimit.core import trees
from jaxlimit.pruning.prune import AVERAGED, MAX_PRODUCTS

NAME = "published"
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
# Of each image: two gradients and two losses, and a loss at the end.
CHECKS = 3
# Images from which statistics of batch norm are taken anew.
STATISTICS = 1000

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
        statistics: whether those of batch norm are taken anew from `STATISTICS` images after the magnitude
            cut, whose mask then stays; else masks are chosen along the path of `prune`.
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
    statistics: bool = False
    sparsities: tuple[float, ...] = (0.0, *SPARSITIES)
    averaged: int = AVERAGED

    @property
    def max_products(self) -> float:
        """Whose last step does not cross `most`, unless it is tried again."""
        if self.most is None:
            return MAX_PRODUCTS
        settings = self.settings
        step = 4 / 3 * settings.gradient_share + settings.step_products * settings.curvature_share
        return max((self.most - self.fixed_gradients) / self.num_examples - step, step)

    def settings_to(self, sparsity: float) -> jaxlimit.Settings:
        """Stages that each keep the same share."""
        if self.stages is None or sparsity == 0:
            return self.settings
        return replace(self.settings, stage_share=(1 - sparsity) ** (1 / self.stages))

    @property
    def fixed_gradients(self) -> float:
        """Of soft targets, which are the dense network's outputs, and of statistics."""
        return (self.num_examples * (self.soft > 0) + self.statistics * STATISTICS) / 3


def shares(num_examples: int, gradient: int, curvature: int, **others: Any) -> jaxlimit.Settings:
    """Settings by numbers of images."""
    return jaxlimit.Settings(
        gradient_share=gradient / num_examples, curvature_share=curvature / num_examples, **others
    )


def predict(network: Network, params: Any, batch: Any) -> jax.Array:
    """Logits of a batch."""
    return network.predict(params, batch[0])


def loss(logits: jax.Array, batch: Any) -> jax.Array:
    """Cross entropy with targets that are probabilities."""
    return -jnp.mean(jnp.sum(batch[1] * jax.nn.log_softmax(logits), axis=1))


def batches_of(network: Network, row: Row) -> Any:
    """The images that a row sees, with their targets."""
    images, labels = (x[: row.num_examples] for x in network.train)
    targets = np.eye(10, dtype=np.float32)[labels]
    if row.soft:
        dense = np.asarray(jax.nn.softmax(network.outputs(network.params, images)))
        targets = (row.soft * dense + (1 - row.soft) * targets).astype(np.float32)
    if row.batch_size is None:
        return jaxlimit.batched((images, targets), 1000)
    starts = range(0, row.num_examples, row.batch_size)
    return [(images[i : i + row.batch_size], targets[i : i + row.batch_size]) for i in starts]


def readjusted(network: Network, row: Row, sparsity: float) -> dict[str, Any]:
    """A network of a row."""
    start, num_examples = time.perf_counter(), row.num_examples
    params, mask = cut(network, row.statistics, sparsity) if row.statistics else (network.params, None)
    with patch("jaxlimit.pruning.prune.AVERAGED", row.averaged):
        found = jaxlimit.prune(
            partial(predict, network),
            loss,
            params,
            batches_of(network, row),
            None if row.statistics else sparsity,
            mask=mask,
            prunable=network.prunable,
            trainable=row.trainable,
            settings=row.settings_to(sparsity),
            max_products=row.max_products,
        )
    elapsed = time.perf_counter() - start
    return {
        "accuracy": network.accuracy(found.params),
        "gradients": round(found.num_products * num_examples + row.fixed_gradients),
        "checks": round(CHECKS * num_examples),
        "prune_seconds": round(elapsed, 1),
        **found.to_json(),
    }


def cut(network: Network, statistics: bool, sparsity: float) -> tuple[Any, Any]:
    """Parameters after the magnitude cut, with its mask."""
    mask = jaxlimit.magnitude_mask(trees.partition(network.params, network.prunable)[0], sparsity)
    params = jaxlimit.apply_mask(network.params, mask)
    if statistics:
        params = published_networks.with_statistics_of(params, jnp.asarray(network.train[0][:STATISTICS]))
    return params, mask


def cut_alone(network: Network, statistics: bool, sparsity: float) -> dict[str, Any]:
    """What the magnitude cut leaves."""
    params, _ = cut(network, statistics, sparsity)
    return {"accuracy": network.accuracy(params), "gradients": round(statistics * STATISTICS / 3)}


@dataclass(frozen=True)
class Case:
    """A network with all rows; sparsities of the cuts, and the lowest accuracy that the figure shows."""

    title: str
    make: Callable[[], Network]
    cuts: Mapping[str, bool]
    rows: tuple[Row, ...]
    published: tuple[Published, ...]
    sparsities: tuple[float, ...] = SPARSITIES
    lowest: float = 64.0


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
MLPNET = Case(
    "MLPNet, MNIST",
    published_networks.mlpnet,
    {"magnitude cut": False},
    (
        FEW,
        MORE,
        Row("prune, all data", 60_000, None, jaxlimit.Settings(), most=6_200_000),
        *VARIANTS,
    ),
    (
        Published("CHITA, better solver", (94.00, 93.99, 93.86, 93.70, 92.52, 88.16, 48.39), 16_000),
        Published("CHITA++ LSB", (94.01, 94.04, 94.01, 93.76, 93.28, 91.52, 84.60), 256_000),
        Published("CHITA++ IHT", (None, None, None, 95.44, 95.33, 94.12, 88.11), 256_000),
    ),
)
MORE_IMAGES = Row(
    "cut, statistics anew, prune",
    1000,
    100,
    shares(1000, 500, 100, step_products=5, damping=0.003),
    most=7_500,
    soft=1.0,
    statistics=True,
    sparsities=(0.8, 0.9),
)
AFFINE = replace(
    MORE_IMAGES,
    name="scales and biases move, too",
    trainable=published_networks.is_affine,
    sparsities=(0.9,),
)
RESNET20 = Case(
    "ResNet20, CIFAR-10",
    published_networks.resnet20,
    {"magnitude cut": False, "cut, statistics anew": True},
    (MORE_IMAGES, AFFINE),
    (
        Published("CHITA, better ridge", (90.55, 88.02, 79.76, 61.67, 21.81, None, None), 1000),
        Published("CHITA++ LSB", (None, None, None, 84.13, 70.64, None, None), 8000),
    ),
    (0.7, 0.8, 0.9),
    lowest=0.0,
)
CASES = {"mlpnet": MLPNET, "resnet20": RESNET20}


def results(case: Case, folder: Path) -> dict[str, dict[str, Any]]:
    """Of every row by sparsity; what is not stored yet is computed."""
    made: list[Network] = []

    def network() -> Network:
        if not made:
            made.append(case.make())
        return made[0]

    tasks: dict[str, tuple[tuple[float, ...], Callable[[float], dict[str, Any]]]] = {
        "dense": ((0.0,), lambda sparsity: cut_alone(network(), False, sparsity))
    }
    for name, statistics in case.cuts.items():
        tasks[name] = case.sparsities, lambda s, statistics=statistics: cut_alone(network(), statistics, s)
    for row in case.rows:
        tasks[row.name] = row.sparsities, lambda s, row=row: readjusted(network(), row, s)
    found = {}
    for name, (sparsities, compute) in tasks.items():
        parts = folder / name.replace(" ", "_").replace(",", "")
        found[name] = {f"{s:g}": common.step(parts / f"{s:g}.json", partial(compute, s)) for s in sparsities}
    return found


def table(case: Case, found: Mapping[str, Mapping[str, Any]]) -> str:
    """Test accuracies in per cent; with gradients at the sparsest network, and with those of the checks."""
    lines = []
    for name, row in found.items():
        cells = [row.get(f"{s:g}", {}).get("accuracy") for s in (0.0, *SPARSITIES)]
        most = max(part["gradients"] for part in row.values())
        checks = max(part.get("checks", 0) for part in row.values())
        lines.append([name, *map(_cell, cells), f"{most:,}", f"{checks:,}"])
    for row in case.published:
        lines.append([row.name, "", *map(_cell, row.accuracies), f"{row.gradients:,}", ""])
    heads = [case.title, "0", *(f"{s:g}" for s in SPARSITIES), "gradients", "checks"]
    return common.markdown(heads, lines)


def _cell(accuracy: float | None) -> str:
    return "" if accuracy is None else f"{accuracy:.2f}"


def plot(document: Mapping[str, Any]) -> None:
    """Accuracy against the share that is kept; other methods dashed."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(document), figsize=(5.5 * len(document), 4), layout="constrained", squeeze=False
    )
    for ax, (name, found) in zip(axes[0], document.items(), strict=True):
        rows = {
            row: {float(s): part["accuracy"] for s, part in parts.items()}
            for row, parts in found["rows"].items()
        }
        variants = {row.name for row in VARIANTS}
        dense = rows.pop("dense")[0.0]
        for row, points in rows.items():
            if row in variants:
                continue
            kept = [s for s in sorted(points) if s]
            ax.plot([1 - s for s in kept], [points[s] for s in kept], "o-", markersize=3, label=row)
        for row in found["published"]:
            points = [(1 - s, x) for s, x in zip(SPARSITIES, row["accuracies"], strict=True) if x is not None]
            ax.plot(*zip(*points, strict=True), "x--", label=row["name"])
        ax.axhline(dense, color="black", linewidth=0.5)
        ax.set(xscale="log", xlabel="share of the weights that is kept", ylabel="test accuracy, %")
        ax.set_ylim(CASES[name].lowest, dense + 4)
        ax.set_title(CASES[name].title)
        shown = [s for s in SPARSITIES if s <= max(CASES[name].sparsities)]
        ax.set_xticks([1 - s for s in shown], [f"{1 - s:.2g}" for s in shown])
        ax.minorticks_off()
        ax.invert_xaxis()
        ax.legend(fontsize=7)
    figure.savefig(common.FIGURES / f"{NAME}.png", dpi=120)
    plt.close(figure)


def main() -> None:
    """As typed on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of the parts")
    parser.add_argument("--networks", nargs="+", choices=list(CASES), default=list(CASES))
    options = parser.parse_args()
    document = common.read_document(NAME).get("networks", {})
    for name in options.networks:
        document[name] = {
            "rows": results(CASES[name], options.work / name),
            "published": [vars(row) for row in CASES[name].published],
            "environment": common.environment(),
        }
    command = "python benchmarks/published.py --work DIR"
    common.write_document(NAME, {"command": command, "networks": document})
    for name in options.networks:
        common.write_table(f"{NAME}_{name}", table(CASES[name], document[name]["rows"]))
    plot(document)


if __name__ == "__main__":
    main()
