"""How far each layer can be pruned alone: the limits of a network, layer by layer.

A layer is an array of weights, or several that a function puts together. All others stay as they are, so
these limits do not add up: pruned together, layers share one tolerance, and `pruning_limit` is asked of all.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlimit.core.checks import require_instance, require_key
from jaxlimit.core.display import Displayed, View
from jaxlimit.core.terminal import takes_bar
from jaxlimit.core.trees import PyTree, flatten, path_name
from jaxlimit.curvature.operator import Curvature
from jaxlimit.geometry.groups import group_labels
from jaxlimit.geometry.magnitude import magnitude_order
from jaxlimit.limits.arguments import check_arguments, require_readjustable
from jaxlimit.limits.budget import Progress, shown
from jaxlimit.limits.estimate import LIMITS
from jaxlimit.limits.pruning_limit import MAX_MATVECS, pruning_limit
from jaxlimit.limits.result import PruningLimit

LayerOf = Callable[[tuple, Any], str | None]


@dataclass(frozen=True, eq=False, repr=False)
class LayerLimits(Displayed, Mapping[str, PruningLimit]):
    """The limits of each layer pruned alone, by its name: a mapping. Prints as a table.

    Attributes:
        limits: by the name of the layer.
    """

    limits: Mapping[str, PruningLimit]

    def __getitem__(self, name: str) -> PruningLimit:
        return self.limits[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.limits)

    def __len__(self) -> int:
        return len(self.limits)

    def to_json(self) -> dict[str, Any]:
        """Everything but the arrays, as JSON values: `PruningLimit.to_json` by layer."""
        return {name: limit.to_json() for name, limit in self.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "LayerLimits":
        """The inverse of `to_json`, but for the arrays.

        Raises:
            ValueError: the values are not those of limits.
        """
        return cls({name: PruningLimit.from_json(limit) for name, limit in values.items()})

    def _view(self) -> View:
        first = next(iter(self.values()))
        names = [name for name in LIMITS if any(name in limit.estimates() for limit in self.values())]
        kind = "Gauss-Newton" if first.positive_semidefinite else "Hessian"
        title = "Limits of each layer pruned alone"
        asked = f"for a loss increase of {first.loss_tolerance:.4g}; {kind}; {first.num_examples:,} examples"
        rows = []
        for layer, limit in self.items():
            found = limit.estimates()
            cells = [f"{found[name].value:.4f}" if name in found else "-" for name in names]
            rows.append((layer, f"{limit.dim:,}", *cells, limit.code))
        unsure = [f"{layer}: {limit.status}" for layer, limit in self.items() if not limit.code.converged]
        return View(title, ("layer", "weights", *names, "ended"), rows, [asked, *unsure])


@takes_bar(lambda layer, state: shown(state)._replace(title=layer))
def layer_limits(
    curvature: Curvature,
    key: jax.Array,
    *,
    loss_tolerance: float,
    layer_of: LayerOf | None = None,
    tolerance: float = 1e-3,
    max_matvecs: int = MAX_MATVECS,
    num_probes: int | None = None,
    which: Sequence[str] = LIMITS,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Callable[[str, Progress], None] | bool | None = None,
    basis_bytes: int | None = None,
    host_bytes: int = 0,
    scores: PyTree | None = None,
    groups: Any = None,
) -> LayerLimits:
    """How sparse each layer can be pruned alone while the loss rises by at most `loss_tolerance`.

    `pruning_limit` of `curvature.of(layer)`, one layer after the other; all other parameters stay as they
    are. Cost: that of `pruning_limit` for each layer, of which those up to 5,000 weights are solved exactly.

    Args:
        curvature: from `hessian` or `gauss_newton`.
        key: of the random probes; each layer has its own.
        loss_tolerance: eps, which each layer may spend alone.
        layer_of: `layer_of(path, leaf) -> name` of the layer that an array of weights belongs to; None for an
            array that no layer is asked of. Default: each array is a layer, named like layers.0.kernel.
        tolerance: as for `pruning_limit`.
        max_matvecs: budget of each layer, as for `pruning_limit`.
        num_probes: as for `pruning_limit`.
        which: as for `pruning_limit`.
        checkpoint: folder for intermediate results, in which each layer has its own.
        progress: called with the name of a layer and a `Progress` after every block of products; True shows
            bars.
        basis_bytes: as for `pruning_limit`.
        host_bytes: likewise.
        scores: as for `pruning_limit`: a pytree shaped like the weights of all layers.
        groups: as for `pruning_limit`, of all layers.

    Returns:
        The limits by layer, in the order of the weights; `print` shows one table.

    Raises:
        ValueError: as for `pruning_limit`, before work starts; no layer, or one whose weights are all zero.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxlimit import batched, hessian
        >>> def loss(p, x): return jnp.mean((x @ p["a"]["w"] - 1) ** 2 + 9 * (x @ p["b"]["w"] - 1) ** 2) / 2
        >>> weights = {"w": jnp.linspace(0.0, 1.0, 64).reshape(64, 1)}
        >>> curvature = hessian(loss, {"a": weights, "b": weights}, batched(8 * jnp.eye(64), 64))
        >>> print(layer_limits(curvature, jax.random.key(0), loss_tolerance=1.0, which=["width"]))
        Limits of each layer pruned alone
        layer  weights   width  ended
        a.w         64  0.4688  exact
        b.w         64  0.2812  exact
        for a loss increase of 1; Hessian; 64 examples
    """
    require_instance("curvature", curvature, Curvature, "hessian or gauss_newton")
    key = require_key("key", key)
    check_arguments(loss_tolerance, tolerance, max_matvecs, num_probes, which, basis_bytes, host_bytes)
    labels = None if groups is None else group_labels(curvature.weights, groups)
    magnitude_order(curvature.weights, scores, labels)  # refuses those that do not match
    layers = _layers(curvature.weights, layer_of)
    for name, paths in layers.items():
        _require_prunable(name, _part(curvature, paths), which)
    limits: dict[str, PruningLimit] = {}
    keys = jax.random.split(key, len(layers))
    for number, (name, paths) in enumerate(layers.items()):
        part = _part(curvature, paths)  # one at a time: each holds the batches linearised in its own weights
        limits[name] = pruning_limit(
            part,
            keys[number],
            loss_tolerance=loss_tolerance,
            tolerance=tolerance,
            max_matvecs=max_matvecs,
            num_probes=num_probes,
            which=which,
            checkpoint=None if checkpoint is None else Path(checkpoint) / f"{number}-{_file_name(name)}",
            progress=partial(progress, name) if callable(progress) else None,
            basis_bytes=basis_bytes,
            host_bytes=host_bytes,
            scores=_of_part(scores, part.weights),
            groups=_of_part(labels, part.weights),
        )
    return LayerLimits(limits)


def _layers(weights: PyTree, layer_of: LayerOf | None) -> dict[str, set[tuple]]:
    """The paths of the arrays of each layer, in the order of the weights."""
    layers: dict[str, set[tuple]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        name = path_name(path) if layer_of is None else layer_of(path, leaf)
        if name is None:
            continue
        if not isinstance(name, str):
            raise ValueError(
                f"layer_of must return the name of a layer, or None, got {name!r:.50} for {path_name(path)}."
            )
        layers.setdefault(name, set()).add(path)
    if not layers:
        raise ValueError("layer_of names no layer: it returned None for every array of weights.")
    return layers


def _part(curvature: Curvature, paths: set[tuple]) -> Curvature:
    return curvature.of(lambda path, _: path in paths)


def _require_prunable(name: str, part: Curvature, which: Sequence[str]) -> None:
    """Whether the limits of a layer can be asked for."""
    if not np.any(flatten(part.weights)):
        raise ValueError(
            f"all weights of {name} are zero: every sparsity leaves it as it is. Let layer_of return None "
            "for it."
        )
    require_readjustable(part, which)


def _of_part(tree: PyTree | None, weights: PyTree) -> PyTree | None:
    """A tree like all weights, if there is one, with None where the part has none."""
    if tree is None:
        return None
    return jax.tree.map(lambda w, x: None if w is None else x, weights, tree, is_leaf=lambda w: w is None)


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)
