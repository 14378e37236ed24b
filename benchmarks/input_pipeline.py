"""What share of an epoch of training goes into its input: shuffling, gathering and augmenting the batches.

    python benchmarks/input_pipeline.py

`training.train_model` holds the images on the device and prepares each batch inside the compiled epoch. Here
the epoch of some networks on CIFAR-10, read from $JAXLIMIT_DATA, is timed beside the same preparation alone.
The two take turns, and the fastest of each counts. Results are in results/input_pipeline.json and .md.
"""

import time
from collections.abc import Callable
from typing import Any

import common
import jax
import jax.numpy as jnp

from jaxlimit import training
from jaxlimit.application.presets import Arrays, Options, build_network, find_preset, load_arrays

NAME = "input_pipeline"
BATCH_SIZE = 128
ROUNDS = 3
# Preset, and updates in an epoch: as many as take seconds on one core.
NETWORKS = {"cifar10-fc5": 40, "cifar10-lenet": 20, "cifar10-vgg16": 2}


def epoch_seconds(name: str, arrays: Arrays) -> float:
    """Of the second epoch of training, which compiles nothing."""
    preset, ends = find_preset(name), []
    training.train_model(
        build_network(preset, seed=0),
        arrays,
        jax.random.key(0),
        epochs=2,
        batch_size=BATCH_SIZE,
        learning_rate=1e-3,
        l1=preset.recipe.l1,
        augment=preset.augmentation(),
        on_epoch=lambda *_: ends.append(time.perf_counter()),
    )
    return ends[1] - ends[0]


def input_alone(name: str, arrays: Arrays) -> Callable[[], jax.Array]:
    """The preparation of all batches of an epoch, each reduced to a number so that none is left out."""
    augment = find_preset(name).augmentation() or (lambda key, images: images)

    @jax.jit
    def prepare(images: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
        def batch(total: jax.Array, indices: jax.Array) -> tuple[jax.Array, None]:
            inputs = augment(jax.random.fold_in(key, indices[0]), images[indices])
            return total + inputs.sum() + labels[indices].sum(), None

        order = jax.random.permutation(key, len(images)).reshape(-1, BATCH_SIZE)
        return jax.lax.scan(batch, jnp.zeros(()), order)[0]

    images, labels = jax.tree.map(jnp.asarray, arrays)
    jax.block_until_ready(prepare(images, labels, jax.random.key(0)))
    return lambda: prepare(images, labels, jax.random.key(1))


def measure(name: str, updates: int) -> dict[str, Any]:
    """Seconds an update, for one network."""
    (images, labels), _ = load_arrays(find_preset(name), Options())
    arrays = images[: updates * BATCH_SIZE], labels[: updates * BATCH_SIZE]
    prepare = input_alone(name, arrays)
    epochs, inputs = [], []
    for _ in range(ROUNDS):
        epochs.append(epoch_seconds(name, arrays))
        inputs += [common.seconds(prepare) for _ in range(3)]
    epoch, alone = min(epochs) / updates, min(inputs) / updates
    return {"network": name, "updates": updates, "update": epoch, "input": alone, "share": alone / epoch}


def main() -> None:
    rows = [measure(name, updates) for name, updates in NETWORKS.items()]
    cells = [
        [
            row["network"],
            f"{1e3 * row['update']:.0f} ms",
            f"{1e3 * row['input']:.2f} ms",
            f"{row['share']:.1%}",
        ]
        for row in rows
    ]
    table = common.markdown(("network", "update", "its input", "share"), cells)
    document = {"command": f"python benchmarks/{NAME}.py", "batch_size": BATCH_SIZE, "networks": rows}
    common.write(NAME, document, table)


if __name__ == "__main__":
    main()
