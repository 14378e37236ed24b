"""Smart-Ratio: random tickets whose layers keep hand-made shares of their weights.

Layer l of L, in forward order, has m_l weights. Dense layers keep .3 of them; a convolution keeps kappa r_l,

    r_l = (L - l + 1)^2 + (L - l + 1),    divided by l^2 for networks like VGG,

where kappa makes the total right. A layer that would keep more than all leaves the surplus to the
convolutions after it. Which weights a layer keeps is drawn at random before training ("random tickets"), or
they are its largest after a first training ("hybrid tickets"). Source: Su, Chen, Cai, Wu, Gao, Wang and Lee,
"Sanity-Checking Pruning Methods: Random Tickets can Win the Jackpot", NeurIPS 2020, arXiv 2009.11094.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import jax
import numpy as np
from flax import nnx, traverse_util

from jaxlimit.baselines.masks import keep_largest, kept_counts, random_mask, size
from jaxlimit.baselines.network import SparseNetwork, kernels, subfolder
from jaxlimit.core.checks import as_real, require_range
from jaxlimit.core.trees import PyTree
from jaxlimit.training.recipe import Folder, Recipe, TrainingOptions

Name = tuple[str, ...]


@dataclass(frozen=True)
class SmartRatio:
    """Settings; the defaults are those of the recipe for ResNets on CIFAR-10.

    Attributes:
        hybrid: hybrid tickets. The kept weights then go on from their trained values, through the whole
            schedule once more (learning-rate rewinding).
        vgg: divide r_l by l^2.
        dense_density: what dense layers keep of their weights.
        fixed: which layers keep `dense_density`: "dense", every dense layer, as in the recipe; or "last", the
            last dense layer only, where the others count as convolutions. This is ours, for networks with
            several dense layers: the recipe's were made with one, and cannot be sparser than its .3.
        recipe: of the training, and of the one before it for hybrid tickets.

    Raises:
        ValueError: a setting outside its range.
    """

    hybrid: bool = False
    vgg: bool = False
    dense_density: float = 0.3
    fixed: str = "dense"
    recipe: Recipe = Recipe(batch_size=64)  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        density = as_real(self.dense_density)
        require_range("dense_density", self.dense_density, 0 <= density <= 1, "from 0 to 1")
        require_range("fixed", self.fixed, self.fixed in ("dense", "last"), "dense or last")


def ratio_counts(
    sizes: Sequence[int],
    fixed: Sequence[bool],
    num_kept: int,
    *,
    dense_density: float = 0.3,
    vgg: bool = False,
) -> list[int]:
    """How many weights each layer keeps.

    kappa = (num_kept - floor(.3 * all weights of fixed layers)) / sum_scored m_l r_l. The recipe rounds every
    layer down and so keeps up to L weights less than it was asked for; here these go to the layers that lost
    most by rounding, one each, so that the total is `num_kept`.

    Args:
        sizes: m_l, in forward order.
        fixed: layers that keep `dense_density`; the others are scored.
        num_kept: the total.
        dense_density: as in `SmartRatio`.
        vgg: as in `SmartRatio`.

    Raises:
        ValueError: no such choice exists: the fixed layers alone keep more, or all layers together less.

    Examples:
        Three convolutions (r = 20, 12, 6) and a dense layer, of 100 weights each:

        >>> ratio_counts([100, 100, 100, 100], [False, False, False, True], 220)
        [100, 60, 30, 30]

        The same asked for 250: the first layer is full and leaves 15.8 weights to the second.

        >>> ratio_counts([100, 100, 100, 100], [False, False, False, True], 250)
        [100, 85, 35, 30]
    """
    scored = [index for index in range(len(sizes)) if not fixed[index]]
    in_fixed = sum(m for m, is_fixed in zip(sizes, fixed, strict=True) if is_fixed)
    least = _floor(dense_density * in_fixed)
    most = least + sum(sizes[index] for index in scored)
    if not least <= num_kept <= most:
        raise ValueError(
            f"Smart-Ratio cannot keep {num_kept:,} of {sum(sizes):,} weights, only {least:,} to {most:,} "
            f"with dense_density {dense_density:g}: ask for another sparsity, or change dense_density or, "
            "with several dense layers, fixed."
        )
    scores = {index: _raw_score(index + 1, len(sizes), vgg) for index in scored}
    norm = sum(sizes[index] * scores[index] for index in scored)
    wanted, surplus = [dense_density * m for m in sizes], 0.0
    for index in scored:
        share = (num_kept - least) * sizes[index] * scores[index] / norm + surplus
        wanted[index] = min(share, float(sizes[index]))
        surplus = share - wanted[index]
    counts = [_floor(number) for number in wanted]
    by_loss = sorted(range(len(sizes)), key=lambda index: counts[index] - wanted[index])
    for index in by_loss[: num_kept - sum(counts)]:
        counts[index] += 1
    return counts


def _raw_score(layer: int, num_layers: int, vgg: bool) -> float:
    """r_l."""
    after = num_layers - layer + 1
    return (after**2 + after) / (layer**2 if vgg else 1)


def _floor(value: float) -> int:
    """Rounded down, where .29 * 100 = 28.999999999999996 is 29."""
    return math.floor(value + 1e-9 * max(1.0, value))


def forward_order(model: nnx.Module) -> list[Name]:
    """Names of the prunable weights in the order in which the model defines its layers.

    Examples:
        >>> from jaxlimit.models import FullyConnected
        >>> forward_order(FullyConnected([1, 1, 1], rngs=nnx.Rngs(0)))
        [('layers', '0', 'kernel'), ('layers', '1', 'kernel')]
    """
    prunable = {name for name, leaf in traverse_util.flatten_dict(kernels(model)).items() if leaf is not None}
    return [name for name in _parameters(model) if name in prunable]


def _parameters(module: nnx.Module, path: Name = ()) -> Iterator[Name]:
    for name, part in vars(module).items():
        if isinstance(part, nnx.Param):
            yield (*path, name)
        elif isinstance(part, nnx.Module):
            yield from _parameters(part, (*path, name))


def smart_ratio(
    model: nnx.Module,
    arrays: tuple[Any, Any],
    key: jax.Array,
    sparsities: Sequence[float],
    settings: SmartRatio = SmartRatio(),
    *,
    checkpoint: Folder = None,
    **options: Unpack[TrainingOptions],
) -> tuple[SparseNetwork, ...]:
    """Random tickets, or hybrid ones.

    Cost: a training for each sparsity; for hybrid tickets one more.

    Its arguments, result and errors are those of `lomp`. Kernels of two dimensions are dense layers, all
    others convolutions. The masks are drawn with the key, too.

    Raises:
        ValueError: before any training, a sparsity that `ratio_counts` refuses.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxlimit.models import FullyConnected
        >>> model = FullyConnected([4, 8, 4], rngs=nnx.Rngs(0))
        >>> data = (jnp.eye(4), jnp.arange(4))
        >>> settings = SmartRatio(fixed="last", recipe=Recipe(epochs=1))
        >>> (network,) = smart_ratio(model, data, jax.random.key(0), [0.75], settings)
        >>> network.layers  # 16 = 7 + .3 * 32
        {'layers.0.kernel': (7, 32), 'layers.1.kernel': (9, 32)}
    """
    weights = kernels(model)
    num_kept = kept_counts(weights, sparsities)
    counts = [layer_sizes(model, count, settings) for count in num_kept]
    mask_key, train_key = jax.random.split(key)
    recipe = settings.recipe
    if settings.hybrid:
        folder = subfolder(checkpoint, "dense")
        model = recipe.train(model, arrays, jax.random.fold_in(train_key, 1), checkpoint=folder, **options)
        weights = kernels(model)
    networks = []
    for total, layers in zip(num_kept, counts, strict=True):
        mask = layer_masks(weights, layers, None if settings.hybrid else mask_key)
        folder = subfolder(checkpoint, f"kept-{total}")
        trained = recipe.train(model, arrays, train_key, mask=mask, checkpoint=folder, **options)
        networks.append(SparseNetwork(trained, mask, (size(weights), total)))
    return tuple(networks)


def layer_sizes(model: nnx.Module, num_kept: int, settings: SmartRatio) -> dict[Name, int]:
    """How many weights each layer of the model keeps, by name, in forward order.

    Raises:
        ValueError: as `ratio_counts`.
    """
    flat: dict[Name, Any] = traverse_util.flatten_dict(kernels(model))
    names = forward_order(model)
    dense = [flat[name].ndim == 2 for name in names]
    if settings.fixed == "last":
        last = max((index for index, is_dense in enumerate(dense) if is_dense), default=None)
        dense = [index == last for index in range(len(names))]
    counts = ratio_counts(
        [flat[name].size for name in names],
        dense,
        num_kept,
        dense_density=settings.dense_density,
        vgg=settings.vgg,
    )
    return dict(zip(names, counts, strict=True))


def layer_masks(weights: PyTree, counts: dict[Name, int], key: jax.Array | None) -> PyTree:
    """Each layer's own mask: drawn at random or, without a key, of its largest weights."""
    flat: dict[Name, Any] = dict(traverse_util.flatten_dict(weights))
    for number, (name, count) in enumerate(counts.items()):
        if key is None:
            flat[name] = keep_largest(np.abs(flat[name]), count)
        else:
            flat[name] = random_mask(jax.random.fold_in(key, number), flat[name], count)
    return traverse_util.unflatten_dict(flat)
