"""What does a product with a transformer of 1e9 weights take of each of 8, or of 256, devices?

    python benchmarks/scale_plan.py

Nothing is computed. The programs of a product of one batch, and of the rest of a Lanczos step, are lowered
from shapes and compiled on a processor that is told it has so many devices: memory of each, and what passes
between them. The network is a decoder of 1.07e9 float32 weights: 20 equal layers in a scan, each computed
again in the backward pass, of width 2,048 with 16 heads, and 32,768 words. A batch has one sequence of 1,024
tokens for each device. Three layouts:

    FSDP          every array of weights is divided over all devices; every device has all tokens, and the
                  loss says where the weights and the activations lie
    data x model  examples are divided along one axis; heads, hidden units and words along the other
    one axis      weights are divided as for FSDP, and the examples along the same axis, by the caller

Temporary memory is what XLA's compiler for CPUs plans; one for accelerators fuses and schedules otherwise.
The passes that divide arrays are the same for all devices. Behind them a compiler for accelerators merges
collectives and hides them behind work, and makes a reduce-scatter of an all-reduce whose sum is divided at
once; the one for CPUs leaves the all-reduce, which shows the whole sum.

Results are in results/scale_plan.json and scale_plan.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import collectives
import common
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlimit.core.sharding import example_sharding
from jaxlimit.core.trees import PyTree
from jaxlimit.curvature.products import GaussNewtonProduct, HessianProduct
from jaxlimit.geometry.magnitude import magnitude_order
from jaxlimit.spectrum import lanczos
from jaxlimit.spectrum.basis import PANEL, in_slots
from jaxlimit.training import cross_entropy

NAME = "scale_plan"
# Layouts, and parts of the examples and of the weights.
MESHES = (
    ("FSDP", 8, 1),
    ("data x model", 2, 4),
    ("one axis", 8, 1),
    ("FSDP", 256, 1),
    ("data x model", 16, 16),
)
KEPT_PANELS = 4
# Passes of Gram-Schmidt at most.
PASSES = 2


class Network(NamedTuple):
    """Sizes of a decoder."""

    layers: int = 20
    width: int = 2048
    heads: int = 16
    length: int = 1024
    words: int = 32_768

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all weights, the layers stacked."""
        size = self.width // self.heads
        return {
            "words": (self.words, self.width),
            "qkv": (self.layers, self.width, 3, self.heads, size),
            "out": (self.layers, self.heads, size, self.width),
            "up": (self.layers, self.width, 4 * self.width),
            "down": (self.layers, 4 * self.width, self.width),
        }


SMALL = Network(layers=3, width=64, heads=8, length=16, words=128)

# Of each array the axis of the width, and that of words, heads or hidden units.
WIDTH_AXES = {"words": 1, "qkv": 1, "out": 3, "up": 1, "down": 2}
MODEL_AXES = {"words": 0, "qkv": 3, "out": 1, "up": 2, "down": 1}


def places(layout: str, mesh: Mesh) -> dict[str, NamedSharding]:
    """Where the weights lie."""
    axes, name = (MODEL_AXES, "model") if layout == "data x model" else (WIDTH_AXES, "data")
    return {key: NamedSharding(mesh, P(*[None] * axis, name)) for key, axis in axes.items()}


def normalized(x: jax.Array) -> jax.Array:
    """At root mean square 1 along the width."""
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5)


def layer(hidden: jax.Array, weights: Mapping[str, jax.Array]) -> jax.Array:
    """Attention and two dense layers, each behind a norm, of (sequences, length, width)."""
    length = hidden.shape[1]
    query, key, value = jnp.einsum("bid,dche->cbihe", normalized(hidden), weights["qkv"])
    scores = jnp.einsum("bihe,bjhe->bhij", query, key) / query.shape[-1] ** 0.5
    scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -1e9)
    mixed = jnp.einsum("bhij,bjhe->bihe", jax.nn.softmax(scores), value)
    hidden = hidden + jnp.einsum("bihe,hed->bid", mixed, weights["out"])
    return hidden + jax.nn.gelu(normalized(hidden) @ weights["up"]) @ weights["down"]


def decoder(
    place_weights: Callable[[PyTree], PyTree] = lambda weights: weights,
    place_examples: Callable[[jax.Array], jax.Array] = lambda hidden: hidden,
) -> Callable[[PyTree, PyTree], jax.Array]:
    """`predict(weights, (tokens, labels)) -> logits`, which says where weights and activations lie."""

    def step(hidden: jax.Array, weights: PyTree) -> tuple[jax.Array, None]:
        return place_examples(layer(place_examples(hidden), weights)), None

    def predict(weights: PyTree, batch: PyTree) -> jax.Array:
        layers = dict(place_weights(weights))
        words = layers.pop("words")
        hidden, _ = jax.lax.scan(jax.checkpoint(step), place_examples(words[batch[0]]), layers)
        return place_examples(normalized(hidden) @ words.T)

    return predict


def fully_sharded(mesh: Mesh) -> Callable[[PyTree, PyTree], jax.Array]:
    """The decoder whose weights stay divided, and of which each device computes its own sequences."""
    where, examples = places("FSDP", mesh), NamedSharding(mesh, P("data"))
    constraint = jax.lax.with_sharding_constraint
    return decoder(lambda x: constraint(x, where), lambda x: constraint(x, examples))


def output_loss(logits: jax.Array, batch: PyTree) -> jax.Array:
    """Mean cross entropy of the tokens."""
    return cross_entropy(logits, batch[1])


def lowered(layout: str, mesh: Mesh, network: Network) -> Iterator[tuple[str, jax.stages.Lowered]]:
    """Programs by name: what `Curvature.matvec` runs for a batch of a stream, and a step of Lanczos."""
    where = places(layout, mesh)

    def weights(*leading: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            name: _array((*leading, *shape), mesh, P(*[None] * len(leading), *where[name].spec))
            for name, shape in network.shapes.items()
        }

    tokens_spec = P() if layout == "FSDP" else P(None, "data")
    tokens = _array((1, mesh.size, network.length), mesh, tokens_spec, jnp.int32)
    group, args, vectors = (tokens, tokens), (weights(), dict.fromkeys(where)), weights(1)
    predict = fully_sharded(mesh) if layout == "FSDP" else decoder()
    hessian = HessianProduct(lambda w, batch: output_loss(predict(w, batch), batch), "highest")
    gauss_newton = GaussNewtonProduct(predict, output_loss, "highest")
    sharding = example_sharding(group, axis=1)
    yield "gradient", hessian.gradient_sum.program(sharding).lower(args, group)
    yield "gauss_newton", gauss_newton.sum.program(sharding).lower((*args, vectors), group)
    yield "hessian", hessian.sum.program(sharding).lower((*args, vectors), group)
    if layout != "one axis":  # where vectors lie as for FSDP
        scalar: Any = _array((1,), mesh, P())
        at = lanczos.StepVectors(vectors, vectors, scalar, scalar)
        for panels in (0, KEPT_PANELS):
            basis = in_slots([weights(1, PANEL)] * panels)
            step = lanczos.rest_of_step.lower(basis, panels, at, vectors)
            yield f"step, {panels * PANEL} vectors kept", step


def _array(shape: tuple[int, ...], mesh: Mesh, spec: P, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def measure(layout: str, data: int, model: int, network: Network) -> list[dict[str, Any]]:
    """Rows of one layout, in a process with so many devices."""
    mesh = jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    rows = []
    for name, program in lowered(layout, mesh, network):
        compiled: Any = program.compile()
        memory = compiled.memory_analysis()
        rows.append(
            {
                "layout": layout,
                "data": data,
                "model": model,
                "program": name,
                "argument_bytes": memory.argument_size_in_bytes,
                "result_bytes": memory.output_size_in_bytes,
                "temporary_bytes": memory.temp_size_in_bytes,
                "collective_bytes": collectives.collective_bytes(compiled.as_text(), PASSES),
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def host_bytes_per_weight(num_weights: int = 1_000_000) -> float:
    """At most, while the weights are put in order on the host."""
    weights = np.random.default_rng(0).standard_normal(num_weights).astype(np.float32)
    tracemalloc.start()
    order = magnitude_order(weights)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / order.dim


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """GiB of each device."""
    heads = ["layout, devices, program", "arguments", "results", "temporary"]
    heads += ["gathered", "summed", "otherwise moved"]
    lines = []
    for row in rows:
        moved = row["collective_bytes"]
        gathered, summed = moved.get("all-gather", 0), moved.get("all-reduce", 0)
        sizes = [row["argument_bytes"], row["result_bytes"], row["temporary_bytes"], gathered, summed]
        sizes.append(sum(moved.values()) - gathered - summed)
        layout, devices = row["layout"], row["data"] * row["model"]
        if row["model"] > 1:
            layout = f"{row['data']} data x {row['model']} model"
        lines.append([f"{layout}, {devices}, {row['program']}", *(f"{size / 2**30:.2f}" for size in sizes)])
    return common.markdown(heads, lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--one", nargs=3, metavar=("LAYOUT", "DATA", "MODEL"), help="rows of one, as JSON")
    parser.add_argument("--small", action="store_true", help="with --one: of 2e5 weights")
    given = parser.parse_args()
    if given.one:
        layout, data, model = given.one
        print(json.dumps(measure(layout, int(data), int(model), SMALL if given.small else Network())))
        return
    rows: list[dict[str, Any]] = []
    for layout, data, model in MESHES:
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={data * model}"}
        command = [sys.executable, __file__, "--one", layout, str(data), str(model)]
        done = subprocess.run(command, env=os.environ | flags, check=True, stdout=subprocess.PIPE, text=True)
        rows += json.loads(done.stdout)
    network = Network()
    document = {
        "command": f"python benchmarks/{NAME}.py",
        "network": network._asdict(),
        "num_weights": sum(int(np.prod(shape)) for shape in network.shapes.values()),
        "host_bytes_per_weight": host_bytes_per_weight(),
        "rows": rows,
    }
    common.write(NAME, document, table(rows))


if __name__ == "__main__":
    main()
