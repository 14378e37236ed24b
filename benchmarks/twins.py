"""The networks of networks.py in PyTorch: the same parameters, outputs and batches, in PyTorch's layout.

A twin mirrors the attributes of its NNX model, so that `layers/0/kernel` there is `layers.0.weight` here:

    tensor        NNX                            PyTorch
    dense         (in, out)                      (out, in)
    convolution   (height, width, in, out)       (out, in, height, width)
    features      flattened (h, w, channel)      flattened (channel, h, w): rows of the first dense kernel
    images        (batch, h, w, channels)        (batch, channels, h, w)

Only the prunable weights require gradients: that is how a user of any peer restricts it to them. Attention is
written out, because PyTorch's fused one has no second derivative on a CPU.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import networks
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from flax import nnx, traverse_util
from numpy.typing import NDArray
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

from jaxlimit import models
from jaxlimit.models.convolutional import Pool
from jaxlimit.models.resnet import Block, Normalized, ResNet

# Differences of the outputs, over the largest: float32 rounding through up to 20 layers.
OUTPUT_TOLERANCE = 1e-4


class TorchFullyConnected(nn.Module):
    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*ends) for ends in pairwise(widths))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        *hidden, last = self.layers
        for layer in hidden:
            inputs = F.relu(layer(inputs))
        return last(inputs)


class TorchConvolutional(nn.Module):
    def __init__(self, model: models.ConvolutionalNetwork):
        super().__init__()
        self.order = model.layers
        self.convolutions = nn.ModuleList(map(_convolution, model.convolutions))
        self.norms = nn.ModuleList(nn.BatchNorm2d(norm.num_features) for norm in model.norms)
        self.dense = TorchFullyConnected(model.dense.widths)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        number = 0
        for layer in self.order:
            if isinstance(layer, Pool):
                images = F.max_pool2d(images, layer.size, layer.strides)
                continue
            images = self.convolutions[number](images)
            images = F.relu(self.norms[number](images) if self.norms else images)
            number += 1
        return self.dense(images.flatten(1))


class TorchNormalized(nn.Module):
    def __init__(self, model: Normalized):
        super().__init__()
        self.convolution = _convolution(model.convolution)
        self.norm = nn.BatchNorm2d(model.norm.num_features)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm(self.convolution(images))


class TorchBlock(nn.Module):
    def __init__(self, model: Block):
        super().__init__()
        self.layers = nn.ModuleList(map(TorchNormalized, model.layers))
        self.shortcut = nn.ModuleList(map(TorchNormalized, model.shortcut))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        *first, last = self.layers
        residual = images
        for layer in first:
            residual = F.relu(layer(residual))
        for projection in self.shortcut:
            images = projection(images)
        return F.relu(last(residual) + images)


class TorchResNet(nn.Module):
    def __init__(self, model: ResNet):
        super().__init__()
        self.stem = TorchNormalized(model.stem)
        self.blocks = nn.ModuleList(map(TorchBlock, model.blocks))
        self.dense = nn.Linear(model.dense.in_features, model.dense.out_features)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = F.relu(self.stem(images))
        for block in self.blocks:
            features = block(features)
        return self.dense(features.mean((2, 3)))


class TorchAttention(nn.Module):
    future: torch.Tensor

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        future = torch.ones(networks.CONTEXT, networks.CONTEXT, dtype=torch.bool).triu(1)
        self.register_buffer("future", future, persistent=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        batch, length, width = hidden.shape
        heads = (batch, length, self.num_heads, width // self.num_heads)
        query, key, value = (
            f(hidden).reshape(heads).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(2, 3) / math.sqrt(heads[-1])
        scores = scores.masked_fill(self.future[:length, :length], -math.inf)
        mixed = scores.softmax(-1) @ value
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class TorchLayer(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = TorchAttention(width, num_heads)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden))
        return hidden + self.down(F.gelu(self.up(self.norm(hidden)), approximate="tanh"))


class TorchTransformer(nn.Module):
    def __init__(self, model: networks.Transformer):
        super().__init__()
        width = model.tokens.features
        self.tokens = nn.Embedding(model.tokens.num_embeddings, width)
        self.positions = nn.Embedding(model.positions.num_embeddings, width)
        self.layers = nn.ModuleList(TorchLayer(width, layer.attention.num_heads) for layer in model.layers)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, model.head.out_features)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(self.norm(hidden))


class MeanCrossEntropy(nn.CrossEntropyLoss):
    """Over examples, or over all tokens of all examples; classes last, as the networks give them."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return super().forward(input.flatten(0, -2), target.flatten())


def _convolution(layer: nnx.Conv) -> nn.Conv2d:
    options: dict[str, Any] = {"stride": layer.strides, "padding": layer.padding}
    bias = layer.bias is not None
    return nn.Conv2d(layer.in_features, layer.out_features, layer.kernel_size[0], bias=bias, **options)


def _network(model: nnx.Module) -> nn.Module:
    if isinstance(model, models.FullyConnected):
        return TorchFullyConnected(model.widths)
    if isinstance(model, models.ConvolutionalNetwork):
        return TorchConvolutional(model)
    if isinstance(model, ResNet):
        return TorchResNet(model)
    if isinstance(model, networks.Transformer):
        return TorchTransformer(model)
    raise ValueError(f"there is no PyTorch twin of a {type(model).__name__}.")


_NAMES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
}


def _torch_name(path: tuple[Any, ...]) -> str:
    *parents, name = map(str, path)
    return ".".join([*parents, _NAMES.get(name, name)])


def _torch_layout(path: tuple[Any, ...], array: NDArray, model: nnx.Module) -> NDArray:
    if path[-1] != "kernel":
        return array
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    if isinstance(model, models.ConvolutionalNetwork) and path[:3] == ("dense", "layers", "0"):
        array = array.reshape(*model.features, -1).transpose(2, 0, 1, 3).reshape(array.shape)
    return array.T


@dataclass(frozen=True)
class Twin:
    """A problem in PyTorch, in memory.

    Flat vectors are in the order of the flattened weights in JAX (`jax.flatten_util.ravel_pytree` of
    `curvature.weights`); PyTorch's own are in the order of the module's parameters: v_torch = v[order].

    Attributes:
        module: in evaluation mode; only the prunable weights require gradients.
        parameters: those weights, in the module's order.
        batches: (inputs, labels) of every batch.
        order: for each of PyTorch's weights, its position in the flat vector in JAX.
    """

    module: nn.Module
    parameters: list[nn.Parameter]
    batches: list[tuple[torch.Tensor, torch.Tensor]]
    order: NDArray[np.int64]
    loss: MeanCrossEntropy

    @property
    def num_examples(self) -> int:
        """In all batches."""
        return sum(len(labels) for _, labels in self.batches)

    def to_torch(self, vector: NDArray) -> torch.Tensor:
        """A flat vector in JAX's order as PyTorch's."""
        return torch.from_numpy(np.asarray(vector)[self.order]).to(self.parameters[0])

    def to_jax(self, vector: torch.Tensor) -> NDArray:
        """The inverse of `to_torch`."""
        result = np.empty(len(self.order), np.float32)
        result[self.order] = vector.detach().cpu().numpy()
        return result


def make_twin(problem: networks.Problem, batch_size: int = networks.BATCH_SIZE, device: str = "cpu") -> Twin:
    """The twin of a problem, with the same weights, statistics and batches.

    Raises:
        ValueError: its outputs are not those of the problem, to float32 rounding.
    """
    model, module = problem.model, _network(problem.model)
    params = traverse_util.flatten_dict(problem.params)
    statistics = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    arrays = {
        _torch_name(path): _torch_layout(path, np.asarray(array), model)
        for path, array in (params | traverse_util.flatten_dict(statistics)).items()
    }
    state = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    missing, unexpected = module.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(f"the twin of {problem.name} lacks {unexpected} or has no values for {missing}.")
    module.eval().to(device)

    # Each kernel's positions in the flat vector, moved as its weights are.
    positions, start = {}, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(problem.params):
        if networks.is_prunable(path, leaf):
            names = tuple(key.key for key in path)
            index = np.arange(start, start + leaf.size).reshape(leaf.shape)
            positions[_torch_name(names)] = _torch_layout(names, index, model)
            start += leaf.size
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in positions)
    prunable = [(name, x) for name, x in module.named_parameters() if x.requires_grad]
    order = np.concatenate([positions[name].ravel() for name, _ in prunable])

    batches = [
        (_inputs(inputs).to(device), torch.from_numpy(np.asarray(labels).astype(np.int64)).to(device))
        for inputs, labels in problem.batches(batch_size)
    ]
    _check_outputs(problem, module, batches[0][0])
    return Twin(module, [x for _, x in prunable], batches, order, MeanCrossEntropy())


def _inputs(inputs: jax.Array) -> torch.Tensor:
    array = np.asarray(inputs)
    if array.ndim == 4:
        array = array.transpose(0, 3, 1, 2)
    return torch.from_numpy(array.copy())


def _check_outputs(problem: networks.Problem, module: nn.Module, inputs: torch.Tensor) -> None:
    with torch.no_grad():
        got = module(inputs).cpu().numpy()
    with jax.default_matmul_precision("highest"):
        expected = np.asarray(jax.jit(problem.predict)(problem.params, problem.inputs[: len(inputs)]))
    difference = np.abs(got - expected).max() / np.abs(expected).max()
    if not difference <= OUTPUT_TOLERANCE:
        raise ValueError(f"the outputs of {problem.name} in PyTorch differ by {difference:.1e}, relatively.")
