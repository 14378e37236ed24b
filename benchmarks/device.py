"""What a GPU does: products, precisions, whole runs and other libraries, in one command of under 8 minutes.

    python benchmarks/device.py --work DIR [--seconds 450]

The steps are done in the order of `plan`, the most telling first. Each writes DIR/NAME.json when it is done;
no step begins when the seconds are over, and the same command goes on with those that are missing. Compiled
programs are kept in DIR/cache. A step that the machine or a library cannot do says so and holds up no other.

    machine     rates of a large matrix product at each precision, and of reading memory
    product     a product with one curvature of one network: in gradients, in memory, and several side by side
    limit       the width limit of LeNet at each precision, or the refusal
    run         128 Lanczos steps of ResNet50 with 10,000 images of CIFAR-10, vectors on the device or host
    peers       products of PyTorch, curvlinops and others, where they are installed

`--small` does the same on few examples of digits, as CI does on a CPU, and publishes nothing. Without it all
results that are there go to results/device_gpu.json and device_gpu.md. Images are read from $JAXLIMIT_DATA.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
import jax
import networks
import numpy as np

import jaxlimit
from jaxlimit import models
from jaxlimit.core.trees import PyTree, combine
from jaxlimit.spectrum import lanczos
from jaxlimit.spectrum.basis import PANEL
from jaxlimit.spectrum.probes import rademacher

SECONDS = 450
OPERATORS = ("hessian", "gauss_newton")
# Full float32, and what a GPU has that is faster: TF32, and three bfloat16 products in place of one.
PRECISIONS = ("highest", "tensorfloat32", "BF16_BF16_F32_X3")
BLOCKS = (1, 2, 4, 8)
# Networks with their numbers of examples, in the order in which they are measured.
EXAMPLES = {
    "resnet18": 512,
    "lenet": 8_192,
    "transformer, 10 million weights": 64,
    "resnet50": 64,
    "fc5": 32_768,
    "vgg16": 1_024,
    "fc2": 32_768,
    "digits": 1_438,
}
MORE = {
    "resnet50": networks.Network(partial(models.ResNet, 50), networks.NETWORKS["lenet"].load, 64),
    # As nanoGPT's for characters: 6 layers of width 384 with 6 heads, 256 characters.
    "transformer, 10 million weights": networks.Network(
        partial(networks.Transformer, 384, 6, 6, 256), partial(networks.text_sequences, 256), 64
    ),
}
Step = Callable[[], dict[str, Any]]


def load(name: str, num_examples: int) -> networks.Problem:
    """A network at its random start, with its first examples."""
    networks.NETWORKS.update(MORE)
    return networks.load_problem(name, num_examples)


def machine(precisions: Sequence[str]) -> dict[str, Any]:
    """Operations and bytes a second; None where the device has no such precision."""
    rates: dict[str, float | None] = {}
    for precision in precisions:
        try:
            rates[precision] = common.matmul_rate(precision)
        except (ValueError, jax.errors.JaxRuntimeError):
            rates[precision] = None
    return {"matmul_rate": rates, "read_rate": common.read_rate(2**24 if common.on_cpu() else 2**30)}


def product(name: str, num_examples: int, operator: str, precision: str) -> dict[str, Any]:
    """Seconds of a gradient and of blocks of products, and memory, of one network."""
    problem = load(name, num_examples)
    curvature = problem.curvature(operator, num_examples, precision=precision)
    found: dict[str, Any] = {"num_weights": curvature.dim, "num_examples": num_examples}
    start = time.perf_counter()
    jax.block_until_ready(curvature.matmat(_signs(curvature, 1)))
    found["first_call"] = time.perf_counter() - start
    gradient = _compiled_gradient(problem, curvature, precision)
    functions = {"gradient": partial(gradient, curvature.weights)} | {
        f"block of {size}": partial(curvature.matmat, _signs(curvature, size)) for size in BLOCKS
    }
    found["timed"] = common.in_turns(functions, budget=0.6)
    linear = curvature.linear
    found["bytes"] = {"gradient": _memory(gradient)}
    if linear is not None:
        lowered = curvature.product.group_mean.lower(linear[0], 1.0, _signs(curvature, 1))
        found["bytes"]["kept"] = sum(x.nbytes for x in jax.tree.leaves(linear))
        found["bytes"]["product"] = _memory(lowered.compile())
    return found


def _signs(curvature: jaxlimit.Curvature, count: int) -> PyTree:
    return rademacher(jax.random.key(0), curvature.weights, count)


def _compiled_gradient(problem: networks.Problem, curvature: jaxlimit.Curvature, precision: str) -> Any:
    """Of all examples at once, as a function of the weights; data and the other parameters stay."""
    batch, rest = (problem.inputs, problem.labels), curvature.rest

    def loss(weights: PyTree, rest: PyTree, batch: PyTree) -> jax.Array:
        with jax.default_matmul_precision(precision):
            return curvature.product.loss(combine(weights, rest), batch)

    compiled = jax.jit(jax.grad(loss)).lower(curvature.weights, rest, batch).compile()
    return _WithData(compiled, rest, batch)


class _WithData:
    """A compiled function of the weights, other parameters and a batch, as one of the weights."""

    def __init__(self, compiled: Any, *rest: PyTree):
        self._compiled, self._rest = compiled, rest

    def __call__(self, weights: PyTree) -> PyTree:
        return self._compiled(weights, *self._rest)

    def memory_analysis(self) -> Any:
        """As that of the compiled function."""
        return self._compiled.memory_analysis()


def _memory(compiled: Any) -> int | None:
    """Bytes that a program reserves beside arguments and results."""
    return getattr(compiled.memory_analysis(), "temp_size_in_bytes", None)


def limit(name: str, num_examples: int, precision: str) -> dict[str, Any]:
    """The width limit at a precision of the products."""
    curvature = load(name, num_examples).curvature("gauss_newton", precision=precision)
    try:
        found = jaxlimit.pruning_limit(
            curvature, jax.random.key(0), loss_tolerance=0.05, which=("width",), num_probes=1, max_matvecs=128
        )
    except ValueError as error:
        return {"refused": str(error)}
    assert found.width is not None
    return {"width": vars(found.width), "num_matvecs": found.num_matvecs, "rounding": curvature.rounding}


def whole_run(name: str, num_examples: int, num_steps: int) -> dict[str, Any]:
    """Seconds of a Lanczos run, compilation included, and once more without; with its vectors on the host."""
    curvature = load(name, num_examples).curvature("gauss_newton")
    start = _signs(curvature, 1)

    def run(max_basis: int | None = None, num_steps: int = num_steps) -> PyTree:
        return lanczos.run(curvature.matmat, lanczos.init(start), num_steps, max_basis, num_steps).current

    first, again = common.seconds(run), common.seconds(run)
    run(0, 2 * PANEL)  # compiles what moves a panel
    offloaded = common.seconds(partial(run, 0))
    products = num_steps * common.in_turns({"product": lambda: curvature.matmat(start)}, 1.0)["product"]
    return {"steps": num_steps, "first": first, "again": again, "offloaded": offloaded, "products": products}


def peers_of(name: str, num_examples: int, operator: str) -> dict[str, Any]:
    """Seconds of the products of other libraries."""
    try:
        import peers
    except ImportError as error:
        return {"missing": str(error)}
    problem, timed = load(name, num_examples), {}
    for peer in peers.load_peers(problem, operator):
        vector = peer.to_native(np.ones(problem.curvature(operator).dim, np.float32))

        def call(peer: Any = peer, vector: Any = vector) -> None:
            peer.matvec(vector)
            peer.synchronize()

        timed[peer.name] = call
    return {"timed": common.in_turns(timed, budget=0.6)}


def plan(small: bool) -> dict[str, Step]:
    """All steps by name, the most telling first."""
    examples = {"digits": 64} if small else EXAMPLES
    first, *others = PRECISIONS[:1] if small else PRECISIONS
    of_limit, of_run = (
        (("digits", 64), ("digits", 64, 8)) if small else (("lenet", 2_048), ("resnet50", 10_000, 128))
    )
    compared = [name for name in examples if name not in MORE]
    steps = {"machine": partial(machine, (first, *others)), **_products(examples, first)}
    steps["run"] = partial(whole_run, *of_run)
    for precision in (first, *others):
        steps[f"limit {precision}"] = partial(limit, *of_limit, precision)
    for name in compared:
        for operator in OPERATORS:
            steps[f"peers {name} {operator}"] = partial(peers_of, name, examples[name], operator)
    for precision in others:
        steps |= _products(examples, precision)
    return steps


def _products(examples: Mapping[str, int], precision: str) -> dict[str, Step]:
    return {
        f"product {name} {operator} {precision}": partial(product, name, count, operator, precision)
        for name, count in examples.items()
        for operator in OPERATORS
    }


def perform(steps: Mapping[str, Step], work: Path, seconds: float) -> dict[str, Any]:
    """Does the steps that are missing, until the seconds are over; all that are there."""
    start, found = time.monotonic(), {}
    for name, compute in steps.items():
        path = work / f"{name.replace(' ', '-').replace(',', '')}.json"
        if path.exists() or time.monotonic() - start < seconds:
            found[name] = common.step(path, partial(_or_why_not, compute))
    return found


def _or_why_not(compute: Step) -> dict[str, Any]:
    """The result of a step, or what kept it from one."""
    try:
        return compute()
    except (MemoryError, ValueError, FileNotFoundError, jax.errors.JaxRuntimeError) as error:
        return {"failed": str(error).splitlines()[0]}


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Products in units of a gradient, and their memory in that of a gradient's."""
    heads = ["product", "gradient", *(f"block of {size}" for size in BLOCKS), "memory", "first call"]
    lines = []
    for name, step in found.items():
        if not name.startswith("product ") or "failed" in step:
            continue
        times, sizes = step["timed"], step["bytes"]
        gradient, memory = times["gradient"], None
        if sizes.get("product") and sizes["gradient"]:
            memory = (sizes["product"] + sizes["kept"]) / sizes["gradient"]
        lines.append(
            [
                name.removeprefix("product "),
                f"{1e3 * gradient:.2f} ms",
                *(f"{times[f'block of {size}'] / size / gradient:.2f}" for size in BLOCKS),
                "" if memory is None else f"{memory:.1f}",
                f"{step['first_call']:.1f} s",
            ]
        )
    return common.markdown(heads, lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of the steps")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="after which no step begins (default: %(default)s)"
    )
    parser.add_argument("--small", action="store_true", help="few examples of digits, nothing published")
    options = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", str(options.work / "cache"))
    steps = plan(options.small)
    found = perform(steps, options.work, options.seconds)
    print(table(found), end="")
    print(f"{len(found)} of {len(steps)} steps are done.")
    if not options.small:
        document = {"command": "python benchmarks/device.py --work DIR", "steps": found}
        common.write(f"device_{jax.default_backend()}", document, table(found))


if __name__ == "__main__":
    main()
