r"""Lookahead: a weight counts by what its layer does together with the layers before and after it.

    score = w^2 * sum over what makes its input v^2 * sum over what reads its output u^2

For dense layers without activations the score is exactly by how much the product of the three matrices
changes, in squared Frobenius norm, where w goes. For a convolution the sums run over the places of the kernel
and over its other channels. A factor of batch norm belongs to the layer before it. What adds to one stream,
as residual branches do, adds up. At both ends of the network the sum counts 1. Source: Park, Lee, Mo and
Shin, "Lookahead: A Far-Sighted Alternative of Magnitude-based Pruning", ICLR 2020, arXiv 2002.04809.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from jaxlimit.core.trees import PyTree, path_name
from jaxlimit.models import ConvolutionalNetwork, FullyConnected, ResNet

INPUTS, OUTPUTS = "inputs", "outputs"
# Added to the variance of batch norm, as in the authors' code.
EPSILON = 1e-10


@dataclass(frozen=True)
class Layer:
    """What a kernel reads and what it adds to: streams of channels or hidden units, by names of your own.

    Attributes:
        kernel: name of the kernel in the parameters, as "layers.0.kernel".
        reads: stream that it reads; "inputs" is that of the network.
        writes: stream that it adds to; "outputs" is that of the network.
        factor: (outputs,) what its outputs are multiplied by before they get there, as by batch norm
            gamma / sqrt(variance); None: 1.
        rows: (inputs,) which unit of the stream each input is; None: input i is unit i modulo their number,
            as where images with channels last are flattened.
    """

    kernel: str
    reads: str
    writes: str
    factor: Any = None
    rows: Any = None


def lookahead_scores(weights: PyTree, layers: Sequence[Layer], *, normalized: bool = True) -> PyTree:
    """The scores of a network whose layers are described.

    Before a layer are all that stand earlier in the list and write to the stream that it reads, after it all
    that stand later and read the stream that it writes to. So a residual block reads the sum of the blocks
    before it, and each is scored as a neighbour of all others on its stream. How a residual network is
    unfolded is our reading; the paper names the sum.

    Args:
        weights: pytree of the prunable weights, as `curvature.weights`: kernels with inputs on the last axis
            but one and outputs on the last.
        layers: one for each kernel, in the order of the forward pass: `lookahead_layers(model)`, or your own.
        normalized: whether the scores of each layer are divided by their norm, so that layers can be compared
            globally. Within a layer this changes nothing.

    Returns:
        Pytree like the weights, float64 on the host, for `scores=`.

    Raises:
        ValueError: layers and kernels that are not the same, a stream that nothing writes to or reads, or
            sizes that do not fit.

    Examples:
        Two dense layers; the weight from input 0 to unit 1 has u = 3 after it.

        >>> weights = {"a": np.array([[1.0, 2.0]]), "b": np.array([[1.0], [3.0]])}
        >>> layers = [Layer("a", "inputs", "hidden"), Layer("b", "hidden", "outputs")]
        >>> found = lookahead_scores(weights, layers, normalized=False)
        >>> found["a"].tolist(), found["b"].tolist()
        ([[1.0, 36.0]], [[1.0], [36.0]])
    """
    paths = jax.tree_util.tree_leaves_with_path(weights)
    kernels = {path_name(path): np.asarray(leaf, np.float64) for path, leaf in paths}
    _require_kernels(kernels, layers)
    units = _units(kernels, layers)
    scores = {}
    for number, layer in enumerate(layers):
        kernel = kernels[layer.kernel]
        makes = [before for before in layers[:number] if before.writes == layer.reads]
        reads = [after for after in layers[number + 1 :] if after.reads == layer.writes]
        _require_streams(layer, makes, reads)
        made = sum(_made(kernels[each.kernel], each) for each in makes) if makes else np.ones(1)
        read = sum(_read(kernels[each.kernel], each, units) for each in reads) if reads else np.ones(1)
        entering = np.broadcast_to(made, units.get(layer.reads, 1))[_rows(layer, kernel, units)]
        score = kernel**2 * entering[:, None] * (read * _squared_factor(layer))
        norm = np.linalg.norm(score)
        scores[layer.kernel] = score / norm if normalized and norm > 0 else score
    return jax.tree_util.tree_map_with_path(lambda path, _: scores[path_name(path)], weights)


def _made(kernel: NDArray[np.float64], layer: Layer) -> NDArray[np.float64]:
    """For each output the sum of squares of what makes it."""
    return (kernel**2).reshape(-1, kernel.shape[-1]).sum(0) * _squared_factor(layer)


def _read(kernel: NDArray[np.float64], layer: Layer, units: dict[str, int]) -> NDArray[Any]:
    """For each unit of its stream the sum of squares of what reads it."""
    by_input = (kernel**2).sum(-1).reshape(-1, kernel.shape[-2]).sum(0)
    return np.bincount(_rows(layer, kernel, units), by_input, minlength=units[layer.reads])


def _squared_factor(layer: Layer) -> Any:
    return 1.0 if layer.factor is None else np.asarray(layer.factor, np.float64) ** 2


def _rows(layer: Layer, kernel: NDArray[np.float64], units: dict[str, int]) -> NDArray[np.int64]:
    """The unit that each input of a kernel is."""
    number = units.get(layer.reads, 1)
    if layer.rows is None:
        return np.arange(kernel.shape[-2]) % number
    return np.asarray(layer.rows)


def _units(kernels: dict[str, NDArray[np.float64]], layers: Sequence[Layer]) -> dict[str, int]:
    """How many units each stream has that something writes to."""
    units: dict[str, int] = {}
    for layer in layers:
        size = kernels[layer.kernel].shape[-1]
        if units.setdefault(layer.writes, size) != size:
            raise ValueError(
                f"{layer.kernel} writes {size} units to the stream {layer.writes!r}, another layer "
                f"{units[layer.writes]}: what adds up must have as many, else give it a stream of its own."
            )
    for layer in layers:
        _require_sizes(layer, kernels[layer.kernel], units.get(layer.reads))
    return units


def _require_kernels(kernels: dict[str, NDArray[np.float64]], layers: Sequence[Layer]) -> None:
    names = [layer.kernel for layer in layers]
    if sorted(names) != sorted(kernels):
        missing, unknown = sorted(kernels.keys() - {*names}), sorted({*names} - kernels.keys())
        raise ValueError(
            f"layers must describe every kernel of weights once; missing: {', '.join(missing) or 'none'}; "
            f"unknown: {', '.join(unknown) or 'none'}"
        )
    flat = [name for name, kernel in kernels.items() if kernel.ndim < 2]
    if flat:
        raise ValueError(
            f"kernels must have inputs and outputs as their last axes, unlike {', '.join(flat)}."
        )


def _require_sizes(layer: Layer, kernel: NDArray[np.float64], number: int | None) -> None:
    """Of what a layer reads from a stream of so many units, None for the inputs of the network."""
    inputs, outputs = kernel.shape[-2:]
    if layer.factor is not None and np.shape(layer.factor) not in ((), (outputs,)):
        raise ValueError(
            f"factor of {layer.kernel} must have shape ({outputs},), got {np.shape(layer.factor)}."
        )
    if number is None:
        return
    if layer.rows is None and inputs % number:
        raise ValueError(
            f"{layer.kernel} has {inputs} inputs, which are no multiple of the {number} units of the stream "
            f"{layer.reads!r}: say by rows which unit each is. A convolution in groups has no such order."
        )
    if layer.rows is not None:
        rows = np.asarray(layer.rows)
        if (
            rows.shape != (inputs,)
            or rows.dtype.kind not in "iu"
            or not np.all((rows >= 0) & (rows < number))
        ):
            raise ValueError(f"rows of {layer.kernel} must be {inputs} integers from 0 to below {number}.")


def _require_streams(layer: Layer, makes: Sequence[Layer], reads: Sequence[Layer]) -> None:
    """Streams begin and end at layers, but for those of the network."""
    ends = (
        ("reads", layer.reads, makes, INPUTS, "no earlier layer writes to it"),
        ("writes", layer.writes, reads, OUTPUTS, "no later layer reads it"),
    )
    for verb, stream, others, end, without in ends:
        if bool(others) == (stream == end):
            because = f"but {others[0].kernel} is on its other side" if others else f"but {without}"
            raise ValueError(
                f"{layer.kernel} {verb} the stream {stream!r}, {because}: the ends of the network are called "
                f"{INPUTS!r} and {OUTPUTS!r}, and no other."
            )


def lookahead_layers(model: nnx.Module) -> list[Layer]:
    """The layers of a `FullyConnected`, convolutional or residual network of this package.

    Raises:
        ValueError: another kind of network.

    Examples:
        >>> network = FullyConnected([2, 3, 1], rngs=nnx.Rngs(0))
        >>> for layer in lookahead_layers(network): print(layer.kernel, layer.reads, layer.writes)
        layers.0.kernel inputs layers.0
        layers.1.kernel layers.0 outputs
    """
    match model:
        case FullyConnected():
            return list(_dense(model, "layers", INPUTS))
        case ConvolutionalNetwork():
            names = [INPUTS, *(f"convolutions.{n}" for n in range(len(model.convolutions)))]
            norms = model.norms or [None] * len(model.convolutions)
            pairs = zip(pairwise(names), norms, strict=True)
            made = [Layer(f"{to}.kernel", come, to, _factor(norm)) for (come, to), norm in pairs]
            return [*made, *_dense(model.dense, "dense.layers", names[-1])]
        case ResNet():
            return list(_residual(model))
    raise ValueError(
        f"the layers of a {type(model).__name__} are not known: FullyConnected, ConvolutionalNetwork (LeNet, "
        "CNet, AlexNet, VGG) and ResNet are; for others write a list of Layer(kernel, reads, writes)."
    )


def _dense(model: FullyConnected, path: str, entering: str) -> Iterator[Layer]:
    last = len(model.layers) - 1
    for number in range(last + 1):
        leaving = OUTPUTS if number == last else f"{path}.{number}"
        yield Layer(f"{path}.{number}.kernel", entering, leaving)
        entering = leaving


def _residual(model: ResNet) -> Iterator[Layer]:
    """Blocks that add to a stream, which a projection ends."""
    stream = "stem"
    yield Layer("stem.convolution.kernel", INPUTS, stream, _factor(model.stem.norm))
    for number, block in enumerate(model.blocks):
        path, entering = f"blocks.{number}", stream
        stream = path if block.shortcut else stream
        inner = [f"{path}.layers.{place}" for place in range(len(block.layers))]
        steps = pairwise([entering, *inner[:-1], stream])
        for name, (come, to), layer in zip(inner, steps, block.layers, strict=True):
            yield Layer(f"{name}.convolution.kernel", come, to, _factor(layer.norm))
        for projection in block.shortcut:
            kernel = f"{path}.shortcut.0.convolution.kernel"
            yield Layer(kernel, entering, stream, _factor(projection.norm))
    yield Layer("dense.kernel", stream, OUTPUTS)


def _factor(norm: nnx.BatchNorm | None) -> NDArray[np.float64] | None:
    """Gamma / sqrt(variance) of batch norm in evaluation mode."""
    if norm is None:
        return None
    scale = 1.0 if norm.scale is None else np.asarray(norm.scale[...], np.float64)
    return scale / np.sqrt(np.asarray(norm.var[...], np.float64) + EPSILON)
