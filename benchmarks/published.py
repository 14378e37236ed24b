"""The benchmark of the field: test accuracy after pruning without SGD, beside published methods.

    python benchmarks/published.py --work DIR [--networks mlpnet resnet20]

Networks and data: published_networks.py. The rows of other methods are constants here, as measured with their
authors' public code: CHITA and CHITA++ (ICML 2023), which choose and update weights by a low-rank Fisher
matrix, and need no SGD either.

Our rows are `jaxlimit.prune`, for each sparsity from the dense network. "Gradients" are images whose
gradients a row takes: a Gauss-Newton product or a gradient over N images counts as N, a loss as N / 3, and so
do the dense network's outputs where these are the targets, and statistics of batch norm. What changes no
weight is given apart as "checks": two gradients and two losses of each image in `gauss_newton`, the pruned
network's loss, and the statistics of the dense network. Settings of a row are the same at all sparsities.
With few gradients they were chosen by the accuracy on training images that the row does not see; those of
ResNet20 at .9, with 8,000 gradients.

Each result is stored in DIR as soon as it is there. Results are in results/published.json, and tables in
results/published_NETWORK.md; the figure is published.png.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import common
import jax
import jax.numpy as jnp
import numpy as np
import published_networks
from published_networks import Network, corrected_statistics, with_statistics_of
from published_rows import (
    MLPNET_OTHERS,
    MLPNET_ROWS,
    RESNET20_OTHERS,
    RESNET20_ROWS,
    RESNET20_VARIANTS,
    SPARSITIES,
    VARIANTS,
    Published,
    Row,
    Trained,
)

import jaxlimit
from jaxlimit.core import trees

NAME = "published"
# Of each image: two gradients and two losses, and a loss at the end.
CHECKS = 3
# Images from which statistics of batch norm are taken anew.
STATISTICS = 1000


def predict(network: Network, params: Any, batch: Any) -> jax.Array:
    """Logits of a batch."""
    return network.predict(params, batch[0])


def loss(logits: jax.Array, batch: Any) -> jax.Array:
    """Cross entropy with targets that are probabilities."""
    return -jnp.mean(jnp.sum(batch[1] * jax.nn.log_softmax(logits), axis=1))


def targets_of(network: Network, num_examples: int, soft: float) -> tuple[np.ndarray, np.ndarray]:
    """Images with their targets, a share of which are the dense network's outputs."""
    images, labels = (x[:num_examples] for x in network.train)
    targets = np.eye(10, dtype=np.float32)[labels]
    if soft:
        dense = np.asarray(jax.nn.softmax(network.outputs(network.params, images)))
        targets = (soft * dense + (1 - soft) * targets).astype(np.float32)
    return images, targets


def batches_of(network: Network, row: Row) -> Any:
    """The images that a row sees, with their targets."""
    images, targets = targets_of(network, row.num_examples, row.soft)
    if row.batch_size is None:
        return jaxlimit.batched((images, targets), 1000)
    starts = range(0, row.num_examples, row.batch_size)
    return [(images[i : i + row.batch_size], targets[i : i + row.batch_size]) for i in starts]


def statistics_of(network: Network, row: Row) -> Callable[[Any], Any] | None:
    """The `statistics_fn` of a row."""
    if not row.statistics:
        return None
    images = jnp.asarray(network.train[0][: row.statistics])
    if row.corrected:
        return corrected_statistics(network.params, images)
    return partial(with_statistics_of, images=images)


def readjusted(network: Network, row: Row, sparsity: float) -> dict[str, Any]:
    """A network of a row."""
    start, processor, num_examples = time.perf_counter(), time.process_time(), row.num_examples
    with patch("jaxlimit.pruning.prune.AVERAGED", row.averaged):
        found = jaxlimit.prune(
            partial(predict, network),
            loss,
            network.params,
            batches_of(network, row),
            sparsity,
            prunable=network.prunable,
            trainable=row.trainable,
            statistics_fn=statistics_of(network, row),
            settings=row.settings_to(sparsity),
            max_products=row.max_products(sparsity),
        )
    elapsed = time.perf_counter() - start
    return {
        "accuracy": network.accuracy(found.params),
        "gradients": round(found.num_products * num_examples + row.fixed_gradients(sparsity)),
        "checks": round(CHECKS * num_examples + row.statistics / 3),
        "prune_seconds": round(elapsed, 1),
        "cpu_seconds": round(time.process_time() - processor, 1),  # with the test
        **found.to_json(),
    }


def trained(network: Network, row: Trained, sparsity: float) -> dict[str, Any]:
    """A network of a row of SGD, with the magnitude mask of the dense network."""
    mask = jaxlimit.magnitude_mask(trees.partition(network.params, network.prunable)[0], sparsity)
    images, targets = targets_of(network, row.num_examples, row.soft)
    params = published_networks.trained(network.params, mask, images, targets, row.rate)
    params = with_statistics_of(params, network.train[0][: row.statistics])
    spent = row.num_examples * (1 + (row.soft > 0) / 3) + row.statistics / 3
    return {"accuracy": network.accuracy(params), "gradients": round(spent)}


def made_by(network: Network, row: Row | Trained, sparsity: float) -> dict[str, Any]:
    """A network of a row of either kind."""
    return readjusted(network, row, sparsity) if isinstance(row, Row) else trained(network, row, sparsity)


def cut_alone(network: Network, statistics: str, sparsity: float) -> dict[str, Any]:
    """What the magnitude cut leaves, with statistics that are "held", "anew", or "corrected"."""
    mask = jaxlimit.magnitude_mask(trees.partition(network.params, network.prunable)[0], sparsity)
    params = jaxlimit.apply_mask(network.params, mask)
    images, passes = (
        jnp.asarray(network.train[0][:STATISTICS]),
        ("held", "anew", "corrected").index(statistics),
    )
    if statistics == "anew":
        params = with_statistics_of(params, images)
    if statistics == "corrected":
        params = corrected_statistics(network.params, images)(params)
    return {"accuracy": network.accuracy(params), "gradients": round(passes * STATISTICS / 3)}


@dataclass(frozen=True)
class Case:
    """A network with all rows; sparsities of the cuts, and the lowest accuracy that the figure shows."""

    title: str
    make: Callable[[], Network]
    cuts: Mapping[str, str]
    rows: tuple[Row | Trained, ...]
    published: tuple[Published, ...]
    sparsities: tuple[float, ...] = SPARSITIES
    lowest: float = 64.0


MLPNET = Case(
    "MLPNet, MNIST", published_networks.mlpnet, {"magnitude cut": "held"}, MLPNET_ROWS, MLPNET_OTHERS
)
RESNET20 = Case(
    "ResNet20, CIFAR-10",
    published_networks.resnet20,
    {"magnitude cut": "held", "cut, statistics anew": "anew", "cut, statistics corrected": "corrected"},
    RESNET20_ROWS,
    RESNET20_OTHERS,
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
        "dense": ((0.0,), lambda sparsity: cut_alone(network(), "held", sparsity))
    }
    for name, statistics in case.cuts.items():
        tasks[name] = case.sparsities, lambda s, statistics=statistics: cut_alone(network(), statistics, s)
    for row in case.rows:
        tasks[row.name] = row.sparsities, lambda s, row=row: made_by(network(), row, s)
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
        variants = {row.name for row in (*VARIANTS, *RESNET20_VARIANTS)}
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
        furthest = max(s for points in rows.values() for s in points)
        shown = [s for s in SPARSITIES if s <= furthest]
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
