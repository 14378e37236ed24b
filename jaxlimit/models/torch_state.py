"""Weights of the same networks trained with PyTorch: names and layouts converted.

    tensor        PyTorch                        here
    dense         (out, in)                      (in, out)
    convolution   (out, in, height, width)       (height, width, in, out)
    features      flattened (channel, h, w)      flattened (h, w, channel): rows of the first dense kernel

Names are those of the paper's code: `linear.0.weight`, `conv.3.bias`: the number is the position in the
sequence, in which batch norm, ReLU and pools count. A ResNet has the names of the public CIFAR networks that
this code follows: `conv1`, `bn1`, `layer2.0.conv1`, `layer2.0.shortcut.0`, `linear`.

PyTorch's wrappers put parts of their own into names: `module.` (DataParallel), `_orig_mod.` (compile). Pruned
by `torch.nn.utils.prune`, a layer has `weight_orig` and `weight_mask`, whose product is its weight.
"""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from jaxlimit.models.convolutional import ConvolutionalNetwork, Pool
from jaxlimit.models.fully_connected import FullyConnected
from jaxlimit.models.resnet import Normalized, ResNet

Model = TypeVar("Model", bound=nnx.Module)
State = dict[str, NDArray]
# Types of safetensors; NumPy lacks some of them.
SAFETENSORS = {
    "F64": jnp.float64,
    "F32": jnp.float32,
    "F16": jnp.float16,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    **{f"I{bits}": jnp.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": jnp.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    "BOOL": jnp.bool_,
}
# Entries of a state dict that no network here has a place for.
IGNORED = ("num_batches_tracked", "__order__", "n_averaged")
# Parts of names that wrappers of modules add: DataParallel, compile, FSDP, checkpointing of activations.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Beginnings of files that torch.save writes: a zip archive, or a pickle.
PICKLES = (b"PK\x03\x04", b"\x80")
CONVERT = (
    "Convert a pickle (.pt, .pth) where you trust it: "
    "safetensors.torch.save_file(torch.load(...), 'net.safetensors')."
)


def load_torch_state(model: Model, file: str | Path) -> Model:
    """A copy of the model with the weights, and running statistics, of a PyTorch state dict.

    Save it there by `safetensors.torch.save_file(net.state_dict(), "net.safetensors")`, or by
    `numpy.savez("net.npz", **{name: x.numpy() for name, x in net.state_dict().items()})`.

    Args:
        model: a network of `jaxlimit.models`; it is left as it is.
        file: .safetensors or .npz. Pickles (.pt, .pth) are not read: they can run code.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a damaged file or one of another kind; names or shapes that are not the network's.
    """
    model = nnx.clone(model)
    state = _within(_plain(_read(Path(file)), file), next(_layers(model))[0])
    for prefix, layer, features in _layers(model):
        _assign(layer, prefix, features, state, file)
    if state:
        raise ValueError(f"{file} holds what this network has no place for: {', '.join(sorted(state))}.")
    return model


def _plain(found: State, file: str | Path) -> State:
    """The state without what wrappers and pruning add to it."""
    state: State = {}
    for name, x in found.items():
        plain = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if plain.endswith(IGNORED):
            continue
        if plain in state:
            raise ValueError(f"{file} holds {plain} twice, once as {name}.")
        state[plain] = x
    for name in [name.removesuffix("_mask") for name in state if name.endswith("_mask")]:
        if f"{name}_orig" not in state:
            raise ValueError(f"{file} has {name}_mask without {name}_orig, the weights that it masks.")
        weights, mask = state.pop(f"{name}_orig"), state.pop(f"{name}_mask")
        if weights.shape != mask.shape:
            raise ValueError(f"{name}_mask in {file} has shape {mask.shape}, its weights {weights.shape}.")
        state[name] = weights * mask.astype(weights.dtype)
    return state


def _within(state: State, first: str) -> State:
    """The state without the name of an attribute that holds the network; `first` is that of a layer."""
    heads = {name.split(".")[0] for name in state}
    if len(heads) == 1 and not any(name.startswith(f"{first}.") for name in state):
        return {name.partition(".")[2]: x for name, x in state.items()}
    return state


def read_safetensors(path: Path) -> State:
    """All arrays of a .safetensors file, by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged.
    """
    from safetensors import SafetensorError, deserialize

    _require_file(path)
    content = path.read_bytes()
    if content.startswith(PICKLES):
        raise ValueError(f"{path} is what torch.save writes, no safetensors file. {CONVERT}")
    try:
        found = deserialize(content)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return {name: _tensor(f"{name} in {path}", tensor) for name, tensor in found}


def _tensor(name: str, tensor: dict) -> NDArray:
    dtype = SAFETENSORS.get(tensor["dtype"])
    if dtype is None:
        known = ", ".join(SAFETENSORS)
        raise ValueError(f"{name} has dtype {tensor['dtype']}: cast it to one of {known} before it is saved.")
    return np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing.")


def _read(path: Path) -> State:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    _require_file(path)
    if path.suffix == ".npz":
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is damaged, or no npz file of arrays: {error}") from error
    raise ValueError(f"{path} must be a .safetensors or .npz file. {CONVERT}")


Module = nnx.Linear | nnx.Conv | nnx.BatchNorm
Place = tuple[str, Module, tuple[int, ...] | None]


def _layers(model: nnx.Module) -> Iterator[Place]:
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


def _assign(
    layer: Module, prefix: str, features: tuple[int, ...] | None, state: State, file: str | Path
) -> None:
    """Moves the layer's arrays from the state into it."""

    def take(variable: nnx.Variable | None, name: str) -> None:
        if variable is None:
            return
        key = f"{prefix}.{name}"
        if key not in state:
            raise ValueError(f"{file} has no {key}; it holds {', '.join(sorted(state)) or 'nothing more'}.")
        array, like = state.pop(key), variable.get_value()
        array = _converted(array, features)
        if array.shape != like.shape or not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"{key} in {file} must be of floating type and shape {like.shape} (in the layout of this "
                f"package), got {array.dtype} of shape {array.shape}."
            )
        variable.set_value(jnp.asarray(array, like.dtype))

    if isinstance(layer, nnx.BatchNorm):
        take(layer.scale, "weight")
        take(layer.mean, "running_mean")
        take(layer.var, "running_var")
    else:
        take(layer.kernel, "weight")
    take(layer.bias, "bias")


def _converted(array: NDArray, features: tuple[int, ...] | None) -> NDArray:
    """From PyTorch's layout."""
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    if array.ndim == 2:
        if features is not None and array.shape[1] == np.prod(features):
            height, width, channels = features
            array = array.reshape(-1, channels, height, width).transpose(0, 2, 3, 1).reshape(array.shape)
        return array.T
    return array
