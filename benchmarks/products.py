"""How long does a product with the curvature take: against the gradient, the hardware, and every peer?

    python benchmarks/products.py [--networks fc2 lenet] [--precisions highest]

For each network of networks.py and both curvatures, on the same weights, data and vectors and in one process:
the gradient of the mean loss; jaxlimit's product, for one vector and for blocks; the same linearised anew in
every product; other ways to differentiate, in the batches of 128 that the peers have; and the product of
every peer. All take turns. Operations are XLA's count for one batch of all examples; the rate is that of a
large matrix product on the same machine. Networks that are not measured anew keep their rows; with

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/products.py --networks vgg16 resnet18 transformer

memory comes in huge pages, and these networks get rows of their own. Each row is written when it is there.

Results are in results/products.json, products.md (against the gradient and the hardware) and
products_peers.md; those of a GPU in files of their own, products_gpu. Networks that are not ours are added by
products_strangers.py. With --precisions default both sides use its faster formats. Needs
`pip install -e ".[cli,bench]"`, and MNIST and CIFAR-10 under $JAXLIMIT_DATA.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import common
import jax
import jax.numpy as jnp
import networks
import numpy as np
import peers
from jax.flatten_util import ravel_pytree

import jaxlimit
from jaxlimit.core import writing
from jaxlimit.core.batches import grouped
from jaxlimit.core.trees import PyTree, combine, partition

NAME = "products"
BLOCKS = (2, 4, 8)
# Blocks only where a single product takes less than so many seconds.
BLOCKS_BELOW = 1.0
# Other ways to differentiate, which the benchmark writes itself.
MODES = ("forward over reverse", "reverse over reverse")
Functions = dict[str, Callable[[], Any]]


def differentiated(problem: networks.Problem, groups: list[PyTree], vector: PyTree) -> Functions:
    """The gradient, and Hessian products differentiated in the usual ways, each a compiled scan."""
    weights, rest = partition(problem.params, networks.is_prunable)

    def gradient(weights: PyTree, rest: PyTree, batch: PyTree) -> PyTree:
        return jax.grad(lambda w: problem.loss(combine(w, rest), batch))(weights)

    def plain(weights: PyTree, rest: PyTree, vector: PyTree, batch: PyTree) -> PyTree:
        return gradient(weights, rest, batch)

    def forward_over_reverse(weights: PyTree, rest: PyTree, vector: PyTree, batch: PyTree) -> PyTree:
        return jax.jvp(lambda w: gradient(w, rest, batch), (weights,), (vector,))[1]

    def reverse_over_reverse(weights: PyTree, rest: PyTree, vector: PyTree, batch: PyTree) -> PyTree:
        def slope(weights: PyTree) -> jax.Array:
            return ravel_pytree(gradient(weights, rest, batch))[0] @ ravel_pytree(vector)[0]

        return jax.grad(slope)(weights)

    def compiled(product: Callable[..., PyTree]) -> Callable[[], PyTree]:
        @jax.jit
        def total(weights: PyTree, rest: PyTree, vector: PyTree, groups: list[PyTree]) -> PyTree:
            def add(total: PyTree, batch: PyTree) -> tuple[PyTree, None]:
                with jax.default_matmul_precision("highest"):
                    found, size = product(weights, rest, vector, batch), len(batch[1])
                return jax.tree.map(lambda t, x: t + size * x, total, found), None

            sum_ = jax.tree.map(jnp.zeros_like, weights)
            for group in groups:
                sum_, _ = jax.lax.scan(add, sum_, group)
            return sum_

        return partial(total, weights, rest, vector, groups)

    return {
        "gradient": compiled(plain),
        "forward over reverse": compiled(forward_over_reverse),
        "reverse over reverse": compiled(reverse_over_reverse),
    }


def own_functions(
    problem: networks.Problem, operator: str, precision: str, blocks: bool
) -> tuple[jaxlimit.Curvature, Functions]:
    """The curvature, and what is timed of jaxlimit."""
    curvature = problem.curvature(operator, precision=precision)
    one = networks.vectors_like(curvature.weights, 1)
    anew = replace(curvature, linear_bytes=0)
    vector = jax.tree.map(lambda x: x[0], one)
    functions: Functions = {
        "gradient": differentiated(problem, list(curvature.groups), vector)["gradient"],
        "jaxlimit": lambda: curvature.matmat(one),
        "jaxlimit, anew": lambda: anew.matmat(one),
    }
    if operator == "hessian":
        others = differentiated(problem, list(grouped(problem.batches())), vector)
        functions |= {name: others[name] for name in MODES}
    for size in BLOCKS if blocks else ():
        block = networks.vectors_like(curvature.weights, size)
        functions[f"jaxlimit, block of {size}"] = partial(curvature.matmat, block)
    return curvature, functions


def peer_functions(found: list[peers.Peer], dim: int, blocks: bool) -> Functions:
    """What is timed of the peers, on vectors of their own kind."""
    vectors = np.random.default_rng(0).standard_normal((max(BLOCKS), dim), np.float32)

    def synchronized(peer: peers.Peer, product: Callable[[Any], Any], vector: Any) -> Callable[[], None]:
        def call() -> None:
            product(vector)
            peer.synchronize()

        return call

    functions: Functions = {}
    for peer in found:
        functions[peer.name] = synchronized(peer, peer.matvec, peer.to_native(vectors[0]))
        for size in BLOCKS if blocks and peer.has_blocks else ():
            block = peer.to_native_block(vectors[:size])
            functions[f"{peer.name}, block of {size}"] = synchronized(peer, peer.matmat, block)
    return functions


def first_call(problem: networks.Problem, operator: str) -> float:
    """Seconds of the first product, compilation and linearisation included."""
    curvature = problem.curvature(operator)
    one = networks.vectors_like(curvature.weights, 1)
    start = time.perf_counter()
    jax.block_until_ready(curvature.matmat(one))
    return time.perf_counter() - start


def measure(name: str, operator: str, precision: str) -> dict[str, Any]:
    """All timings of one network and curvature."""
    problem = networks.load_problem(name)
    compilation = first_call(problem, operator)
    curvature = problem.curvature(operator)
    one = networks.vectors_like(curvature.weights, 1)
    jax.block_until_ready(curvature.matmat(one))
    blocks = common.seconds(lambda: curvature.matmat(one)) < BLOCKS_BELOW
    curvature, functions = own_functions(problem, operator, precision, blocks)
    found = peers.load_peers(problem, operator, precision=precision)
    differences = {peer.name: peers.product_difference(peer, curvature) for peer in found}
    functions |= peer_functions(found, curvature.dim, blocks)
    times = common.in_turns(functions)
    faults = {name: common.page_faults(functions[name]) for name in ("gradient", "jaxlimit")}
    return {
        "network": name,
        "operator": operator,
        "precision": precision,
        "huge_pages": common.huge_pages(),
        "num_weights": curvature.dim,
        "num_examples": len(problem.inputs),
        "seconds": times,
        "page_faults": faults,
        "first_call": compilation,
        "operations": networks.counted_operations(problem, curvature),
        "linear_bytes": sum(x.nbytes for x in jax.tree.leaves(curvature.linear)),
        "batch_size": int(jax.tree.leaves(curvature.groups)[0].shape[1]),
        "versions": {peer.name: peer.version for peer in found},
        "difference": differences,
    }


def label(row: Mapping[str, Any]) -> str:
    """The network, and what is unusual."""
    precision = "" if row["precision"] == "highest" else f", precision {row['precision']}"
    return row["network"] + (", huge pages" if row["huge_pages"] else "") + precision


def own_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Times in gradients, blocks per vector, and the share of the rate of a large matrix product."""
    heads = ["network", "curvature", "gradient", "product", "in gradients", "anew", "operations"]
    heads += [f"block of {size}" for size in BLOCKS] + ["share of matrix-product rate", "kept", "first call"]
    lines = []
    for row in rows:
        times, counts = row["seconds"], row["operations"]
        gradient, product = times["gradient"], times["jaxlimit"]
        block = [times.get(f"jaxlimit, block of {size}") for size in BLOCKS]
        lines.append(
            [
                label(row),
                row["operator"],
                f"{1e3 * gradient:.1f} ms",
                f"{1e3 * product:.1f} ms",
                f"{product / gradient:.2f}",
                f"{times['jaxlimit, anew'] / gradient:.2f}",
                f"{counts['kept'] / counts['gradient']:.2f}",
                *[
                    "" if x is None else f"{x / size / gradient:.2f}"
                    for x, size in zip(block, BLOCKS, strict=True)
                ],
                f"{counts['kept'] / product / row['matmul_rate']:.0%}",
                f"{row['linear_bytes'] / 2**20:,.0f} MiB",
                f"{row['first_call']:.1f} s",
            ]
        )
    return common.markdown(heads, lines)


def peer_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Milliseconds of a product, and how many times as long the peers take."""
    names = list(dict.fromkeys(name for row in rows for name in row["versions"]))
    lines = []
    for row in rows:
        times, own = row["seconds"], row["seconds"]["jaxlimit"]
        others = [times.get(name) for name in (*MODES, *names)]
        fastest = min(times[name] for name in row["versions"]) / own
        lines.append(
            [label(row), row["operator"], f"{1e3 * own:.1f} ms"]
            + ["" if x is None else f"{1e3 * x:.1f} ms" for x in others]
            + [f"{fastest:.1f}"]
        )
    return common.markdown(
        ["network", "curvature", "jaxlimit", *MODES, *names, "fastest peer / jaxlimit"], lines
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=list(networks.NETWORKS), choices=networks.NETWORKS)
    parser.add_argument(
        "--precisions", nargs="+", default=["highest"], help="of matrix products (default: %(default)s)"
    )
    options = parser.parse_args()
    for precision in options.precisions:
        rate = common.matmul_rate(precision)
        for name in options.networks:
            for operator in peers.OPERATORS:
                add({**measure(name, operator, precision), "matmul_rate": rate})


def add(row: dict[str, Any]) -> None:
    """Writes a row with those that are there, in the place of the one before."""
    name = NAME if common.on_cpu() else f"{NAME}_{jax.default_backend()}"
    path = common.RESULTS / f"{name}.json"
    before = writing.read_json(path) if path.exists() else {"rows": []}
    rows = before.pop("rows")
    keys = ("network", "operator", "precision", "huge_pages")
    measured = {tuple(one[key] for key in keys): one for one in (*rows, row)}
    order = list(networks.NETWORKS)
    rows = sorted(measured.values(), key=lambda one: (order.index(one["network"]), one["huge_pages"]))
    writing.write_file(common.RESULTS / f"{name}_peers.md", peer_table(rows))
    print(peer_table([row]))
    common.write(name, before | {"command": f"python benchmarks/{NAME}.py", "rows": rows}, own_table(rows))


if __name__ == "__main__":
    main()
