r"""The smaller network with the same outputs: units that compute nothing are taken out.

A unit (a hidden unit, a channel, a head) is *unused* where every weight that reads it is zero, and *constant*
where every weight that makes it is zero: then its value is that of its bias, v = act(norm(b)), for any input.
What reads a constant unit reads a number, which goes into its bias:

    W^T h + b  =  W_kept^T h_kept + (b + W_gone^T v)

A convolution that pads reads 0 beyond the border and v within, and one that dilates its input 0 between the
pixels, which no bias does. There all constant units but one go, and the one that stays carries them all: its
reading weights become sum_j (v_j / v) W_j. Units that are gone may leave others without weights, so the
passes are repeated until nothing changes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from jaxlimit.core.trees import PyTree
from jaxlimit.geometry.magnitude import apply_mask
from jaxlimit.models.bert import Attention, SentenceEncoder
from jaxlimit.models.convolutional import Convolution, ConvolutionalNetwork
from jaxlimit.models.couplings import OURS, is_plain, require_plain
from jaxlimit.models.fully_connected import FullyConnected
from jaxlimit.models.functional import Predict, from_nnx
from jaxlimit.models.resnet import ResNet

KNOWN = (*OURS, nnx.Sequential)
# Between the layers of an `nnx.Sequential`: functions that act on every number by itself.
ELEMENTWISE = (nnx.relu, nnx.gelu, nnx.tanh, nnx.sigmoid, nnx.silu, nnx.elu, nnx.softplus, jnp.tanh)


@dataclass(frozen=True, eq=False)
class Shrunk:
    """A network without the units that compute nothing.

    Attributes:
        model: the smaller network, of the same class.
        predict: it as a function, as `from_nnx` gives it.
        params: its parameters.
        num_params: their number.
        dense_num_params: that of the network before.
    """

    model: nnx.Module
    predict: Predict
    params: PyTree
    num_params: int
    dense_num_params: int

    def __repr__(self) -> str:
        return (
            f"{type(self.model).__name__} of {self.num_params:,} parameters, {self.dense_num_params:,} before"
        )


def shrink(model: nnx.Module, params: PyTree, mask: PyTree | None = None) -> Shrunk:
    """The smaller network with the same outputs as the pruned one, but for rounding.

    Taken out are hidden units of dense layers, channels of convolutions, those within the blocks of a
    residual network, attention heads, and the units between `up` and `down`. The channels of a residual
    stream stay. Single zeros within units that stay are kept as they are. One unit of a layer stays always.
    Cost: none of the data is looked at; `jaxlimit.core.jaxprs.multiplications` counts what a network takes.

    Args:
        model: the network that was pruned: `FullyConnected`, `ConvolutionalNetwork` (LeNet, CNet, AlexNet,
            VGG), `ResNet`, `SentenceEncoder`, or an `nnx.Sequential` of dense layers, convolutions and
            elementwise functions. It is not changed.
        params: its parameters, named as `from_nnx` names them, zero where pruned: `Pruned.params`.
        mask: pytree of bools, False where a weight is to be zero, in case `params` are not pruned yet.

    Returns:
        The smaller network.

    Raises:
        ValueError: another kind of network, also one that is derived from these and computes something else;
            a layer that stands in two places; params or a mask that are not the model's.

    Examples:
        The second unit is made by zeros, so that it is relu(2.0) for all inputs.

        >>> model = FullyConnected([2, 3, 1], rngs=nnx.Rngs(0))
        >>> kernels = jnp.array([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]), jnp.array([[1.0], [3.0], [0.0]])
        >>> first = {"kernel": kernels[0], "bias": jnp.array([0.0, 2.0, 0.0])}
        >>> params = {"layers": {"0": first, "1": {"kernel": kernels[1], "bias": jnp.zeros(1)}}}
        >>> small = shrink(model, params)
        >>> small, small.params["layers"]["1"]["bias"].tolist()  # the third is read by nothing
        (FullyConnected of 5 parameters, 13 before, [6.0])
    """
    if mask is not None:
        params = apply_mask(params, mask)
    _, like = from_nnx(model)
    expected, got = (jax.tree.map(np.shape, tree) for tree in (like, params))
    if expected != got:
        raise ValueError(f"params must have the shapes of the model's, {expected}, got {got}.")
    small = nnx.clone(model)
    nnx.update(small, nnx.restore_int_paths(params))
    links = list(_links(small))
    require_plain(small)
    while any(link.take_out() for link in links):
        pass
    _resize(small)
    small_predict, small_params = from_nnx(small)
    return Shrunk(small, small_predict, small_params, _size(small_params), _size(params))


class _Link(NamedTuple):
    """Units that some layers make and one layer reads.

    Attributes:
        makers: dense layers or convolutions whose outputs are the units; the last one gives their values.
        reader: the layer whose inputs are the units.
        activation: what is between, on every number by itself.
        norm: batch norm before the activation, or None.
        size: outputs of a unit, which stand beside each other: of an attention head.
    """

    makers: tuple[Any, ...]
    reader: Any
    activation: Callable[[jax.Array], jax.Array]
    norm: Any = None
    size: int = 1

    def take_out(self) -> bool:
        """Removes what is unused or constant; whether anything was removed."""
        made, number = _host(self.makers[-1].kernel), self.makers[-1].kernel.shape[-1]
        # A dense layer behind convolutions reads every channel at every pixel.
        read = _host(self.reader.kernel).reshape(-1, number, self.reader.kernel.shape[-1])
        constant = ~self._units(np.any(made.reshape(-1, number) != 0, axis=0))
        unused = ~self._units(np.any(read != 0, axis=(0, 2)))
        gone, values = constant | unused, np.where(constant & ~unused, self._values(), 0)
        carrier = None
        if np.any(values) and (self.reader.bias is None or _has_borders(self.reader)):
            carrier = int(np.argmax(np.abs(values)))
            gone[carrier] = False
        elif gone.all():
            gone[: self.size] = False
        if not gone.any():
            return False
        folded = np.where(gone, values, 0)
        if carrier is not None:
            read[:, carrier] += np.einsum("pno,n->po", read, folded / values[carrier])
        elif np.any(folded):
            bias: Any = self.reader.bias
            moved = _host(bias) + np.einsum("pno,n->o", read, folded)
            bias.set_value(jnp.asarray(moved, bias.get_value().dtype))
        self._cut(~gone, read)
        return True

    def _units(self, anything: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Whether there is anything in any output of the unit of each output."""
        return np.repeat(anything.reshape(-1, self.size).any(axis=1), self.size)

    def _values(self) -> NDArray[np.float64]:
        """What the units are where nothing but their bias makes them."""
        maker = self.makers[-1]
        number = maker.kernel.shape[-1]
        before = np.zeros(number) + _host(maker.bias)
        if self.norm is not None:
            norm = self.norm
            factor = _host(norm.scale, 1.0) / np.sqrt(_host(norm.var) + norm.epsilon)
            before = (before - _host(norm.mean)) * factor + _host(norm.bias)
        dtype = maker.kernel.get_value().dtype
        return np.asarray(self.activation(jnp.asarray(before, dtype)), np.float64)

    def _cut(self, kept: NDArray[np.bool_], read: NDArray[np.float64]) -> None:
        number, shape = int(kept.sum()), self.reader.kernel.shape
        for maker in self.makers:
            for variable in (maker.kernel, maker.bias):
                if variable is not None:
                    variable.set_value(variable.get_value()[..., kept])
            maker.out_features = number
        for variable in [] if self.norm is None else _variables(self.norm):
            variable.set_value(variable.get_value()[kept])
        dtype, left = self.reader.kernel.get_value().dtype, read[:, kept]
        shape = (*shape[:-2], left.size // (shape[-1] * int(np.prod(shape[:-2]))), shape[-1])
        self.reader.kernel.set_value(jnp.asarray(left.reshape(shape), dtype))
        self.reader.in_features = shape[-2]


def _links(model: nnx.Module) -> Iterator[_Link]:
    known = model if is_plain(model, *KNOWN) else None
    match known:
        case FullyConnected():
            yield from _dense(known.layers)
        case ConvolutionalNetwork():
            layers = [*known.convolutions, known.dense.layers[0]]
            for number, (maker, reader) in enumerate(pairwise(layers)):
                yield _Link((maker,), reader, nnx.relu, known.norms[number] if known.norms else None)
            yield from _dense(known.dense.layers)
        case ResNet():
            for block in known.blocks:
                for maker, reader in pairwise(block.layers):
                    yield _Link((maker.convolution,), reader.convolution, nnx.relu, maker.norm)
        case SentenceEncoder():
            for layer in known.layers:
                heads = layer.attention
                makers, size = (
                    (heads.query, heads.key, heads.value),
                    heads.query.out_features // heads.num_heads,
                )
                yield _Link(makers, heads.out, lambda x: x, size=size)
                yield _Link((layer.up,), layer.down, lambda x: nnx.gelu(x, approximate=False))
        case nnx.Sequential():
            yield from _sequential(known)
        case _:
            raise ValueError(
                f"a {type(model).__name__} is not known well enough to be made smaller: FullyConnected, "
                "ConvolutionalNetwork (LeNet, CNet, AlexNet, VGG), ResNet, SentenceEncoder, and "
                "nnx.Sequential of nnx.Linear, nnx.Conv and elementwise functions are."
            )


def _dense(layers: Any) -> Iterator[_Link]:
    return (_Link((maker,), reader, nnx.relu) for maker, reader in pairwise(layers))


def _sequential(model: nnx.Sequential) -> Iterator[_Link]:
    """Pairs of layers with elementwise functions between them."""
    maker, between = None, []
    for layer in model.layers:
        grouped = isinstance(layer, nnx.Conv) and layer.feature_group_count > 1
        if isinstance(layer, nnx.Linear | nnx.Conv) and not grouped:
            if maker is not None:
                yield _Link((maker,), layer, _composed(tuple(between)))
            maker, between = layer, []
        elif layer in ELEMENTWISE:
            between.append(layer)
        else:
            raise ValueError(
                f"an nnx.Sequential with {layer!r:.60} is not known well enough to be made smaller: "
                "nnx.Linear, nnx.Conv, and relu, gelu, tanh, sigmoid, silu, elu and softplus of flax.nnx are."
            )


def _composed(functions: tuple[Callable, ...]) -> Callable[[jax.Array], jax.Array]:
    def composed(x: jax.Array) -> jax.Array:
        for function in functions:
            x = function(x)
        return x

    return composed


def _resize(model: nnx.Module) -> None:
    """What a network says of its own sizes."""
    for _, module in nnx.iter_graph(model):
        if isinstance(module, FullyConnected):
            kernels = [layer.kernel.shape for layer in module.layers]
            module.widths = (kernels[0][0], *(shape[-1] for shape in kernels))
        elif isinstance(module, nnx.Conv):
            module.kernel_shape = module.kernel.shape
        elif isinstance(module, Attention):
            size = module.out.out_features // module.num_heads
            module.num_heads = module.query.kernel.shape[-1] // size
        elif isinstance(module, nnx.BatchNorm):
            module.num_features = module.mean.shape[0]
        if isinstance(module, ConvolutionalNetwork):
            channels = iter([layer.kernel.shape[-1] for layer in module.convolutions])
            module.layers = tuple(
                layer._replace(channels=next(channels)) if isinstance(layer, Convolution) else layer
                for layer in module.layers
            )
            last = module.convolutions[-1].kernel.shape[-1] if module.convolutions else module.features[-1]
            module.features = (*module.features[:-1], last)


def _variables(norm: nnx.BatchNorm) -> list[Any]:
    return [x for x in (norm.mean, norm.var, norm.scale, norm.bias) if x is not None]


def _host(variable: Any, without: float = 0.0) -> NDArray[np.float64]:
    """Its value; where a layer has no such variable, that which changes nothing."""
    return np.array(without if variable is None else variable.get_value(), np.float64)


def _has_borders(layer: Any) -> bool:
    """Whether a convolution may read something else beyond the border than within."""
    if not isinstance(layer, nnx.Conv):
        return False
    pads = layer.padding != "VALID" and (isinstance(layer.padding, str) or bool(np.any(layer.padding)))
    return pads or bool(np.any(np.asarray(layer.input_dilation) > 1))  # between pixels, as beyond the border


def _size(params: PyTree) -> int:
    return sum(x.size for x in jax.tree.leaves(params))
