r"""The pruning limit of a network: how much of it can be removed before the loss rises by more than eps.

`pruning_limit` answers in four ways, each weaker in its demand than the one before (see `roots`): the loss
of the pruned network itself (one_shot), the paper's Gaussian width (width), the exact statistical dimension
of the cone (cone), and the best readjustment of the kept weights (readjusted).

Small networks are solved from a dense eigendecomposition. Large ones by Lanczos, which goes on until the
bracket of each limit is narrower than the tolerance, or the budget of products is spent.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxlimit import lanczos
from jaxlimit.checkpoint import Checkpoint
from jaxlimit.curvature import Curvature, dense_matrix
from jaxlimit.dense import dense_curvature
from jaxlimit.geometry import width_ridge
from jaxlimit.lanczos import Tridiagonal
from jaxlimit.magnitude import MagnitudeOrder, flatten, magnitude_order, num_removed
from jaxlimit.quadrature import (
    SpectralBracket,
    bracket_indefinite,
    bracket_semidefinite,
    gauss,
    rademacher,
    stack_rules,
)
from jaxlimit.readjust import readjusted_minimum
from jaxlimit.result import PruningLimit
from jaxlimit.roots import (
    Estimate,
    cone_limit,
    cone_point,
    one_shot_limit,
    quadrature_error,
    readjusted_limit,
    removed_radius,
    width_limit,
)

PyTree = Any

LIMITS = ("one_shot", "width", "cone", "readjusted")
# Up to here a dense eigendecomposition fits (1 GB) and costs less than Lanczos with enough probes for .001.
DENSE_DIM = 5_000
# Vectors multiplied at once outside Lanczos: enough to share a forward pass, few enough to fit in memory.
BLOCK = 8


class Progress(NamedTuple):
    """What `pruning_limit` tells about its work, after every block of products."""

    stage: str
    num_matvecs: int
    max_matvecs: int
    lower: float
    upper: float


def pruning_limit(
    curvature: Curvature,
    key: jax.Array,
    *,
    loss_tolerance: float,
    tolerance: float = 1e-3,
    max_matvecs: int = 10_000,
    num_probes: int | None = None,
    which: Sequence[str] = LIMITS,
    checkpoint: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> PruningLimit:
    r"""How sparse the network can be pruned while its loss rises by at most `loss_tolerance`.

    Cost: with D <= 5,000 weights, D products and one dense eigendecomposition. Otherwise Lanczos: for a
    Gauss-Newton matrix typically 64 steps a probe, for a Hessian several hundred, and as many for each of
    the five or so sparsities at which the cone is looked at; memory for (steps x probes) vectors.

    Args:
        curvature: from `hessian` (predicts) or `gauss_newton` (fast, certified, optimistic).
        key: of the random probes; a dense solution uses none.
        loss_tolerance: eps, the rise of the loss that is allowed, in units of the loss; positive. The paper
            takes `loss_statistics(...).batch_std`.
        tolerance: wanted accuracy of each limit, in units of sparsity; .001 is the grid of the paper's code.
        max_matvecs: budget of products with the curvature, all limits together.
        num_probes: number of random probes. None chooses: the dense solution where it fits, else as many
            probes as the tolerance needs.
        which: the limits wanted, of "one_shot", "width", "cone", "readjusted".
        checkpoint: folder for intermediate results. A run that was interrupted goes on from there and
            gives the same bits; a folder of a different problem is refused.
        progress: called with a `Progress` after every block of products.

    Returns:
        The limits asked for, with brackets, and a status sentence; `print` shows them as a table.

    Raises:
        ValueError: an argument out of range, naming it; weights that are all zero; a foreign checkpoint.
        FloatingPointError: a product with the curvature is not finite.

    Example:
        >>> from jaxlimit import batched, hessian
        >>> def loss(w, x): return jnp.mean((x @ (w - 1.0)) ** 2) / 2
        >>> weights = jnp.linspace(0.0, 1.0, 64).reshape(64, 1)
        >>> curvature = hessian(loss, weights, batched(8 * jnp.eye(64), 64))
        >>> limit = pruning_limit(curvature, jax.random.key(0), loss_tolerance=0.5, which=["width"])
        >>> print(limit.width)
        0.4848 [0.4692, 0.5005]

    Source: arXiv 2306.05857 for the question and `width`; docs/theory for the others.
    """
    _check_arguments(loss_tolerance, tolerance, max_matvecs, num_probes, which)
    order = magnitude_order(curvature.weights)
    if order.squared_norm[-1] == 0:
        raise ValueError("all prunable weights are zero: every sparsity leaves the network as it is.")
    problem = _Problem(curvature, key, loss_tolerance, tolerance, max_matvecs, num_probes, tuple(which), order)
    products = _Products(curvature, max_matvecs, progress)
    dense_fits = curvature.dim <= min(DENSE_DIM, max_matvecs)
    if num_probes is None and dense_fits:
        return _dense_limit(problem, products, which)
    store = Checkpoint(checkpoint, problem.fingerprint())
    result = _lanczos_limit(problem, products, store)
    if "readjusted" in which and result.readjusted is None and dense_fits:
        readjusted = _dense_limit(problem, products, ("readjusted",)).readjusted
        result = replace(result, readjusted=readjusted, num_matvecs=products.count)
    return result


class _Problem(NamedTuple):
    """The arguments of `pruning_limit`, with the weights in order."""

    curvature: Curvature
    key: jax.Array
    loss_tolerance: float
    tolerance: float
    max_matvecs: int
    num_probes: int | None
    which: tuple[str, ...]
    order: MagnitudeOrder

    def fingerprint(self) -> dict[str, Any]:
        """Numbers that tell one problem from another, so that a checkpoint is not continued by mistake."""
        return {
            "dim": self.curvature.dim,
            "num_examples": self.curvature.num_examples,
            "positive_semidefinite": self.curvature.positive_semidefinite,
            "weights": [float(np.sum(flatten(self.curvature.weights))), float(self.order.squared_norm[-1])],
            "loss_tolerance": float(self.loss_tolerance),
            "tolerance": float(self.tolerance),
            "num_probes": self.num_probes,
            "key": np.asarray(jax.random.key_data(self.key)).ravel().tolist(),
        }


class _Products:
    """Products with the curvature: counted, limited and reported."""

    def __init__(self, curvature: Curvature, max_matvecs: int, progress: Callable[[Progress], None] | None):
        self.curvature, self.max_matvecs, self.progress = curvature, max_matvecs, progress
        self.count, self.stage, self.lower, self.upper = 0, "", 0.0, 1.0

    @property
    def left(self) -> int:
        return self.max_matvecs - self.count

    def matmat(self, vectors: PyTree) -> PyTree:
        self.count += jax.tree.leaves(vectors)[0].shape[0]
        if self.progress is not None:
            self.progress(Progress(self.stage, self.count, self.max_matvecs, self.lower, self.upper))
        return self.curvature.matmat(vectors)

    def matvec(self, vector: PyTree) -> PyTree:
        return jax.tree.map(lambda x: x[0], self.matmat(jax.tree.map(lambda x: x[None], vector)))


def _dense_limit(problem: _Problem, products: _Products, which: Iterable[str]) -> PruningLimit:
    curvature, order, eps = problem.curvature, problem.order, problem.loss_tolerance
    products.stage = "dense"
    matrix = dense_matrix(products.matmat, curvature.weights)
    dense = dense_curvature(matrix, order, curvature.gradient)
    bracket = SpectralBracket.exact(dense.measure)
    limits: dict[str, Estimate] = {}
    width = width_limit(bracket, order, eps)
    if "one_shot" in which:
        limits["one_shot"] = one_shot_limit(
            dense.loss_increase(), curvature.dim, eps, tolerance=0.0, num_points=curvature.dim
        )
    if "width" in which:
        limits["width"] = width
    counts: list[int] = []
    if "cone" in which:
        limits["cone"], points = cone_limit(bracket, order, dense.removed, eps, width.value, tolerance=0.0)
        counts = [point.num_removed for point in points]
    if "readjusted" in which:
        limits["readjusted"] = readjusted_limit(dense.minimum(), curvature.dim, eps, 0.0, width.value)
    return _result(
        problem,
        products,
        bracket,
        dense.measure,
        dict(zip(counts, dense.removed(counts), strict=True)),
        limits,
        width,
        "dense eigendecomposition",
        f"converged: exact, from all {curvature.dim:,} eigenvalues.",
    )


def _lanczos_limit(problem: _Problem, products: _Products, store: Checkpoint) -> PruningLimit:
    curvature, order = problem.curvature, problem.order
    eps, tolerance, which = problem.loss_tolerance, problem.tolerance, problem.which
    semidefinite = curvature.positive_semidefinite
    limits: dict[str, Estimate] = {}
    notes: list[str] = []

    runs = _probe_runs(problem, products, store)
    width, bracket = _final_width(problem, runs)
    products.lower, products.upper = width.lower, width.upper
    if "width" in which:
        limits["width"] = width
    removed: dict[int, SpectralBracket] = {}
    if "cone" in which:
        look = _removed_brackets(problem, products, store, bracket, removed)
        try:
            limits["cone"], _ = cone_limit(bracket, order, look, eps, width.value, tolerance)
        except _BudgetSpent:
            notes.append("cone")
    if "one_shot" in which:
        try:
            increase = _loss_increase(curvature, order, products, store)
            limits["one_shot"] = one_shot_limit(increase, curvature.dim, eps, tolerance)
        except _BudgetSpent:
            notes.append("one_shot")
    if "readjusted" in which and semidefinite:
        start = limits.get("cone", width).value
        try:
            minimum = _readjusted(problem, products, store)
            limits["readjusted"] = readjusted_limit(minimum, curvature.dim, eps, tolerance, start)
        except _BudgetSpent:
            notes.append("readjusted")
    status = _status(problem, products, limits, notes, width, bracket)
    measure = stack_rules([gauss(run) for run in runs], curvature.dim)
    return _result(problem, products, bracket, measure, removed, limits, width, "Lanczos", status)


class _BudgetSpent(Exception):
    """Not enough products are left for the next limit; the others stand."""


def _bracket(problem: _Problem, runs: Sequence[Tridiagonal], dim: int | None, ridge: float | None = None):
    if problem.curvature.positive_semidefinite:
        return bracket_semidefinite(runs, dim)
    return bracket_indefinite(runs, dim, ridge=ridge)


def _probe_runs(problem: _Problem, products: _Products, store: Checkpoint) -> list[Tridiagonal]:
    """Lanczos from random probes: one decides how deep and how many, the others follow.

    A number of probes asked for runs as one block.
    """
    curvature, order = problem.curvature, problem.order
    products.stage = "spectrum"

    def resolved(runs: list[Tridiagonal]) -> bool:
        bracket = _bracket(problem, runs, curvature.dim)
        estimate = width_limit(bracket, order, problem.loss_tolerance)
        error = quadrature_error(bracket, order, problem.loss_tolerance)
        products.lower, products.upper = estimate.value - error, estimate.value + error
        return error <= problem.tolerance

    keys = jax.random.split(problem.key, 2)
    starts = rademacher(keys[0], curvature.weights, problem.num_probes or 1)
    runs = _run_until(products, starts, resolved, store, "probe")
    if problem.num_probes is not None:
        return runs
    # The standard error falls as one over the square root of the number of probes.
    error = width_limit(_bracket(problem, runs, curvature.dim), order, problem.loss_tolerance).probe_error
    steps = runs[0].num_steps
    wanted = int(np.ceil((error / problem.tolerance) ** 2)) - 1
    extra = min(wanted, products.left // (2 * steps))
    if extra < 1:
        return runs
    starts = rademacher(keys[1], curvature.weights, extra)
    more = _run_until(products, starts, lambda runs: runs[0].num_steps >= steps, store, "probes", steps)
    return runs + more


def _run_until(
    products: _Products,
    starts: PyTree,
    resolved: Callable[[list[Tridiagonal]], bool],
    store: Checkpoint,
    name: str,
    num_steps: int | None = None,
) -> list[Tridiagonal]:
    """Extends a block of Lanczos runs by a quarter at a time until it is resolved or the budget is spent."""
    num_runs = jax.tree.leaves(starts)[0].shape[0]
    if products.left < num_runs:
        raise _BudgetSpent
    state = store.load_state(name, lanczos.init(starts))
    products.count += state.diagonal.size
    while True:
        steps = state.diagonal.shape[1]
        runs = state.tridiagonals()
        if steps and (all(run.breakdown for run in runs) or resolved(runs)):
            return runs
        extra = num_steps - steps if num_steps else max(16, steps // 64 * 16)
        extra = min(extra, products.left // num_runs)
        if extra < 1:
            return runs
        state = lanczos.run(products.matmat, state, extra)
        store.save_state(name, state)


def _final_width(problem: _Problem, runs: list[Tridiagonal]) -> tuple[Estimate, SpectralBracket]:
    """The width limit, with rigorous bounds resolved around its own ridge."""
    dim, eps = problem.curvature.dim, problem.loss_tolerance
    width = width_limit(_bracket(problem, runs, dim), problem.order, eps)
    n = int(num_removed(dim, width.value))
    radius = removed_radius(problem.order, max(n, int(np.argmax(problem.order.squared_norm > 0))))
    bracket = _bracket(problem, runs, dim, width_ridge(radius, eps))
    return width_limit(bracket, problem.order, eps), bracket


def _removed_brackets(
    problem: _Problem,
    products: _Products,
    store: Checkpoint,
    probes: SpectralBracket,
    removed: dict[int, SpectralBracket],
) -> Callable[[list[int]], list[SpectralBracket]]:
    """Brackets of the spectral measure seen from c(s), by Lanczos from several c(s) side by side."""
    order, eps = problem.order, problem.loss_tolerance

    def error(n: int, run: Tridiagonal) -> float:
        """Of the dimension: d log delta / d log a <= 1, and delta is about 1 - s at the root."""
        point = cone_point(n, _bracket(problem, [run], None), removed_radius(order, n), eps)
        width = point.spread if not problem.curvature.positive_semidefinite else np.log(point.upper / point.lower)
        return float(width) * (1 - n / order.dim)

    def look(counts: list[int]) -> list[SpectralBracket]:
        products.stage = "cone"
        starts = jax.tree.map(lambda *x: jnp.stack(x), *[order.removed_vector(n) for n in counts])

        def resolved(runs: list[Tridiagonal]) -> bool:
            return all(error(n, run) <= problem.tolerance for n, run in zip(counts, runs, strict=True))

        runs = _run_until(products, starts, resolved, store, "cone-" + "-".join(map(str, counts)))
        for n, run in zip(counts, runs, strict=True):
            removed[n] = _bracket(problem, [run], None, width_ridge(removed_radius(order, n), eps))
        return [removed[n] for n in counts]

    return look


def _loss_increase(
    curvature: Curvature, order: MagnitudeOrder, products: _Products, store: Checkpoint
) -> Callable[[NDArray], NDArray]:
    """-g^T c + c^T H c / 2 at an array of sparsities, in blocks of products."""
    gradient = flatten(curvature.gradient)

    def increase(sparsities: NDArray) -> NDArray:
        products.stage = "one_shot"
        counts = num_removed(curvature.dim, sparsities)
        values = []
        for block in np.array_split(counts, -(-len(counts) // BLOCK)):
            name = f"one_shot-{'-'.join(map(str, block))}"
            saved = store.load_array(name)
            if saved is None:
                if products.left < len(block):
                    raise _BudgetSpent
                vectors = [order.removed_vector(int(n)) for n in block]
                product = products.matmat(jax.tree.map(lambda *x: jnp.stack(x), *vectors))
                rows = [jax.tree.map(lambda x, i=i: x[i], product) for i in range(len(block))]
                flat = [flatten(c) for c in vectors]
                saved = np.array([c @ flatten(hc) / 2 - gradient @ c for c, hc in zip(flat, rows, strict=True)])
                store.save_array(name, saved)
            else:
                products.count += len(block)
            values.append(saved)
        return np.concatenate(values)

    return increase


def _readjusted(problem: _Problem, products: _Products, store: Checkpoint) -> Callable[[int], tuple[float, float]]:
    """Bounds on the readjusted loss after n removals, by conjugate gradients warm-started along the search."""
    order, eps = problem.order, problem.loss_tolerance
    start = jax.tree.map(jnp.zeros_like, order.like)

    def minimum(n: int) -> tuple[float, float]:
        nonlocal start
        products.stage = "readjusted"
        saved = store.load_tree(f"readjusted-{n}", {"x": start, "bounds": np.zeros(3)})
        if saved is None:
            if products.left < 1:
                raise _BudgetSpent
            before = products.count
            lower, upper, start = readjusted_minimum(
                products.matvec, order.removed_vector(n), order.mask(n), start, eps, products.left
            )
            bounds = np.array([lower, upper, products.count - before])
            store.save_tree(f"readjusted-{n}", {"x": start, "bounds": bounds})
            return lower, upper
        start = saved["x"]
        products.count += int(saved["bounds"][2])
        return float(saved["bounds"][0]), float(saved["bounds"][1])

    return minimum


def _status(
    problem: _Problem,
    products: _Products,
    limits: dict[str, Estimate],
    skipped: list[str],
    width: Estimate,
    bracket: SpectralBracket,
) -> str:
    """One sentence on each thing the reader must know, the verdict first."""
    tolerance, semidefinite = problem.tolerance, problem.curvature.positive_semidefinite
    error = quadrature_error(bracket, problem.order, problem.loss_tolerance)
    worst = max([error, *(limit.spread for limit in limits.values() if not semidefinite)])
    kind = "bracket" if semidefinite else "spread over step counts"
    if skipped or worst > tolerance:
        sentences = [f"under-resolved: {kind} {worst:.4f} at a tolerance of {tolerance:g}, "
                     f"limited by max_matvecs = {problem.max_matvecs}: raise it, or tolerance."]
        if skipped:
            sentences.append(f"No product was left for {', '.join(skipped)}.")
    else:
        sentences = [f"converged: {kind} {worst:.4f} within the tolerance of {tolerance:g}."]
    if width.probe_error > 1.5 * tolerance:
        sentences.append(f"The probe error {width.probe_error:.4f} exceeds the tolerance: use more probes.")
    if not semidefinite:
        sentences.append("The interval of an indefinite Hessian is rigorous and much wider than its spread.")
        if "readjusted" in problem.which and problem.curvature.dim > min(DENSE_DIM, problem.max_matvecs):
            sentences.append(
                f"readjusted with |H| needs a dense matrix (at most {DENSE_DIM:,} weights): take the optimistic "
                "one of gauss_newton."
            )
    return " ".join(sentences)


def _result(
    problem: _Problem,
    products: _Products,
    bracket: SpectralBracket,
    measure: Any,
    removed: dict[int, SpectralBracket],
    limits: dict[str, Estimate],
    width: Estimate,
    method: str,
    status: str,
) -> PruningLimit:
    curvature, order = problem.curvature, problem.order
    first_nonzero = int(np.argmax(order.squared_norm > 0))
    n = max(int(num_removed(curvature.dim, width.value)), first_nonzero)
    return PruningLimit(
        **{name: limits.get(name) if name in problem.which else None for name in LIMITS},
        measure=measure,
        loss_tolerance=problem.loss_tolerance,
        tolerance=problem.tolerance,
        num_matvecs=products.count,
        num_probes=0 if measure.dim is None else len(measure.nodes),
        num_steps=measure.nodes.shape[1],
        num_examples=curvature.num_examples,
        dim=curvature.dim,
        positive_semidefinite=curvature.positive_semidefinite,
        method=method,
        largest_eigenvalue=float(np.max(np.abs(measure.nodes))),
        ridge=width_ridge(removed_radius(order, n), problem.loss_tolerance),
        status=status,
        _order=order,
        _bracket=bracket,
        _removed=removed,
    )


def _check_arguments(
    loss_tolerance: float, tolerance: float, max_matvecs: int, num_probes: int | None, which: Sequence[str]
) -> None:
    for name, value in (("loss_tolerance", loss_tolerance), ("tolerance", tolerance)):
        if not (np.isscalar(value) or np.ndim(value) == 0) or not (np.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a positive finite number, got {value}.")
    if max_matvecs < 16:
        raise ValueError(f"max_matvecs must be at least 16, got {max_matvecs}.")
    if num_probes is not None and not 1 <= num_probes <= max_matvecs:
        raise ValueError(f"num_probes must lie between 1 and max_matvecs = {max_matvecs}, got {num_probes}.")
    unknown = [name for name in which if name not in LIMITS]
    if isinstance(which, str) or unknown or not which:
        raise ValueError(f"which must name limits among {', '.join(LIMITS)}, got {which!r}.")
