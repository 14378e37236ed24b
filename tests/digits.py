"""Trained networks on scikit-learn's digits, for tests that need one and do not ask how it was trained.

`data/digits.safetensors` holds their weights, made by

    python tests/digits.py

with the recipe of the preset "digits": 400 epochs (60 for the small ones) of batches of 128, a learning rate
that falls from .05 to 0 along a cosine, lambda = 5e-4, seed 0 or 1. `test_digits.py` trains them again.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import optax
from flax import nnx

import jaxlimit
from jaxlimit import data, models, training
from jaxlimit.training import model_files

PATH = Path(__file__).parent / "data" / "digits.safetensors"
PRESET = (64, 48, 24, 10)  # of `jaxlimit run` and the README: 4,464 weights
SMALL = (64, 10, 10)  # 740 weights
# Widths, seed, epochs.
NETWORKS = {"preset": (PRESET, 0, 400), "small-0": (SMALL, 0, 60), "small-1": (SMALL, 1, 60)}


@dataclass(frozen=True)
class Network:
    """A network, its data in batches of 128, and the standard deviation of the batches' losses."""

    predict: Any
    loss: Any
    params: Any
    batches: jaxlimit.Batches
    tolerance: float


@functools.cache
def arrays():
    """The training images and their labels."""
    digits = data.load_digits()
    return digits.train_images, digits.train_labels


@functools.cache
def trained(name: str) -> Network:
    """The network with the committed weights."""
    untrained = {key: start(*settings[:2])[1] for key, settings in NETWORKS.items()}
    params = model_files.load_params(PATH, untrained)[name]
    return with_params(start(*NETWORKS[name][:2])[0], params)


@functools.cache
def trained_again(widths: tuple[int, ...], seed: int, epochs: int) -> Network:
    """A network trained here."""
    predict, params = start(widths, seed)
    rate = optax.cosine_decay_schedule(0.05, epochs * training.steps_per_epoch(len(arrays()[1]), 128))
    loss, key = training.classification_loss(predict), jax.random.key(seed)
    return with_params(
        predict, training.train(loss, params, arrays(), key, epochs=epochs, learning_rate=rate, l1=5e-4)
    )


def start(widths: tuple[int, ...], seed: int):
    """`predict` and the parameters at random."""
    return models.from_nnx(models.FullyConnected(widths, rngs=nnx.Rngs(seed)))


def with_params(predict, params) -> Network:
    """The network at these parameters."""
    loss, batches = training.classification_loss(predict), jaxlimit.batched(arrays(), 128)
    return Network(predict, loss, params, batches, jaxlimit.loss_statistics(loss, params, batches).batch_std)


if __name__ == "__main__":
    model_files.save_params(PATH, {name: trained_again(*it).params for name, it in NETWORKS.items()})
