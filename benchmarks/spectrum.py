"""How long does a whole Lanczos run take: against every peer, and against its products alone?

    JAX_ENABLE_COMPILATION_CACHE=false python benchmarks/spectrum.py [--parts peers first overhead]

    peers      32, 64 and 128 steps with the Hessian, from the same start vector, beside each peer that has a
               run of its own. What it reorthogonalises differs: jaxlimit, matfree and the plain loop keep the
               whole basis orthogonal, hessian-eigenthings too, curvlinops nothing.
    first      the first run of each number of steps, in which programs are compiled, beside matfree
    overhead   what 128 steps cost beyond their products, for the FC5 of CIFAR-10 (3.9 million weights)

Results are in results/spectrum.json, spectrum.md, spectrum_first.md and spectrum_overhead.md. Needs
`pip install -e ".[cli,bench]"`, and MNIST and CIFAR-10 under $JAXLIMIT_DATA.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import common
import jax
import jax.numpy as jnp
import networks
import numpy as np
import peers

import jaxlimit
from jaxlimit.application.presets import Options, build_network, find_preset, load_arrays
from jaxlimit.core import writing
from jaxlimit.models import from_nnx
from jaxlimit.spectrum import lanczos
from jaxlimit.spectrum.basis import PANEL
from jaxlimit.spectrum.probes import rademacher
from jaxlimit.training.losses import classification_curvature

NAME = "spectrum"
STEPS = (32, 64, 128)
# Networks with their numbers of examples, fewer than a product is timed with where a run takes minutes.
NETWORKS = {"digits": 1_438, "fc2": 2_048, "fc5": 2_048, "lenet": 128}
# Those whose products take little, so that a step's other costs show.
FIRST = ("digits", "fc2")
OVERHEAD_EXAMPLES = (2_048, 10_000)


def own_run(curvature: jaxlimit.Curvature, start: Any, num_steps: int) -> lanczos.LanczosState:
    """A run with full reorthogonalisation, as `pruning_limit` makes it."""
    return lanczos.run(curvature.matmat, lanczos.init(start), num_steps)


def starts(curvature: jaxlimit.Curvature) -> tuple[Any, np.ndarray]:
    """One vector of random signs, as a tree with a leading axis and flat."""
    tree = rademacher(jax.random.key(0), curvature.weights, 1)
    return tree, np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def against_peers(name: str, num_examples: int) -> list[dict[str, Any]]:
    """Seconds of the runs of one network, by number of steps."""
    problem = networks.load_problem(name, num_examples)
    curvature = problem.curvature("hessian")
    tree, flat = starts(curvature)
    found = [peer for peer in peers.load_peers(problem, "hessian") if peer.has_lanczos]
    matfree = peers.Matfree(curvature)
    others: list[Any] = [*found, matfree]
    rows = []
    for num_steps in STEPS:
        matfree.compile(num_steps)
        functions: dict[str, Callable[[], Any]] = {"jaxlimit": partial(own_run, curvature, tree, num_steps)}
        for peer in others:
            functions[peer.name] = partial(peer.lanczos, peer.to_native(flat), num_steps)
        timed = common.in_turns(functions)  # short runs are repeated, long ones are not
        row = {"network": name, "num_examples": num_examples, "num_weights": curvature.dim}
        rows.append({**row, "steps": num_steps, "seconds": timed})
        print(table(rows[-1:]), flush=True)
    return rows


def first_runs(name: str, num_examples: int) -> list[dict[str, Any]]:
    """Processor seconds of the first run of each number of steps, compilation included, and of later ones."""
    curvature = networks.load_problem(name, num_examples).curvature("hessian")
    jax.block_until_ready(curvature.linear)
    tree, flat = starts(curvature)
    matfree, rows = peers.Matfree(curvature), []
    for num_steps in STEPS:
        runs: dict[str, Callable[[], Any]] = {
            "jaxlimit": partial(own_run, curvature, tree, num_steps),
            "matfree": partial(matfree.lanczos, matfree.to_native(flat), num_steps),
        }
        first = {kind: common.seconds(run, time.process_time) for kind, run in runs.items()}
        again = common.in_turns(runs, budget=1.0, clock=time.process_time)
        rows.append({"network": name, "steps": num_steps, "first": first, "again": again})
    return rows


def first_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Processor seconds of first and later runs."""
    heads = ["network", "steps", "first, jaxlimit", "first, matfree", "again, jaxlimit", "again, matfree"]
    lines = []
    for row in rows:
        times = [row[when][who] for when in ("first", "again") for who in ("jaxlimit", "matfree")]
        lines.append([row["network"], str(row["steps"]), *(f"{x:.3f} s" for x in times)])
    return common.markdown(heads, lines)


def overhead(num_examples: int, num_steps: int = STEPS[-1]) -> dict[str, Any]:
    """Seconds of a run, of as many products (one, timed repeatedly, times their number), and of the rest."""
    preset = find_preset("cifar10-fc5")
    (images, labels), _ = load_arrays(preset, Options())
    predict, params = from_nnx(build_network(preset, seed=0))
    batches = jaxlimit.batched((images[:num_examples], labels[:num_examples]), 128)
    curvature = classification_curvature("hessian", predict, params, batches)
    start, _ = starts(curvature)
    jax.block_until_ready(own_run(curvature, start, 2))
    product = common.in_turns({"product": lambda: curvature.matmat(start)})["product"]
    diagonal = jax.tree.map(lambda x: 1 + abs(x), curvature.weights)

    def steps_alone(max_basis: int | None = None) -> lanczos.LanczosState:
        """The same run with the matrix diag(1 + |w|), whose products are next to nothing."""
        return lanczos.run(
            partial(jax.tree.map, jnp.multiply, diagonal), lanczos.init(start), num_steps, max_basis
        )

    timed = {"products": num_steps * product} | common.once(
        {
            "run": partial(own_run, curvature, start, num_steps),
            "steps alone": steps_alone,
            "steps without reorthogonalisation": partial(steps_alone, 0),
        }
    )
    linear = curvature.linear
    assert linear is not None
    program = curvature.product.group_mean.lower(linear[0], curvature.num_examples, start)
    memory: Any = program.compile().memory_analysis()
    panel_bytes = 4 * curvature.dim * PANEL
    panels = sum(j // PANEL + 1 for j in range(num_steps))
    return {
        "network": "cifar10-fc5",
        "num_examples": num_examples,
        "num_weights": curvature.dim,
        "steps": num_steps,
        "seconds": timed,
        # Once for the overlaps, once to subtract, of the panels so far in each step.
        "basis_read": 2 * panels * panel_bytes,
        "read_rate": common.read_rate(),
        "bytes": {
            "linearised batches": sum(x.nbytes for x in jax.tree.leaves(linear)),
            "basis": 4 * curvature.dim * num_steps,
            "product, temporary": memory.temp_size_in_bytes,
            "process, largest": _largest_memory(),
        },
    }


def _largest_memory() -> int:
    """Of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Seconds of the runs."""
    names = list(dict.fromkeys(name for row in rows for name in row["seconds"]))
    lines = []
    for row in rows:
        times = row["seconds"]
        best = min(value for name, value in times.items() if name != "jaxlimit") / times["jaxlimit"]
        cells = [f"{times[name]:.2f} s" if name in times else "" for name in names]
        lines.append([row["network"], f"{row['num_examples']:,}", str(row["steps"]), *cells, f"{best:.1f}"])
    return common.markdown(["network", "examples", "steps", *names, "fastest peer / jaxlimit"], lines)


def overhead_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What a run costs beyond its products, and its memory."""
    heads = ["examples", "products", "run", "steps alone", "of the products", "without reorthogonalisation"]
    heads += ["share of memory's rate"]
    lines = []
    for row in rows:
        times, sizes = row["seconds"], row["bytes"]
        alone, low = times["steps alone"], times["steps without reorthogonalisation"]
        lines.append(
            [
                f"{row['num_examples']:,}",
                *(f"{times[name]:.1f} s" for name in ("products", "run", "steps alone")),
                f"{alone / times['products']:.1%}",
                f"{low / times['products']:.1%}",
                f"{row['basis_read'] / (alone - low) / row['read_rate']:.0%}",
                *(f"{size / 2**20:,.0f} MiB" for size in sizes.values()),
            ]
        )
    return common.markdown([*heads, *rows[0]["bytes"]], lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("peers", "first", "overhead")
    parser.add_argument("--parts", nargs="+", default=list(parts), choices=parts)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    options = parser.parse_args()
    path = common.RESULTS / f"{NAME}.json"
    document = writing.read_json(path) if path.exists() else {}
    document |= {"command": f"JAX_ENABLE_COMPILATION_CACHE=false python benchmarks/{NAME}.py"}
    if "peers" in options.parts:
        kept = [row for row in document.get("peers", []) if row["network"] not in options.networks]
        rows = [*kept, *(row for name in options.networks for row in against_peers(name, NETWORKS[name]))]
        document["peers"] = sorted(rows, key=lambda row: list(NETWORKS).index(row["network"]))
    if "first" in options.parts:
        document["first"] = [row for name in FIRST for row in first_runs(name, NETWORKS[name])]
        common.write_table("spectrum_first", first_table(document["first"]))
    if "overhead" in options.parts:
        document["overhead"] = [overhead(count) for count in OVERHEAD_EXAMPLES]
        writing.write_file(common.RESULTS / f"{NAME}_overhead.md", overhead_table(document["overhead"]))
        print(overhead_table(document["overhead"]))
    common.write(NAME, document, table(document["peers"]))


if __name__ == "__main__":
    main()
