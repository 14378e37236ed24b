r"""The pruning limit of a network: how much of it can be removed before the loss rises by more than eps.

`pruning_limit` answers in four ways, each weaker in its demand than the one before (see `width`): the loss of
the pruned network itself (one_shot), the paper's Gaussian width (width), the exact statistical dimension of
the cone (cone), and the best readjustment of the kept weights (readjusted).

Small networks are solved from a dense eigendecomposition (`dense_source`), large ones by Lanczos
(`lanczos_source`).
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlimit.core.checks import require_instance, require_key
from jaxlimit.core.memory import advice_on_memory, device_memory
from jaxlimit.core.storage import Checkpoint
from jaxlimit.core.terminal import takes_bar
from jaxlimit.core.trees import PyTree
from jaxlimit.curvature.operator import Curvature
from jaxlimit.geometry.magnitude import magnitude_order
from jaxlimit.limits.arguments import check_arguments, require_readjustable
from jaxlimit.limits.budget import Budget, BudgetSpent, Progress, shown
from jaxlimit.limits.cone import cone_limit
from jaxlimit.limits.conjugate_gradients import NegativeCurvature
from jaxlimit.limits.dense_source import dense_fits, dense_is_cheaper, dense_source
from jaxlimit.limits.estimate import LIMITS, Estimate
from jaxlimit.limits.lanczos_source import lanczos_source
from jaxlimit.limits.problem import Problem, fingerprint
from jaxlimit.limits.readjusted import readjusted_limit
from jaxlimit.limits.result import Behind, PruningLimit
from jaxlimit.limits.rises import true_rises
from jaxlimit.limits.source import Source
from jaxlimit.limits.status import Findings, status_of
from jaxlimit.limits.width import width_limit
from jaxlimit.spectrum.bracket import SpectralBracket

# A budget, not a target: Lanczos stops when the limits are resolved.
MAX_MATVECS = 10_000


@takes_bar(shown)
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
    progress: Callable[[Progress], None] | bool | None = None,
    basis_bytes: int | None = None,
    host_bytes: int = 0,
    scores: PyTree | None = None,
    groups: Any = None,
) -> PruningLimit:
    r"""How sparse the network can be pruned while its loss rises by at most `loss_tolerance`.

    Cost: with D <= 5,000 weights, D products and one dense eigendecomposition, unless a wide tolerance, or
    one_shot alone, takes fewer. Otherwise Lanczos: for a Gauss-Newton matrix typically 64 steps a probe, for
    a Hessian several hundred, and as many again or fewer for the one to three sparsities at which the cone is
    looked at; 100 to 400 for readjusted; memory for (steps x probes) vectors, as far as `basis_bytes` allow.

    Args:
        curvature: from `gauss_newton`, whose cone foretells what `attained_limit` builds, in few products; or
            from `hessian`, as the paper takes it, whose width and cone are lower (docs/limits.md).
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
            is resolved for width and cone alone; the other two take a few products. readjusted with a Hessian
            needs the dense matrix: alone it is refused beyond 5,000 weights.
        checkpoint: folder for intermediate results. A run that was interrupted goes on from there and
            gives the same bits; a folder of a different problem is refused. One product, which `max_matvecs`
            does not count, tells problems apart.
        progress: called with a `Progress` after every block of products; True shows a bar.
        basis_bytes: memory on each device for the vectors that Lanczos keeps orthogonal. Where they do not
            fit, the first ones are kept and the status says so; with 0 three vectors do, and the spectrum
            takes more products. None: half of the device's memory.
        host_bytes: pinned memory of the host, for each device, for further vectors. A step brings them to the
            devices, 32 at a time, once or twice. 0: they are left out.
        scores: pytree shaped like the weights: the weights go in the order of increasing |score|. None: of
            increasing |weight|, which is magnitude pruning.
        groups: weights that go together: "output_channels", "input_channels", ("heads", number), ("blocks",
            shape), or a pytree of integer labels shaped like the weights: see `group_labels`. They go in the
            order of the root mean square of their weights (or scores), and every limit is the last sparsity
            within the tolerance that whole groups can reach. None: every weight by itself.

    Returns:
        The limits asked for, with brackets, and a status sentence; `print` shows them as a table.

    Raises:
        ValueError: an argument out of range, naming it; weights that are all zero; groups that do not match
            the weights; a foreign checkpoint; nothing but readjusted asked of a Hessian that is too large for
            it.
        FloatingPointError: a product with the curvature is not finite.
        MemoryError: a device ran out of memory; says what needs less.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxlimit import batched, hessian
        >>> def loss(w, x): return jnp.mean((x @ (w - 1.0)) ** 2) / 2
        >>> weights = jnp.linspace(0.0, 1.0, 64).reshape(64, 1)
        >>> curvature = hessian(loss, weights, batched(8 * jnp.eye(64), 64))
        >>> limit = pruning_limit(curvature, jax.random.key(0), loss_tolerance=0.5, which=["width"])
        >>> print(limit.width)  # the last s with s <= 1 / (1 + R(s)^2), for this H = I
        0.4062 [0.3750, 0.4375]

    Source: arXiv 2306.05857 for the question and `width`; for cone `geometry.cone_dimension`, for the others
    their modules, `one_shot` and `readjusted`.
    """
    require_instance("curvature", curvature, Curvature, "hessian or gauss_newton")
    key = require_key("key", key)
    check_arguments(loss_tolerance, tolerance, max_matvecs, num_probes, which, basis_bytes, host_bytes)
    tolerance, num_probes = float(tolerance), None if num_probes is None else int(num_probes)
    problem = Problem(magnitude_order(curvature.weights, scores, groups), float(loss_tolerance))
    if problem.order.squared_norm[-1] == 0:
        raise ValueError("all prunable weights are zero: every sparsity leaves the network as it is.")
    require_readjustable(curvature, which)
    budget = Budget(curvature, int(max_matvecs), progress if callable(progress) else None)
    identity = {} if checkpoint is None else fingerprint(curvature, problem, key, tolerance, num_probes)
    dim, semidefinite = curvature.dim, curvature.positive_semidefinite
    dense = dense_fits(dim, max_matvecs) and dense_is_cheaper(dim, which, tolerance, semidefinite)
    with Checkpoint(checkpoint, identity) as store:
        if num_probes is None and dense:
            source: Source = dense_source(problem, budget)
        else:
            source = lanczos_source(
                problem,
                budget,
                store,
                key,
                tolerance=tolerance,
                num_probes=num_probes,
                which=which,
                basis_bytes=device_memory() // 2 if basis_bytes is None else basis_bytes,
                host_bytes=host_bytes,
            )
        solved = _solve(source, problem, budget, which, 0.0 if source.exact else tolerance)
    return _result(problem, source, budget, solved, which, tolerance, num_probes)


class _Solved(NamedTuple):
    """The limits, and the brackets that they rest on.

    Attributes:
        limits: by name, None where not wanted or where products did not suffice.
        width: the width limit, from which the others start: wanted or not.
        bracket: of the spectral measure.
        removed: of the spectral measure seen from c after n removals, by n.
    """

    limits: Mapping[str, Estimate | None]
    width: Estimate
    bracket: SpectralBracket
    removed: dict[int, SpectralBracket]


def _solve(
    source: Source, problem: Problem, budget: Budget, which: Sequence[str], tolerance: float
) -> _Solved:
    """Solves for width, then for each of the others that is wanted."""
    bracket, removed = source.spectrum(), {}
    width = width_limit(bracket, problem)

    def cone() -> Estimate:
        limit, brackets = cone_limit(bracket, source.look, problem, width.value, tolerance)
        removed.update(brackets)
        return limit

    def readjusted() -> Estimate:
        minimum, dim = source.minimum(), problem.dim

        def looked(within: int, beyond: int) -> None:
            ends = problem.sparsity(within), problem.sparsity(beyond)
            budget.look(*ends, (problem.counts[beyond] - problem.counts[within]) / dim)

        eps, counts = problem.loss_tolerance, problem.counts
        nearest = limits.get("cone") or width
        # Trained weights do better than random ones; and what is learned above the limit serves below it.
        start = 1 - (1 - nearest.value) / 2
        return readjusted_limit(minimum, dim, eps, tolerance / 2, start, looked, counts)

    limits: dict[str, Estimate | None] = {"width": width}
    for name, solve in (("one_shot", source.one_shot), ("cone", cone), ("readjusted", readjusted)):
        try:
            limits[name] = solve() if name in which else None
        except (BudgetSpent, NegativeCurvature):
            limits[name] = None
    return _Solved(limits, width, bracket, removed)


def _result(
    problem: Problem,
    source: Source,
    budget: Budget,
    solved: _Solved,
    which: Sequence[str],
    tolerance: float,
    num_probes: int | None,
) -> PruningLimit:
    """The limits that were wanted, with what they rest on and what the reader must know."""
    measure, curvature = source.measure, budget.curvature
    wanted = {name: solved.limits[name] if name in which else None for name in LIMITS}
    rises = true_rises(curvature, problem, wanted)
    code, status = status_of(
        Findings(
            limits=solved.limits,
            which=which,
            rises=rises,
            loss=curvature.loss,
            loss_tolerance=problem.loss_tolerance,
            tolerance=tolerance,
            dim=problem.dim,
            exact=source.exact,
            semidefinite=curvature.positive_semidefinite,
            negative_share=source.negative_share,
            num_matvecs=budget.count,
            max_matvecs=budget.max_matvecs,
            num_probes=num_probes,
            rounding=curvature.rounding,
            reorthogonalized=source.reorthogonalized,
        )
    )
    return PruningLimit(
        **wanted,
        rises=rises,
        measure=measure,
        loss_tolerance=problem.loss_tolerance,
        tolerance=tolerance,
        num_matvecs=budget.count,
        num_probes=0 if measure.dim is None else len(measure.nodes),
        num_steps=measure.nodes.shape[1],
        num_examples=curvature.num_examples,
        dim=curvature.dim,
        positive_semidefinite=curvature.positive_semidefinite,
        method=source.method,
        reorthogonalized=source.reorthogonalized,
        largest_eigenvalue=float(np.max(np.abs(measure.nodes))),
        ridge=problem.ridge(problem.num_removed(solved.width.value)),
        code=code,
        status=status,
        _behind=Behind(problem, solved.bracket, solved.removed),
        num_groups=None if problem.order.num_removals == problem.dim else problem.order.num_removals,
    )
