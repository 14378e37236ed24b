"""Products and statistics of data on four devices of a mesh, printed as JSON: for `test_meshes.py`.

Every combination of axes (explicit, which are JAX's default, or automatic), of parameters (placed or not)
and of batches (cut here, or a list).
"""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxlimit

AXES = {"explicit": AxisType.Explicit, "automatic": AxisType.Auto}


def loss(weights, batch):
    return jnp.mean(jnp.tanh(batch @ weights) ** 2)


def measured(weights, batches):
    """What does not depend on where the data lie."""
    sweep = jaxlimit.sparsity_sweep(lambda w, x: {"loss": loss(w, x)}, weights, batches, [0, 0.5])
    return {
        "statistics": jaxlimit.loss_statistics(loss, weights, batches).mean,
        "sweep": sweep.metrics["loss"].tolist(),
        "product": np.ravel(jaxlimit.hessian(loss, weights, batches).matvec(weights)).tolist(),
    }


def main():
    data = np.random.default_rng(0).standard_normal((32, 3)).astype(np.float32)
    weights = jnp.ones((3, 1))
    found = {"one device": measured(weights, jaxlimit.batched(data, 8))}
    for (name, axis), placed, cut in itertools.product(AXES.items(), (False, True), (False, True)):
        mesh = jax.make_mesh((4,), ("data",), axis_types=(axis,))
        examples = NamedSharding(mesh, PartitionSpec("data"))
        here = jax.device_put(weights, NamedSharding(mesh, PartitionSpec())) if placed else weights
        parts = [jax.device_put(part, examples) for part in np.split(data, 4)]
        batches = jaxlimit.batched(jax.device_put(data, examples), 8) if cut else parts
        found[f"{name}, placed {placed}, cut {cut}"] = measured(here, batches)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
