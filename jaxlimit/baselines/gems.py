"""Rare Gems: a subnetwork is found at initialisation by learning a score for each weight, then trained.

The weights stay at w = sign(w_0) sqrt(2 / fan_in). Each has a score p, at first uniform in [0, 1], and a flag
f, at first 1. The forward pass uses w f 1[p > 1/2]; the gradient passes straight through the step:

    minimise over p    cross entropy(w f 1[p > 1/2]) + l2 ||p||^2,      d 1[p > 1/2] / dp := 1,   p in [0, 1]

Every few epochs the smallest scores among the flagged weights lose their flag. Then the flagged weights are
trained. Source: Sreenivasan, Sohn, Yang, Grinde, Nagle, Wang, Xing, Lee and Papailiopoulos, "Rare Gems:
Finding Lottery Tickets at Initialization", NeurIPS 2022, arXiv 2202.12002.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxlimit.baselines.masks import keep_all, keep_largest, kept_counts, size
from jaxlimit.baselines.network import SparseNetwork, bare, kernels, subfolder, with_params
from jaxlimit.core.checks import as_real, require_count, require_range
from jaxlimit.core.trees import PyTree, combine, partition
from jaxlimit.training.classifier import PureClassifier, pure_classifier
from jaxlimit.training.descent import Settings, minimise
from jaxlimit.training.recipe import Folder, Recipe, TrainingOptions
from jaxlimit.training.schedule import learning_rate_schedule, steps_per_epoch

# l2 of the recipe for ResNet-20 on CIFAR-10, by density; between these interpolated in both logarithms.
L2_BY_DENSITY = {0.0144: 1e-4, 0.0372: 3e-5, 0.5: 1e-8}


@dataclass(frozen=True)
class RareGems:
    """Settings; the defaults are those for ResNet-20 on CIFAR-10.

    Attributes:
        epochs: E, of the search.
        batch_size: of the search.
        learning_rate: of the scores; it falls to 0 as a cosine over the search.
        momentum: of the scores' gradient.
        l2: weight of ||p||^2; None: the recipe's for the density (`recipe_l2`).
        drop_every: T: flags are dropped after every T epochs, floor((E - 1) / T) times.
        finetune: of the weights, afterwards.

    Raises:
        ValueError: a number outside its range.
    """

    epochs: int = 150
    batch_size: int = 128
    learning_rate: float = 0.1
    momentum: float = 0.9
    l2: float | None = None
    drop_every: int = 5
    finetune: Recipe = Recipe(  # noqa: RUF009 (frozen)
        epochs=150, learning_rate=0.01, milestones=(80 / 150, 120 / 150)
    )

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "drop_every"):
            require_count(name, getattr(self, name))
        require_range("momentum", self.momentum, 0 <= as_real(self.momentum) < 1, "at least 0 and below 1")
        positive = 0 < as_real(self.learning_rate) < math.inf
        require_range("learning_rate", self.learning_rate, positive, "finite and above 0")
        allowed = self.l2 is None or 0 <= as_real(self.l2) < math.inf
        require_range("l2", self.l2, allowed, "finite and at least 0, or None")

    @property
    def num_drops(self) -> int:
        """K."""
        return (self.epochs - 1) // self.drop_every


def recipe_l2(density: float) -> float:
    """The weight of ||p||^2 at a density.

    The recipe has 1e-8 at .5, 3e-5 at .0372, 1e-4 at .0144 and at .0059. Values between are ours.

    Examples:
        >>> [round(recipe_l2(density), 10) for density in (0.9, 0.5, 0.0372, 0.0059)]
        [1e-08, 1e-08, 3e-05, 0.0001]
    """
    densities, values = np.log(list(L2_BY_DENSITY)), np.log(list(L2_BY_DENSITY.values()))
    return float(np.exp(np.interp(np.log(density), densities, values)))


def flagged_counts(dim: int, num_kept: int, num_drops: int) -> list[int]:
    """Number of flagged weights at first and after each drop.

    A drop takes the flag of ceil(q * flagged) weights, q = 1 - (num_kept / D)^(1 / num_drops). The recipe so
    ends up to `num_drops` weights below the target, with nothing left in the worst case, where it cuts once
    to the target; here no drop goes below the target and the last one meets it. Without drops there is one
    cut at the end.

    Examples:
        >>> flagged_counts(1000, 125, 3)  # a half each time
        [1000, 500, 250, 125]
    """
    counts = [dim]
    share = 1 - (num_kept / dim) ** (1 / max(num_drops, 1))
    for _ in range(num_drops - 1):
        counts.append(max(counts[-1] - math.ceil(share * counts[-1] - 1e-9 * dim), num_kept))
    return [*counts, num_kept]


def straight_through(scores: jax.Array) -> jax.Array:
    """1[p > 1/2], with derivative 1 everywhere.

    Examples:
        >>> jax.jvp(straight_through, (jnp.array([0.2, 0.7]),), (jnp.ones(2),))
        (Array([0., 1.], dtype=float32), Array([1., 1.], dtype=float32))
    """
    return (scores > 0.5).astype(scores.dtype) + (scores - jax.lax.stop_gradient(scores))


def signed_constants(weights: PyTree) -> PyTree:
    """sign(w) sqrt(2 / fan_in) for kernels with outputs on their last axis."""
    return jax.tree.map(lambda w: jnp.sign(w) * math.sqrt(2 / math.prod(w.shape[:-1])), weights)


def searchable(model: nnx.Module) -> nnx.Module:
    """The model as the search takes it: its weights signed constants, without biases, batch norm bare."""
    model = bare(model, biases=False)
    return with_params(model, signed_constants(kernels(model)))


def score_objective(network: PureClassifier, l2: float) -> Callable[..., tuple[jax.Array, PyTree]]:
    """What the search minimises, as `jaxlimit.training.descent.minimise` takes it.

    Its parameters are the scores, its state (flags, weights, other parameters, state of the network).
    """

    def objective(scores: PyTree, state: PyTree, batch: PyTree, key: jax.Array) -> tuple[jax.Array, PyTree]:
        flags, weights, rest, inner = state
        gated = jax.tree.map(lambda w, f, p: w * f * straight_through(p), weights, flags, scores)
        loss, inner = network.objective(combine(gated, rest), inner, batch, key)
        penalty = l2 * sum(jnp.sum(p**2) for p in jax.tree.leaves(scores))
        return loss + penalty, (flags, weights, rest, inner)

    return objective


def search(
    model: nnx.Module,
    arrays: tuple[Any, Any],
    key: jax.Array,
    num_kept: int,
    settings: RareGems,
    *,
    checkpoint: Folder = None,
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
) -> tuple[PyTree, PyTree, nnx.Module]:
    """The scores at the end of the search, flags that keep exactly `num_kept` weights, and the model.

    The model's weights are as they were, its running statistics those of the network of the scores.
    """
    network = pure_classifier(model, augment)
    weights, rest = partition(network.params)
    dim, per_epoch = size(weights), steps_per_epoch(len(arrays[1]), settings.batch_size)
    l2 = recipe_l2(num_kept / dim) if settings.l2 is None else settings.l2
    flagged = flagged_counts(dim, num_kept, settings.num_drops)
    score_key, order_key = jax.random.split(key)
    scores = optax.tree.random_like(score_key, weights, sampler=jax.random.uniform)

    def drop(epoch: int, scores: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        number, between = divmod(epoch + 1, settings.drop_every)
        if between or not 1 <= number <= settings.num_drops:
            return scores, state
        return scores, (keep_largest(scores, flagged[number], alive=state[0]), *state[1:])

    rate = learning_rate_schedule(
        "cosine", settings.learning_rate, epochs=settings.epochs, updates_per_epoch=per_epoch
    )
    scores, (flags, _, _, statistics) = minimise(
        score_objective(network, l2),
        scores,
        (keep_all(weights), weights, rest, network.state),
        arrays,
        order_key,
        Settings(settings.epochs, settings.batch_size, rate, settings.momentum),
        project=lambda scores: jax.tree.map(lambda p: jnp.clip(p, 0, 1), scores),
        after_epoch=drop,
        on_epoch=on_epoch,
        checkpoint=checkpoint,
        identity={**network.identity, "l2": l2, "num_kept": num_kept, "drop_every": settings.drop_every},
    )
    model = network.rebuild(network.params, statistics)
    return scores, keep_largest(scores, num_kept, alive=flags), model


def rare_gems(
    model: nnx.Module,
    arrays: tuple[Any, Any],
    key: jax.Array,
    sparsities: Sequence[float],
    settings: RareGems = RareGems(),
    *,
    checkpoint: Folder = None,
    **options: Unpack[TrainingOptions],
) -> tuple[SparseNetwork, ...]:
    """A search and a training for each sparsity.

    The network has no biases and batch norm without scale and shift, as in the recipe; any other parameters
    stay at their start during the search.

    Its arguments, result and errors are those of `lomp`. Only the signs of the model's weights
    matter; the scores are drawn with the key, too; `rounds` are the flagged weights after every drop.

    Examples:
        >>> from jaxlimit.models import FullyConnected
        >>> model = FullyConnected([4, 8, 4], rngs=nnx.Rngs(0))
        >>> data = (jnp.eye(4), jnp.arange(4))
        >>> settings = RareGems(epochs=7, drop_every=2, finetune=Recipe(epochs=2))
        >>> (network,) = rare_gems(model, data, jax.random.key(0), [0.75], settings)
        >>> network.rounds, sorted(network.params["layers"]["0"])
        ((64, 40, 25, 16), ['kernel'])
    """
    model = searchable(model)
    weights, networks = kernels(model), []
    for num_kept in kept_counts(weights, sparsities):
        search_key, train_key = jax.random.split(key)
        folder = subfolder(checkpoint, f"kept-{num_kept}")
        _, mask, _ = search(
            model, arrays, search_key, num_kept, settings, checkpoint=subfolder(folder, "search"), **options
        )
        folder = subfolder(folder, "finetune")
        trained = settings.finetune.train(model, arrays, train_key, mask=mask, checkpoint=folder, **options)
        flagged = flagged_counts(size(weights), num_kept, settings.num_drops)
        networks.append(SparseNetwork(trained, mask, tuple(flagged)))
    return tuple(networks)
