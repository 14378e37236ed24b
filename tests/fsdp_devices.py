"""A small decoder divided over eight devices as in `benchmarks/scale_plan.py`; prints JSON for its test."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxlimit

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import scale_plan

NETWORK = scale_plan.Network(layers=2, width=32, heads=4, length=8, words=64)


def tridiagonal(predict, weights, tokens):
    """T of two steps, and whether the vectors lie as the weights do."""

    def loss(weights, batch):
        return scale_plan.output_loss(predict(weights, batch), batch)

    curvature = jaxlimit.hessian(loss, weights, jaxlimit.batched((tokens, tokens), 8), linear_bytes=0)
    found = jaxlimit.tridiagonalize(curvature.matvec, curvature.weights, 2)
    product = curvature.matvec(curvature.weights)
    same = [product[k].sharding.is_equivalent_to(x.sharding, x.ndim) for k, x in curvature.weights.items()]
    return {"T": [*found.diagonal, *found.off_diagonal], "divided alike": all(same)}


def main():
    rng = np.random.default_rng(0)
    host = {k: rng.standard_normal(shape).astype(np.float32) / 8 for k, shape in NETWORK.shapes.items()}
    tokens = rng.integers(0, NETWORK.words, (8, NETWORK.length)).astype(np.int32)
    mesh = jax.make_mesh((8, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    weights = jax.device_put(host, scale_plan.places("FSDP", mesh))
    everywhere = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec()))
    found = {
        "one device": tridiagonal(scale_plan.decoder(), host, tokens),
        "FSDP": tridiagonal(scale_plan.fully_sharded(mesh), weights, everywhere),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
