"""The two controls: no pruning, and pruning that knows nothing."""

from collections.abc import Sequence
from typing import Any, Unpack

import jax
from flax import nnx

from jaxlimit.baselines.masks import keep_all, kept_counts, random_mask, size
from jaxlimit.baselines.network import SparseNetwork, kernels, subfolder
from jaxlimit.training.recipe import Folder, Recipe, TrainingOptions

# Of a key: the mask, as against the order of the examples.
_MASK = 1


def dense(
    model: nnx.Module,
    arrays: tuple[Any, Any],
    key: jax.Array,
    sparsities: Sequence[float] = (0.0,),
    settings: Recipe = Recipe(),  # noqa: B008 (frozen)
    *,
    checkpoint: Folder = None,
    **options: Unpack[TrainingOptions],
) -> tuple[SparseNetwork, ...]:
    """The network trained without any pruning: what the others are measured by.

    Its arguments, result and errors are those of `lomp`, but every sparsity must be 0: the result is one
    network that keeps everything, for each of them.

    Raises:
        ValueError: another sparsity than 0.
    """
    if any(sparsities) or not len(sparsities):
        raise ValueError(f"dense training has sparsity 0 only, got sparsities = {list(sparsities)}.")
    trained = settings.train(model, arrays, key, checkpoint=subfolder(checkpoint, "dense"), **options)
    mask = keep_all(kernels(trained))
    return (SparseNetwork(trained, mask, (size(mask),)),) * len(sparsities)


def random_pruning(
    model: nnx.Module,
    arrays: tuple[Any, Any],
    key: jax.Array,
    sparsities: Sequence[float],
    settings: Recipe = Recipe(),  # noqa: B008 (frozen)
    *,
    checkpoint: Folder = None,
    **options: Unpack[TrainingOptions],
) -> tuple[SparseNetwork, ...]:
    """Training from scratch of a network whose kept weights are drawn at random, before training.

    All choices of D - floor(s D) weights of the whole network are equally likely, so every layer is about as
    sparse as the network.

    Its arguments, result and errors are those of `lomp`; the masks are drawn with the key, too.

    Examples:
        >>> from jaxlimit.models import FullyConnected
        >>> import jax.numpy as jnp
        >>> model = FullyConnected([4, 4], rngs=nnx.Rngs(0))
        >>> data = (jnp.eye(4), jnp.arange(4))
        >>> (network,) = random_pruning(model, data, jax.random.key(0), [0.5], Recipe(epochs=1))
        >>> network.num_kept
        8
    """
    weights, networks = kernels(model), []
    for num_kept in kept_counts(weights, sparsities):
        mask = random_mask(jax.random.fold_in(key, _MASK), weights, num_kept)
        folder = subfolder(checkpoint, f"kept-{num_kept}")
        trained = settings.train(model, arrays, key, mask=mask, checkpoint=folder, **options)
        networks.append(SparseNetwork(trained, mask, (size(weights), num_kept)))
    return tuple(networks)
