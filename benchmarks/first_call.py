"""What does the first call compile, and how long does that take: for each network and each stage?

    python benchmarks/first_call.py [--networks digits lenet]

Each network is measured in a process of its own, without JAX's cache of compiled programs. The stages follow
each other as in a first hour: the Hessian with its checks, what its products keep, one product, the measured
rounding, 16 Lanczos steps, a sweep of 8 sparsities; then all of it again for a network of another seed, which
should compile nothing. A stage counts the programs that XLA compiles, and seconds of processor time, which
say more than those of a clock where a machine is busy. Networks that are not measured anew keep their rows.

Results are in results/first_call.json and first_call.md. MNIST and CIFAR-10 are read from $JAXLIMIT_DATA.
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
from jaxlimit.core.trees import PyTree
from jaxlimit.spectrum import lanczos
from jaxlimit.spectrum.probes import rademacher

NAME = "first_call"
EXAMPLES = 512
STEPS, SPARSITIES = 16, 8
OURS = ("digits", "fc2", "fc5", "lenet", "vgg16", "transformer")
STRANGERS = ("bare CNN, max pool", "Haiku LSTM", "Linen ViT")
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


def in_a_process(name: str) -> dict[str, Any]:
    """`measure` in a new process that keeps no programs."""
    settings = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, __file__, "--measure", name]
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = (*OURS, *STRANGERS)
    parser.add_argument("--networks", nargs="+", default=list(known), choices=known)
    parser.add_argument("--measure", metavar="NETWORK", help="one of them, in this process, as JSON")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    before = {row["network"]: row for row in common.read_document(NAME).get("rows", [])}
    for name in options.networks:
        before[name] = in_a_process(name)
        rows = [before[one] for one in known if one in before]
        document = {"command": f"python benchmarks/{NAME}.py", "rows": rows}
        common.write(NAME, document, table(rows))


if __name__ == "__main__":
    main()
