"""Weights that go together: channels, attention heads, blocks, or whatever integer labels say.

A *group* is a set of weights that are removed at once. Labels are integers shaped like the weights, one for
each weight: those with one label are one group, in whichever leaves they stand.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from jaxlimit.core.checks import require_count
from jaxlimit.core.leaves import to_arrays
from jaxlimit.core.sharding import to_host
from jaxlimit.core.trees import PyTree

# Names of the kernels of attention, in the libraries of JAX and PyTorch: those whose outputs are the heads',
# and the one whose inputs are.
INTO_HEADS = ("query", "key", "value", "q_proj", "k_proj", "v_proj", "query_proj", "key_proj", "value_proj")
OUT_OF_HEADS = ("out", "o_proj", "out_proj", "output_proj")
FORMS = (
    'groups must be "output_channels", "input_channels", ("heads", number), ("blocks", shape), or a pytree '
    "of integer labels shaped like the weights"
)


def group_labels(weights: PyTree, groups: Any) -> PyTree:
    """Integer labels shaped like the weights: equal where weights go together.

    The named groups are those of kernels in Flax's layout, (inputs, outputs) and (rows, columns, inputs,
    outputs). Kernels of PyTorch and Equinox have their outputs in axis 0: use `axis_labels(weights, 0)`.

    Args:
        weights: pytree of the prunable weights, as `curvature.weights`.
        groups: one of

            - `"output_channels"`: a slice of each kernel for every output, its last axis;
            - `"input_channels"`: a slice of each kernel for every input, its axis -2;
            - `("heads", number)`: the slices of query, key, value and output kernels that belong to one head
              of one attention; the kernels are known by their names, and no other weights may be there;
            - `("blocks", shape)`: blocks of the last axes of each kernel, smaller ones at the far ends where
              the shape does not divide them;
            - a pytree of integers shaped like the weights, which is returned as arrays.

    Raises:
        ValueError: none of these; labels of another shape or dtype; a leaf that has no such axis; weights
            that are of no attention, or heads that do not fit.

    Examples:
        >>> group_labels({"a": np.ones((2, 3)), "b": np.ones((1, 2))}, "output_channels")
        {'a': array([[0, 1, 2], [0, 1, 2]]), 'b': array([[3, 4]])}
        >>> group_labels(np.ones((2, 3)), ("blocks", (1, 2)))
        array([[0, 0, 1], [2, 2, 3]])
    """
    if isinstance(groups, str):
        axes = {"output_channels": -1, "input_channels": -2}
        if groups not in axes:
            raise ValueError(f"{FORMS}; got {groups!r}.")
        return axis_labels(weights, axes[groups])
    if isinstance(groups, (tuple, list)) and len(groups) == 2 and isinstance(groups[0], str):
        kind, argument = groups
        if kind == "heads":
            return head_labels(weights, argument)
        if kind == "blocks":
            return block_labels(weights, argument)
        raise ValueError(f"{FORMS}; got {groups!r:.80}.")
    expected, got = (jax.tree.map(np.shape, tree) for tree in (weights, groups))
    if groups is None or expected != got:
        raise ValueError(f"{FORMS}, {expected}; got {got!r:.300}.")
    labels = jax.tree.map(to_host, to_arrays("groups", groups))
    for path, leaf in jax.tree_util.tree_leaves_with_path(labels):
        if leaf.dtype.kind not in "iu":
            raise ValueError(
                f"labels of groups must be integers, got {leaf.dtype} in groups{jax.tree_util.keystr(path)}: "
                "what decides the order of groups are weights or scores."
            )
    return jax.tree.map(lambda x: x.astype(np.int64), labels)


def axis_labels(weights: PyTree, axis: int) -> PyTree:
    """A group for every index along an axis of each leaf, numbered through the leaves.

    Raises:
        ValueError: a leaf without this axis.

    Examples:
        >>> axis_labels([np.ones((2, 2)), np.ones((1, 3))], 0)
        [array([[0, 0], [1, 1]]), array([[2, 2, 2]])]
    """

    def indices(name: str, shape: tuple[int, ...]) -> NDArray[np.int64]:
        if not -len(shape) <= axis < len(shape):
            raise ValueError(f"axis {axis} of its groups does not exist in {name}, of shape {shape}.")
        along = np.ones(len(shape), int)
        along[axis] = shape[axis]
        return np.broadcast_to(np.arange(shape[axis]).reshape(along), shape)

    return _numbered(weights, indices)


def block_labels(weights: PyTree, shape: Sequence[int]) -> PyTree:
    """A group for every block of the last axes of each leaf: (inputs, outputs) where the shape has two sides.

    Raises:
        ValueError: a shape that is none; a leaf of fewer axes.
    """
    if isinstance(shape, str) or not isinstance(shape, Sequence) or not shape:
        raise ValueError(f'the shape of blocks must be integers, as in ("blocks", (4, 4)), got {shape!r}.')
    for size in shape:
        require_count("a side of blocks", size)

    def indices(name: str, whole: tuple[int, ...]) -> NDArray[np.int64]:
        if len(whole) < len(shape):
            raise ValueError(f"blocks of shape {tuple(shape)} do not fit {name}, of shape {whole}.")
        sides = (1,) * (len(whole) - len(shape)) + tuple(shape)
        counts = [-(-size // side) for size, side in zip(whole, sides, strict=True)]
        at = np.ix_(*(np.arange(size) // side for size, side in zip(whole, sides, strict=True)))
        return np.ravel_multi_index(np.broadcast_arrays(*at), counts)

    return _numbered(weights, indices)


def head_labels(weights: PyTree, number: int) -> PyTree:
    """A group for every head of every attention: its slices of query, key, value and output kernels.

    Kernels are known by a part of their path, as "query" and "out" of Flax or "q_proj" and "o_proj"; those
    whose paths agree before that part belong to one attention. The axis of heads is either of size `number`,
    as in (inputs, heads, size of a head), or holds the heads one after the other, as in (inputs, outputs). An
    array named "weight" is (outputs, inputs), as in PyTorch and Equinox.

    Args:
        weights: pytree of the kernels of attention alone: choose them by `prunable`, or `curvature.of`.
            Biases of query, key and value may be there, too.
        number: of heads of each attention.

    Raises:
        ValueError: other weights; an output kernel without query, key and value, which may be of any layer;
            heads that do not fit, as where several share a key and a value.

    Examples:
        >>> kernels = {"query": np.ones((1, 4)), "out": np.ones((4, 1))}
        >>> jax.tree.map(lambda x: x.ravel().tolist(), head_labels(kernels, 2))
        {'out': [0, 0, 1, 1], 'query': [0, 0, 1, 1]}
    """
    require_count("the number of heads", number)
    first: dict[tuple, int] = {}
    sizes: dict[tuple, set[int]] = defaultdict(set)
    led_into: set[tuple] = set()

    def labels(path: tuple, leaf: Any) -> NDArray[np.int64]:
        attention, into = _place_in_attention(path)
        name, shape = jax.tree_util.keystr(path), np.shape(leaf)
        axis, size = _heads(name, shape, number, into)
        sizes[attention].add(size)
        led_into.update([attention] if into else [])
        if len(sizes[attention]) > 1:
            raise ValueError(
                f"heads of {name}, of shape {shape}, have another size than those of its attention. Where "
                "several heads share a key and a value, give integer labels."
            )
        along = np.ones(len(shape), int)
        along[axis] = shape[axis]
        heads = np.arange(shape[axis]) * number // shape[axis] + first.setdefault(
            attention, len(first) * number
        )
        return np.broadcast_to(heads.reshape(along), shape)

    found = jax.tree_util.tree_map_with_path(labels, weights)
    if alone := [attention for attention in sizes if attention not in led_into]:
        raise ValueError(
            f"weights{jax.tree_util.keystr(alone[0])} hold an output kernel without query, key or value, "
            "which may be of any layer: choose the kernels of attention by prunable or curvature.of, or "
            "give integer labels."
        )
    return found


def _place_in_attention(path: tuple) -> tuple[tuple, bool]:
    """The path of the attention, and whether this kernel leads into its heads."""
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    into = next((i for i, name in enumerate(names) if name in INTO_HEADS), None)
    out = next((i for i, name in enumerate(names) if name in OUT_OF_HEADS), None)
    where = out if into is None else into
    if where is None or (into is None and names[-1] == "bias"):
        raise ValueError(
            f"{jax.tree_util.keystr(path) or 'weights'} belongs to no head of attention that is known by its "
            f"name ({', '.join((*INTO_HEADS, *OUT_OF_HEADS))}): choose kernels of attention by prunable or "
            "curvature.of, or give integer labels."
        )
    return path[:where], into is not None


def _heads(name: str, shape: tuple[int, ...], number: int, into: bool) -> tuple[int, int]:
    """The axis along which heads stand, and the size of a head."""
    if name.endswith(("['bias']", ".bias")):
        axis, apart = 0, len(shape) == 2
    elif name.endswith(("['weight']", ".weight")) and len(shape) == 2:  # (outputs, inputs)
        axis, apart = (0 if into else 1), False
    else:
        apart = len(shape) == 3
        axis = 0 if not into else len(shape) - (2 if apart else 1)
    if apart and shape[axis] == number:
        return axis, shape[axis + 1]
    if apart or not shape or shape[axis] % number:
        raise ValueError(f"{number} heads do not fit {name}, of shape {shape}.")
    return axis, shape[axis] // number


def _numbered(weights: PyTree, indices: Any) -> PyTree:
    """Labels of each leaf, from indices of its groups, none of which is another leaf's."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(weights)
    first, labels = 0, []
    for path, leaf in leaves:
        found = indices(jax.tree_util.keystr(path) or "weights", np.shape(leaf))
        labels.append(first + found)
        first += int(found.max(initial=-1)) + 1
    return structure.unflatten(labels)
