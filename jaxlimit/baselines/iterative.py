"""Iterative magnitude pruning with rewinding.

    round 0:      train all weights; w* = the weights after a number of updates of that training
    each round:   remove a fifth of the survivors, the smallest |w| of all layers together,
                  put the survivors back to w*, train again from the first learning rate

so that .8^r of the weights are alive after r rounds. Source: Frankle, Dziugaite, Roy and Carbin, "Linear Mode
Connectivity and the Lottery Ticket Hypothesis", arXiv 1912.05671.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlimit.baselines.masks import keep_all, keep_largest, kept_counts, size
from jaxlimit.baselines.network import SparseNetwork, bare, kernels, subfolder
from jaxlimit.core.checks import as_real, require_count, require_range
from jaxlimit.geometry.magnitude import num_removed
from jaxlimit.training.recipe import Folder, Recipe, TrainingOptions
from jaxlimit.training.schedule import steps_per_epoch


@dataclass(frozen=True)
class IterativePruning:
    """Settings; the defaults are those for ResNet-20 on CIFAR-10.

    For VGG-16 the recipe has 2,000 updates and `Recipe(epochs=200, milestones=(80 / 200, 120 / 200))`.

    Attributes:
        removed_share: of the survivors, in each round.
        rewind_steps: updates after which the weights are put back; 0: the start.
        recipe: of every round.

    Raises:
        ValueError: a number outside its range.
    """

    removed_share: float = 0.2
    rewind_steps: int = 1000
    recipe: Recipe = Recipe()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        share = as_real(self.removed_share)
        require_range("removed_share", self.removed_share, 0 < share < 1, "between 0 and 1")
        require_count("rewind_steps", self.rewind_steps, 0)


def rounds(dim: int, kept: Sequence[int], removed_share: float = 0.2) -> list[tuple[int, int]]:
    """The rounds that lead to these numbers of kept weights, each as (alive before, alive after).

    Round r leads to D - floor((1 - .8^r) D) weights. A number between two rounds is reached from the first of
    them by a shorter cut, beside the way.

    Examples:
        >>> rounds(1000, [512, 700])
        [(1000, 800), (800, 700), (800, 640), (640, 512)]
    """
    found, before, number = [], dim, 0
    while before > min(kept):
        number += 1
        after = dim - int(num_removed(dim, 1 - (1 - removed_share) ** number))
        found += [(before, count) for count in sorted({*kept}, reverse=True) if after < count < before]
        if min(kept) <= after < before:
            found.append((before, after))
        before = after
    return found


def iterative_pruning(
    model: nnx.Module,
    arrays: tuple[Any, Any],
    key: jax.Array,
    sparsities: Sequence[float],
    settings: IterativePruning = IterativePruning(),
    *,
    checkpoint: Folder = None,
    **options: Unpack[TrainingOptions],
) -> tuple[SparseNetwork, ...]:
    """Iterative magnitude pruning with rewinding; all sparsities share their rounds.

    The network has batch norm without scale and shift, as in the recipe. The running statistics of batch norm
    are put back, too, to those at the end of the epoch of w*.

    Every training draws an order of the examples of its own: what is found at one sparsity depends on the
    others asked for as it does on the key.

    Cost: a training for each of the log(1 - s) / log .8 rounds to the largest s, one more for each sparsity
    that is not that of a round, and the epochs up to w* a second time.

    Its arguments, result and errors are those of `lomp`; `rounds` are the survivors of every round.

    Raises:
        ValueError: there are more rewind_steps than updates in a training.

    Examples:
        >>> from jaxlimit.models import FullyConnected
        >>> model = FullyConnected([4, 4], rngs=nnx.Rngs(0))
        >>> data = (jnp.eye(4), jnp.arange(4))
        >>> settings = IterativePruning(rewind_steps=0, recipe=Recipe(epochs=5))
        >>> (network,) = iterative_pruning(model, data, jax.random.key(0), [0.2], settings)
        >>> network.rounds
        (16, 13)
    """
    recipe, steps = settings.recipe, settings.rewind_steps
    kept = kept_counts(kernels(model), sparsities)
    updates = recipe.updates(len(arrays[1]))
    require_range("rewind_steps", steps, steps <= updates, f"at most the {updates} updates of a training")

    model = bare(model, biases=True)
    first_key = jax.random.fold_in(key, 0)
    start = rewound(model, arrays, first_key, settings, checkpoint=subfolder(checkpoint, "rewind"), **options)
    trained = recipe.train(model, arrays, first_key, checkpoint=subfolder(checkpoint, "dense"), **options)
    mask = keep_all(kernels(trained))
    dim = size(mask)
    networks = {dim: SparseNetwork(trained, mask, (dim,))}
    for number, (before, after) in enumerate(rounds(dim, kept, settings.removed_share), start=1):
        parent = networks[before]
        magnitudes = jax.tree.map(jnp.abs, kernels(parent.model))
        mask = keep_largest(magnitudes, after, alive=parent.mask)
        round_key, folder = jax.random.fold_in(key, number), subfolder(checkpoint, f"kept-{after}")
        trained = recipe.train(start, arrays, round_key, mask=mask, checkpoint=folder, **options)
        networks[after] = SparseNetwork(trained, mask, (*parent.rounds, after))
    return tuple(networks[count] for count in kept)


def rewound(
    model: nnx.Module,
    arrays: tuple[Any, Any],
    key: jax.Array,
    settings: IterativePruning,
    *,
    checkpoint: Folder = None,
    **options: Unpack[TrainingOptions],
) -> nnx.Module:
    """The model after `rewind_steps` updates of the training with that key: w*.

    It is the same training, whose learning rate is 0 from that update on: no weight changes any more until
    the end of the epoch.
    """
    recipe, steps = settings.recipe, settings.rewind_steps
    if steps == 0:
        return model
    num_examples = len(arrays[1])
    usual: Any = recipe.rate(num_examples)

    def until_then(step: Any) -> jax.Array:
        rate: Any = usual(step) if callable(usual) else usual
        return jnp.where(step < steps, rate, 0.0)

    return recipe.train(
        model,
        arrays,
        key,
        epochs=math.ceil(steps / steps_per_epoch(num_examples, recipe.batch_size)),
        learning_rate=until_then,
        checkpoint=checkpoint,
        **options,
    )
