"""Training with a group lasso on hidden units, in place of the L1 term: a stage of benchmarks/groups.py."""

from typing import Any

import groups_networks
import jax
import jax.numpy as jnp
import numpy as np
from groups_networks import Network

import jaxlimit
from jaxlimit import models, training
from jaxlimit.application import presets
from jaxlimit.core.trees import partition
from jaxlimit.geometry.magnitude import magnitude_order

LAMBDAS = {"digits": (0.0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2), "fc2": (0.0, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3)}
# A unit whose root mean square is below that of the largest times this has been emptied by its training.
EMPTY = 1e-2


def trained(name: str, network: Network, strength: float) -> dict[str, Any]:
    """The stage `lasso`, of one lambda: one seed, training as for the other stages."""
    preset = groups_networks.preset_of(name)
    predict, start = models.from_nnx(presets.build_network(preset, 0))
    labels = models.unit_labels(presets.build_network(preset, 0), partition(start)[0])
    train, test = presets.load_arrays(preset, presets.Options())
    loss, recipe = training.classification_loss(predict), preset.recipe
    params = training.train(
        loss,
        start,
        train,
        jax.random.fold_in(jax.random.key(0), 0),
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        learning_rate=recipe.rate(len(train[1])),
        momentum=recipe.momentum,
        group_lasso=strength,
        groups=labels,
    )
    batches = network.batches
    statistics = jaxlimit.loss_statistics(loss, params, batches)
    curvature = jaxlimit.hessian(loss, params, batches)
    keywords: dict[str, Any] = {
        "which": ["one_shot"],
        "groups": labels,
        "loss_tolerance": statistics.batch_std,
    }
    limit = jaxlimit.pruning_limit(curvature, jax.random.key(0), **keywords)
    scores = np.sqrt(np.diff(magnitude_order(curvature.weights, groups=labels).squared_norm))
    sizes = np.diff(magnitude_order(curvature.weights, groups=labels).counts)
    rms = scores / np.sqrt(sizes)
    wrong = jax.jit(lambda images, labels: jnp.mean(predict(params, images).argmax(-1) != labels))
    return {
        "lambda": strength,
        "loss": statistics.mean,
        "loss_tolerance": statistics.batch_std,
        "test_error": float(wrong(*test)),
        "units": len(rms),
        "empty_units": int(np.sum(rms < EMPTY * rms.max())),
        "one_shot": limit.to_json(),
    }
