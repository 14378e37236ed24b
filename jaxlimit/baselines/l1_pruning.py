"""LOMP, the paper's own method: L1-regularised training, then one global magnitude cut, no fine-tuning.

    w = argmin mean_i loss_i(w) + l1 * sum_j |w_j|,    then the floor(s D) smallest |w_j| become 0

Source: Zhang, Zhang, Sun and Liu, arXiv 2306.05857. With a good limit s comes from `jaxlimit.pruning_limit`.
"""

from collections.abc import Sequence
from typing import Any, Unpack

import jax
from flax import nnx

from jaxlimit.baselines.masks import kept_counts
from jaxlimit.baselines.network import SparseNetwork, cut, kernels, subfolder
from jaxlimit.geometry.magnitude import magnitude_mask
from jaxlimit.training.recipe import Folder, Recipe, TrainingOptions

LOMP = Recipe(epochs=200, learning_rate=0.01, schedule="constant", weight_decay=0.0, l1=5e-5)
"""The recipe of the paper's code for FC5 and FC12 on CIFAR-10; `jaxlimit presets` lists those for others."""


def lomp(
    model: nnx.Module,
    arrays: tuple[Any, Any],
    key: jax.Array,
    sparsities: Sequence[float],
    settings: Recipe = LOMP,
    *,
    checkpoint: Folder = None,
    **options: Unpack[TrainingOptions],
) -> tuple[SparseNetwork, ...]:
    """One training for all sparsities, and one cut for each.

    Args:
        model: a classifier at its start; left as it is.
        arrays: (inputs, labels).
        key: of the order of the examples and of the augmentation.
        sparsities: each from 0 to below 1.
        settings: of the training; `l1` is what makes it LOMP.
        checkpoint: folder in which every finished epoch is kept; a run that was killed goes on from there, to
            the same bits.
        options: see `TrainingOptions`.

    Returns:
        A network for each sparsity, in their order, with exactly D - floor(s D) weights.

    Raises:
        ValueError: a sparsity is outside [0, 1) or leaves no weight; the model or the data are refused by
            `jaxlimit.training.train_model`.
        FloatingPointError: training diverged.

    Examples:
        >>> from jaxlimit.models import FullyConnected
        >>> import jax.numpy as jnp
        >>> model = FullyConnected([4, 4], rngs=nnx.Rngs(0))
        >>> data, recipe = (jnp.eye(4), jnp.arange(4)), Recipe(epochs=50, schedule="constant", l1=1e-3)
        >>> (network,) = lomp(model, data, jax.random.key(0), [0.5], recipe)
        >>> network.num_kept, network.predict(network.params, data[0]).argmax(-1).tolist()
        (8, [0, 1, 2, 3])
    """
    kept_counts(kernels(model), sparsities)
    trained = settings.train(model, arrays, key, checkpoint=subfolder(checkpoint, "dense"), **options)
    weights = kernels(trained)
    return tuple(cut(trained, magnitude_mask(weights, sparsity)) for sparsity in sparsities)
