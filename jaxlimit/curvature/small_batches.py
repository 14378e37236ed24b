"""Small batches against their parts: weight, loss and gradient of a mean are sums of those of the parts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxlimit.core.sums import batch_weight, weighted
from jaxlimit.core.trees import PyTree
from jaxlimit.curvature.products import Loss, Product
from jaxlimit.curvature.scattered import norm

# Relative differences beyond which two cuts of the data do not agree: float32 keeps losses to about 1e-5 and
# gradients to 1e-4, and what is no mean is off by more than a part in a hundred in fours and twos.
LOSS_TOLERANCE, GRADIENT_TOLERANCE, WEIGHT_TOLERANCE = 1e-3, 1e-3, 1e-5
# Below it losses are rounding: those of a network that is as it was, say.
LEAST_LOSS = 1e-5
# Differences are rounding as long as the last digits of the weights make a tenth of them.
NOISE = 10


def in_parts(product: Product, size: int, moved: PyTree, rest: PyTree, small: PyTree) -> dict[str, jax.Array]:
    """Weight, loss and gradient of each small batch against those of its parts."""

    def compare(batch: PyTree) -> dict[str, jax.Array]:
        parts = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), batch)
        weight, loss, gradient, _, _ = _weighted_sums(product, moved, rest, batch)
        of_parts = jax.lax.map(partial(_weighted_sums, product, moved, rest), parts)
        weights, losses, gradients, loss_size, gradient_size = jax.tree.map(
            partial(jnp.sum, axis=0), of_parts
        )
        return {
            "weight": jnp.abs(weight - weights),
            "weight size": weights,
            "loss": jnp.abs(loss - losses),
            "loss size": loss_size,
            "gradient": norm(jax.tree.map(jnp.subtract, gradient, gradients)),
            "gradient size": gradient_size,
        }

    return jax.lax.map(compare, small)


def noise_in_parts(
    product: Product, moved: PyTree, nudged: PyTree, rest: PyTree, small: PyTree
) -> dict[str, jax.Array]:
    """What the last digits of the weights make."""

    def compare(batch: PyTree) -> dict[str, jax.Array]:
        sums = [_weighted_sums(product, at, rest, batch) for at in (moved, nudged)]
        difference = jax.tree.map(jnp.subtract, *sums)
        return {"loss noise": jnp.abs(difference[1]), "gradient noise": norm(difference[2])}

    return jax.lax.map(compare, small)


def _weighted_sums(product: Product, moved: PyTree, rest: PyTree, batch: PyTree) -> tuple:
    """Weight, loss and gradient of a batch, both times the weight, and the sizes of the two."""
    weight = batch_weight(product.weight, batch)
    sums = jax.value_and_grad(Loss(product))(moved, rest, batch)
    loss, gradient = jax.tree.map(partial(weighted, weight), sums)
    return jnp.asarray(weight, jnp.float32), loss, gradient, jnp.abs(loss), norm(gradient)


def differing_parts(found: dict[str, jax.Array], tolerance: float) -> str:
    """In which words small batches differ from their parts, if they do."""
    total = {name: float(np.sum(np.asarray(x, np.float64))) for name, x in found.items()}
    weight = total["weight size"]
    least = {"weight": 0.0, "loss": LEAST_LOSS * weight, "gradient": 0.0}
    for name, smallest in least.items():
        difference, size = total[name], total[f"{name} size"]
        noise = NOISE * total.get(f"{name} noise", 0.0)
        allowed = tolerance if name == "loss" else GRADIENT_TOLERANCE
        if not difference <= max(allowed * size + smallest, noise):
            share = difference / max(size, 1e-300)
            return f"of a few examples the {name} and that of their parts differ by {share:.2g} of it"
    return ""
