"""Parameters of a network on disk, as safetensors: no pickles, read by any framework."""

from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from jaxlimit.core.writing import DamagedFile, write_file
from jaxlimit.models.torch_state import read_safetensors

Model = TypeVar("Model", bound=nnx.Module)


def save_model(path: Path, model: nnx.Module) -> None:
    """Writes the parameters and the running statistics of a Flax NNX model as safetensors."""
    save_params(path, _arrays(model))


def load_model(path: Path, model: Model) -> Model:
    """A copy of the model with the arrays that `save_model` wrote, to the same bits.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or not of that network.
    """
    model, arrays = nnx.clone(model), load_params(path, _arrays(model))
    nnx.update(model, nnx.restore_int_paths(arrays))
    return model


def _arrays(model: nnx.Module) -> Any:
    """Nested dictionaries, with positions in lists as strings."""
    flat = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))))
    return traverse_util.unflatten_dict({tuple(map(str, path)): leaf for path, leaf in flat.items()})


def save_params(path: Path, params: Any) -> None:
    """Writes nested dictionaries of arrays as safetensors, with names like layers.0.kernel."""
    from safetensors.numpy import save

    flat = traverse_util.flatten_dict(params, sep=".")
    write_file(path, save({name: np.array(leaf, order="C") for name, leaf in flat.items()}))


def load_params(path: Path, like: Any) -> Any:
    """Reads what `save_params` wrote, to the same bits.

    Args:
        path: the file.
        like: parameters of the network that it is for.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or not of that network.
    """
    found = read_safetensors(path)
    flat: dict[str, Any] = traverse_util.flatten_dict(like, sep=".")
    expected = {name: leaf.shape for name, leaf in flat.items()}
    if {name: leaf.shape for name, leaf in found.items()} != expected:
        raise DamagedFile(f"{path} is not of this network: names or shapes of its arrays differ.", path)
    return traverse_util.unflatten_dict({name: jnp.asarray(leaf) for name, leaf in found.items()}, sep=".")
