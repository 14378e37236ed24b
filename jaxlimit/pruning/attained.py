"""The sparsest network within a loss tolerance that a walk to rising sparsities finds.

Whether a network with these zeros exists is settled by building one. No quadratic model needs to be right.
"""

import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from jaxlimit.core.checks import as_real, require_count, require_positive, require_range
from jaxlimit.core.memory import advice_on_memory
from jaxlimit.core.storage import Checkpoint
from jaxlimit.core.terminal import takes_bar
from jaxlimit.core.trees import Prunable, PyTree, is_kernel
from jaxlimit.pruning.prune import network, path, settled
from jaxlimit.pruning.readjustable import Readjustable, readjustable
from jaxlimit.pruning.result import Attained, Ending, Readjusting, shown
from jaxlimit.pruning.trust_region import DEFAULT, Point, Settings

# Steps that a network has to come within the tolerance: benchmarks/pruning.py.
MAX_STEPS = 8
# Enough for a walk to .98 and three bisections, also where a step takes 21 products.
MAX_PRODUCTS = 1000.0


class _State(NamedTuple):
    """A pytree, which is stored after every step.

    Attributes:
        point: the network that is being readjusted.
        num_removed: of its weights; that of `best` where the next one is not begun.
        num_steps: it had.
        best: the sparsest network within the tolerance.
        best_removed: of its weights.
        failed: fewest weights removed, beyond those of `best`, of a network that did not come within it;
            D + 1 where none is known.
        failed_from: weights removed of the network that was `best` when it failed.
        tried: (n, 2) sparsity and loss of the networks that were built.
    """

    point: Point
    num_removed: int
    num_steps: int
    best: Point
    best_removed: int
    failed: int
    failed_from: int
    tried: NDArray[np.float64]


@takes_bar(shown)
@advice_on_memory()
def attained_limit(
    predict_fn: Callable[[PyTree, PyTree], PyTree],
    loss_fn: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    batches: Iterable[PyTree],
    *,
    loss_tolerance: float,
    tolerance: float = 0.005,
    prunable: Prunable = is_kernel,
    trainable: Prunable | None = None,
    scores: PyTree | None = None,
    groups: Any = None,
    weight_fn: Callable[[PyTree], jax.Array] | None = None,
    statistics_fn: Callable[[PyTree], PyTree] | None = None,
    max_products: float = MAX_PRODUCTS,
    max_steps: int = MAX_STEPS,
    unpruned: bool = True,
    settings: Settings = DEFAULT,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Callable[[Readjusting], None] | bool | None = None,
    on_network: Callable[[float, PyTree], None] | None = None,
) -> Attained:
    r"""The sparsest network that was found within the loss tolerance: a lower bound of what is possible.

    Networks are built one from the other at rising sparsities, as in `prune`, until one does not come down
    to L* + eps within `max_steps` steps; the sparsity between it and the best one is bisected. The one that
    failed is tried again from networks nearer to it, for which it is a smaller step, and if it comes within
    the tolerance, the walk goes on. A network is given up as soon as steps like its last one would not
    suffice.

    Cost: about 4.5 products with all the data for each step, as `prune` counts them; again as many for the
    network without pruning. Memory: as for `prune`, and the best network.

    Args:
        predict_fn: as for `prune`.
        loss_fn: as for `prune`.
        params: as for `prune`.
        batches: as for `prune`.
        loss_tolerance: eps, the rise of the loss that is allowed; positive.
        tolerance: the search ends where a network that was made from the best one failed and is so close, in
            units of sparsity.
        prunable: as for `prune`.
        trainable: as for `prune`.
        scores: as for `prune`.
        groups: as for `prune`; the search ends, too, where no whole group lies between.
        weight_fn: as for `prune`.
        statistics_fn: as for `prune`.
        max_products: budget of the search, counted as in `prune`.
        max_steps: steps that a network has.
        unpruned: whether the network without pruning is given as many products, too.
        settings: as for `prune`.
        checkpoint: as for `prune`.
        progress: called with a `Readjusting` after every step; True shows a bar.
        on_network: called with the sparsity and the parameters of every network that is within the tolerance,
            in the order in which they are found. One that is handed out when work is interrupted may be
            handed out again, the same, when it goes on.

    Returns:
        The sparsity, the network, and all that were tried.

    Raises:
        ValueError: as for `prune`; a number out of range.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxlimit import batched
        >>> def predict(w, x): return x @ w
        >>> def loss(outputs, x): return jnp.mean((outputs - 10.0) ** 2)
        >>> weights, data = jnp.arange(1.0, 5.0)[:, None], batched(jnp.ones((4, 4)), 4)
        >>> found = attained_limit(predict, loss, weights, data, loss_tolerance=0.1)
        >>> found.sparsity, [sparsity for sparsity, _ in found.tried]
        (0.75, [0.25, 0.5, 0.75, 1.0])
    """
    require_positive("loss_tolerance", loss_tolerance)
    require_range("tolerance", tolerance, 0 < as_real(tolerance) < 1, "between 0 and 1")
    require_count("max_steps", max_steps)
    require_positive("max_products", max_products)
    problem = readjustable(
        predict_fn,
        loss_fn,
        params,
        batches,
        prunable=prunable,
        trainable=trainable,
        scores=scores,
        groups=groups,
        weight_fn=weight_fn,
        statistics_fn=statistics_fn,
        settings=settings,
    )
    goal = problem.curvature.loss + float(loss_tolerance)
    identity = {
        **problem.identity(),
        "loss_tolerance": float(loss_tolerance),
        "tolerance": float(tolerance),
        "max_steps": max_steps,
    }
    with Checkpoint(checkpoint, {} if checkpoint is None else identity) as store:

        def tell(stage: str, removed: int, point: Point, most: float) -> None:
            if callable(progress):
                sparsity, to = removed / problem.dim, goal if stage == "search" else np.inf
                progress(Readjusting(stage, sparsity, point.loss, to, point.num_products, most))

        start = problem.start
        first = _State(start, 0, 0, start, 0, problem.dim + 1, 0, np.zeros((0, 2)))
        state = problem.stored(store, "search", first)
        while (target := _target(problem, state, tolerance)) is not None:
            if state.point.num_products >= max_products:
                break
            before, state = state, _next(problem, state, target, goal, max_steps)
            if on_network is not None and state.best is not before.best:  # before it counts as handed out
                on_network(target / problem.dim, problem.params(state.best))
            store.save_tree("search", state)
            tell("search", int(state.num_removed), state.point, max_products)
        spent = float(state.point.num_products)
        free = _without_pruning(problem, store, spent, partial(tell, "unpruned", 0)) if unpruned else None
    return _result(problem, state, target, free, loss_tolerance, tolerance, spent)


def _without_pruning(
    problem: Readjustable, store: Checkpoint, spent: float, tell: Callable[[Point, float], None]
) -> Point:
    """Where the network gets with as many products if no weight goes."""
    free, done = problem.stored(store, "unpruned", (problem.start, False))
    every = problem.mask(problem.start.weights, 0)
    while free.num_products < spent and not done:
        before, free = free, problem.step(free, every)
        done = settled(problem, before, free)
        store.save_tree("unpruned", (free, done))
        tell(free, spent)
    return free


def _target(problem: Readjustable, state: _State, tolerance: float) -> int | None:
    """How many weights go next: on the path while no network failed, else between; None at the end.

    Whether a network comes within the tolerance depends on the one that it is made from, and where they lie
    far apart, on rounding. So the one that failed is tried again from the first one that is found on the way
    to it, and once more from the best one that is next to it.
    """
    if state.num_steps > 0:  # not done with this one
        return int(state.num_removed)
    best, failed, dim = int(state.best_removed), int(state.failed), problem.dim
    if best == dim:
        return None
    weights, failed_from = state.best.weights, int(state.failed_from)
    if failed > dim:  # to within the tolerance of 1 it is still a long way
        wanted = path(dim, dim, problem.settings.stage_share, best)[0]
        return problem.reachable(weights, wanted, best, failed)
    failures = np.sum(
        np.round(state.tried[:, 0] * dim) == failed
    )  # had it succeeded, it would be the best one
    if failed - best > max(1, tolerance * dim) and (failed_from == best or failures > 1):
        between = problem.reachable(weights, (best + failed) // 2, best, failed)
        if between is not None:
            return between
    return None if failed_from == best else problem.reachable(weights, failed, best, dim + 1)


def _next(problem: Readjustable, state: _State, target: int, goal: float, max_steps: int) -> _State:
    """A step of the network at the target, which is begun, or found within the tolerance or beyond it."""
    mask = problem.mask(state.best.weights, target)
    if state.num_steps == 0:
        used = state.point.number, state.point.num_products
        point, num_steps = problem.cut(state.best._replace(number=used[0], num_products=used[1]), mask), 0
    else:
        point, num_steps = state.point, int(state.num_steps)
    trusted = True
    if num_steps or not point.loss <= goal:  # a loss may be NaN
        damping = point.damping
        point, num_steps = problem.step(point, mask), num_steps + 1
        trusted = point.damping <= damping
    loss = point.loss
    if loss <= goal and problem.settings.gradient_share < 1:
        loss = problem.mean_loss(point)
    # Steps lower the loss by less and less, so one like the last for each that is left is more than can be. A
    # step that was cut short because the model was wrong says nothing of those after it.
    left = max_steps - num_steps
    hopeless = left == 0 or (trusted and not loss - goal <= point.fall * left)
    if not loss <= goal and not hopeless:
        return state._replace(point=point, num_removed=target, num_steps=num_steps)
    tried = np.concatenate([state.tried, [[target / problem.dim, loss]]])
    done = state._replace(point=point, num_removed=target, num_steps=0, tried=tried)
    if not loss <= goal:
        return done._replace(failed=target, failed_from=int(state.best_removed))
    done = done._replace(best=point, best_removed=target)
    if target < state.failed:
        return done
    beyond = [round(s * problem.dim) for s, loss in tried if not loss <= goal and s * problem.dim > target]
    return done._replace(failed=min(beyond, default=problem.dim + 1), failed_from=-1)


def _result(
    problem: Readjustable,
    state: _State,
    target: int | None,
    free: Point | None,
    loss_tolerance: float,
    tolerance: float,
    spent: float,
) -> Attained:
    best, failed = int(state.best_removed), int(state.failed)
    if target is None:
        code = Ending.BRACKETED
        status = f"bracketed: at {failed / problem.dim:.4f} the loss did not come within the tolerance."
        if failed > problem.dim:
            status = "bracketed: every weight can go."
    else:
        code = Ending.OUT_OF_PRODUCTS
        status = (
            "out of products: the budget ended the search, not the network. Raise max_products, and the same "
            "checkpoint goes on."
        )
    mask = problem.mask(state.best.weights, best)
    return Attained(
        sparsity=best / problem.dim,
        pruned=network(problem, state.best, mask, code, status),
        tried=tuple((float(s), float(loss)) for s, loss in state.tried),
        loss_tolerance=float(loss_tolerance),
        tolerance=float(tolerance),
        dense_loss=problem.curvature.loss,
        unpruned_loss=None if free is None else problem.mean_loss(free),
        num_products=spent,
        code=code,
        status=status,
    )
