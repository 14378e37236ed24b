"""Padded data on eight devices, one of which holds nothing but padding: for `test_means.py`.

Prints losses and products as JSON; and what is said where no weight is given.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxlimit


def masked(params, batch):
    outputs = jnp.tanh(batch["x"] @ params)
    return jnp.sum(jnp.sum(outputs**2, axis=1) * batch["mask"]) / jnp.sum(batch["mask"])


def count_mask(batch):
    return jnp.sum(batch["mask"])


def refusal(use):
    try:
        use()
    except ValueError as error:
        return str(error)
    return "none"


def main():
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((3, 2)).astype(np.float32)
    arrays = {
        "x": rng.standard_normal((48, 3)).astype(np.float32)
        * np.linspace(1, 3, 48, dtype=np.float32)[:, None],
        "mask": (np.arange(48) < 39).astype(np.float32),
    }
    place = NamedSharding(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data"))
    on_devices = jax.tree.map(lambda x: jax.device_put(x, place), arrays)
    report = {}
    for name, batches in {
        "one device": [arrays],
        "one batch": [on_devices],
        "batched": jaxlimit.batched(on_devices, 16),
    }.items():
        options = {"weight_fn": count_mask}
        curvature = jaxlimit.hessian(masked, jnp.asarray(weights), batches, **options)
        anew = jaxlimit.hessian(masked, jnp.asarray(weights), batches, linear_bytes=0, **options)
        report[name] = {
            "loss": curvature.loss,
            "statistics": jaxlimit.loss_statistics(masked, weights, batches, **options).mean,
            "weight": curvature.total_weight,
            "product": np.ravel(curvature.matvec(weights)).tolist(),
            "anew": np.ravel(anew.matvec(weights)).tolist(),
            "gradient": np.ravel(curvature.gradient).tolist(),
            "refusal": refusal(
                lambda batches=batches: jaxlimit.hessian(masked, jnp.asarray(weights), batches)
            ),
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
