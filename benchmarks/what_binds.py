"""What does a product spend its time on: matrix products, elementwise work, or moving numbers about?

    taskset -c 0 python benchmarks/what_binds.py [--networks lenet transformer]

For each network of networks.py and both curvatures one product, its batches linearised and kept, is traced
operation by operation on one core, in a process of its own. An operation of XLA's compiled program counts as

    products     a matrix product or convolution, with what is fused to it
    copies       transposes, slices, paddings and other changes of layout alone
    elementwise  everything else: activations, norms, softmax, sums
    outside      the time of the call that no operation takes: memory, and the host

*rate within products* is the operations of the product over the seconds of the first kind, over the rate of a
large matrix product on the same core. Results are in results/what_binds.json and what_binds.md.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import collectives
import common
import jax
import networks
from jax.profiler import ProfileData

NAME = "what_binds"
CALLS = 3
KINDS = ("products", "elementwise", "copies")
PRODUCTS = ("dot", "convolution")
MOVES = (
    *("copy", "transpose", "reshape", "bitcast", "broadcast", "slice", "dynamic-slice", "pad", "concatenate"),
    *("dynamic-update-slice", "parameter", "constant", "tuple", "get-tuple-element", "iota", "gather"),
)
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = .*? ([a-z\-]+)\((.*)")
# They contain others, which are traced themselves.
CONTAINERS = ("while", "call", "conditional")


def kinds_of(text: str) -> dict[str, str]:
    """The kind of every instruction of a compiled program, by its name; none for loops and calls."""
    bodies = {
        name: [found.groups() for line in lines if (found := INSTRUCTION.match(line))]
        for name, lines in collectives.computations(text)[0].items()
    }

    def opcodes(opcode: str, rest: str) -> set[str]:
        called = re.search(r"calls=%?([\w.\-]+)", rest)
        if opcode != "fusion" or called is None:
            return {opcode}
        return set().union(*(opcodes(code, more) for _, code, more in bodies[called[1]]))

    kinds = {}
    for name, opcode, rest in (line for lines in bodies.values() for line in lines):
        inside = opcodes(opcode, rest)
        if opcode not in CONTAINERS:
            moves = inside <= {*MOVES}
            kinds[name] = "products" if inside & {*PRODUCTS} else "copies" if moves else "elementwise"
    return kinds


def traced(curvature: Any, dumped: Path) -> dict[str, float]:
    """Seconds of a product by kind, and of the whole call."""
    vector = jax.tree.map(lambda w: jax.random.normal(jax.random.key(1), w.shape), curvature.weights)
    run = lambda: jax.block_until_ready(curvature.matvec(vector))  # noqa: E731
    run()
    whole = common.in_turns({"call": run})["call"]
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(CALLS):
                run()
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = ProfileData.from_file(str(path))
    seconds: dict[Any, Counter[str]] = defaultdict(Counter)
    for event in (event for plane in data.planes for line in plane.lines for event in line.events):
        stats = dict(event.stats)
        if "hlo_op" in stats and not event.name.startswith("end: "):
            seconds[stats["program_id"]][str(stats["hlo_op"])] += event.duration_ns / 1e9 / CALLS
    programs = [kinds_of(path.read_text()) for path in dumped.glob("*cpu_after_optimizations.txt")]
    total: Counter[str] = Counter()
    for operations in seconds.values():
        known = next(kinds for kinds in programs if all(is_known(kinds, name) for name in operations))
        for name, duration in operations.items():
            if name in known:
                total[known[name]] += duration
    return {"call": whole, **{kind: total[kind] for kind in KINDS}}


def is_known(kinds: Mapping[str, str], name: str) -> bool:
    """Whether a program has the operation; loops and calls are of none."""
    return name in kinds or name.partition(".")[0] in CONTAINERS


def measure(name: str, operator: str, dumped: Path) -> dict[str, Any]:
    """A row of the table."""
    problem, rate = networks.load_problem(name), common.matmul_rate()
    curvature = problem.curvature(operator)
    found = traced(curvature, dumped)
    operations = networks.counted_operations(problem, curvature)["kept"]
    row = {"network": name, "operator": operator, "operations": operations}
    return row | {"seconds": found, "matmul_rate": max(rate, common.matmul_rate())}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Shares of the time of the traced operations and the rest of the call."""
    lines = []
    for row in rows:
        seconds, rate = row["seconds"], row["operations"] / row["matmul_rate"]
        whole = max(seconds["call"], sum(seconds[kind] for kind in KINDS))
        shares = [seconds[kind] / whole for kind in KINDS]
        cells = [f"{share:.0%}" for share in (*shares, max(0.0, 1 - sum(shares)))]
        rates = [f"{rate / seconds['products']:.0%}", f"{rate / whole:.0%}"]
        lines.append((row["network"], row["operator"], f"{1e3 * whole:.1f} ms", *cells, *rates))
    heads = ("network", "curvature", "product", *KINDS, "outside", "rate within products", "rate of all")
    return common.markdown(heads, lines)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=list(networks.NETWORKS), choices=networks.NETWORKS)
    parser.add_argument("--one", nargs=3, metavar=("NETWORK", "CURVATURE", "DIR"), help="one row, as JSON")
    options = parser.parse_args()
    if options.one:
        name, operator, folder = options.one
        print(json.dumps(measure(name, operator, Path(folder))))
        return
    document = common.read_document(NAME)
    known = {(row["network"], row["operator"]): row for row in document.get("rows", [])}
    for name in options.networks:
        for operator in ("hessian", "gauss_newton"):
            with tempfile.TemporaryDirectory() as folder:
                flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder} --xla_dump_hlo_as_text"
                environment = os.environ | {"XLA_FLAGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "false"}
                command = [sys.executable, __file__, "--one", name, operator, folder]
                done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            known[name, operator] = json.loads(done.stdout.splitlines()[-1])
    rows = [known[key] for name in networks.NETWORKS for key in known if key[0] == name]
    command = f"taskset -c 0 python benchmarks/{NAME}.py"
    common.write(NAME, {"command": command, "rows": rows}, table(rows))


if __name__ == "__main__":
    main()
