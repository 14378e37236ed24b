"""Three networks that others have trained, and their data, as bare functions.

The pruning literature compares itself on two: trained weights of IST-DASLab/WoodFisher (its folder
checkpoints), as .npz files with PyTorch's names and layouts in $JAXLIMIT_DATA/published: mlpnet-mnist.npz and
resnet20-cifar10.npz. The third is of the package cifar-10-model 7.4.0 on PyPI (Siddharth Gudiduri, BSD-3):
its cnn_model.h5, beside them, is read by h5py. MNIST and CIFAR-10 are those of `jaxlimit.data`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxlimit import data
from jaxlimit.core.trees import is_kernel
from jaxlimit.data.dataset import CIFAR10_NORMALIZATION
from jaxlimit.data.files import data_folder

Tree = Any
# Of the batch norm of ResNet20, and of Keras.
EPSILON, KERAS_EPSILON = 1e-5, 1e-3
# Three stages of three blocks; the first block of the second and of the third halves the image.
STAGES, BLOCKS = (1, 2, 3), (0, 1, 2)
# Examples of one forward pass.
CHUNK = 1000
SGD_BATCH = 64


@dataclass(frozen=True)
class Network:
    """A trained network and its data, whose training examples stand in an order drawn once.

    Attributes:
        predict: `predict(params, inputs) -> logits`.
        params: as published.
        prunable: `prunable(path, leaf)`: the weights that the literature prunes.
        train: inputs and labels.
        test: likewise.
    """

    predict: Callable[[Tree, Any], jax.Array]
    params: Tree
    prunable: Callable[[Any, Any], bool]
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]

    def outputs(self, params: Tree, inputs: np.ndarray) -> np.ndarray:
        """Logits of many examples."""
        found = [_forward(self.predict, params, inputs[i : i + CHUNK]) for i in range(0, len(inputs), CHUNK)]
        return np.concatenate(found)

    def accuracy(self, params: Tree, num_examples: int = 10_000) -> float:
        """On test examples, in per cent."""
        inputs, labels = (x[:num_examples] for x in self.test)
        return 100 * float(np.mean(self.outputs(params, inputs).argmax(1) == labels))


@partial(jax.jit, static_argnums=0)
def _forward(predict: Callable[[Tree, Any], jax.Array], params: Tree, inputs: jax.Array) -> jax.Array:
    return predict(params, inputs)


def mlpnet() -> Network:
    """784-40-20-10, ReLU, no biases."""
    file = np.load(data_folder("mnist").parent / "published" / "mlpnet-mnist.npz")
    params = [jnp.asarray(file[f"fc{i}.weight"].T) for i in (1, 2, 3)]
    digits = data.load_mnist()
    train, test = (
        (images.reshape(len(images), -1), labels)
        for images, labels in (
            (digits.train_images, digits.train_labels),
            (digits.test_images, digits.test_labels),
        )
    )
    return Network(_mlp, params, lambda path, leaf: True, _shuffled(*train), test)


def _mlp(params: Tree, images: Any) -> jax.Array:
    for kernel in params[:-1]:
        images = jax.nn.relu(images @ kernel)
    return images @ params[-1]


def resnet20() -> Network:
    """Of He et al. (2016), with projections in the two shortcuts that change the shape."""
    file = np.load(data_folder("mnist").parent / "published" / "resnet20-cifar10.npz")
    params = {name: jnp.asarray(_here(value)) for name, value in file.items()}
    photos = data.load_cifar10()
    train = _shuffled(_inputs(photos.train_images), photos.train_labels)
    test = _inputs(photos.test_images), photos.test_labels
    return Network(_resnet, params, _is_pruned, train, test)


def keras_cnn() -> Network:
    """Three pairs of convolutions with batch norm, and three dense layers; pixels of 0 to 255 go in.

    Its authors trained it on a random four fifths of the training images, which are not known.
    """
    import h5py  # pyright: ignore[reportMissingImports]

    with h5py.File(data_folder("mnist").parent / "published" / "cnn_model.h5") as file:
        layers: Any = file["model_weights"]
        params = {
            f"{layer}/{name.removesuffix(':0')}": jnp.asarray(array)
            for layer, group in layers.items()
            for name, array in group.get(layer, {}).items()
        }
    photos = data.load_cifar10()
    train = _shuffled(_pixels(photos.train_images), photos.train_labels)
    return Network(_keras, params, is_kernel, train, (_pixels(photos.test_images), photos.test_labels))


def _pixels(images: np.ndarray) -> np.ndarray:
    """0 to 255, as this network wants them."""
    mean, deviation = (np.asarray(x, np.float32) for x in CIFAR10_NORMALIZATION)
    return np.round(255 * (images * deviation + mean))


def _keras(params: Tree, images: Any) -> jax.Array:
    """As its file model.py builds it, in evaluation mode; its outputs, too, pass a ReLU."""
    hidden = images
    for number in range(6):
        name, norm = (f"{kind}_{number}" if number else kind for kind in ("conv2d", "batch_normalization"))
        hidden = jax.lax.conv_general_dilated(
            hidden, params[f"{name}/kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        hidden = jax.nn.relu(hidden + params[f"{name}/bias"])
        mean, variance, scale, bias = (
            params[f"{norm}/{part}"] for part in ("moving_mean", "moving_variance", "gamma", "beta")
        )
        hidden = (hidden - mean) * (scale / jnp.sqrt(variance + KERAS_EPSILON)) + bias
        if number in (1, 3):
            hidden = nnx.max_pool(hidden, (2, 2), strides=(2, 2))
    hidden = hidden.reshape(len(hidden), -1)
    for name in ("dense", "dense_1", "dense_2"):
        hidden = jax.nn.relu(hidden @ params[f"{name}/kernel"] + params[f"{name}/bias"])
    return hidden


def _here(value: np.ndarray) -> np.ndarray:
    """From PyTorch's layout."""
    if value.ndim == 4:
        return value.transpose(2, 3, 1, 0)
    return value.T if value.ndim == 2 else value


def _inputs(images: np.ndarray) -> np.ndarray:
    """Normalised as this network wants them: pixels in [0, 1] less .5, over .5."""
    mean, deviation = (np.asarray(x, np.float32) for x in CIFAR10_NORMALIZATION)
    images *= 2 * deviation
    images += 2 * mean - 1
    return images


def _is_pruned(path: Any, leaf: Any) -> bool:
    """All kernels but those of the shortcuts, as in the literature."""
    return leaf.ndim > 1 and "downsample" not in path[-1].key


def is_affine(path: Any, leaf: Any) -> bool:
    """Scales and biases of ResNet20, without the statistics of its batch norm."""
    return leaf.ndim == 1 and "running" not in path[-1].key


@jax.jit
def with_statistics_of(params: Tree, images: jax.Array) -> Tree:
    """ResNet20 with the statistics of batch norm that these images have, in one forward pass."""
    found = dict(params)
    _resnet(params, images, found)
    return found


def corrected_statistics(dense: Tree, images: jax.Array) -> Callable[[Tree], Tree]:
    """A function from a network to the same with statistics of its own, as `statistics_fn` of `prune`.

    They are those that the dense network brought from its training, changed as they change on these images
    from the dense network to the other one. What few images, or images that are not augmented, have of their
    own is in both, and cancels.
    """
    before = with_statistics_of(dense, images)

    @jax.jit
    def corrected(params: Tree) -> Tree:
        found = with_statistics_of(params, images)
        for name in [name for name in params if name.endswith("running_var")]:
            growth = found[name] / before[name]
            found[name] = dense[name] * growth
            mean = name.replace("running_var", "running_mean")
            found[mean] += (dense[mean] - before[mean]) * jnp.sqrt(growth)
        return found

    return corrected


def trained(params: Tree, mask: Tree, images: Any, targets: Any, rate: float) -> Tree:
    """ResNet20 after an epoch of SGD with the mask held; statistics of batch norm are those of each batch."""
    keep = {name: jnp.ones(()) if mask[name] is None else mask[name] for name in params}
    params = {name: x * keep[name] for name, x in params.items()}
    moving = {name: x for name, x in params.items() if "running" not in name}
    steps = len(images) // SGD_BATCH
    optimizer = optax.sgd(optax.cosine_decay_schedule(rate, steps), momentum=0.9)

    def loss(moving: Tree, images: Any, targets: Any) -> jax.Array:
        known: dict[str, jax.Array] = {**params, **moving}
        logits = _resnet(known, images, dict(known))
        return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), axis=1))

    @jax.jit
    def step(moving: Tree, moments: Any, images: Any, targets: Any) -> tuple[Tree, Any]:
        updates, moments = optimizer.update(jax.grad(loss)(moving, images, targets), moments)
        moved: Tree = optax.apply_updates(moving, updates)
        return {name: x * keep[name] for name, x in moved.items()}, moments

    moments = optimizer.init(moving)
    for start in range(0, steps * SGD_BATCH, SGD_BATCH):
        part = slice(start, start + SGD_BATCH)
        moving, moments = step(moving, moments, images[part], targets[part])
    return params | moving


def _resnet(params: Tree, images: Any, statistics: dict[str, jax.Array] | None = None) -> jax.Array:
    norm = partial(_normalized, params, statistics)
    hidden = jax.nn.relu(norm("bn1", _convolved(params, "conv1", images)))
    for stage in STAGES:
        for block in BLOCKS:
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            inputs = hidden
            hidden = jax.nn.relu(norm(f"{name}.bn1", _convolved(params, f"{name}.conv1", inputs, stride)))
            hidden = norm(f"{name}.bn2", _convolved(params, f"{name}.conv2", hidden))
            if stride > 1:
                inputs = _convolved(params, f"{name}.downsample.0", inputs, stride, padding=0)
                inputs = norm(f"{name}.downsample.1", inputs)
            hidden = jax.nn.relu(hidden + inputs)
    return hidden.mean((1, 2)) @ params["fc.weight"] + params["fc.bias"]


def _convolved(params: Tree, name: str, images: jax.Array, stride: int = 1, padding: int = 1) -> jax.Array:
    return jax.lax.conv_general_dilated(
        images,
        params[f"{name}.weight"],
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _normalized(
    params: Tree, statistics: dict[str, jax.Array] | None, name: str, images: jax.Array
) -> jax.Array:
    """Batch norm in evaluation mode; with the statistics of these images where they are wanted."""
    if statistics is not None:
        statistics[f"{name}.running_mean"] = images.mean((0, 1, 2))
        statistics[f"{name}.running_var"] = images.var((0, 1, 2))
    source = params if statistics is None else statistics
    scale, bias, mean, variance = (
        source[f"{name}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
    )
    return (images - mean) * (scale / jnp.sqrt(variance + EPSILON)) + bias


def _shuffled(inputs: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.random.default_rng(0).permutation(len(labels))
    return inputs[order], labels[order]
