"""How does the time of a product grow with weights, examples, depth and probes?

    python benchmarks/scaling.py

One quantity grows, the others stay, for fully connected networks on random inputs:

    weights    two hidden layers, from 1e4 to 1e8 weights, 256 examples
    examples   784-100-10, 1,000 to 64,000 examples
    depth      2 to 32 hidden layers of 256, 2,048 examples
    probes     784-1000-600-300-100-10, 1 to 16 vectors at once, 512 examples

For each a power law is fitted to the upper half of the points, where compiled programs are no longer bound
by their own overhead. Results are in results/scaling.json and scaling.md, the figure in
docs/figures/scaling.png.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import common
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from matplotlib.ticker import NullFormatter

import jaxlimit
from jaxlimit import plots
from jaxlimit.models import FullyConnected, from_nnx
from jaxlimit.training.losses import CURVATURES, classification_curvature

NAME = "scaling"


class Point(NamedTuple):
    """One problem: widths of the network, examples, and vectors multiplied at once."""

    widths: tuple[int, ...]
    num_examples: int
    num_vectors: int = 1

    @property
    def num_weights(self) -> int:
        """Kernel weights."""
        return sum(a * b for a, b in zip(self.widths, self.widths[1:], strict=False))


class Series(NamedTuple):
    """A quantity that grows, how it is read off a point, and the points."""

    label: str
    size: Callable[[Point], int]
    points: tuple[Point, ...]


FC5 = (784, 1000, 600, 300, 100, 10)
SERIES = {
    "weights": Series(
        "prunable weights D",
        lambda point: point.num_weights,
        tuple(Point((n, n, n, 10), 256) for n in (70, 220, 700, 2_200, 7_000)),
    ),
    "examples": Series(
        "examples",
        lambda point: point.num_examples,
        tuple(Point((784, 100, 10), 1_000 * 4**i) for i in range(4)),
    ),
    "depth": Series(
        "hidden layers",
        lambda point: len(point.widths) - 2,
        tuple(Point((*[256] * (depth + 1), 10), 2_048) for depth in (2, 4, 8, 16, 32)),
    ),
    "probes": Series(
        "vectors at once",
        lambda point: point.num_vectors,
        tuple(Point(FC5, 512, count) for count in (1, 2, 4, 8, 16)),
    ),
}


def seconds(point: Point) -> dict[str, float]:
    """Of a product with either curvature."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((point.num_examples, point.widths[0]), np.float32)
    labels = rng.integers(0, point.widths[-1], point.num_examples)
    predict, params = from_nnx(FullyConnected(point.widths, rngs=nnx.Rngs(0)))
    functions: dict[str, Callable[[], Any]] = {}
    for kind in CURVATURES:
        curvature = classification_curvature(kind, predict, params, jaxlimit.batched((images, labels), 128))
        vectors = jax.tree.map(lambda x: jnp.ones((point.num_vectors, *x.shape)), curvature.weights)
        functions[kind] = lambda curvature=curvature, vectors=vectors: curvature.matmat(vectors)
    return common.in_turns(functions)


def exponent(sizes: Sequence[int], times: Sequence[float]) -> float:
    """Slope of log time against log size, over the upper half of the points."""
    upper = slice(len(sizes) // 2, None)
    return float(np.polyfit(np.log(sizes[upper]), np.log(times[upper]), 1)[0])


def measure(series: Series) -> dict[str, Any]:
    """Sizes, seconds and exponents of one series."""
    found = [seconds(point) for point in series.points]
    sizes = [series.size(point) for point in series.points]
    times = {kind: [times[kind] for times in found] for kind in CURVATURES}
    return {
        "label": series.label,
        "points": [point._asdict() for point in series.points],
        "sizes": sizes,
        "seconds": times,
        "exponents": {kind: exponent(sizes, times[kind]) for kind in CURVATURES},
    }


def draw(document: dict[str, Any]) -> Any:
    """Log-log, a panel for each quantity."""
    figure, panels = plt.subplots(1, len(document), figsize=(3.2 * len(document), 3), layout="constrained")
    for panel, series in zip(panels, document.values(), strict=True):
        for kind in CURVATURES:
            label = f"{plots.TITLES[kind]}: exponent {series['exponents'][kind]:.2f}"
            panel.loglog(
                series["sizes"], series["seconds"][kind], marker="o", label=label, color=plots.COLOURS[kind]
            )
        panel.set_xlabel(series["label"])
        if series["sizes"][-1] < 100:  # too few decades for powers of ten
            panel.set_xticks(series["sizes"], [str(size) for size in series["sizes"]])
            panel.xaxis.set_minor_formatter(NullFormatter())
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.margins(y=0.25)
        panel.legend(fontsize="small", loc="lower right")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("seconds of a product")
    return figure


def main() -> None:
    document = {}
    for name, series in SERIES.items():
        document[name] = measure(series)
        print(name, document[name]["sizes"], document[name]["seconds"], flush=True)
    draw(document).savefig(common.FIGURES / f"{NAME}.png", dpi=150)
    rows = [
        [series["label"], f"{series['sizes'][0]:,} to {series['sizes'][-1]:,}"]
        + [f"{series['exponents'][kind]:.2f}" for kind in CURVATURES]
        for series in document.values()
    ]
    table = common.markdown(["time against", "range", *(f"exponent, {kind}" for kind in CURVATURES)], rows)
    common.write(NAME, {"command": f"python benchmarks/{NAME}.py", "series": document}, table)


if __name__ == "__main__":
    main()
