r"""The pruning limit of a network: how much of it can be removed before the loss rises by more than eps.

`pruning_limit` answers in four ways, each weaker in its demand than the one before (see `roots`): the loss
of the pruned network itself (one_shot), the paper's Gaussian width (width), the exact statistical dimension
of the cone (cone), and the best readjustment of the kept weights (readjusted).

Small networks are solved from a dense eigendecomposition (`dense`), large ones by Lanczos (`adaptive`).
"""

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import numpy as np

from jaxlimit.core.memory import advice_on_memory, device_memory
from jaxlimit.core.storage import Checkpoint, ordered_sum
from jaxlimit.core.trees import flatten
from jaxlimit.curvature.dense_matrix import dense_matrix
from jaxlimit.curvature.operator import Curvature
from jaxlimit.geometry.dimensions import width_ridge
from jaxlimit.geometry.magnitude import MagnitudeOrder, magnitude_order, num_removed
from jaxlimit.limits.dense_source import DenseCurvature, dense_curvature
from jaxlimit.limits.lanczos_source import AdaptiveCurvature, Products, Progress
from jaxlimit.limits.result import PruningLimit
from jaxlimit.limits.roots import (
    LIMITS,
    BudgetSpent,
    Estimate,
    cone_limit,
    readjusted_limit,
    width_limit,
)
from jaxlimit.spectrum.bracket import SpectralBracket

PyTree = Any

# Up to here a dense eigendecomposition fits in 1 GB and is done in seconds, without any probe error.
DENSE_DIM = 5_000
# A budget, not a target: Lanczos stops when the limits are resolved.
MAX_MATVECS, LEAST_MATVECS = 10_000, 16


@advice_on_memory()
def pruning_limit(
    curvature: Curvature,
    key: jax.Array,
    *,
    loss_tolerance: float,
    tolerance: float = 1e-3,
    max_matvecs: int = MAX_MATVECS,
    num_probes: int | None = None,
    which: Sequence[str] = LIMITS,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Callable[[Progress], None] | None = None,
    basis_bytes: int | None = None,
    scores: PyTree | None = None,
) -> PruningLimit:
    r"""How sparse the network can be pruned while its loss rises by at most `loss_tolerance`.

    Cost: with D <= 5,000 weights, D products and one dense eigendecomposition. Otherwise Lanczos: for a
    Gauss-Newton matrix typically 64 steps a probe, for a Hessian several hundred, and as many for each of
    the five or so sparsities at which the cone is looked at; memory for (steps x probes) vectors, as far as
    `basis_bytes` allow.

    Args:
        curvature: from `hessian` (predicts) or `gauss_newton` (fast, certified, optimistic).
        key: of the random probes; a dense solution uses none.
        loss_tolerance: eps, the rise of the loss that is allowed, in units of the loss; positive. The paper
            takes `loss_statistics(...).batch_std`.
        tolerance: wanted accuracy of each limit, in units of sparsity; .001 is the grid of the paper's code.
        max_matvecs: budget of products with the curvature, all limits together; the spectrum takes at most
            half of it where other limits than `width` are asked for. A limit that runs out of products is the
            interval found so far, or None.
        num_probes: number of random probes. None chooses: the dense solution where it fits, else as many
            probes as the tolerance needs.
        which: the limits wanted, of "one_shot", "width", "cone", "readjusted". The spectrum, and `measure`,
            is resolved for width and cone alone; the other two take a few products.
        checkpoint: folder for intermediate results. A run that was interrupted goes on from there and
            gives the same bits; a folder of a different problem is refused.
        progress: called with a `Progress` after every block of products.
        basis_bytes: memory on each device for the vectors that Lanczos keeps orthogonal. Where they do not
            fit, the first ones are kept and the status says so; with 0 three vectors do, and the spectrum
            takes more products. None: half of the device's memory.
        scores: pytree shaped like the weights: the weights go in the order of increasing |score|. None: of
            increasing |weight|, which is magnitude pruning.

    Returns:
        The limits asked for, with brackets, and a status sentence; `print` shows them as a table.

    Raises:
        ValueError: an argument out of range, naming it; weights that are all zero; a foreign checkpoint.
        FloatingPointError: a product with the curvature is not finite.
        MemoryError: a device ran out of memory; says what needs less.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxlimit import batched, hessian
        >>> def loss(w, x): return jnp.mean((x @ (w - 1.0)) ** 2) / 2
        >>> weights = jnp.linspace(0.0, 1.0, 64).reshape(64, 1)
        >>> curvature = hessian(loss, weights, batched(8 * jnp.eye(64), 64))
        >>> limit = pruning_limit(curvature, jax.random.key(0), loss_tolerance=0.5, which=["width"])
        >>> print(limit.width)  # s = 1 / (1 + R(s)^2) for this H = I
        0.4181 [0.3868, 0.4493]

    Source: arXiv 2306.05857 for the question and `width`; for the others the modules `geometry` (cone) and
    `roots` (one_shot, readjusted).
    """
    _check_arguments(loss_tolerance, tolerance, max_matvecs, num_probes, which, basis_bytes)
    loss_tolerance, tolerance, max_matvecs = float(loss_tolerance), float(tolerance), int(max_matvecs)
    num_probes = None if num_probes is None else int(num_probes)
    order = magnitude_order(curvature.weights, scores)
    if order.squared_norm[-1] == 0:
        raise ValueError("all prunable weights are zero: every sparsity leaves the network as it is.")
    if basis_bytes is None:
        basis_bytes = device_memory() // 2
    fingerprint = _fingerprint(curvature, order, key, loss_tolerance, tolerance, num_probes)
    store = Checkpoint(checkpoint, fingerprint)
    products = Products(curvature, max_matvecs, progress)

    def dense() -> DenseCurvature:
        products.stage = "dense"
        return dense_curvature(
            dense_matrix(products.matmat, curvature.weights), order, curvature.gradient, loss_tolerance
        )

    resolve = not {"width", "cone"}.isdisjoint(which)
    exact = num_probes is None and curvature.dim <= min(DENSE_DIM, max_matvecs)
    if exact:
        source, accuracy = dense(), 0.0
    else:
        source = AdaptiveCurvature(
            products, order, key, loss_tolerance, tolerance, num_probes, store, basis_bytes, resolve
        )
        accuracy = tolerance
    # A spectrum that does not resolve must leave something for the other limits.
    with products.half(num_probes or 1) if set(which) != {"width"} else nullcontext():
        bracket, removed = source.spectrum(), {}
    width = width_limit(bracket, order, loss_tolerance)

    def seen_from(counts: list[int]) -> list[SpectralBracket]:
        removed.update(zip(counts, source.removed(counts), strict=True))
        return [removed[n] for n in counts]

    def cone() -> Estimate:
        return cone_limit(bracket, order, seen_from, loss_tolerance, width.value, accuracy)

    def readjusted() -> Estimate:
        # |H| is not to be had from products alone, so the Hessian's needs the dense matrix.
        needs_dense = not (exact or curvature.positive_semidefinite)
        if needs_dense and curvature.dim > min(DENSE_DIM, products.left):
            raise BudgetSpent
        minimum = (dense() if needs_dense else source).minimum()
        return readjusted_limit(minimum, order.dim, loss_tolerance, accuracy / 2, width.value)

    limits: dict[str, Estimate | None] = {"width": width}
    for name, solve in (("one_shot", source.one_shot), ("cone", cone), ("readjusted", readjusted)):
        try:
            limits[name] = solve() if name in which else None
        except BudgetSpent:
            limits[name] = None
    if exact:
        status = f"converged: exact, from all {order.dim:,} eigenvalues."
    else:
        spectral = [x for x in (width, limits["cone"]) if x is not None and resolve]
        status = _status(curvature, tolerance, max_matvecs, spectral, limits, which)
        if not source.reorthogonalized:
            status += " Lanczos kept its first vectors only (basis_bytes), so it may take more products."
    measure = source.measure
    n = max(int(num_removed(order.dim, width.value)), order.num_zeros + 1)
    return PruningLimit(
        **{name: limits[name] if name in which else None for name in LIMITS},
        measure=measure,
        loss_tolerance=loss_tolerance,
        tolerance=tolerance,
        num_matvecs=products.count,
        num_probes=0 if measure.dim is None else len(measure.nodes),
        num_steps=measure.nodes.shape[1],
        num_examples=curvature.num_examples,
        dim=curvature.dim,
        positive_semidefinite=curvature.positive_semidefinite,
        method="dense eigendecomposition" if exact else "Lanczos",
        reorthogonalized=source.reorthogonalized,
        largest_eigenvalue=float(np.max(np.abs(measure.nodes))),
        ridge=width_ridge(order.radius(n), loss_tolerance),
        status=status,
        _order=order,
        _bracket=bracket,
        _removed=removed,
    )


def _status(
    curvature: Curvature,
    tolerance: float,
    max_matvecs: int,
    spectral: list[Estimate],
    limits: dict[str, Estimate | None],
    which: Sequence[str],
) -> str:
    """The verdict first, then one sentence on each thing the reader must know."""
    semidefinite = curvature.positive_semidefinite
    spread = max((limit.spread for limit in spectral), default=0.0)
    searched = {name: limits[name] for name in ("one_shot", "readjusted")}
    left = {name: x.spread for name, x in searched.items() if x is not None and x.spread > tolerance}
    probe_error = spectral[0].probe_error if spectral else 0.0
    too_large = "readjusted" in which and not semidefinite and curvature.dim > DENSE_DIM
    missing = [n for n in which if limits[n] is None and not (n == "readjusted" and too_large)]
    kind = "bracket" if semidefinite else "spread over step counts"
    sentences = [f"converged: {kind} {spread:.4f}, within the tolerance of {tolerance:g}."]
    if missing or left or spread > tolerance:
        wide = f"{kind} {spread:.4f} at a tolerance of {tolerance:g}, " if spread > tolerance else ""
        sentences = [f"under-resolved: {wide}limited by max_matvecs = {max_matvecs:,}: raise it."]
    if missing:
        sentences.append(f"Too few products were left for {', '.join(missing)}.")
    sentences += [f"{name} was left in an interval of {width:.4f}." for name, width in left.items()]
    if probe_error > 1.5 * tolerance:
        sentences.append(f"The probe error {probe_error:.4f} exceeds the tolerance: use more probes.")
    if spectral and not semidefinite:
        sentences.append("The rigorous interval of an indefinite Hessian is much wider than its spread.")
    if too_large:
        sentences.append(
            f"readjusted with |H| needs a dense matrix (at most {DENSE_DIM:,} weights): gauss_newton has an "
            "optimistic one."
        )
    return " ".join(sentences)


def _fingerprint(
    curvature: Curvature,
    order: MagnitudeOrder,
    key: jax.Array,
    loss_tolerance: float,
    tolerance: float,
    num_probes: int | None,
) -> dict[str, Any]:
    """What tells one problem from another, so that a checkpoint is not continued by mistake.

    Devices round the loss of one network differently: of this four digits, and six decimals.
    """
    return {
        "dim": curvature.dim,
        "num_examples": curvature.num_examples,
        "positive_semidefinite": curvature.positive_semidefinite,
        "loss": round(float(f"{curvature.loss:.4g}"), 6),
        "weights": ordered_sum(flatten(curvature.weights)),
        "order": ordered_sum(order.rank),
        "loss_tolerance": loss_tolerance,
        "tolerance": tolerance,
        "num_probes": num_probes,
        "key": np.asarray(jax.random.key_data(key)).ravel().tolist(),
    }


def _check_arguments(
    loss_tolerance: float,
    tolerance: float,
    max_matvecs: int,
    num_probes: int | None,
    which: Sequence[str],
    basis_bytes: int | None,
) -> None:
    for name, value in (("loss_tolerance", loss_tolerance), ("tolerance", tolerance)):
        if np.ndim(value) != 0 or not 0 < float(value) < np.inf:
            raise ValueError(f"{name} must be a positive finite number, got {value}.")
    counts = {"max_matvecs": max_matvecs, "num_probes": num_probes, "basis_bytes": basis_bytes}
    for name, value in counts.items():
        if value is not None and not isinstance(value, (int, np.integer)):
            raise ValueError(f"{name} must be an integer, got {value!r}.")
    if max_matvecs < LEAST_MATVECS:
        raise ValueError(f"max_matvecs must be at least {LEAST_MATVECS}, got {max_matvecs}.")
    if num_probes is not None and not 1 <= num_probes <= max_matvecs:
        raise ValueError(f"num_probes must lie between 1 and max_matvecs = {max_matvecs}, got {num_probes}.")
    if basis_bytes is not None and basis_bytes < 0:
        raise ValueError(f"basis_bytes must be at least 0, got {basis_bytes}.")
    unknown = [name for name in which if name not in LIMITS]
    if isinstance(which, str) or unknown or not which:
        raise ValueError(f"which must name limits among {', '.join(LIMITS)}, got {which!r}.")
