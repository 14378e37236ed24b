"""What does the first call compile, and how long does that take: for each network and each stage?

    python benchmarks/first_call.py [--parts stages dense] [--networks digits lenet]

Each network is measured in a process of its own, without JAX's cache of compiled programs. The stages follow
each other as in a first hour: the Hessian with its checks, what its products keep, one product, the measured
rounding, 16 Lanczos steps, a sweep of 8 sparsities; then all of it again for a network of another seed, which
should compile nothing. A stage counts the programs that XLA compiles, and seconds of processor time, which
say more than those of a clock where a machine is busy. Networks that are not measured anew keep their rows.

`dense` are all four limits of networks that are small enough for the dense matrix, each curvature twice: the
first time with all that it compiles, and again for a network of another seed. *Its matrix products* and *its
reading* are what one product would take at the rate of a large matrix product, and if it did nothing but read
what is kept of the examples. One thread multiplies there: a second one takes processor time while it waits.

Results are in results/first_call.json, first_call.md and first_call_dense.md. MNIST and CIFAR-10 are read
from $JAXLIMIT_DATA.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import common
import jax
import networks
import products_strangers

import jaxlimit
from jaxlimit.core.jaxprs import multiplications
from jaxlimit.core.trees import PyTree
from jaxlimit.curvature.linearizing import num_bytes
from jaxlimit.spectrum import lanczos
from jaxlimit.spectrum.probes import rademacher
from jaxlimit.training.losses import CURVATURES

NAME = "first_call"
EXAMPLES = 512
STEPS, SPARSITIES = 16, 8
OURS = ("digits", "fc2", "fc5", "lenet", "vgg16", "transformer")
STRANGERS = ("bare CNN, max pool", "Haiku LSTM", "Linen ViT")
# Weights in the matrix: 4,464 and 3,312.
SMALL = ("digits", "Haiku LSTM, 24 units")
LOSS_TOLERANCE = 0.05
COMPILED = "/jax/core/compile/backend_compile_duration"
Problem = tuple[Callable[[PyTree, PyTree], jax.Array], PyTree, jaxlimit.Batches]


class Compilations:
    """How many programs XLA has compiled since this object was made."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        self.count += event == COMPILED


def load(name: str, seed: int) -> Problem:
    """Loss, parameters and data; the parameters of a network that is not ours are moved by the seed."""
    if name in networks.NETWORKS:
        problem = networks.load_problem(name, EXAMPLES if name != "vgg16" else 64, seed=seed)
        return problem.loss, problem.params, problem.batches()
    loss, params, arrays = products_strangers.STRANGERS[name]()
    return loss, jax.tree.map(lambda x: x * (1 + 0.1 * seed), params), jaxlimit.batched(arrays, 128)


def stages(loss: Callable, params: PyTree, batches: jaxlimit.Batches) -> dict[str, Callable[[], Any]]:
    """What is done one after the other."""
    made: dict[str, Any] = {}

    def curvature() -> jaxlimit.Curvature:
        made["hessian"] = jaxlimit.hessian(loss, params, batches)
        made["start"] = rademacher(jax.random.key(0), made["hessian"].weights, 1)
        return made["hessian"]

    def steps() -> lanczos.LanczosState:
        return lanczos.run(made["hessian"].matmat, lanczos.init(made["start"]), STEPS)

    def swept() -> jaxlimit.Sweep:
        grid = [i / SPARSITIES for i in range(SPARSITIES)]
        return jaxlimit.sparsity_sweep(lambda p, b: {"loss": loss(p, b)}, params, batches, grid)

    return {
        "hessian": curvature,
        "kept": lambda: made["hessian"].linear,
        "product": lambda: made["hessian"].matmat(made["start"]),
        "rounding": lambda: made["hessian"].rounding,
        "Lanczos": steps,
        "sweep": swept,
    }


def measure(name: str) -> dict[str, Any]:
    """Programs and seconds of each stage, in this process."""
    compiled = Compilations()

    def timed(function: Callable[[], Any]) -> dict[str, float]:
        count, clock, start = compiled.count, time.process_time(), time.perf_counter()
        jax.block_until_ready(function())
        return {
            "programs": compiled.count - count,
            "processor_seconds": time.process_time() - clock,
            "seconds": time.perf_counter() - start,
        }

    first, second = (stages(*load(name, seed)) for seed in (0, 1))
    found = {stage: timed(function) for stage, function in first.items()}
    again = [timed(function) for function in second.values()]
    found["another seed"] = {key: sum(one[key] for one in again) for key in again[0]}
    return {"network": name, "stages": found}


def small(name: str, kind: str, seed: int) -> jaxlimit.Curvature:
    """A curvature whose matrix is small, "hessian" or "gauss_newton"."""
    if name in networks.NETWORKS:
        return networks.load_problem(name, seed=seed).curvature(kind)
    predict, params, arrays = products_strangers.lstm_outputs(24)
    params = jax.tree.map(lambda x: x * (1 + 0.1 * seed), params)
    batches = jaxlimit.batched(arrays, 128)
    if kind == "hessian":
        return jaxlimit.hessian(products_strangers.classifier(predict), params, batches)
    output_loss = lambda logits, batch: products_strangers.cross_entropy(logits, batch[1])  # noqa: E731
    return jaxlimit.gauss_newton(lambda p, batch: predict(p, batch[0]), output_loss, params, batches)


def measure_dense(name: str, kind: str) -> dict[str, Any]:
    """Programs and processor seconds of all limits, in this process."""
    curvatures, compiled = [small(name, kind, seed) for seed in (0, 1)], Compilations()

    def limits(curvature: jaxlimit.Curvature) -> dict[str, float]:
        times, count, start = [], compiled.count, time.process_time()
        limit = jaxlimit.pruning_limit(
            curvature,
            jax.random.key(0),
            loss_tolerance=LOSS_TOLERANCE,
            progress=lambda _: times.append(time.process_time()),  # before every block of products
        )
        whole, blocks = time.process_time() - start, len(times)
        block = (times[-1] - times[1]) / (blocks - 2)
        products = times[-1] - start + block
        return {
            "programs": compiled.count - count,
            "processor_seconds": whole,
            "matrix": products,
            "rest": whole - products,
            "product": blocks * block / limit.num_matvecs,
            "products": limit.num_matvecs,
        }

    first, again = map(limits, curvatures)
    row = {"network": name, "curvature": kind, "first": first, "again": again}
    # What bounds a product from below: its matrix products, and reading what is kept of the examples.
    row["operations"] = 2 * multiplications(curvatures[0].matvec, curvatures[0].weights)
    row["kept_bytes"] = num_bytes(curvatures[0].linear)
    rates = common.matmul_rate(clock=time.process_time), common.read_rate(clock=time.process_time)
    return row | dict(zip(("matmul_rate", "read_rate"), rates, strict=True))


def in_a_process(*what: str, **settings: str) -> dict[str, Any]:
    """A measurement in a new process that keeps no programs."""
    settings = {"JAX_ENABLE_COMPILATION_CACHE": "false", **settings}
    command = [sys.executable, __file__, "--measure", *what]
    done = subprocess.run(command, env=os.environ | settings, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Programs and processor seconds of each stage."""
    names = list(rows[0]["stages"])
    lines = []
    for row in rows:
        found = row["stages"]
        cells = [f"{found[n]['programs']} / {found[n]['processor_seconds']:.1f} s" for n in names]
        whole = sum(found[n]["processor_seconds"] for n in names[:-1])
        lines.append([row["network"], *cells[:-1], f"{whole:.1f} s", cells[-1]])
    return common.markdown(["network", *names[:-1], "all", names[-1]], lines)


def dense_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The first time, and again: where the processor time goes."""
    lines = []
    for row in rows:
        first, again = row["first"], row["again"]
        cells = [f"{first['processor_seconds']:.1f} s", str(first["programs"])]
        cells += [f"{again['processor_seconds']:.1f} s", str(again["programs"])]
        cells += [f"{again['matrix']:.1f} s", f"{again['rest']:.1f} s", f"{1e3 * again['product']:.2f} ms"]
        cells += [f"{1e3 * row['operations'] / row['matmul_rate']:.2f} ms"]
        cells += [f"{1e3 * row['kept_bytes'] / row['read_rate']:.2f} ms"]
        lines.append([row["network"], row["curvature"], f"{first['products']:,}", *cells])
    heads = ["network", "curvature", "products", "first", "programs", "again", "programs"]
    heads += ["the products", "eigensystem, limits", "one product", "its matrix products", "its reading"]
    return common.markdown(heads, lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = (*OURS, *STRANGERS, *SMALL[1:])
    parser.add_argument("--parts", nargs="+", default=["stages", "dense"], choices=["stages", "dense"])
    parser.add_argument("--networks", nargs="+", default=list(known), choices=known)
    parser.add_argument("--measure", nargs="+", help="NETWORK [CURVATURE]: one row, in this process, as JSON")
    options = parser.parse_args()
    if options.measure:
        found = measure(*options.measure) if len(options.measure) == 1 else measure_dense(*options.measure)
        print(json.dumps(found))
        return
    document = {**common.read_document(NAME), "command": f"python benchmarks/{NAME}.py"}

    def add(part: str, row: dict[str, Any], table: Callable[[Sequence[Mapping[str, Any]]], str]) -> None:
        """Writes a row in the place of the one before it."""
        before = {(one["network"], one.get("curvature")): one for one in document.get(part, [])}
        before[row["network"], row.get("curvature")] = row
        document[part] = sorted(before.values(), key=lambda one: known.index(one["network"]))
        common.write(NAME, document)
        common.write_table(NAME if part == "rows" else f"{NAME}_{part}", table(document[part]))

    for name in options.networks:
        if "stages" in options.parts and name not in SMALL[1:]:
            add("rows", in_a_process(name), table)
        if "dense" in options.parts and name in SMALL:
            for kind in CURVATURES:
                add("dense", in_a_process(name, kind, OPENBLAS_NUM_THREADS="1"), dense_table)


if __name__ == "__main__":
    main()
