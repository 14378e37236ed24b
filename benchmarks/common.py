"""What benchmarks share: where results go, the machine, the clock, steps that are done once, thresholds."""

import json
import os
import platform
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

import jaxlimit
from jaxlimit.application import machine
from jaxlimit.core import writing
from jaxlimit.geometry.magnitude import magnitude_order
from jaxlimit.limits.budget import Budget
from jaxlimit.limits.one_shot import one_shot_limit, predicted_path
from jaxlimit.limits.problem import Problem

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parents[1] / "docs" / "figures"


def environment() -> dict[str, Any]:
    """The machine, the versions, and settings of the C library, for the results of this process."""
    settings = {name: value for name, value in os.environ.items() if name.startswith(("MALLOC_", "GLIBC_"))}
    device = machine.device() | {"processor": processor()}
    return {"device": device, "versions": machine.versions(), "settings": settings}


def huge_pages() -> bool:
    """Whether the C library asks for memory in huge pages."""
    return "glibc.malloc.hugetlb=1" in os.environ.get("GLIBC_TUNABLES", "")


def page_faults(function: Callable[[], Any], calls: int = 3) -> float:
    """Pages that the system clears and hands out in one call of what was warmed up."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        seconds(function)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / calls


def processor() -> str:
    """The name of the CPU, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def seconds(function: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Until the result is there."""
    start = clock()
    jax.block_until_ready(function())
    return clock() - start


def in_turns(
    functions: Mapping[str, Callable[[], Any]],
    budget: float = 2.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Least seconds of each function, after it was warmed up.

    They take turns in series of calls, so that whatever else the machine does meets them alike; the least is
    what it disturbed least. The first call of a series is not counted: it finds the caches full of another's
    data, and on a CPU the threads of another library still awake.

    Args:
        functions: by name; each returns when, or gives arrays that tell when, its work is done.
        budget: seconds for a function, in 3 series of 1 to 8 calls; one that takes longer is timed once.
        clock: of the seconds; `time.process_time` leaves out what others do on a core.
    """
    warm = {name: (seconds(fn), seconds(fn, clock))[1] for name, fn in functions.items()}
    found = {name: [once] if once > budget else [] for name, once in warm.items()}
    repeated = {name: function for name, function in functions.items() if not found[name]}
    for _ in range(3):
        for name, function in repeated.items():
            time.sleep(0.02)
            seconds(function)
            calls = min(max(1, int(budget / 3 / warm[name]) - 1), 8)
            found[name] += [seconds(function, clock) for _ in range(calls)]
    return {name: min(values) for name, values in found.items()}


def once(functions: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Seconds of each function, called once: for what takes long and has been compiled before."""
    return {name: seconds(function) for name, function in functions.items()}


def on_cpu() -> bool:
    """Whether JAX computes on the CPU; another device has sizes and results of its own."""
    return jax.default_backend() == "cpu"


def matmul_rate(precision: str = "highest", clock: Callable[[], float] = time.perf_counter) -> float:
    """Operations a second of a large float32 matrix product: what bounds products with H."""
    size = 2048 if on_cpu() else 8192
    matrix = jax.random.normal(jax.random.key(0), (size, size), jnp.float32)
    product = jax.jit(lambda x: jnp.matmul(x, x, precision=precision))
    return 2 * size**3 / in_turns({"product": lambda: product(matrix)}, clock=clock)["product"]


def read_rate(num_bytes: int = 2**30, clock: Callable[[], float] = time.perf_counter) -> float:
    """Bytes a second at which a product with a wide matrix reads it: what bounds work on a basis."""
    matrix = jnp.ones((64, num_bytes // 256), jnp.float32)
    product = jax.jit(lambda x: jnp.matmul(x, x[0], precision="highest"))
    return num_bytes / in_turns({"product": lambda: product(matrix)}, clock=clock)["product"]


def operations(function: Callable[..., Any], *arguments: Any) -> float:
    """Floating-point operations of the compiled program, as XLA counts them; a loop's body counts once."""
    analysis: Any = jax.jit(function).lower(*arguments).compile().cost_analysis()
    return float(analysis["flops"])


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def sparsity(value: float) -> str:
    """In three digits, or in as many as do not make it 1.

    Examples:
        >>> sparsity(0.98196), sparsity(0.99967)
        ('0.982', '0.9997')
    """
    digits = next((digits for digits in range(3, 8) if value == 1 or round(value, digits) < 1), 8)
    return f"{value:.{digits}f}"


# An interval that reaches further from its limit is marked.
FAR = 0.01


def limit(value: float, found: Mapping[str, Any], tolerance: float) -> str:
    """A limit, as `sparsity`: ~ where its products did not resolve it, ? where its interval reaches far.

    Args:
        value: of the limit.
        found: its `spread`, `lower` and `upper`; what is measured has none, and no mark.
        tolerance: to which it should be resolved.

    Examples:
        >>> limit(0.9, {"spread": 0.1, "lower": 0.7, "upper": 0.95}, 0.001), limit(0.9, {}, 0.001)
        ('~?0.900', '0.900')
    """
    reach = max(found.get("upper", value) - value, value - found.get("lower", value))
    return f"{'~' * (found.get('spread', 0) > tolerance)}{'?' * (reach > FAR)}{sparsity(value)}"


def write(name: str, document: Mapping[str, Any], table: str | None = None) -> None:
    """Results as results/NAME.json, with the machine, and as NAME.md if there is a table."""
    write_document(name, {**document, "environment": environment()})
    if table is not None:
        write_table(name, table)


def write_document(name: str, document: Mapping[str, Any]) -> None:
    """Results as results/NAME.json, as they are."""
    writing.write_json(RESULTS / f"{name}.json", {"format": writing.FORMAT, **document})


def write_table(name: str, table: str) -> None:
    """A table as results/NAME.md and on the screen."""
    writing.write_file(RESULTS / f"{name}.md", table)
    print(table, end="", flush=True)


def read_document(name: str) -> dict[str, Any]:
    """What results/NAME.json holds; empty if it is not there."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def step(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a file holds, computed first if it is not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        found = {"format": writing.FORMAT} | compute()
        writing.write_json(path, found | {"seconds": round(time.perf_counter() - start, 1)})
        print(f"{time.strftime('%H:%M:%S')} {path.parent.name}/{path.stem}", flush=True)
    return writing.read_json(path)


def kernel_in(path: Sequence[Any], *parts: str) -> bool:
    """Whether a parameter is a kernel, and its path holds one of the parts, if any are given."""
    names = [entry.key for entry in path]
    return names[-1] == "kernel" and (not parts or any(part in names for part in parts))


def crossing(sparsities: NDArray[np.float64], values: Sequence[float], bound: float) -> float:
    """Where values first exceed a bound, linear between the points of the grid; 1 if nowhere.

    The first value is that of the unpruned network, which is within the bound.
    """
    above = int(np.argmax(np.array(values) > bound))
    if above == 0:
        return 1.0
    return float(np.interp(bound, values[above - 1 : above + 1], sparsities[above - 1 : above + 1]))


def last_reached(reached: Callable[[float], bool], sparsities: NDArray[np.float64], low: float) -> float:
    """The last sparsity of a grid that is reached, by bisection: `low` is reached, the end is not.

    What is reached is taken as an interval.
    """
    below, above = int(np.searchsorted(sparsities, low, side="right")) - 1, len(sparsities) - 1
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if reached(float(sparsities[middle])) else (below, middle)
    return float(sparsities[below])


def one_shot(
    curvature: jaxlimit.Curvature,
    loss_tolerance: float,
    accuracy: float,
    max_matvecs: int,
    groups: Any = None,
) -> dict[str, Any]:
    """The one_shot limit alone, without a glance at the spectrum."""
    problem = Problem(magnitude_order(curvature.weights, groups=groups), loss_tolerance)
    budget = Budget(curvature, max_matvecs)
    path, counts = predicted_path(problem, budget), problem.counts
    limit = one_shot_limit(*path, loss_tolerance, accuracy, counts=counts)
    return {**vars(limit), "num_matvecs": budget.count}
