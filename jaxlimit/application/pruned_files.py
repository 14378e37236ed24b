"""The pruned network on disk: every array by its name, the masks beside them, and how large it is."""

import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from jaxlimit.core.trees import PyTree, flatten, named_arrays, named_leaves, path_name
from jaxlimit.core.writing import DamagedFile, write_file
from jaxlimit.models.torch_state import SAFETENSORS, read_safetensors
from jaxlimit.pruning.result import Pruned
from jaxlimit.pruning.shrink import Shrunk, shrink

# After the name of an array: its mask, True where a weight is kept.
MASK = ".mask"


def save_pruned(path: Path, params: PyTree, mask: PyTree) -> None:
    """Writes a network and its masks as safetensors."""
    from safetensors.numpy import save

    arrays, masks = named_arrays(params), named_arrays(mask)
    require_writable(arrays, masks)
    write_file(path, save({**arrays, **{f"{name}{MASK}": mask for name, mask in masks.items()}}))


def require_writable(arrays: Mapping[str, Any], masks: Collection[str]) -> None:
    """Raises ValueError where an array has a mask's name, or a dtype that files do not hold."""
    for name, array in arrays.items():
        dtype = jnp.result_type(array)
        if dtype not in map(jnp.dtype, SAFETENSORS.values()):
            raise ValueError(
                f"params has an array {name} of dtype {dtype}, which the files of a network do not hold: "
                "cast it, or call without a folder."
            )
    taken = {f"{name}{MASK}" for name in masks} & {*arrays}
    if taken:
        raise ValueError(
            f"an array of params is named {min(taken)}, as the mask of another one is in a file: rename it."
        )


def load_pruned(path: Path, params: PyTree, mask_like: PyTree, num_kept: int | None) -> tuple[PyTree, PyTree]:
    """The parameters and the mask that `save_pruned` wrote, to the same bits.

    Args:
        path: the file.
        params: of the network that it came from.
        mask_like: pytree of the weights that may be pruned, None elsewhere.
        num_kept: weights that the mask keeps, as the results say; None in results of before.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, of another network, or keeps another number of weights.
    """
    found = read_safetensors(path)
    expected = {**_shapes(params, ""), **_shapes(mask_like, MASK)}
    got = {name: x.shape for name, x in found.items()}
    other = [name for name in sorted(expected.keys() | got.keys()) if expected.get(name) != got.get(name)]
    if other:
        name = other[0]
        raise DamagedFile(
            f"{path} is not of this network, or prunable is another one: of the shape of {name} it says "
            f"{got.get(name, 'nothing')}, params and prunable {expected.get(name, 'nothing')}.",
            path,
        )
    network, mask = _filled(params, found, ""), _filled(mask_like, found, MASK)
    if num_kept is not None and count_kept(mask) != num_kept:
        raise DamagedFile(
            f"{path} holds a network of {count_kept(mask):,} weights, where the results are about one of "
            f"{num_kept:,}: it was put there later, or the results were changed.",
            path,
        )
    return network, mask


def count_kept(mask: PyTree) -> int:
    """Weights that a mask keeps."""
    return int(np.count_nonzero(flatten(mask)))


def expected_kept(sparsity: float, mask_like: PyTree) -> int:
    """Weights that are kept at a sparsity."""
    dim = flatten(mask_like).size
    return dim - round(sparsity * dim)


def _shapes(like: PyTree, suffix: str) -> dict[str, tuple[int, ...]]:
    return {name + suffix: np.shape(leaf) for name, leaf in named_leaves(like).items()}


def _filled(like: PyTree, found: dict[str, NDArray[Any]], suffix: str) -> PyTree:
    known = named_leaves(like)

    def fill(path: tuple, leaf: Any) -> Any:
        name = path_name(path)
        return jnp.asarray(found[name + suffix]) if name in known else leaf

    return jax.tree_util.tree_map_with_path(fill, like)


def sizes(dense: PyTree, pruned: Pruned, model: nnx.Module | None = None) -> dict[str, Any]:
    """Bytes of the parameters before and after, as they are and compressed by zlib; and what is kept of each.

    Args:
        dense: parameters before.
        pruned: the pruned network.
        model: to know what is left without the units that compute nothing, if `shrink` takes it.

    Returns:
        "bytes", "dense_compressed_bytes", "compressed_bytes", "kept_share" by array, the names of those
        of which nothing is left, "vanished", and numbers of parameters: "num_params", "shrunk_num_params"
        where there is a model that `shrink` knows.
    """
    before, after = (b"".join(x.tobytes() for x in named_arrays(p).values()) for p in (dense, pruned.params))
    small = None if model is None else _shrunk(model, pruned.params)
    kept = {name: float(np.mean(mask)) for name, mask in named_arrays(pruned.mask).items()}
    return {
        "bytes": len(before),
        "dense_compressed_bytes": len(zlib.compress(before)),
        "compressed_bytes": len(zlib.compress(after)),
        "kept_share": kept,
        "vanished": [name for name, share in kept.items() if share == 0],
        **({"num_params": small.dense_num_params, "shrunk_num_params": small.num_params} if small else {}),
    }


def _shrunk(model: nnx.Module, params: PyTree) -> Shrunk | None:
    try:
        return shrink(model, params)
    except ValueError:  # not known well enough
        return None
