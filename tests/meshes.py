"""Products and statistics of data on four devices of a mesh, printed as JSON: for `test_meshes.py`.

Every combination of axes (explicit, which are JAX's default, or automatic), of parameters (placed or not)
and of batches (cut here, or a list); then losses that say themselves where their arrays lie, kernels that
are divided, numbers of examples that four devices do not share evenly, and a mesh that `jax.set_mesh` sets.
"""

import itertools
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxlimit

AXES = {"explicit": AxisType.Explicit, "automatic": AxisType.Auto}
SPARSITIES = [0, 0.5]


def loss_with(inside):
    def loss(weights, batch):
        return jnp.mean(inside(jnp.tanh(batch @ weights)) ** 2)

    return loss


loss = loss_with(lambda z: z)


def squares(weights, batch):
    """The loss of each example."""
    return jnp.mean(jnp.tanh(batch @ weights) ** 2, axis=1)


def measured(loss, weights, batches):
    """What does not depend on where the data lie."""
    sweep = jaxlimit.sparsity_sweep(lambda w, x: {"loss": loss(w, x)}, weights, batches, SPARSITIES)
    statistics = jaxlimit.loss_statistics(loss, weights, batches)
    curvature = jaxlimit.hessian(loss, weights, batches)
    certificate = jaxlimit.certify(squares, [(0.5, weights)], batches, bound=0.9)
    tuned = jaxlimit.finetuned_sweep(loss, weights, batches, [0.5], num_steps=1, learning_rate=0.01)
    lanczos = jaxlimit.tridiagonalize(curvature.matvec, curvature.weights, 2)
    return {
        "mean": [statistics.mean, statistics.batch_std],
        "sweep": sweep.metrics["loss"].tolist(),
        "tuned": tuned.metrics["loss"].tolist(),
        "risk": list(certificate.means),
        "matrix": np.ravel(curvature.dense()).tolist(),
        "lanczos": [*lanczos.diagonal, *lanczos.off_diagonal],
        "product": np.ravel(curvature.matvec(weights)).tolist(),
        "gradient": np.ravel(curvature.gradient).tolist(),
    }


def stepped(loss, weights, batches):
    """One step of a network of which two weights go; the loss takes the place of the outputs."""
    given = (lambda w, x: w, loss, weights, batches)
    network = jaxlimit.prune(*given, 0.4, max_products=1e-3)
    return np.ravel(network.params).tolist()


def truth(weights, parts):
    """The same from all examples at once, dense and in float64."""
    with jax.enable_x64(True):
        w = np.asarray(weights, np.float64)
        data = np.concatenate(parts).astype(np.float64)
        matrix = np.asarray(jax.hessian(loss)(w, data)).reshape(w.size, w.size)
        order = np.argsort(np.abs(w), axis=None, kind="stable")
        pruned = [
            np.where(np.isin(np.arange(w.size), order[: int(s * w.size)]), 0, w.ravel()) for s in SPARSITIES
        ]
        start = w.ravel() / np.linalg.norm(w)
        first = start @ matrix @ start
        residual = matrix @ start - first * start
        beta = np.linalg.norm(residual)
        half = pruned[1].reshape(w.shape)
        # The first step of Adam is the learning rate, against the sign of the gradient.
        step = half - 0.01 * np.sign(jax.grad(loss)(half, data)) * (half != 0)
        return {
            "matrix": np.ravel(matrix).tolist(),
            "lanczos": [first, residual @ matrix @ residual / beta**2, beta],
            "tuned": [float(min(loss(half, data), loss(step, data)))],
            "mean": [float(loss(w, data)), float(np.std([loss(w, part) for part in parts]))],
            "risk": [float(np.mean(np.tanh(data @ w) ** 2))],
            "sweep": [float(loss(x.reshape(w.shape), data)) for x in pruned],
            "product": (matrix @ w.ravel()).tolist(),
            "gradient": np.ravel(jax.grad(loss)(w, data)).tolist(),
        }


def main(wanted=""):
    """Prints what was found, and the truth, of the cases whose name has this pattern."""
    data = np.random.default_rng(0).standard_normal((33, 3)).astype(np.float32)
    even, weights = data[:32], jnp.array([[1.0, -0.4], [0.3, 0.9], [-0.7, 0.6]])
    fours, sevens = np.split(even, 4), np.split(even, range(7, 32, 7))
    found = {}

    def case(name, parts, loss, weights, batches):
        if not re.search(wanted, name):
            return
        found[name] = {"found": measured(loss, weights, batches), "true": truth(weights, parts)}

    for (name, axis), placed, cut in itertools.product(AXES.items(), (False, True), (False, True)):
        mesh = jax.make_mesh((4,), ("data",), axis_types=(axis,))
        examples = NamedSharding(mesh, PartitionSpec("data"))
        here = jax.device_put(weights, NamedSharding(mesh, PartitionSpec())) if placed else weights
        parts = [jax.device_put(part, examples) for part in fours]
        batches = jaxlimit.batched(jax.device_put(even, examples), 8) if cut else parts
        case(f"{name}, placed {placed}, cut {cut}", fours, loss, here, batches)
        if placed and cut:
            batches = jaxlimit.batched(batches.arrays, 7)
            case(f"{name}, batches of 7", sevens, loss, here, batches)
            whole = jax.device_put(data[32:], NamedSharding(mesh, PartitionSpec()))
            case(f"{name}, an example left over", [*fours, data[32:]], loss, here, [*parts, whole])
        if placed and not cut:
            constrained = jax.sharding.reshard if name == "explicit" else jax.lax.with_sharding_constraint
            stated = loss_with(lambda z, place=constrained, examples=examples: place(z, examples))
            case(f"{name}, a constraint in the loss", fours, stated, here, parts)
    sharded = jax.shard_map(lambda z: z, mesh=mesh, in_specs=examples.spec, out_specs=examples.spec)
    case("automatic, shard_map in the loss", fours, loss_with(sharded), here, parts)
    for name, axis in AXES.items():
        mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(axis,) * 2)
        divided = jax.device_put(even, NamedSharding(mesh, PartitionSpec("data")))
        kernel = jax.device_put(weights, NamedSharding(mesh, PartitionSpec(None, "model")))
        case(f"{name}, kernels divided", fours, loss, kernel, jaxlimit.batched(divided, 8))
        if wanted:
            continue
        found[f"{name}, pruned"] = {
            "found": {"params": stepped(loss, kernel, jaxlimit.batched(divided, 8))},
            # Without a mesh: tests/test_prune.py has its oracles.
            "true": {"params": stepped(loss, weights, [even])},
        }
    for name, axis in AXES.items():
        mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(axis,) * 2)
        with jax.set_mesh(mesh):
            divided = jax.device_put(even, PartitionSpec("data"))
            kernel = jax.device_put(weights, PartitionSpec(None, "model"))
            batches = jaxlimit.batched(divided, 8)
            case(f"{name}, mesh set", fours, loss, weights, batches)
            case(f"{name}, mesh set, kernels divided", fours, loss, kernel, batches)
            case(f"{name}, mesh set, batches of 7", sevens, loss, weights, jaxlimit.batched(divided, 7))
            constrained = jax.sharding.reshard if name == "explicit" else jax.lax.with_sharding_constraint
            stated = loss_with(lambda z, place=constrained: place(z, PartitionSpec("data")))
            case(f"{name}, mesh set, a constraint in the loss", fours, stated, weights, batches)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
