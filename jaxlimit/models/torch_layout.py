"""One table of the correspondence with PyTorch, read in both directions: names of arrays, and their layouts.

    tensor        PyTorch                        here
    dense         (out, in)                      (in, out)
    convolution   (out, in, height, width)       (height, width, in, out)
    features      flattened (channel, h, w)      flattened (h, w, channel): rows of the first dense kernel

Names are those of the paper's code: `linear.0.weight`, `conv.3.bias`: the number is the position in the
sequence, in which batch norm, ReLU and pools count. A ResNet has the names of the public CIFAR networks that
this code follows: `conv1`, `bn1`, `layer2.0.conv1`, `layer2.0.shortcut.0`, `linear`.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from numpy.typing import NDArray

from jaxlimit.models.convolutional import ConvolutionalNetwork, Pool
from jaxlimit.models.fully_connected import FullyConnected
from jaxlimit.models.resnet import Normalized, ResNet

# The axes of PyTorch's arrays, as axes of ours, by their number.
AXES = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}
Features = tuple[int, ...] | None
Layer = nnx.Linear | nnx.Conv | nnx.BatchNorm
Place = tuple[str, Layer, Features]


class Entry(NamedTuple):
    """An array of a network.

    Attributes:
        name: PyTorch's.
        path: as in the parameters that `from_nnx` gives, such as layers.0.kernel.
        variable: that holds it.
        features: (h, w, c) of the images whose features are the rows of a dense kernel; else None.
    """

    name: str
    path: str
    variable: nnx.Variable
    features: Features

    def to_torch(self, array: NDArray[Any]) -> NDArray[Any]:
        """The array, or the mask of it, in PyTorch's layout."""
        images = array if self.features is None else array.reshape(*self.features, -1)
        turned = images.transpose(AXES[images.ndim])
        return turned if self.features is None else turned.reshape(len(turned), -1)

    def from_torch(self, array: NDArray[Any]) -> NDArray[Any]:
        """The inverse of `to_torch`; of an array that is not the network's, something of another shape."""
        images, features = array, self.features
        if features is not None and array.ndim == 2 and array.shape[1] == math.prod(features):
            height, width, channels = features
            images = array.reshape(-1, channels, height, width)
        turned = images.transpose(np.argsort(AXES.get(images.ndim, range(images.ndim))))
        return turned if images is array else turned.reshape(-1, turned.shape[-1])


def entries(model: nnx.Module) -> Iterator[Entry]:
    """All parameters and running statistics of a network, layer by layer.

    Raises:
        ValueError: no network of `jaxlimit.models` that has names in PyTorch.

    Examples:
        >>> [(entry.name, entry.path) for entry in entries(FullyConnected([4, 3], rngs=nnx.Rngs(0)))]
        [('linear.0.weight', 'layers.0.kernel'), ('linear.0.bias', 'layers.0.bias')]
    """
    graph = nnx.iter_graph(model)
    paths = {id(node): ".".join(map(str, path)) for path, node in graph if isinstance(node, nnx.Variable)}
    for layer_name, layer, features in layers(model):
        for name, variable in _arrays(layer).items():
            if variable is not None:
                rows = features if name == "weight" else None
                yield Entry(f"{layer_name}.{name}", paths[id(variable)], variable, rows)


def _arrays(layer: Layer) -> dict[str, nnx.Variable | None]:
    """The arrays of a layer under PyTorch's names; None where it has none."""
    if isinstance(layer, nnx.BatchNorm):
        running = {"running_mean": layer.mean, "running_var": layer.var}
        return {"weight": layer.scale, "bias": layer.bias, **running}
    return {"weight": layer.kernel, "bias": layer.bias}


def layers(model: nnx.Module) -> Iterator[Place]:
    """PyTorch's name of every layer, the layer, and for a dense one on features their (h, w, c)."""
    if isinstance(model, FullyConnected):
        for number, layer in enumerate(model.layers):
            yield f"linear.{2 * number}", layer, None
    elif isinstance(model, ConvolutionalNetwork):
        position, number = 0, 0
        for layer in model.layers:
            if not isinstance(layer, Pool):
                yield f"conv.{position}", model.convolutions[number], None
                if model.norms:
                    position += 1
                    yield f"conv.{position}", model.norms[number], None
                position, number = position + 1, number + 1  # the ReLU
            position += 1
        for number, layer in enumerate(model.dense.layers):
            yield f"linear.{2 * number}", layer, None if number else model.features
    elif isinstance(model, ResNet):
        yield from _normalized(model.stem, "conv1", "bn1")
        for name, block in zip(_block_names(model), model.blocks, strict=True):
            for number, layer in enumerate(block.layers, 1):
                yield from _normalized(layer, f"{name}.conv{number}", f"{name}.bn{number}")
            for layer in block.shortcut:
                yield from _normalized(layer, f"{name}.shortcut.0", f"{name}.shortcut.1")
        yield "linear", model.dense, None
    else:
        raise ValueError(f"model must be a network of jaxlimit.models, got a {type(model).__name__}.")


def _normalized(layer: Normalized, name: str, norm: str) -> Iterator[Place]:
    yield name, layer.convolution, None
    yield norm, layer.norm, None


def _block_names(model: ResNet) -> Iterator[str]:
    for stage, count in enumerate(model.num_blocks, 1):
        yield from (f"layer{stage}.{number}" for number in range(count))
