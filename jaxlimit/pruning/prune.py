"""One pruned network: masks of rising sparsity, with the kept weights readjusted at every stage."""

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlimit.core.checks import require_positive
from jaxlimit.core.memory import advice_on_memory
from jaxlimit.core.storage import Checkpoint, ordered_sum
from jaxlimit.core.terminal import takes_bar
from jaxlimit.core.trees import Prunable, PyTree, flatten, is_kernel
from jaxlimit.geometry.magnitude import num_removed
from jaxlimit.pruning.readjustable import Readjustable, readjustable
from jaxlimit.pruning.result import Ending, Pruned, Readjusting, kept_share, shown
from jaxlimit.pruning.trust_region import DEFAULT, Point, Settings

# The last stage ends where two steps running lower the loss by less than this share of it, or of the loss
# that the network had before it was pruned.
SETTLED = 1e-3
# With a damping of so much of the curvature along the first gradient, steps are lost in rounding.
HELPLESS = 1e3
# Where each step sees a part of the data, the mean of so many last ones is better than the last alone:
# by .4 to 1.4 points of test accuracy in benchmarks/published.py, at no cost.
AVERAGED = 6
# Enough for the loss to settle, also where the data are one batch, so that a step takes 21 products.
MAX_PRODUCTS = 400.0


class _State(NamedTuple):
    """A pytree, which is stored after every step."""

    point: Point
    mask: PyTree
    stage: int
    settled: bool
    average: "_Average | None"


class _Average(NamedTuple):
    """Mean of the weights after the last steps, all of the last mask; later ones count more."""

    weights: PyTree
    number: int


@takes_bar(shown)
@advice_on_memory()
def prune(
    predict_fn: Callable[[PyTree, PyTree], PyTree],
    loss_fn: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    batches: Iterable[PyTree],
    sparsity: float | None = None,
    *,
    prunable: Prunable = is_kernel,
    trainable: Prunable | None = None,
    scores: PyTree | None = None,
    groups: Any = None,
    mask: PyTree | None = None,
    weight_fn: Callable[[PyTree], jax.Array] | None = None,
    statistics_fn: Callable[[PyTree], PyTree] | None = None,
    max_products: float = MAX_PRODUCTS,
    settings: Settings = DEFAULT,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Callable[[Readjusting], None] | bool | None = None,
) -> Pruned:
    r"""The network of one sparsity, with the kept weights readjusted on the real loss.

    The smallest weights go in stages, each of which keeps four fifths of those before it. After each cut
    that raises the loss comes a Gauss-Newton step with a trust region on the weights that are kept, and
    after the last one as many as lower the loss noticeably. The mask is chosen anew at every stage, from the
    readjusted weights. There is no learning rate and no random order: network, data and budget give one
    result. Where each step sees a part of the data (`Settings.gradient_share`), the network is the mean of
    the last ones.

    Cost: a step is a gradient, a loss or two, and up to 20 products with a tenth of the data, about 4.5
    products in all; memory as for a product with `gauss_newton`, and six vectors.

    Args:
        predict_fn: `predict_fn(params, batch) -> outputs`, as for `gauss_newton`.
        loss_fn: `loss_fn(outputs, batch) -> scalar`, the mean over the batch's examples, convex in outputs.
        params: pytree of parameters, the trained network.
        batches: the data to keep the loss low on, as for `hessian`; streams too.
        sparsity: share of the prunable weights to remove, in [0, 1].
        prunable: as for `hessian`.
        trainable: other parameters that move along, as a pytree of bools or `fn(path, leaf) -> bool`. None:
            none do, so biases, normalisation and running statistics stay as they are.
        scores: pytree like the prunable weights: these go in the order of increasing |score|. None: of
            increasing |weight|, looked at anew at every stage.
        groups: weights that go together, as for `pruning_limit`: at every stage as many whole groups as do
            not exceed its sparsity.
        mask: pytree of bools like the prunable weights, False where a weight is to go, in the place of
            `sparsity`: it is cut at once.
        weight_fn: how much a batch counts, as for `hessian`.
        statistics_fn: `statistics_fn(params) -> params`, the whole tree with the running statistics of its
            batch norm taken anew, in a forward pass over some training inputs, say. It is called after every
            cut, and steps hold what it gives; it must give the same each time, and leave parameters that move
            as they are. What it costs is not counted. None: the statistics are held throughout.
        max_products: budget, in products with all the data: a gradient counts as one, a loss as a third, a
            product with a share of the data as that share. The step that crosses it is completed, and all
            stages have one step.
        settings: how steps are made.
        checkpoint: folder for intermediate results. Work that was interrupted goes on from there and gives
            the same bits, with another budget too; a folder of a different problem is refused.
        progress: called with a `Readjusting` after every step; True shows a bar.

    Returns:
        The network with its mask, its measured loss, and a status.

    Raises:
        ValueError: as for `gauss_newton`; a sparsity outside [0, 1], a mask that does not match, both of them
            or neither; groups with a mask, or that do not match; a foreign checkpoint.

    Examples:
        Two weights do the same; the one that is kept learns to do the work of both.

        >>> import jax.numpy as jnp
        >>> from jaxlimit import batched
        >>> def predict(w, x): return x @ w
        >>> def loss(outputs, x): return jnp.mean((outputs - 3.0) ** 2)
        >>> network = prune(predict, loss, jnp.array([[1.0], [2.0]]), batched(jnp.ones((4, 2)), 4), 0.5)
        >>> print(abs(network.params.ravel()).round(2), round(network.loss, 6))
        [0. 3.] 0.0

    Source: Levenberg and Marquardt's damping for the Gauss-Newton steps of Schraudolph (2002), solved by
    conjugate gradients as in Martens (2010); the path of masks is gradual magnitude pruning (Zhu and Gupta
    2017) without its schedule.
    """
    _require_one(sparsity, mask)
    if mask is not None and (scores is not None or groups is not None):
        raise ValueError(
            "prune takes scores and groups with a sparsity: a mask says itself which weights go."
        )
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
    if mask is None:
        last = int(num_removed(problem.dim, sparsity))  # pyright: ignore[reportArgumentType]
        counts = path(problem.dim, last, settings.stage_share)
    else:
        mask = problem.require_mask(mask)
        counts = [int(np.sum(flatten(mask) == 0))]
    identity = {
        **problem.identity(),
        "num_removed": counts[-1],
        "mask": None if mask is None else ordered_sum(flatten(mask)),
    }
    with Checkpoint(checkpoint, {} if checkpoint is None else identity) as store:
        state = _State(problem.start, problem.mask(problem.start.weights, 0), 0, False, None)
        if settings.gradient_share < 1:
            state = state._replace(average=_Average(problem.start.weights, 0))
        state = problem.stored(store, "path", state)
        while not state.settled and (state.stage < len(counts) or state.point.num_products < max_products):
            state = _next(problem, state, counts, mask)
            store.save_tree("path", state)
            if callable(progress):
                point, done = state.point, float(np.mean(flatten(state.mask) == 0))
                progress(Readjusting("path", done, point.loss, np.inf, point.num_products, max_products))
    return _result(problem, state)


def path(dim: int, last: int, share: float, first: int = 0) -> list[int]:
    """Numbers of removed weights, from beyond the first to the last: a stage keeps a share of those before.

    Examples:
        >>> path(100, 60, 0.8)
        [20, 36, 48, 58, 60]
    """
    kept, counts = dim - first, []
    while (kept := min(math.ceil(share * kept), kept - 1)) > dim - last:
        counts.append(dim - kept)
    return [*counts, last]


def settled(problem: Readjustable, before: Point, point: Point) -> bool:
    """Whether the step from the point before lowered the loss by little, and no further step would do more.

    A step whose model was wrong says nothing of the next one, which is damped more, until no damping helps.
    """
    right = point.damping <= before.damping
    helpless = point.damping > HELPLESS * problem.start.damping / problem.settings.damping
    return _little(problem, point) and (right or helpless)


def _little(problem: Readjustable, point: Point) -> bool:
    return not point.fall > SETTLED * max(abs(point.loss), abs(problem.curvature.loss))


def network(problem: Readjustable, point: Point, mask: PyTree, code: Ending, status: str) -> Pruned:
    """The network at a point, with its loss on all data."""
    flat = flatten(mask)
    return Pruned(
        params=problem.params(point),
        mask=mask,
        sparsity=float(np.mean(flat == 0)),
        loss=problem.mean_loss(point),
        dense_loss=problem.curvature.loss,
        num_products=float(point.num_products),
        num_steps=int(point.number),
        code=code,
        status=status,
        kept_share=kept_share(mask),
    )


def _require_one(sparsity: float | None, mask: PyTree | None) -> None:
    if (sparsity is None) == (mask is None):
        raise ValueError("prune takes either a sparsity or a mask.")
    if sparsity is not None and np.ndim(sparsity) != 0:
        raise ValueError(f"sparsity must be one number in [0, 1], got {sparsity!r:.80}: call prune for each.")


def _next(problem: Readjustable, state: _State, counts: list[int], fixed: PyTree | None) -> _State:
    """A cut to the next stage, if there is one; and a step, unless the cut alone leaves the loss as low."""
    point, mask, stage = state.point, state.mask, int(state.stage)
    if stage == len(counts):
        point = problem.step(point, mask)
        done = settled(problem, state.point, point) and _little(problem, state.point)
        return state._replace(point=point, settled=done, average=_averaged(state.average, point))
    mask = problem.mask(point.weights, counts[stage]) if fixed is None else fixed
    point, stage = problem.cut(point, mask), stage + 1
    if stage < len(counts) and point.loss <= problem.curvature.loss:
        return state._replace(point=point, mask=mask, stage=stage)
    point = problem.step(point, mask)
    average = _averaged(state.average, point) if stage == len(counts) else state.average
    return _State(point, mask, stage, False, average)


def _averaged(average: _Average | None, point: Point) -> _Average | None:
    """With one more step."""
    if average is None:
        return None
    number = int(average.number) + 1
    share = 1 / min(number, AVERAGED)
    return _Average(jax.tree.map(lambda m, x: m + share * (x - m), average.weights, point.weights), number)


def _result(problem: Readjustable, state: _State) -> Pruned:
    point = state.point
    if state.average is not None and state.average.number:
        point = point._replace(weights=state.average.weights)
    done = Ending.SETTLED, "settled: a further step lowers the loss by less than a thousandth."
    left = (
        Ending.OUT_OF_PRODUCTS,
        f"out of products: the last step still lowered the loss by {float(state.point.fall):.2g}. Raise "
        "max_products, and the same checkpoint goes on.",
    )
    found = network(problem, point, state.mask, *(done if state.settled else left))
    loss = state.point.loss if np.isfinite(found.loss) else found.loss  # of a part of the data, and of all
    if np.isfinite(loss):
        return found
    told = f"not finite: the loss is {float(loss)}. Prune less, or look for overflow in it."
    return replace(found, code=Ending.NOT_FINITE, status=told)
