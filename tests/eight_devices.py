"""A pruning limit on eight devices, printed as JSON: `test_sharding.py` runs it in processes of its own."""

import argparse
import json
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxlimit
from jaxlimit.core import memory
from jaxlimit.core.sharding import place
from jaxlimit.core.trees import flatten
from jaxlimit.curvature import linearizing
from jaxlimit.spectrum import lanczos
from jaxlimit.spectrum.basis import norms

LIMITS = {"hessian": ("one_shot", "width"), "gauss_newton": ("width", "readjusted")}


def predict(params, batch):
    x = batch["x"]
    for i in range(3):
        x = (jnp.tanh(x) if i else x) @ params[f"w{i}"] + params[f"b{i}"]
    return x


def cross_entropy(outputs, batch):
    return -jnp.mean(jnp.sum(batch["y"] * jax.nn.log_softmax(outputs), axis=1))


def loss(params, batch):
    return cross_entropy(predict(params, batch), batch)


def on_mesh(params, arrays, data, model):
    """The examples divided along one axis of a mesh, the kernels along the other."""
    mesh = jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    specs = {"w0": (None, "model"), "b0": ("model",), "w1": ("model", None), "b1": (), "w2": (None, "model")}
    params = {
        name: place(x, NamedSharding(mesh, PartitionSpec(*specs.get(name, ())))) for name, x in params.items()
    }
    return params, jax.tree.map(lambda x: place(x, NamedSharding(mesh, PartitionSpec("data"))), arrays)


def collectives(text):
    """What passes between devices in a compiled program: kinds, and shapes of the results."""
    found = re.findall(r"= (\(?[a-z0-9]+\[.*?) (all-[a-z]+|reduce-scatter|collective-permute)\(", text)
    return [
        (kind, [[int(n) for n in shape.split(",") if n] for shape in re.findall(r"\[([0-9,]*)\]", shapes)])
        for shapes, kind in found
    ]


def parts_of(vectors):
    return {k: x.sharding.shard_shape(x.shape) for k, x in vectors.items() if x is not None}


def offloaded(curvature):
    """Lanczos with vectors in host memory: how far T is from that without, and how a panel lies there."""
    initial = lanczos.init(jax.tree.map(lambda x: x[None], curvature.weights))
    resident, moved = (lanczos.run(curvature.matmat, initial, 40, *room) for room in ((64,), (0, 64)))
    panel = memory.in_device_memory(moved.basis[0])
    assert {x.sharding.memory_kind for x in jax.tree.leaves(moved.basis[0])} == {memory.HOST_MEMORY}
    difference = np.max(np.abs(resident.diagonal - moved.diagonal)) / np.max(np.abs(resident.diagonal))
    return {"difference": float(difference), "parts": parts_of(jax.tree.map(lambda x: x[:, 0], panel))}


def report_on(kind, params, arrays, checkpoint):
    functions = (loss,) if kind == "hessian" else (predict, cross_entropy)
    curvature = getattr(jaxlimit, kind)(*functions, params, jaxlimit.batched(arrays, 128))
    limit = jaxlimit.pruning_limit(
        curvature,
        jax.random.key(0),
        loss_tolerance=0.05,
        tolerance=0.005,
        num_probes=1,
        max_matvecs=400,
        which=LIMITS[kind],
        checkpoint=checkpoint,
    )
    weights = jax.tree.map(lambda x: x[None], curvature.weights)
    (group,) = curvature.linear
    compiled = curvature.product.group_mean.lower(group, curvature.num_examples, weights).compile()
    product = curvature.matmat(weights)
    with mock.patch.dict(linearizing.BATCH_BYTES, cpu=1):
        apart = getattr(jaxlimit, kind)(*functions, params, jaxlimit.batched(arrays, 128))
        assert len(apart.linear) > 1
    return {
        "limits": {name: getattr(limit, name).value for name in LIMITS[kind]},
        "num_matvecs": limit.num_matvecs,
        "product": float(norms(product)[0]),
        "apart": float(norms(apart.matmat(weights))[0]),
        "gradient": float(np.linalg.norm(flatten(curvature.gradient))),
        "collectives": collectives(compiled.as_text()),
        "parts": parts_of(product),
        "parts apart": parts_of(apart.matmat(weights)),
        "offloaded": offloaded(curvature),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("problem", help="npz of the parameters, and of the data x and y")
    parser.add_argument("--mesh", type=int, nargs=2, help="parts of the examples and of the kernels")
    parser.add_argument("--kinds", nargs="+", default=["hessian", "gauss_newton"])
    parser.add_argument("--checkpoint")
    parser.add_argument("--process", type=int, nargs=3, help="number, of how many, and the first one's port")
    options = parser.parse_args()
    if options.process:
        number, count, port = options.process
        jax.distributed.initialize(f"localhost:{port}", count, number)
    with np.load(options.problem) as content:
        params = {name: content[name] for name in content if name not in "xy"}
        arrays = {name: content[name] for name in "xy"}
    if options.mesh:
        params, arrays = on_mesh(params, arrays, *options.mesh)
    statistics = jaxlimit.loss_statistics(loss, params, jaxlimit.batched(arrays, 128))
    report = {"mean": statistics.mean, "batch_std": statistics.batch_std}
    for kind in options.kinds:
        checkpoint = None if options.checkpoint is None else f"{options.checkpoint}/{kind}"
        report[kind] = report_on(kind, params, arrays, checkpoint)
    if jax.process_index() == 0:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
