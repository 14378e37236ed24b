"""The pruned network on disk: every array by its name, the masks beside them, and how large it is."""

import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from jaxlimit.core.trees import PyTree, named_arrays, path_name
from jaxlimit.core.writing import DamagedFile, write_file
from jaxlimit.measuring.certificates import Certificate
from jaxlimit.models.couplings import OURS, is_plain
from jaxlimit.models.torch_state import read_safetensors
from jaxlimit.pruning.result import Pruned
from jaxlimit.pruning.shrink import shrink

# After the name of an array: its mask, True where a weight is kept.
MASK = ".mask"


def save_pruned(path: Path, params: PyTree, mask: PyTree) -> None:
    """Writes a network and its masks as safetensors."""
    from safetensors.numpy import save

    masks = {f"{name}{MASK}": mask for name, mask in named_arrays(mask).items()}
    write_file(path, save({**named_arrays(params), **masks}))


def load_pruned(path: Path, params: PyTree, mask_like: PyTree) -> tuple[PyTree, PyTree]:
    """The parameters and the mask that `save_pruned` wrote, to the same bits.

    Args:
        path: the file.
        params: of the network that it came from.
        mask_like: pytree of the weights that may be pruned, None elsewhere.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or of another network.
    """
    found = read_safetensors(path)
    try:
        return _filled(params, found, ""), _filled(mask_like, found, MASK)
    except (KeyError, ValueError) as error:
        raise DamagedFile(f"{path} is not of this network: {error}.", path) from error


def stored_sparsity(path: Path, certificate: Certificate | None) -> float | None:
    """That of the certified network in a file; None where nothing is certified, and in folders of before."""
    return certificate.sparsity if certificate is not None and path.exists() else None


def _filled(like: PyTree, found: dict[str, NDArray[Any]], suffix: str) -> PyTree:
    known = named_arrays(like)

    def fill(path: tuple, leaf: Any) -> Any:
        name = path_name(path)
        return jnp.asarray(found[name + suffix]).reshape(np.shape(leaf)) if name in known else leaf

    return jax.tree_util.tree_map_with_path(fill, like)


def sizes(dense: PyTree, pruned: Pruned, model: nnx.Module | None = None) -> dict[str, Any]:
    """Bytes of the parameters before and after, as they are and compressed by zlib; and what is kept of each.

    Args:
        dense: parameters before.
        pruned: the pruned network.
        model: what `shrink` takes, to know what is left without the units that compute nothing.

    Returns:
        "bytes", "dense_compressed_bytes", "compressed_bytes", "kept_share" by array, the names of those
        of which nothing is left, "vanished", and numbers of parameters: "num_params", "shrunk_num_params"
        where there is a model that `shrink` knows.
    """
    before, after = (b"".join(x.tobytes() for x in named_arrays(p).values()) for p in (dense, pruned.params))
    small = shrink(model, pruned.params) if model is not None and is_plain(model, *OURS) else None
    kept = {name: float(np.mean(mask)) for name, mask in named_arrays(pruned.mask).items()}
    return {
        "bytes": len(before),
        "dense_compressed_bytes": len(zlib.compress(before)),
        "compressed_bytes": len(zlib.compress(after)),
        "kept_share": kept,
        "vanished": [name for name, share in kept.items() if share == 0],
        **({"num_params": small.dense_num_params, "shrunk_num_params": small.num_params} if small else {}),
    }
