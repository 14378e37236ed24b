"""`prune` as a method: a trained network whose kept weights are readjusted by Gauss-Newton steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import jax
from flax import nnx

from jaxlimit.baselines.l1_pruning import LOMP
from jaxlimit.baselines.masks import count, kept_counts, size
from jaxlimit.baselines.network import SparseNetwork, kernels, subfolder, with_params
from jaxlimit.core.batches import batched
from jaxlimit.core.checks import require_positive
from jaxlimit.models import from_nnx
from jaxlimit.pruning.prune import prune
from jaxlimit.training.losses import cross_entropy
from jaxlimit.training.recipe import Folder, Recipe, TrainingOptions


@dataclass(frozen=True)
class ReadjustedPruning:
    """Settings.

    Attributes:
        recipe: of the training; LOMP's, or one without L1 term.
        max_products: budget of `prune` for each sparsity, in products with all training examples.

    Raises:
        ValueError: a budget that is not positive.
    """

    recipe: Recipe = LOMP
    max_products: float = 100.0

    def __post_init__(self) -> None:
        require_positive("max_products", self.max_products)


def readjusted_pruning(
    model: nnx.Module,
    arrays: tuple[Any, Any],
    key: jax.Array,
    sparsities: Sequence[float],
    settings: ReadjustedPruning = ReadjustedPruning(),
    *,
    checkpoint: Folder = None,
    **options: Unpack[TrainingOptions],
) -> tuple[SparseNetwork, ...]:
    """One training for all sparsities, and `prune` for each: no learning rate, no random order.

    The weights are readjusted on the training examples as they are, without augmentation. Biases and
    statistics of batch norm stay as training left them.

    Its arguments, result and errors are those of `lomp`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxlimit.models import FullyConnected
        >>> model = FullyConnected([4, 4], rngs=nnx.Rngs(0))
        >>> data, settings = (jnp.eye(4), jnp.arange(4)), ReadjustedPruning(Recipe(epochs=2), max_products=20)
        >>> (network,) = readjusted_pruning(model, data, jax.random.key(0), [0.5], settings)
        >>> network.num_kept
        8
    """
    counts = kept_counts(kernels(model), sparsities)
    recipe = settings.recipe
    model = recipe.train(model, arrays, key, checkpoint=subfolder(checkpoint, "dense"), **options)
    (predict, params), networks = from_nnx(model), []
    for sparsity, num_kept in zip(sparsities, counts, strict=True):
        found = prune(
            lambda params, batch: predict(params, batch[0]),
            lambda logits, batch: cross_entropy(logits, batch[1]),
            params,
            batched(arrays, recipe.batch_size),
            sparsity,
            max_products=settings.max_products,
            checkpoint=subfolder(checkpoint, f"kept-{num_kept}"),
        )
        pruned = with_params(model, found.params)
        networks.append(SparseNetwork(pruned, found.mask, (size(found.mask), count(found.mask))))
    return tuple(networks)
