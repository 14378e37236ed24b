"""How many products does each estimator of a limit need, and what else moves the limit?

    python benchmarks/accuracy.py --work DIR [--parts runs subsampling precision table] [--networks fc2-mnist]

Networks: digits (trained here, with and without L1; dense truth), and the FC2 and LeNet of tests/data, which
the paper's PyTorch code trained, on MNIST and CIFAR-10 from $JAXLIMIT_DATA.

    runs         long Lanczos runs, from which every estimator is computed at every step count
    subsampling  the width limit on parts of the training set, at the loss tolerance of the whole
    precision    the width limit in float32 and float64, with and without reorthogonalisation
    reference    what the paper's code would predict, by probe and number of steps
    table        all that is there, as results/accuracy.json and accuracy*.md

DIR keeps one file for each piece of work; an interrupted run goes on behind them. What DIR does not hold
stays as it is in results/accuracy.json.
"""

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import common
import jax
import numpy as np
import optax
from flax import nnx
from scipy.fft import dct
from scipy.linalg import eigh

import jaxlimit
from jaxlimit import data, models, training
from jaxlimit.core import trees
from jaxlimit.geometry import magnitude
from jaxlimit.geometry.dimensions import fixed_point, width_ridge
from jaxlimit.reference import paper_code
from jaxlimit.spectrum import lanczos
from jaxlimit.spectrum.bracket import Bracketed, bracket_indefinite, bracket_semidefinite
from jaxlimit.spectrum.probes import rademacher
from jaxlimit.spectrum.rules import Rule, gauss, gauss_radau
from jaxlimit.spectrum.tridiagonal import Tridiagonal
from jaxlimit.training.losses import CURVATURES

GOLDEN = Path(__file__).parents[1] / "tests" / "data"
PARTS = ("runs", "subsampling", "precision", "reference", "table")
TOLERANCE = 1e-3
STEP = 16  # distance of the step counts at which the estimators are compared; 1/32 of a longer run
BLOCKS = (2, 4)  # block sizes of block Lanczos
DEFLATED = 32  # outliers that are deflated
REFERENCE_STEPS = (32, 64, 96, 128)
REFERENCE_PROBES = 5


@dataclass(frozen=True)
class Network:
    """A trained network with its examples; the loss is the mean over the first `num_examples`."""

    name: str
    num_examples: int
    steps: dict[str, int]
    num_probes: int = 2
    l1: float = 5e-5

    @cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels."""
        if self.name.startswith("digits"):
            dataset = data.load_digits()
        else:
            dataset = data.load_mnist() if self.name == "fc2-mnist" else data.load_cifar10()
        images = dataset.train_images
        if self.name == "fc2-mnist":
            images = data.flatten_channel_first(images)
        return images[: self.num_examples], dataset.train_labels[: self.num_examples]

    @cached_property
    def trained(self) -> tuple[Callable, Any]:
        """Predict function and parameters."""
        rngs = nnx.Rngs(0)
        if self.name == "fc2-mnist":
            network = models.fc2(784, rngs=rngs)
            return models.from_nnx(models.load_torch_state(network, GOLDEN / "golden_fc2_mnist/weights.npz"))
        if self.name == "lenet-cifar10":
            network = models.LeNet(rngs=rngs)
            file = GOLDEN / "golden_lenet_cifar10/weights.npz"
            return models.from_nnx(models.load_torch_state(network, file))
        predict, params = models.from_nnx(models.digits_net(rngs=rngs))
        rate = optax.cosine_decay_schedule(0.05, 400 * 12)
        loss = training.classification_loss(predict)
        key = jax.random.key(0)
        return predict, training.train(
            loss, params, self.arrays, key, epochs=400, learning_rate=rate, l1=self.l1
        )

    @property
    def label(self) -> str:
        """Name for files and tables."""
        return f"{self.name}-{self.num_examples}"

    def curvature(self, kind: str, num_examples: int | None = None) -> jaxlimit.Curvature:
        """Of the mean loss over the first examples."""
        predict, params = self.trained
        batches = jaxlimit.batched(tuple(x[:num_examples] for x in self.arrays), 128)
        return training.classification_curvature(kind, predict, params, batches)

    @cached_property
    def loss_tolerance(self) -> float:
        """The spread of the losses of the batches of 128, as in the paper."""
        predict, params = self.trained
        batches = jaxlimit.batched(self.arrays, 128)
        loss = training.classification_loss(predict)
        return jaxlimit.loss_statistics(loss, params, batches).batch_std


NETWORKS = (
    Network("digits-l1-0", 1_438, {"hessian": 448, "gauss_newton": 160}, l1=0.0),
    Network("digits-l1-5e-4", 1_438, {"hessian": 448, "gauss_newton": 160}, l1=5e-4),
    Network("fc2-mnist", 10_000, {"hessian": 512, "gauss_newton": 96}),
    Network("lenet-cifar10", 512, {"hessian": 1_024, "gauss_newton": 96}, num_probes=1),
    Network("fc2-mnist", 60_000, {"hessian": 384, "gauss_newton": 96}, num_probes=1),
)


class Spectrum:
    """Lanczos runs of one network and curvature, and the roots that estimators make of them."""

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.squared_norm, self.eps = arrays["squared_norm"], float(arrays["loss_tolerance"])
        self.dim = len(self.squared_norm) - 1
        self.runs = [
            Tridiagonal(diagonal, off_diagonal[:-1], float(off_diagonal[-1]))
            for diagonal, off_diagonal in zip(arrays["diagonal"], arrays["off_diagonal"], strict=True)
        ]
        self.steps = self.runs[0].num_steps
        self.eigenvalues, self.weights = arrays.get("eigenvalues"), arrays.get("weights")

    def root(self, dimension: Callable[[float], float]) -> float:
        """The width limit, for a dimension as a function of the ridge."""

        def of_count(n: int) -> float:
            norm = self.squared_norm[n]
            return dimension(width_ridge(float(np.sqrt(norm)), self.eps)) if norm > 0 else 1.0

        return fixed_point(of_count, self.dim)

    def root_of_rules(self, rules: Iterable[Rule]) -> float:
        """The same, for the mean over rules."""
        rules = [(np.abs(nodes), weights) for nodes, weights in rules]
        return self.root(lambda a: float(np.mean([np.sum(w * (a / (a + x))) for x, w in rules])))

    def truth(self, probe: int) -> float:
        """From all eigenvalues as this probe sees them; else from the bracket of the longest run."""
        if self.eigenvalues is not None and self.weights is not None:
            return self.root_of_rules([(self.eigenvalues, self.weights[probe])])
        return self.roots_of_bracket(self.runs[probe]).value

    def truth_spread(self, probe: int) -> float:
        """How well the truth itself is known."""
        if self.weights is not None:
            return 0.0
        found = self.roots_of_bracket(self.runs[probe])
        value, others = found.value, found.others[:3]
        return max((abs(other - value) for other in others), default=0.0)

    def roots_of_bracket(self, run: Tridiagonal) -> Bracketed[float]:
        """What the library makes of a run."""
        semidefinite = np.min(gauss(run)[0]) > -1e-6 * np.max(np.abs(run.diagonal))
        bracket = (bracket_semidefinite if semidefinite else bracket_indefinite)([run])
        return bracket.dimension.map(self.root)


def anti_gauss(run: Tridiagonal) -> Rule:
    """Laurie's rule: the last coupling times sqrt 2."""
    off_diagonal = np.append(run.off_diagonal[:-1], run.off_diagonal[-1:] * np.sqrt(2))
    return gauss(Tridiagonal(run.diagonal, off_diagonal, run.residual_norm))


def last_quarter(run: Tridiagonal) -> list[Rule]:
    """Gauss and anti-Gauss rules after 16 step counts of the last quarter."""
    counts = np.unique(np.linspace(0.75 * run.num_steps, run.num_steps, 16).astype(int))
    return [rule(run.truncate(int(k))) for k in counts for rule in (gauss, anti_gauss)]


def squared(run: Tridiagonal) -> list[Rule]:
    """Gauss and Gauss-Radau rules of H^2, whose moments a run of H knows to half the degree."""
    nodes, weights = gauss_radau(run, 0.0)
    jacobi = lanczos_of_diagonal(nodes**2, np.sqrt(weights)[:, None], run.num_steps // 2)
    run = Tridiagonal(np.diag(jacobi), np.diag(jacobi, 1)[:-1], float(jacobi[-1, -2]))
    run = Tridiagonal(run.diagonal[:-1], run.off_diagonal, run.residual_norm)
    rules = gauss(run), gauss_radau(run, 0.0)
    return [(np.sqrt(np.abs(nodes)), weights) for nodes, weights in rules]


def lanczos_of_diagonal(values: np.ndarray, starts: np.ndarray, steps: int) -> np.ndarray:
    """Block tridiagonal matrix of diag(values) from the columns of `starts`, reorthogonalised, in float64.

    `steps` blocks and the coupling to the next: order (steps + 1) times the block size.
    """
    size = starts.shape[1]
    basis = np.zeros((len(values), (steps + 1) * size))
    basis[:, :size] = np.linalg.qr(starts)[0]
    matrix = np.zeros((basis.shape[1], basis.shape[1]))
    for j in range(steps):
        now, after = slice(j * size, (j + 1) * size), slice((j + 1) * size, (j + 2) * size)
        product = values[:, None] * basis[:, now]
        matrix[now, now] = basis[:, now].T @ product
        for _ in range(2):
            product -= basis[:, : after.start] @ (basis[:, : after.start].T @ product)
        basis[:, after], coupling = np.linalg.qr(product)
        matrix[after, now], matrix[now, after] = coupling, coupling.T
    return matrix


def block_rules(spectrum: Spectrum, size: int, products: int) -> list[Rule]:
    """Block Lanczos from `size` probes at once: the Gauss rule of each, at the same number of products."""
    assert spectrum.eigenvalues is not None
    assert spectrum.weights is not None
    starts = np.sqrt(spectrum.weights[:size]).T * np.sign(np.random.default_rng(0).standard_normal(size))
    order = products // size * size
    matrix = lanczos_of_diagonal(spectrum.eigenvalues, starts, products // size)[:order, :order]
    nodes, vectors = eigh(matrix)
    coordinates = np.linalg.qr(starts)[1]
    return [(nodes, (c @ vectors[:size]) ** 2) for c in coordinates.T]


def deflated(spectrum: Spectrum, probe: int, products: int) -> float:
    """The largest eigenvalues known exactly, at a cost of one product each, Lanczos for the rest."""
    assert spectrum.eigenvalues is not None
    assert spectrum.weights is not None
    weights, top = spectrum.weights[probe], np.argsort(np.abs(spectrum.eigenvalues))[-DEFLATED:]
    rest = np.delete(np.arange(len(weights)), top)
    share = float(np.sum(weights[rest]))
    matrix = lanczos_of_diagonal(
        spectrum.eigenvalues[rest], np.sqrt(weights[rest])[:, None], products - DEFLATED
    )
    diagonal, off_diagonal = np.diag(matrix)[:-1], np.diag(matrix, 1)
    bracket = bracket_indefinite([Tridiagonal(diagonal, off_diagonal[:-1], float(off_diagonal[-1]))])
    known, at = weights[top], np.abs(spectrum.eigenvalues[top])
    return spectrum.root(lambda a: share * bracket.dimension.value(a) + float(np.sum(known * (a / (a + at)))))


def chebyshev(spectrum: Spectrum, run: Tridiagonal) -> float:
    """Chebyshev expansion of the integrand to the degree 2k - 1 of the moments that k products give.

    Damped by Jackson's factors, as in the kernel polynomial method (Weisse et al. 2006).
    """
    nodes, weights = gauss(run)
    radius, order = 1.01 * float(np.max(np.abs(nodes))), 2 * run.num_steps
    degrees = np.arange(order)
    moments = np.cos(np.outer(degrees, np.arccos(nodes / radius))) @ weights
    angle = np.pi / (order + 1)
    jackson = (order + 1 - degrees) * np.cos(degrees * angle) + np.sin(degrees * angle) / np.tan(angle)
    damped = moments * jackson / (order + 1)
    points = np.pi * (np.arange(16 * order) + 0.5) / (16 * order)
    damped[1:] *= 2

    def dimension(ridge: float) -> float:
        values = ridge / (ridge + radius * np.abs(np.cos(points)))
        coefficients = np.asarray(dct(values))[:order] / (2 * len(points))
        return float(coefficients @ damped)

    return spectrum.root(dimension)


ESTIMATORS: dict[str, Callable[[Spectrum, Tridiagonal], float]] = {
    "Gauss": lambda s, run: s.root_of_rules([gauss(run)]),
    "Gauss and anti-Gauss, mean over the last quarter": lambda s, run: s.root_of_rules(last_quarter(run)),
    "Gauss and anti-Gauss, median over the last quarter": lambda s, run: float(
        np.median([s.root_of_rules([rule]) for rule in last_quarter(run)])
    ),
    "Gauss and Gauss-Radau of the square": lambda s, run: s.root_of_rules(squared(run)),
    "Gauss-Radau at 0": lambda s, run: s.root_of_rules([gauss_radau(run, 0.0)]),
    "Gauss and Gauss-Radau at 0, mean": lambda s, run: s.root_of_rules([gauss(run), gauss_radau(run, 0.0)]),
    "Chebyshev expansion": chebyshev,
    "jaxlimit": lambda s, run: s.roots_of_bracket(run).value,
}


def products_needed(counts: np.ndarray, errors: np.ndarray) -> int | None:
    """The count from which on the error stays within the tolerance; None if it never does."""
    beyond = np.flatnonzero(np.abs(errors) > TOLERANCE)
    last = int(beyond[-1]) if beyond.size else -1
    return None if last == len(counts) - 1 else int(counts[last + 1])


def compare(spectrum: Spectrum, semidefinite: bool) -> dict[str, Any]:
    """Errors of every estimator at every step count, the worse of the probes."""
    counts = np.arange(2 * STEP, spectrum.steps + 1, max(STEP, spectrum.steps // 32))
    truths = [spectrum.truth(p) for p in range(len(spectrum.runs))]
    roots = {
        name: np.array([[estimate(spectrum, run.truncate(int(k))) for k in counts] for run in spectrum.runs])
        for name, estimate in ESTIMATORS.items()
    }
    errors = {name: found - np.array(truths)[:, None] for name, found in roots.items()}
    if spectrum.eigenvalues is not None and not semidefinite:
        sparse = counts[counts % 32 == 0]
        mean = float(np.mean(truths))
        for size in BLOCKS:
            if size <= len(spectrum.runs):
                found = [spectrum.root_of_rules(block_rules(spectrum, size, int(k))) for k in sparse]
                errors[f"block Lanczos, {size} probes"] = np.array([found]) - mean
        halves = [
            np.mean([spectrum.roots_of_bracket(run.truncate(int(k) // 2)).value for run in spectrum.runs])
            for k in sparse
        ]
        errors["jaxlimit, two runs of half the steps"] = np.array([halves]) - mean
        known = sparse[sparse > DEFLATED]
        errors[f"jaxlimit, {DEFLATED} outliers deflated"] = np.array(
            [[deflated(spectrum, p, int(k)) - truths[p] for k in known] for p in range(len(truths))]
        )
    table = {}
    for name, error in errors.items():
        worst = np.max(np.abs(error), axis=0)
        at = counts[-len(worst) :] if len(worst) == len(counts) else (counts[counts % 32 == 0])[-len(worst) :]
        table[name] = {
            "products": products_needed(at, worst),
            "error": {int(k): float(e) for k, e in zip(at, worst, strict=True) if k % 32 == 0},
        }
    spread = max(spectrum.truth_spread(p) for p in range(len(truths)))
    return {"truth": truths, "truth_spread": spread, "steps": spectrum.steps, "estimators": table}


def store(
    work: Path, missing: bool, name: str, make: Callable[[], dict[str, Any]]
) -> dict[str, np.ndarray] | None:
    """A piece of work from its file; if that is not there it is made, where `missing` allows it."""
    path = work / f"{name}.npz"
    if not path.exists():
        if not missing:
            return None
        start = time.perf_counter()
        arrays = make()
        temporary = work / f"{name}.tmp.npz"
        np.savez(temporary, **arrays, seconds=time.perf_counter() - start)
        temporary.replace(path)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    with np.load(path) as file:
        return dict(file)


def run_lanczos(network: Network, kind: str) -> dict[str, Any]:
    """The long runs, and for digits the exact spectrum as each probe sees it."""
    curvature = network.curvature(kind)
    starts = rademacher(jax.random.key(0), curvature.weights, network.num_probes)
    state = lanczos.run(curvature.matmat, lanczos.init(starts), network.steps[kind])
    order = magnitude.magnitude_order(curvature.weights)
    found: dict[str, Any] = {
        "diagonal": state.diagonal,
        "off_diagonal": state.off_diagonal,
        "squared_norm": order.squared_norm,
        "loss_tolerance": network.loss_tolerance,
    }
    if network.name.startswith("digits"):
        values, vectors = np.linalg.eigh(curvature.dense())
        probes = np.stack(
            [trees.flatten(jax.tree.map(lambda x, p=p: x[p], starts)) for p in range(network.num_probes)]
        )
        found |= {"eigenvalues": values, "weights": (probes @ vectors) ** 2 / len(values)}
    return found


def run_subsample(network: Network, kind: str, num_examples: int) -> dict[str, Any]:
    """The width limit from the first examples only."""
    limit = jaxlimit.pruning_limit(
        network.curvature(kind, num_examples),
        jax.random.key(0),
        loss_tolerance=network.loss_tolerance,
        which=["width"],
    )
    assert limit.width is not None
    return {"width": limit.width.value, "products": limit.num_matvecs}


def subsamples(network: Network) -> list[int]:
    """All examples, and three times a half to a sixth of those before."""
    sizes = {"digits": (180, 360, 720, 1_438), "fc2-mnist": (2_000, 5_000, 10_000, 20_000, 60_000)}
    return list(sizes.get(network.name.partition("-l1")[0], (128, 256, 512, 1_024)))


def extrapolations(sizes: list[int], widths: list[float]) -> dict[str, float]:
    """The last limit as foretold from those before: linear in log N, and a power law with a limit."""
    logs = np.log(sizes)
    slope = (widths[-2] - widths[-3]) / (logs[-2] - logs[-3])
    linear = widths[-2] + slope * (logs[-1] - logs[-2])
    before, now = widths[-3] - widths[-4], widths[-2] - widths[-3]
    ratio = now / before
    power = widths[-2] + now * ratio if ratio < 1 else linear
    return {"log-linear": linear - widths[-1], "geometric": power - widths[-1]}


def run_precision(name: str, dtype: str, reorthogonalize: bool) -> dict[str, Any]:
    """The width limit of a network trained in float32, in one precision and mode, by 256 steps.

    On the first 2,048 examples of MNIST, all of digits.
    """
    network = Network(name, 1_438 if name.startswith("digits") else 2_048, {}, l1=5e-4)
    (predict, params), loss_tolerance = network.trained, network.loss_tolerance  # of both precisions
    with jax.enable_x64(dtype == "float64"):
        images, labels = network.arrays
        params, images = jax.tree.map(partial(np.asarray, dtype=dtype), (params, images))
        batches = jaxlimit.batched((images, labels), 128)
        curvature = training.classification_curvature("hessian", predict, params, batches)
        starts = rademacher(jax.random.key(0), curvature.weights, 1)
        max_basis = None if reorthogonalize else 0
        run = lanczos.run(curvature.matmat, lanczos.init(starts), 256, max_basis).tridiagonals()[0]
        order = magnitude.magnitude_order(curvature.weights)
        spectrum = Spectrum(
            {
                "diagonal": run.diagonal[None],
                "off_diagonal": np.append(run.off_diagonal, run.residual_norm)[None],
                "squared_norm": order.squared_norm,
                "loss_tolerance": np.array(loss_tolerance),
            }
        )
        found = spectrum.roots_of_bracket(run)
        return {"value": found.value, "upper": found.upper}


def run_reference(network: Network) -> dict[str, Any]:
    """Predictions of the paper's code, (probes, step counts); it runs 64 to 128 steps from one probe."""
    curvature = network.curvature("hessian")
    order = magnitude.magnitude_order(curvature.weights)
    radii = paper_code.reference_radii(order)
    everything = curvature.of(paper_code.spectrum_parameters(curvature.params))
    zero_share = paper_code.zero_row_share(everything, order)
    starts = rademacher(jax.random.key(0), everything.weights, REFERENCE_PROBES)
    state = lanczos.run(everything.matmat, lanczos.init(starts), max(REFERENCE_STEPS))
    predictions = [
        [
            paper_code.reference_prediction(
                *gauss(run.truncate(steps)), radii, network.loss_tolerance, zero_share
            )
            for steps in REFERENCE_STEPS
        ]
        for run in state.tridiagonals()
    ]
    return {"prediction": predictions, "zero_share": zero_share}


def markdown(document: dict[str, Any]) -> dict[str, str]:
    """The tables of the documentation, by the names of their files."""
    tables = {
        "accuracy": estimators_table(document["estimators"]),
        "accuracy_examples": examples_table(document["subsampling"]),
        "accuracy_precision": precision_table(document["precision"]),
        "accuracy_reference": reference_table(document["reference"]),
    }
    return {name: "\n".join(lines) + "\n" for name, lines in tables.items()}


def estimators_table(runs: dict[str, Any]) -> list[str]:
    """Products that each estimator needs, a column for each run: the network, its examples, the curvature."""
    names = list(dict.fromkeys(name for run in runs.values() for name in run["estimators"]))
    headings = []
    for run in runs:
        network, count, kind = run.rsplit("-", 2)
        headings.append(f"{network}, {int(count):,}, {'H' if kind == 'hessian' else 'GN'}")
    lines = ["| estimator | " + " | ".join(headings) + " |", "|---|" + "---:|" * len(runs)]
    for name in names:
        cells = []
        for run in runs.values():
            found = run["estimators"].get(name)
            products = found["products"] if found is not None and run["truth_spread"] <= TOLERANCE else None
            cells.append("" if found is None else str(products or f"> {run['steps']}"))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def examples_table(subsampling: dict[str, Any]) -> list[str]:
    """Width limits of the first examples, and by how much the last one is missed by extrapolations."""
    lines = ["| network | width limit by number of examples | error of an extrapolation to the last |"]
    lines += ["|---|---|---|"]
    for name, found in subsampling.items():
        widths = ", ".join(
            f"{n:,}: {w:.4f}" for n, w in zip(found["num_examples"], found["width"], strict=True)
        )
        error = ", ".join(f"{key} {value:+.4f}" for key, value in found["foretold_error"].items())
        lines.append(f"| {name.replace('gauss_newton', 'Gauss-Newton')} | {widths} | {error} |")
    return lines


def precision_table(rows: list[dict[str, Any]]) -> list[str]:
    """Width limits in two precisions, with and without reorthogonalisation."""
    lines = ["| network | precision | reorthogonalised | width | upper bound |", "|---|---|---|---:|---:|"]
    for row in rows:
        lines.append(
            f"| {row['network']} | {row['dtype']} | {'yes' if row['reorthogonalize'] else 'no'} "
            f"| {row['value']:.5f} | {row['upper']:.5f} |"
        )
    return lines


def reference_table(reference: dict[str, Any]) -> list[str]:
    """What the paper's code predicts, from its smallest to its largest number over the probes."""
    lines = ["| network | " + " | ".join(f"{steps} steps" for steps in REFERENCE_STEPS) + " |"]
    lines += ["|---|" + "---:|" * len(REFERENCE_STEPS)]
    for name, found in reference.items():
        columns = zip(*found["prediction"], strict=True)
        lines.append(f"| {name} | " + " | ".join(f"{min(x):.3f} to {max(x):.3f}" for x in columns) + " |")
    return lines


def runs_part(networks: list[Network], stored: Callable[..., Any]) -> dict[str, Any]:
    """Comparison of the estimators on every run."""
    found = {}
    for network in networks:
        for kind in CURVATURES:
            name = f"{network.label}-{kind}"
            arrays = stored(f"run-{name}", partial(run_lanczos, network, kind))
            if arrays is not None:
                found[name] = partial(compare, Spectrum(arrays), kind == "gauss_newton")
    return found


def subsampling_part(networks: list[Network], stored: Callable[..., Any]) -> dict[str, Any]:
    """Width limits by number of examples; LeNet's Hessian at all sizes would take hours."""
    found = {}
    for network in (n for n in NETWORKS[1:4] if n in networks):
        sizes = subsamples(network)
        network = Network(network.name, sizes[-1], {}, l1=network.l1)
        for kind in CURVATURES[network.name == "lenet-cifar10" :]:
            limits = [
                stored(f"subsample-{network.name}-{kind}-{n}", partial(run_subsample, network, kind, n))
                for n in sizes
            ]
            if all(limit is not None for limit in limits):
                widths = [float(limit["width"]) for limit in limits]
                found[f"{network.name}, {kind}"] = {
                    "curvature": kind,
                    "num_examples": sizes,
                    "width": widths,
                    "products": [int(limit["products"]) for limit in limits],
                    "loss_tolerance": network.loss_tolerance,
                    "foretold_error": extrapolations(sizes, widths),
                }
    return found


def precision_part(networks: list[Network], stored: Callable[..., Any]) -> list[dict[str, Any]]:
    """The width limit in both precisions and modes, once all of it is there."""
    rows = []
    for name in sorted({n.name for n in networks} & {"digits-l1-5e-4", "fc2-mnist"}):
        for dtype in ("float32", "float64"):
            for reorthogonalize in (True, False):
                piece = f"precision-{name}-{dtype}-{reorthogonalize}"
                found = stored(piece, partial(run_precision, name, dtype, reorthogonalize))
                if found is not None:
                    row = {"network": name, "dtype": dtype, "reorthogonalize": reorthogonalize}
                    rows.append(row | {side: float(found[side]) for side in ("value", "upper")})
    return rows if len(rows) == 8 else []


def reference_part(networks: list[Network], stored: Callable[..., Any]) -> dict[str, Any]:
    """The paper's code's predictions on FC2, which it trained."""
    found = {}
    for network in networks:
        if network.label == "fc2-mnist-10000":
            arrays = stored(f"reference-{network.label}", partial(run_reference, network))
            if arrays is not None:
                found[network.label] = {
                    "steps": list(REFERENCE_STEPS),
                    "prediction": arrays["prediction"].tolist(),
                    "zero_share": float(arrays["zero_share"]),
                }
    return found


COLLECT = {
    "runs": runs_part,
    "subsampling": subsampling_part,
    "precision": precision_part,
    "reference": reference_part,
}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, metavar="DIR")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    names = sorted({network.name for network in NETWORKS})
    parser.add_argument("--networks", nargs="+", default=names, choices=names)
    arguments = parser.parse_args()
    networks = [network for network in NETWORKS if network.name in arguments.networks]
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    found = {
        part: collect(networks, partial(store, work, part in arguments.parts))
        for part, collect in COLLECT.items()
    }
    if "table" in arguments.parts:
        before = common.read_document("accuracy")
        found["estimators"] = {name: comparison() for name, comparison in found.pop("runs").items()}
        document = {"command": "python benchmarks/accuracy.py --work DIR", "tolerance": TOLERANCE}
        document |= common.environment()
        for part, results in found.items():
            document[part] = results or before.get(part, [])
            if isinstance(results, dict):
                document[part] = {**before.get(part, {}), **results}
        common.write_document("accuracy", document)
        for name, table in markdown(document).items():
            common.write_table(name, table)


if __name__ == "__main__":
    main()
