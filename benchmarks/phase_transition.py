r"""The phase transition on the real loss: how many random directions does a pruned network need?

From the pruned weights w_pruned = w* - c of a trained network, random directions B = (b_1, ..., b_k) are
added one after another until

    min_x L(w_pruned + B x) <= L(w*) + eps.

Four losses meet the same directions: the two quadratic models of the theory, L* + u^T M u / 2 with M = |H|
("hessian") or Gauss-Newton; the second-order Taylor polynomial L* + g^T u + u^T H u / 2 ("taylor"), which has
the gradient, and the signs of H; and the real loss. The first three are answered by linear algebra: with
B^T M B = R^T R and k columns,

    min_x = q(-c) - (y_1^2 + ... + y_k^2) / 2,      y = R^{-T} B^T (M c - g);

the real loss by L-BFGS. Predicted: E k = D - delta + 1/2, delta the statistical dimension of the cone
(Crofton formula, arXiv 1303.6672, section 5), with the width formula as the paper's estimate of delta.

    python benchmarks/phase_transition.py            # 15 minutes on one core: writes result and figure
    python benchmarks/phase_transition.py --quick    # under half a minute: prints only
"""

import argparse
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import common
import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from jax.flatten_util import ravel_pytree
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from quadratic_models import directions
from scipy.linalg import get_lapack_funcs, solve_triangular
from scipy.optimize import minimize

import jaxlimit
from jaxlimit import geometry, plots, training
from jaxlimit.application import presets
from jaxlimit.core.trees import combine, flatten, partition
from jaxlimit.geometry.magnitude import MagnitudeOrder, magnitude_order, num_removed
from jaxlimit.models import from_nnx
from jaxlimit.plots.style import BLUE, GREEN, GREY
from jaxlimit.training.losses import CURVATURES

Array = NDArray[np.float64]
ValueAndGradient = Callable[[Array], tuple[float, Array]]

COMMAND = "python benchmarks/phase_transition.py"
NAME = "phase_transition"
FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "phase_transition.png"
ETA = 0.05  # of the transition window
NUM_STEPS = 300  # of L-BFGS; the checks double them
MAX_COLUMNS = 1200  # random directions in a chain; transitions beyond are left out
TITLES = {"real": "real loss", "taylor": "Taylor: g, and H with its signs", **plots.TITLES}
COLOURS = {"real": "#000000", "taylor": GREEN, **plots.COLOURS}
# The predictions, by loss and formula.
FORMULAS = (
    ("hessian", "width"),
    ("hessian", "cone"),
    ("gauss_newton", "width"),
    ("gauss_newton", "cone"),
    ("taylor", "cone"),
)
LINES = {"width": ":", "cone": "-"}


@dataclass(frozen=True)
class Experiment:
    """A network trained as in the preset `digits`.

    Attributes:
        network: widths.
        sparsities: those looked at.
        shown: the one of them whose probabilities are drawn, and on which the optimiser is checked.
        num_chains: chains of random directions.
        num_checked: how many of them are checked.
        epochs: of training.
    """

    network: str
    sparsities: tuple[float, ...]
    shown: float
    num_chains: int
    num_checked: int
    epochs: int = 400


EXPERIMENTS = (
    Experiment("64-10-10", (0.70, 0.75, 0.80, 0.85, 0.90), 0.80, num_chains=24, num_checked=8),
    Experiment("64-48-24-10", (0.88, 0.91, 0.94, 0.96), 0.91, num_chains=16, num_checked=4),
)
QUICK = (Experiment("64-10-10", (0.80,), 0.80, num_chains=2, num_checked=1, epochs=50),)


class Quadratic(NamedTuple):
    """L(w* + u) - L* = slope^T u + u^T matrix u / 2."""

    matrix: Array
    slope: Array


class Network(NamedTuple):
    """A trained network, in flat coordinates of its D prunable weights; everything else stays fixed.

    Attributes:
        order: the weights, sorted.
        along: (y, origin, directions) -> the loss at origin + directions y, and its gradient in y.
        statistics: of the loss; eps is its spread over batches.
        models: quadratic models of the loss.
        spectra: eigenvalues and eigenvectors of both curvatures.
    """

    order: MagnitudeOrder
    along: Callable[..., tuple[jax.Array, jax.Array]]
    statistics: jaxlimit.LossStatistics
    models: dict[str, Quadratic]
    spectra: dict[str, tuple[Array, Array]]


def train(experiment: Experiment) -> Network:
    """Trains the network and takes its curvatures as dense matrices."""
    preset = replace(presets.find_preset("digits", epochs=experiment.epochs), network=experiment.network)
    arrays, _ = presets.load_arrays(preset, presets.Options())
    predict, params = from_nnx(presets.build_network(preset, seed=0))
    loss = training.classification_loss(predict)
    recipe = preset.recipe
    rate = recipe.rate(len(arrays[0]))
    params = training.train(
        loss, params, arrays, jax.random.key(0), epochs=recipe.epochs, learning_rate=rate, l1=recipe.l1
    )
    batches = jaxlimit.batched(arrays, recipe.batch_size)
    curvatures = [training.classification_curvature(name, predict, params, batches) for name in CURVATURES]
    gradient = flatten(curvatures[0].gradient)
    hessian, gauss_newton = (curvature.dense() for curvature in curvatures)
    weights, rest = partition(params)
    unravel = ravel_pytree(weights)[1]

    @jax.jit
    @jax.value_and_grad
    def along(y: jax.Array, origin: jax.Array, directions: jax.Array) -> jax.Array:
        return loss(combine(unravel(origin + directions @ y), rest), arrays)

    eigenvalues, eigenvectors = np.linalg.eigh(hessian)
    absolute = (eigenvectors * np.abs(eigenvalues)) @ eigenvectors.T
    return Network(
        magnitude_order(weights),
        along,
        jaxlimit.loss_statistics(loss, params, batches),
        {
            "taylor": Quadratic(hessian, gradient),
            "gauss_newton": Quadratic(gauss_newton, np.zeros_like(gradient)),
            "hessian": Quadratic(absolute, np.zeros_like(gradient)),
        },
        {
            "gauss_newton": np.linalg.eigh(gauss_newton),
            "hessian": (eigenvalues, eigenvectors),
        },
    )


def removed_vector(network: Network, sparsity: float) -> Array:
    """c(s)."""
    return flatten(network.order.removed_vector(int(num_removed(network.order.dim, sparsity))))


def predictions(network: Network, sparsity: float) -> dict[str, dict[str, float]]:
    """D - delta(s), by the width formula and of the exact cone."""
    c, loss_tolerance = removed_vector(network, sparsity), network.statistics.batch_std
    dim, radius = len(c), float(np.linalg.norm(c))
    found = {"taylor": {"cone": signed_transition(network, c)}}
    for name in CURVATURES:
        eigenvalues, eigenvectors = network.spectra[name]
        measure = jaxlimit.SpectralMeasure(eigenvalues, np.full(dim, 1 / dim))
        removed = jaxlimit.SpectralMeasure(eigenvalues, (c @ eigenvectors) ** 2 / radius**2)
        found[name] = {
            "width": dim * (1 - geometry.width_dimension(measure, radius, loss_tolerance)),
            "cone": dim * (1 - geometry.cone_dimension(measure, removed, radius, loss_tolerance)),
        }
    return found


def signed_transition(network: Network, c: Array) -> float:
    """The cone formula for an indefinite H with a gradient (quadratic_models.py), tested against `taylor`."""
    eigenvalues, eigenvectors = network.spectra["hessian"]
    slope = network.models["taylor"].slope @ eigenvectors
    return directions(eigenvalues, c @ eigenvectors, slope, network.statistics.batch_std)


# Quadratic models, by linear algebra.


def cholesky(matrix: Array) -> Array:
    """R with R^T R = the largest leading block that is positive definite."""
    (potrf,) = get_lapack_funcs(("potrf",), (matrix,))
    factor, failed = potrf(matrix)
    order = failed - 1 if failed else len(matrix)
    return factor[:order, :order]


def minimiser(model: Quadratic, factor: Array, basis: Array, c: Array) -> Array:
    """The minimiser y = R^{-T} B^T (M c - g), in the coordinates y = R x."""
    pull = basis.T @ (model.matrix @ c - model.slope)
    return solve_triangular(factor, pull[: len(factor)], trans=1)


def at_pruned(model: Quadratic, c: Array) -> float:
    """q(-c), the rise of the loss at the pruned weights."""
    return float(c @ model.matrix @ c / 2 - model.slope @ c)


def quadratic_transition(
    model: Quadratic, factor: Array, basis: Array, c: Array, loss_tolerance: float
) -> int | None:
    """Fewest directions with which the minimum of the model is at most the loss tolerance; None if too few.

    Where B^T M B ceases to be positive definite the model falls without end, and that k is the answer.
    """
    gained = np.cumsum(minimiser(model, factor, basis, c) ** 2) / 2
    reached = at_pruned(model, c) - np.append(0.0, gained) <= loss_tolerance
    if reached.any():
        return int(np.argmax(reached))
    return len(factor) + 1 if len(factor) < basis.shape[1] else None


# Any loss, by optimisation.


def lowest(function: ValueAndGradient, start: Array, bound: float, num_steps: int) -> float:
    """The lowest value that L-BFGS finds, or the first one within the bound."""

    def stop_within_bound(intermediate_result: Any) -> None:
        if intermediate_result.fun <= bound:
            raise StopIteration

    options: Any = {"maxiter": num_steps, "maxfun": 2 * num_steps, "maxcor": 20, "ftol": 0, "gtol": 0}
    found = minimize(
        function, start, jac=True, method="L-BFGS-B", options=options, callback=stop_within_bound
    )
    return float(found.fun)


def transition(function: ValueAndGradient, start: Array, bound: float, num_steps: int = NUM_STEPS) -> int:
    """Fewest leading coordinates with which the minimum of a function is within the bound: bisection."""

    def reaches(count: int) -> bool:
        free = np.arange(len(start)) < count

        def restricted(y: Array) -> tuple[float, Array]:
            value, gradient = function(y)
            return value, gradient * free

        return lowest(restricted, start * free, bound, num_steps) <= bound

    count = bisect_left(range(len(start) + 1), True, key=reaches)
    if count > len(start):
        raise RuntimeError(f"{len(start)} directions are not enough to reach the bound.")
    return count


def loss_along(network: Network, directions: Array, c: Array) -> ValueAndGradient:
    """The function y -> L(w_pruned + directions y) - L*, with its gradient."""
    origin = jnp.asarray(flatten(network.order.like) - c, jnp.float32)
    columns = jnp.asarray(directions, jnp.float32)

    def function(y: Array) -> tuple[float, Array]:
        value, gradient = network.along(jnp.asarray(y, jnp.float32), origin, columns)
        return float(value) - network.statistics.mean, np.asarray(gradient, np.float64)

    return function


def quadratic_along(model: Quadratic, directions: Array, c: Array) -> ValueAndGradient:
    """The function y -> q(directions y - c), with its gradient."""
    curved = directions.T @ model.matrix @ directions
    slope = directions.T @ (model.slope - model.matrix @ c)
    origin = at_pruned(model, c)

    def function(y: Array) -> tuple[float, Array]:
        return float(origin + slope @ y + y @ curved @ y / 2), slope + curved @ y

    return function


# The experiment.


class Chain(NamedTuple):
    """Random directions with what all sparsities share.

    Attributes:
        basis: (D, columns) B.
        factors: R of each quadratic model.
        directions: B R^{-1} of Gauss-Newton: the same nested subspaces, in coordinates in which that matrix
            is the identity, for the optimiser's sake.
    """

    basis: Array
    factors: dict[str, Array]
    directions: Array


def draw_chain(network: Network, num_columns: int, rng: np.random.Generator) -> Chain:
    """Gaussian directions."""
    basis = rng.standard_normal((network.order.dim, num_columns))
    factors = {name: cholesky(basis.T @ model.matrix @ basis) for name, model in network.models.items()}
    factor = factors["gauss_newton"]
    directions = solve_triangular(factor, basis[:, : len(factor)].T, trans=1).T
    return Chain(basis, factors, directions)


def columns_for(predicted: float) -> int:
    """As many directions as the transition may need, given its prediction."""
    return int(1.3 * predicted) + 80


def real_problem(network: Network, chain: Chain, point: dict[str, Any]) -> tuple[ValueAndGradient, Array]:
    """The real loss in the coordinates of the chain, and the minimiser of Gauss-Newton as a start."""
    c = removed_vector(network, point["sparsity"])
    count = columns_for(max(point["predicted"][name]["cone"] for name in ("gauss_newton", "taylor")))
    start = minimiser(network.models["gauss_newton"], chain.factors["gauss_newton"], chain.basis, c)
    return loss_along(network, chain.directions[:, :count], c), start[:count]


def find_transitions(network: Network, chain: Chain, point: dict[str, Any]) -> dict[str, Any]:
    """The k of the four losses at one sparsity."""
    c, loss_tolerance = removed_vector(network, point["sparsity"]), network.statistics.batch_std
    found = {
        name: quadratic_transition(model, chain.factors[name], chain.basis, c, loss_tolerance)
        for name, model in network.models.items()
    }
    return {"real": transition(*real_problem(network, chain, point), loss_tolerance), **found}


def check_optimiser(
    network: Network, chain: Chain, point: dict[str, Any], found: dict[str, Any]
) -> dict[str, int]:
    """By how much k moves with more steps or another start, and how far L-BFGS is from linear algebra."""
    c, loss_tolerance = removed_vector(network, point["sparsity"]), network.statistics.batch_std
    real, start = real_problem(network, chain, point)
    others = {
        "real, twice the steps": transition(real, start, loss_tolerance, 2 * NUM_STEPS),
        "real, from the pruned weights": transition(real, 0 * start, loss_tolerance),
    }
    shifts = {name: k - found["real"] for name, k in others.items()}
    quadratic = quadratic_along(network.models["hessian"], chain.directions, c)
    by_optimiser = transition(quadratic, np.zeros(chain.directions.shape[1]), loss_tolerance)
    return {**shifts, "hessian, L-BFGS": by_optimiser - found["hessian"]}


def crossing(sparsities: Sequence[float], transitions: Sequence[float], dim: int) -> float | None:
    """The s at which as many directions as weights kept, (1 - s) D, are enough: a limit; None if outside."""
    gaps = np.array(transitions) / dim - (1 - np.array(sparsities))
    return float(np.interp(0, gaps, sparsities)) if gaps[0] < 0 < gaps[-1] else None


def run(experiment: Experiment) -> dict[str, Any]:
    """All transitions of one network."""
    network = train(experiment)
    dim = network.order.dim
    points = [describe(network, sparsity) for sparsity in experiment.sparsities]
    needed = [columns_for(point["predicted"]["hessian"]["cone"]) for point in points]
    num_columns = min(dim, MAX_COLUMNS, max(needed))
    rng, checks = np.random.default_rng(0), []
    for index in range(experiment.num_chains):
        chain = draw_chain(network, num_columns, rng)
        for point in points:
            found = find_transitions(network, chain, point)
            for name, k in found.items():
                point["transitions"][name].append(k)
            if index < experiment.num_checked and point["sparsity"] == experiment.shown:
                checks.append(check_optimiser(network, chain, point, found))
    for point in points:
        lists = point["transitions"].items()
        point["median"] = {name: float(np.median(ks)) for name, ks in lists if None not in ks}
    return {
        "network": experiment.network,
        "shown": experiment.shown,
        "dim": dim,
        "loss": network.statistics.mean,
        "loss_tolerance": network.statistics.batch_std,
        "halfwidth": dim * geometry.transition_halfwidth(dim, ETA),
        "num_steps": NUM_STEPS,
        "points": points,
        "curves": curves(network, experiment.sparsities),
        "checks": {name: [check[name] for check in checks] for name in checks[0]},
    }


def describe(network: Network, sparsity: float) -> dict[str, Any]:
    """One sparsity: what is predicted, and where the transitions are going to be entered."""
    c = removed_vector(network, sparsity)
    rise, _ = loss_along(network, np.zeros((len(c), 1)), c)(np.zeros(1))
    rises = {name: at_pruned(model, c) for name, model in network.models.items()}
    return {
        "sparsity": sparsity,
        "kept": len(c) - int(num_removed(len(c), sparsity)),
        "rise_at_pruned": {"real": rise, **rises},
        "predicted": predictions(network, sparsity),
        "transitions": {name: [] for name in COLOURS},
    }


def curves(network: Network, sparsities: Sequence[float]) -> dict[str, Any]:
    """The predictions on a fine grid of sparsities."""
    grid = np.linspace(sparsities[0] - 0.01, sparsities[-1] + 0.01, 41)
    found = [predictions(network, s) for s in grid]
    lines: dict[str, Any] = {name: {} for name in found[0]}
    for name, formula in FORMULAS:
        lines[name][formula] = [at[name][formula] for at in found]
    return {"sparsity": grid.tolist(), **lines}


def limits(result: dict[str, Any]) -> dict[str, float | None]:
    """The sparsities at which as many random directions as weights kept are just enough."""
    dim, lines = result["dim"], result["curves"]
    found = {
        f"{name} {formula}": crossing(lines["sparsity"], lines[name][formula], dim)
        for name, formula in FORMULAS
    }
    for name in TITLES:
        known = [point for point in result["points"] if name in point["median"]]
        medians = [point["median"][name] for point in known]
        found[f"{name} measured"] = crossing([point["sparsity"] for point in known], medians, dim)
    return found


def summary(result: dict[str, Any]) -> str:
    """Predicted and measured 50 % points, a line a sparsity."""
    lines = [f"{result['network']}: D = {result['dim']:,}, window +-{result['halfwidth']:.0f}"]
    for point in result["points"]:
        predicted = [
            f"{name} {formula} {point['predicted'][name][formula]:.1f}" for name, formula in FORMULAS
        ]
        measured = [f"{name} {k:g}" for name, k in point["median"].items()]
        lines += [
            f"s = {point['sparsity']}, {point['kept']:,} kept",
            f"  predicted: {', '.join(predicted)}",
            f"  measured:  {', '.join(measured)}",
        ]
    return "\n".join([*lines, f"limits {result['limits']}", f"checks {result['checks']}"])


def draw(results: Sequence[dict[str, Any]]) -> Figure:
    """Probabilities at one sparsity (left) and 50 % points against sparsity (right), a row a network."""
    with mpl.rc_context(plots.STYLES):
        figure = Figure(figsize=(9, 3.6 * len(results) + 0.9), dpi=150, layout="constrained")
        panels = figure.subplots(len(results), 2, squeeze=False)
    for (left, right), result in zip(panels, results, strict=True):
        draw_probabilities(left, result)
        draw_transitions(right, result)
    handles = {
        label: handle
        for axes in panels.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=4, frameon=False, fontsize=8
    )
    return figure


def draw_probabilities(axes: Axes, result: dict[str, Any]) -> None:
    """The share of chains within the tolerance at k directions, with the predicted transitions."""
    dim = result["dim"]
    (point,) = (point for point in result["points"] if point["sparsity"] == result["shown"])
    center = point["predicted"]["hessian"]["cone"]
    window = [(center + sign * result["halfwidth"]) / dim for sign in (-1, 1)]
    axes.axvspan(*window, color=BLUE, alpha=0.07, linewidth=0, label="window of cone |H|, η = .05")
    for name, formula in FORMULAS:
        k = point["predicted"][name][formula]
        axes.axvline(k / dim, color=COLOURS[name], linewidth=1, linestyle=LINES[formula])
    for name in point["median"]:
        fractions = np.array(point["transitions"][name]) / dim
        axes.ecdf(fractions, color=COLOURS[name], linewidth=2 if name == "real" else 1.4)
    axes.set(xlim=(0, 1.15 * max(window[1], point["predicted"]["hessian"]["width"] / dim)))
    axes.set(xlabel="random directions k / D", ylabel="probability to reach L* + ε", ylim=(0, 1.03))
    axes.set_title(f"{result['network']}, D = {dim:,}, sparsity {point['sparsity']}", fontsize=9)


def draw_transitions(axes: Axes, result: dict[str, Any]) -> None:
    """The directions needed, against sparsity: medians with all chains' range, and the predictions."""
    dim, grid = result["dim"], np.array(result["curves"]["sparsity"])
    axes.plot(grid, 1 - grid, color=GREY, linestyle="--", linewidth=1, label="weights kept, 1 - s")
    for name, formula in FORMULAS:
        values = np.array(result["curves"][name][formula]) / dim
        label = f"{formula}, {TITLES[name]}"
        axes.plot(grid, values, LINES[formula], color=COLOURS[name], linewidth=1.2, label=label)
    for name, title in TITLES.items():
        known = [point for point in result["points"] if name in point["median"]]
        ks = np.array([point["transitions"][name] for point in known]) / dim
        medians = np.array([point["median"][name] for point in known]) / dim
        ranges = np.abs(np.array([ks.min(1), ks.max(1)]) - medians)
        at = [point["sparsity"] for point in known]
        axes.errorbar(
            at, medians, ranges, fmt="o", color=COLOURS[name], markersize=4, label=f"measured: {title}"
        )
    top = max(1 - grid[0], 1.1 * max(result["curves"]["gauss_newton"]["cone"]) / dim)
    axes.set(xlim=(grid[0], grid[-1]), ylim=(0, 1.1 * top), xlabel="sparsity s")
    axes.set_ylabel("directions needed, k / D")


def main() -> None:
    """Runs the experiments; without --quick stores and draws them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one small network; nothing is written")
    quick = parser.parse_args().quick
    results = []
    for experiment in QUICK if quick else EXPERIMENTS:
        result = run(experiment)
        results.append({**result, "limits": limits(result)})
        print(summary(results[-1]), flush=True)
    if quick:
        return
    seconds = round(time.process_time())
    document = {
        "command": COMMAND,
        **common.environment(),
        "cpu_seconds": seconds,
    }
    common.write_document(NAME, {**document, "networks": results})
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    draw(results).savefig(FIGURE)


if __name__ == "__main__":
    main()
