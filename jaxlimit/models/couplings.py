"""Which weights of our own networks go together: labels for `groups=`, one for each unit of a network.

A unit is what can be taken out of a network as a whole. Its group is what makes it; what reads it joins the
group only where it belongs to no other unit, for every weight has one label:

| unit | its weights |
|---|---|
| hidden unit, channel of a convolution | its output slice of the kernel |
| channel of a residual stream | its output slice of every kernel that adds to the stream |
| input of the last dense layer | its row, with the unit that it reads |
| attention head | its slices of query, key, value and output kernels |
| unit between `up` and `down` of a transformer | its column and its row |
| token, position or segment | its row of the embedding table |
"""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from jaxlimit.core.trees import PyTree
from jaxlimit.models.bert import Attention, EncoderLayer, SentenceEncoder
from jaxlimit.models.convolutional import ConvolutionalNetwork, convolve
from jaxlimit.models.fully_connected import FullyConnected
from jaxlimit.models.resnet import Block, Normalized, ResNet

Labels = NDArray[np.int64]
Labelled = tuple[nnx.Module, Labels, bool]
"""A module, labels of units, and whether its kernel makes them (along its last axis) or reads them."""


def unit_labels(model: nnx.Module, weights: PyTree) -> PyTree:
    """Labels of the units of a `FullyConnected`, convolutional, residual or BERT network of this package.

    Args:
        model: the network, of which only the architecture is looked at.
        weights: its prunable weights, as `curvature.weights`, named as `from_nnx` names parameters.

    Returns:
        Pytree of integers shaped like the weights, for `groups=`.

    Raises:
        ValueError: another kind of network, also one with parts of their own kind, or with a part in two
            places; weights that are no kernels or tables of it.

    Examples:
        >>> import jax.numpy as jnp
        >>> network = FullyConnected([2, 3, 1], rngs=nnx.Rngs(0))
        >>> kernels = {"layers": {"0": {"kernel": jnp.ones((2, 3))}, "1": {"kernel": jnp.ones((3, 1))}}}
        >>> labels = unit_labels(network, kernels)["layers"]
        >>> labels["0"]["kernel"].tolist(), labels["1"]["kernel"].tolist()
        ([[0, 1, 2], [0, 1, 2]], [[0], [1], [2]])
    """
    units = list(_units(model))
    require_plain(model)
    known = {id(_matrix(module)): (labels, made) for module, labels, made in units}
    found = {}
    for path, variable in nnx.iter_graph(model):
        if id(variable) in known:
            found[tuple(map(str, path))] = known[id(variable)]

    def label(path: tuple, leaf: Any) -> Labels:
        name = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
        if name not in found:
            raise ValueError(
                f"{jax.tree_util.keystr(path)} is no kernel of {type(model).__name__}: choose its kernels by "
                "prunable."
            )
        labels, made = found[name]
        along = labels if made or np.ndim(leaf) == 1 else labels[:, None]
        return np.broadcast_to(along, np.shape(leaf))

    return jax.tree_util.tree_map_with_path(label, weights)


# The networks whose couplings are known.
OURS = (FullyConnected, ConvolutionalNetwork, ResNet, SentenceEncoder)
# What they are made of.
LAYERS = (nnx.Linear, nnx.Conv, nnx.BatchNorm, nnx.LayerNorm, nnx.Embed)
PARTS = (*OURS, Block, Normalized, EncoderLayer, Attention, nnx.Sequential, *LAYERS)
CONTAINERS = (nnx.List, nnx.Dict)


def is_plain(module: Any, *classes: type) -> bool:
    """Whether a module computes what one of these classes does: it has its `__call__`."""
    return any(isinstance(module, kind) and type(module).__call__ is kind.__call__ for kind in classes)


def require_plain(model: nnx.Module) -> None:
    """Raises ValueError where a part computes something else than its class says, or stands in two places."""
    for first, second, *_ in nnx.find_duplicates(model):
        raise ValueError(
            f"{_named(first)} and {_named(second)} are one and the same: what stands in two places is not "
            "known well enough to be taken apart."
        )
    for path, module in sorted(nnx.iter_graph(model), key=lambda item: len(item[0])):  # the whole first
        if isinstance(module, nnx.Module) and not _is_known(module):
            raise ValueError(
                f"{_named(path)} is a {type(module).__name__} of its own kind, or with a function or a mask "
                f"of its own, and is not known well enough: {', '.join(kind.__name__ for kind in PARTS)} are."
            )


def _is_known(module: nnx.Module) -> bool:
    if type(module) in CONTAINERS:
        return True
    kind = next((kind for kind in PARTS if is_plain(module, kind)), None)
    if kind is None or getattr(module, "mask", None) is not None:
        return False
    defaults = {name: x.default for name, x in inspect.signature(kind.__init__).parameters.items()}
    functions = [name for name, x in defaults.items() if inspect.isroutine(x) and hasattr(module, name)]
    return all(getattr(module, name) in (defaults[name], convolve) for name in functions)


def _named(path: tuple) -> str:
    return ".".join(map(str, path)) or "the network"


class _Counter:
    """New labels, none of them twice."""

    def __init__(self) -> None:
        self._next = 0

    def __call__(self, number: int) -> Labels:
        self._next += number
        return np.arange(self._next - number, self._next)


def _units(model: nnx.Module) -> Iterator[Labelled]:
    new = _Counter()
    known = model if is_plain(model, *OURS) else None
    match known:
        case FullyConnected():
            yield from _dense(known.layers, None, new)
        case ConvolutionalNetwork():
            channels = np.zeros(0, int)
            for layer in known.convolutions:
                channels = new(layer.kernel.shape[-1])
                yield layer, channels, True
            inputs = known.dense.layers[0].kernel.shape[0]
            entering = np.resize(channels, inputs) if channels.size else None  # pixel by pixel
            yield from _dense(known.dense.layers, entering, new)
        case ResNet():
            yield from _residual(known, new)
        case SentenceEncoder():
            yield from _encoder(known, new)
        case _:
            raise ValueError(
                f"the units of a {type(model).__name__} are not known: FullyConnected, ConvolutionalNetwork "
                "(LeNet, CNet, AlexNet, VGG), ResNet and SentenceEncoder have labels; for others give "
                "integers shaped like the weights."
            )


def _dense(layers: Sequence[Any], entering: Labels | None, new: _Counter) -> Iterator[Labelled]:
    """Dense layers one after the other; the last one belongs to the units that it reads."""
    *hidden, last = layers
    for layer in hidden:
        entering = new(layer.kernel.shape[-1])
        yield layer, entering, True
    yield last, new(last.kernel.shape[0]) if entering is None else entering, False


def _residual(model: ResNet, new: _Counter) -> Iterator[Labelled]:
    """Blocks that add to a stream, which a projection ends."""
    stream = new(model.stem.convolution.kernel.shape[-1])
    yield model.stem.convolution, stream, True
    for block in model.blocks:
        *inner, last = block.layers
        for layer in inner:
            yield layer.convolution, new(layer.convolution.kernel.shape[-1]), True
        for projection in block.shortcut:
            stream = new(projection.convolution.kernel.shape[-1])
            yield projection.convolution, stream, True
        yield last.convolution, stream, True
    yield model.dense, stream, False


def _encoder(model: SentenceEncoder, new: _Counter) -> Iterator[Labelled]:
    """Heads and inner units of each layer, and the rows of the tables."""
    for table in (model.tokens, model.positions, model.segments):
        yield table, new(table.embedding.shape[0]), False
    for layer in model.layers:
        attention = layer.attention
        width = attention.query.kernel.shape[-1]
        heads = np.repeat(new(attention.num_heads), width // attention.num_heads)
        for module in (attention.query, attention.key, attention.value):
            yield module, heads, True
        yield attention.out, heads, False
        inner = new(layer.up.kernel.shape[-1])
        yield layer.up, inner, True
        yield layer.down, inner, False


def _matrix(module: Any) -> nnx.Variable:
    return module.embedding if isinstance(module, nnx.Embed) else module.kernel
