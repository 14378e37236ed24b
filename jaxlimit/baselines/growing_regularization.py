r"""GReg: weights that are to go are pushed to zero by an L2 term that grows, from a trained network.

    w <- w - rate * (gradient of the loss + reg * w),     reg for each weight, raised every few updates

GReg-1 raises it, from 0 to 1, on the weights that are smallest after training. GReg-2 first raises it a
little on all weights, so that those of small curvature shrink most, and chooses then; those it keeps have a
small negative one. What was chosen is removed, and the rest is trained again. Source: Wang, Qin, Zhang and
Fu, "Neural Pruning via Growing Regularization", ICLR 2021, arXiv 2012.09243.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlimit.baselines.masks import keep_all, keep_largest, kept_counts, size
from jaxlimit.baselines.network import SparseNetwork, kernels, subfolder
from jaxlimit.core.checks import as_real, require_count, require_range
from jaxlimit.core.trees import PyTree, partition
from jaxlimit.training.classifier import pure_classifier
from jaxlimit.training.descent import Settings, minimise
from jaxlimit.training.recipe import Folder, Recipe, TrainingOptions
from jaxlimit.training.schedule import steps_per_epoch


@dataclass(frozen=True)
class GReg:
    """Settings. The recipe raises reg by 1e-4 (1e-5 to choose) every 5 updates, 50,000 (5,000) in all.

    These are 128 epochs (13) of batches of 128 on CIFAR-10. Here epochs are given, and the steps are as large
    as it takes to come to the same height within them.

    Attributes:
        choose_first: GReg-1; else GReg-2.
        recipe: of the network before it is pruned.
        grow_epochs: in which reg rises to `height` on what is to go.
        stabilise_epochs: after that, in which it stays; ours.
        choose_epochs: of GReg-2, in which it rises to `choose_height` on all weights.
        height: of reg on what is to go.
        choose_height: of reg on all weights, when GReg-2 chooses.
        kept: reg of GReg-2 on what it keeps, constant, as in the authors' code.
        every: updates between two steps of reg.
        batch_size: while reg grows.
        learning_rate: while reg grows.
        momentum: while reg grows.
        finetune: of the weights that are kept, afterwards; its rate, a tenth of the recipe's, is ours.

    Raises:
        ValueError: a number outside its range.
    """

    choose_first: bool = True
    recipe: Recipe = Recipe()  # noqa: RUF009 (frozen)
    grow_epochs: int = 128
    stabilise_epochs: int = 13
    choose_epochs: int = 13
    height: float = 1.0
    choose_height: float = 0.01
    kept: float = -1e-4
    every: int = 5
    batch_size: int = 128
    learning_rate: float = 1e-3
    momentum: float = 0.9
    finetune: Recipe = Recipe(learning_rate=0.01)  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        for name in ("grow_epochs", "choose_epochs", "every", "batch_size"):
            require_count(name, getattr(self, name))
        require_count("stabilise_epochs", self.stabilise_epochs, 0)
        for name in ("height", "choose_height", "learning_rate"):
            value = getattr(self, name)
            require_range(name, value, 0 < as_real(value) < math.inf, "positive and finite")
        require_range("momentum", self.momentum, 0 <= as_real(self.momentum) < 1, "at least 0 and below 1")
        require_range("kept", self.kept, math.isfinite(as_real(self.kept)), "finite")


class Growth(NamedTuple):
    """How reg rises in one phase.

    Attributes:
        start: before the first update.
        height: at the end of `epochs`, and in the epochs that `stay`.
        kept: on all other weights.
    """

    epochs: int
    stay: int
    start: float
    height: float
    kept: float


def regularization(growth: Growth, update: Any, every: int, num_updates: int) -> jax.Array:
    """Reg on what is to go, in an update from 0: equal steps every so many updates, up to the height.

    Examples:
        >>> growth = Growth(epochs=1, stay=1, start=0.0, height=1.0, kept=0.0)
        >>> [round(float(regularization(growth, update, 5, 20)), 2) for update in (0, 4, 5, 19, 30)]
        [0.25, 0.25, 0.5, 1.0, 1.0]
    """
    steps = -(-num_updates // every)
    share = jnp.minimum((update // every + 1) / steps, 1.0)
    return growth.start + (growth.height - growth.start) * share


def grown(
    model: nnx.Module,
    arrays: tuple[Any, Any],
    key: jax.Array,
    leaving: PyTree,
    growth: Growth,
    settings: GReg,
    *,
    checkpoint: Folder = None,
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
) -> nnx.Module:
    """The model after a phase in which reg grows where `leaving` is True."""
    network = pure_classifier(model, augment)
    num_updates = growth.epochs * steps_per_epoch(len(arrays[1]), settings.batch_size)

    def objective(params: PyTree, state: PyTree, batch: PyTree, key: jax.Array) -> tuple[jax.Array, PyTree]:
        update, leaving, inner = state
        loss, inner = network.objective(params, inner, batch, key)
        reg = regularization(growth, update, settings.every, num_updates)
        weights, _ = partition(params)
        squares = jax.tree.map(
            lambda w, go: jnp.sum(jnp.where(go, reg, growth.kept) * w**2), weights, leaving
        )
        return loss + sum(jax.tree.leaves(squares)) / 2, (update + 1, leaving, inner)

    params, (_, _, state) = minimise(
        objective,
        network.params,
        (np.int32(0), leaving, network.state),
        arrays,
        key,
        Settings(growth.epochs + growth.stay, settings.batch_size, settings.learning_rate, settings.momentum),
        on_epoch=on_epoch,
        checkpoint=checkpoint,
        identity={**network.identity, "growth": list(growth), "every": settings.every},
    )
    return network.rebuild(params, state)


def greg(
    model: nnx.Module,
    arrays: tuple[Any, Any],
    key: jax.Array,
    sparsities: Sequence[float],
    settings: GReg = GReg(),
    *,
    checkpoint: Folder = None,
    **options: Unpack[TrainingOptions],
) -> tuple[SparseNetwork, ...]:
    """One dense training, and for each sparsity a phase in which reg grows, a cut, and a training.

    What goes is chosen by magnitude in all layers together; the paper gives each layer its share.

    Its arguments, result and errors are those of `lomp`.

    Examples:
        >>> from jaxlimit.models import FullyConnected
        >>> model = FullyConnected([4, 4], rngs=nnx.Rngs(0))
        >>> data, short = (jnp.eye(4), jnp.arange(4)), Recipe(epochs=2)
        >>> settings = GReg(recipe=short, grow_epochs=5, stabilise_epochs=1, finetune=short)
        >>> (network,) = greg(model, data, jax.random.key(0), [0.75], settings)
        >>> network.num_kept, network.rounds
        (4, (16, 4))
    """
    counts = kept_counts(kernels(model), sparsities)
    train_key, choose_key, grow_key, last_key = jax.random.split(key, 4)
    model = settings.recipe.train(
        model, arrays, train_key, checkpoint=subfolder(checkpoint, "dense"), **options
    )
    start, kept = 0.0, 0.0
    if not settings.choose_first:
        growth = Growth(settings.choose_epochs, 0, 0.0, settings.choose_height, 0.0)
        everything, folder = keep_all(kernels(model)), subfolder(checkpoint, "choose")
        model = grown(model, arrays, choose_key, everything, growth, settings, checkpoint=folder, **options)
        start, kept = settings.choose_height, settings.kept
    growth = Growth(settings.grow_epochs, settings.stabilise_epochs, start, settings.height, kept)
    magnitudes, networks = jax.tree.map(jnp.abs, kernels(model)), []
    for count in counts:
        mask, folder = keep_largest(magnitudes, count), subfolder(checkpoint, f"kept-{count}")
        leaving = jax.tree.map(jnp.logical_not, mask)
        grow = subfolder(folder, "grow")
        pushed = grown(model, arrays, grow_key, leaving, growth, settings, checkpoint=grow, **options)
        folder = subfolder(folder, "finetune")
        trained = settings.finetune.train(pushed, arrays, last_key, mask=mask, checkpoint=folder, **options)
        networks.append(SparseNetwork(trained, mask, (size(mask), count)))
    return tuple(networks)
