"""Masks for those who train on: as PyTorch's pruning takes them, and as a transformation of optax."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from numpy.typing import NDArray

from jaxlimit.core.trees import PyTree, named_arrays, path_name

if TYPE_CHECKING:  # flax takes .6 s to import
    from flax import nnx

    from jaxlimit.models.torch_layout import Entry

# How the name of an array of an `nnx.State` ends, whose leaves are variables.
VARIABLE = ".value"
Rename = Mapping[str, str | tuple[str, Callable[[NDArray[Any]], NDArray[Any]]]]


def torch_masks(
    mask: PyTree, *, model: "nnx.Module | None" = None, names: Rename | None = None
) -> dict[str, NDArray[np.bool_]]:
    """The masks of a pruned network under the names, and in the layouts, of its twin in PyTorch.

    There, `masks` being what this returns:

        from torch.nn.utils import prune
        for name, mask in masks.items():
            layer, _, parameter = name.rpartition(".")
            prune.custom_from_mask(net.get_submodule(layer), parameter, torch.from_numpy(mask))

    Args:
        mask: pytree of bools, False where a weight is pruned, None for what is not prunable, as in `Pruned`.
        model: the network of `jaxlimit.models` whose parameters these are: names and layouts are those of
            `models.torch_state_dict`.
        names: for any other network PyTorch's name of each array by its own, such as "layers.0.kernel"; or
            the name and a function that brings the array into PyTorch's layout: `("fc.weight", np.transpose)`
            for a dense kernel of Flax. None: names and layouts stay.

    Returns:
        Bools by name, on the host; True where a weight is kept.

    Raises:
        ValueError: a mask that is none, or not of this model; names that are missing, unknown, or given
            twice; a layout that does not keep every entry; both model and names.

    Examples:
        >>> mask = {"dense": {"kernel": np.array([[True, False, True]]), "bias": None}}
        >>> torch_masks(mask, names={"dense.kernel": ("fc.weight", np.transpose)})["fc.weight"].tolist()
        [[True], [False], [True]]
    """
    found = _bools(mask)
    if model is not None and names is not None:
        raise ValueError("give either a model or names: a network of jaxlimit.models has names of its own.")
    if model is not None:
        names = {entry.path: (entry.name, entry.to_torch) for entry in _pruned(model, found)}
    elif names is None:
        names = {name: name for name in found}
    if names.keys() != found.keys():
        odd = ", ".join(sorted(names.keys() ^ found.keys()))
        raise ValueError(
            f"names must be of the arrays of the mask, {', '.join(found)}: they differ at {odd}."
        )
    masks = [_renamed(name, found[name], new) for name, new in names.items()]
    twice = [name for name, count in Counter(name for name, _ in masks).items() if count > 1]
    if twice:
        raise ValueError(f"names must differ: {', '.join(twice)} is given to several arrays.")
    return dict(masks)


def keep_zeros(mask: PyTree) -> optax.GradientTransformation:
    """For the end of `optax.chain`: pruned weights stay zero, whatever the optimiser makes of the others.

    `optax.masked` decides for whole arrays whether they are transformed; this decides for each weight. What
    stands after it in the chain could move the zeros again: momentum, weight decay, schedules come before it.

    Args:
        mask: pytree of bools like the parameters, False where a weight is pruned, None for what is not
            prunable; as `Pruned.mask`. Parameters may also be the `nnx.State` of such names, as those of
            `nnx.Optimizer`.

    Returns:
        A transformation without a state.

    Raises:
        ValueError: a mask that is none. From `init`: parameters that do not match it, or that are not zero
            where it is False. `apply_mask` sets them to zero.

    Examples:
        >>> import jax.numpy as jnp
        >>> params = {"w": jnp.array([0.0, 2.0]), "b": jnp.ones(1)}
        >>> mask = {"w": np.array([False, True]), "b": None}
        >>> optimizer = optax.chain(optax.sgd(0.5), keep_zeros(mask))
        >>> gradients = jax.tree.map(jnp.ones_like, params)
        >>> updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        >>> optax.apply_updates(params, updates)
        {'b': Array([0.5], dtype=float32), 'w': Array([0. , 1.5], dtype=float32)}
    """
    masks = _bools(mask)

    def init(params: PyTree) -> optax.EmptyState:
        _require_zeros(params, masks)
        return optax.EmptyState()

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        return _masked(updates, masks), state

    return optax.GradientTransformation(init, update)


def _masked(tree: PyTree, masks: Mapping[str, NDArray[np.bool_]]) -> PyTree:
    """Zero where a mask is False. Arrays are found by their names, so that the tree may be an `nnx.State`."""
    named = _named(tree)
    shapes = {name: np.shape(leaf) for name, leaf in named}
    for name, keep in masks.items():
        if shapes.get(name) != keep.shape:
            raise ValueError(
                f"mask has an array {name} of shape {keep.shape}, but what is trained has "
                f"{f'one of shape {shapes[name]}' if name in shapes else 'none of that name'}: it must be a "
                "mask of these parameters, as Pruned.mask."
            )
    kept = [
        jnp.where(masks[name], leaf, jnp.zeros_like(leaf)) if name in masks else leaf for name, leaf in named
    ]
    return jax.tree.structure(tree).unflatten(kept)


def _named(tree: PyTree) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(path_name(path).removesuffix(VARIABLE), leaf) for path, leaf in leaves]


def _require_zeros(params: PyTree, masks: Mapping[str, NDArray[np.bool_]]) -> None:
    leaves = jax.tree.leaves(params)
    if not leaves or any(isinstance(leaf, Tracer) for leaf in leaves):  # under jit no value is known
        return
    _masked(params, masks)  # refuses a mask of other parameters
    gone = [jnp.where(masks[name], 0, leaf) for name, leaf in _named(params) if name in masks]
    if count := sum(int(jnp.count_nonzero(x)) for x in gone):
        raise ValueError(
            f"{count:,} weights that the mask prunes are not zero, and would stay as they are: start from "
            "the pruned network, Pruned.params or apply_mask(params, mask)."
        )


def _bools(mask: PyTree) -> dict[str, NDArray[np.bool_]]:
    """The arrays of a mask by their names."""
    found = named_arrays(mask)
    odd = [name for name, array in found.items() if array.dtype != bool]
    if odd or not found:
        raise ValueError(
            "mask must hold arrays of bools, True where a weight is kept, as Pruned.mask does; got "
            f"{f'{odd[0]} of dtype {found[odd[0]].dtype}' if odd else 'none'}."
        )
    return found


def _pruned(model: "nnx.Module", found: dict[str, NDArray[np.bool_]]) -> "list[Entry]":
    """The arrays of the model that the mask is of."""
    from jaxlimit.models.torch_layout import entries

    known = {entry.path: entry for entry in entries(model)}
    for name, array in found.items():
        if name not in known or known[name].variable.get_value().shape != array.shape:
            raise ValueError(
                f"mask is not of this {type(model).__name__}: {name} of shape {array.shape} is none of its "
                "parameters."
            )
    return [known[name] for name in found]


def _renamed(name: str, array: NDArray[np.bool_], new: Any) -> tuple[str, NDArray[np.bool_]]:
    """An array under its new name, and in its new layout."""
    new, layout = (new, np.asarray) if isinstance(new, str) else new
    turned = np.array(layout(array), order="C")  # a copy that torch.from_numpy may write to
    if turned.dtype != bool or turned.size != array.size or turned.sum() != array.sum():
        raise ValueError(
            f"the layout of {name} must keep every entry of the mask, as a transposition does: of "
            f"{array.sum():,} kept in shape {array.shape} it makes {turned.sum():,} in shape {turned.shape}."
        )
    return new, turned
