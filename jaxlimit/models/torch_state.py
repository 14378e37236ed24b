"""Weights of the same networks trained with PyTorch, read and written under its names: see `torch_layout`.

PyTorch's wrappers put parts of their own into names: `module.` (DataParallel), `_orig_mod.` (compile). Pruned
by `torch.nn.utils.prune`, a layer has `weight_orig` and `weight_mask`, whose product is its weight.
"""

import zipfile
from pathlib import Path
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from jaxlimit.core.sharding import to_host
from jaxlimit.core.trees import PyTree, named_arrays
from jaxlimit.core.writing import DamagedFile, write_file
from jaxlimit.models.torch_layout import Entry, entries, layers

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
    state = _within(_plain(_read(Path(file)), file), next(layers(model))[0])
    for entry in entries(model):
        _assign(entry, state, file)
    if state:
        raise ValueError(f"{file} holds what this network has no place for: {', '.join(sorted(state))}.")
    return model


def torch_state_dict(model: nnx.Module, params: PyTree | None = None) -> State:
    """The state dict of the same network in PyTorch: what `load_torch_state` reads.

    Args:
        model: a network of `jaxlimit.models`. Running statistics of batch norm are its own.
        params: parameters to take instead of the model's, for instance pruned ones, as `from_nnx` gives them.

    Returns:
        Arrays by PyTorch's names, in its layouts, on the host. `num_batches_tracked` of batch norm is left
        out: PyTorch takes 0 where there is none.

    Raises:
        ValueError: another model; params that are not of this one.

    Examples:
        >>> from jaxlimit.models import FullyConnected
        >>> state = torch_state_dict(FullyConnected([4, 3], rngs=nnx.Rngs(0)))
        >>> {name: array.shape for name, array in state.items()}
        {'linear.0.weight': (3, 4), 'linear.0.bias': (3,)}
    """
    found = list(entries(model))
    arrays = {entry.path: to_host(entry.variable.get_value()) for entry in found}
    if params is not None:
        known = {e.path: arrays[e.path].shape for e in found if isinstance(e.variable, nnx.Param)}
        given = named_arrays(params)
        odd = known.items() ^ {name: array.shape for name, array in given.items()}.items()
        if odd:
            raise ValueError(
                f"params are not those of this {type(model).__name__}, as from_nnx(model) gives them: names "
                f"or shapes differ at {', '.join(sorted({name for name, _ in odd}))}."
            )
        arrays |= given
    # Copies of their own: torch.from_numpy warns of arrays that may not be written to.
    return {entry.name: np.array(entry.to_torch(arrays[entry.path]), order="C") for entry in found}


def save_torch_state(model: nnx.Module, file: str | Path, params: PyTree | None = None) -> None:
    """Writes the network so that it loads into the same network in PyTorch, and by `load_torch_state`.

    There: `net.load_state_dict(safetensors.torch.load_file("net.safetensors"))`.

    Args:
        model: as for `torch_state_dict`.
        file: .safetensors; written whole or not at all.
        params: as for `torch_state_dict`.

    Raises:
        ValueError: a file of another kind; as for `torch_state_dict`.
    """
    from safetensors.numpy import save

    if Path(file).suffix != ".safetensors":
        raise ValueError(f"file must be a .safetensors file, got {file}.")
    write_file(Path(file), save(torch_state_dict(model, params)))


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
        raise DamagedFile(f"{path} is damaged: {error}", path) from error
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


def _assign(entry: Entry, state: State, file: str | Path) -> None:
    """Moves an array from the state into the network."""
    if entry.name not in state:
        raise ValueError(
            f"{file} has no {entry.name}; it holds {', '.join(sorted(state)) or 'nothing more'}."
        )
    array, like = entry.from_torch(state.pop(entry.name)), entry.variable.get_value()
    if array.shape != like.shape or not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"{entry.name} in {file} must be of floating type and shape {like.shape} (in the layout of this "
            f"package), got {array.dtype} of shape {array.shape}."
        )
    value = jnp.asarray(array, like.dtype)
    if np.all(np.isfinite(array)) and not jnp.all(jnp.isfinite(value)):
        raise ValueError(
            f"{entry.name} in {file} has numbers beyond {like.dtype}: it was trained in {array.dtype}."
        )
    entry.variable.set_value(value)
