"""Predicted, attained and certified for any network, in one call."""

import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from jaxlimit.application.answering import Answering, answer
from jaxlimit.application.assessed_folder import assess_into, require_extra
from jaxlimit.application.assessment import Assessment
from jaxlimit.application.ledger import Performer
from jaxlimit.application.question import (
    ERROR_RISE,
    MeanLoss,
    Question,
    certifying_of,
)
from jaxlimit.core.checks import require_key, require_positive, require_problem, require_weight_fn
from jaxlimit.core.interrupt import Interrupt
from jaxlimit.core.terminal import Monitor, Silent, make_monitor
from jaxlimit.core.trees import Prunable, PyTree, is_kernel
from jaxlimit.limits.pruning_limit import MAX_MATVECS
from jaxlimit.measuring.loss_statistics import LossStatistics, loss_statistics
from jaxlimit.measuring.risks import Metric
from jaxlimit.pruning.attained import MAX_PRODUCTS
from jaxlimit.pruning.trust_region import DEFAULT, Settings
from jaxlimit.training.losses import CURVATURES

CALL = "assess(predict_fn, loss_fn, params, batches, key)"


def assess(
    predict_fn: Callable[[PyTree, PyTree], PyTree],
    loss_fn: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    batches: Iterable[PyTree],
    key: jax.Array,
    *,
    loss_tolerance: float | None = None,
    test_batches: Iterable[PyTree] | None = None,
    error_fn: Metric | None = None,
    error_bounds: tuple[float, float] = (0.0, 1.0),
    error_bound: float | None = None,
    error_rise: float = ERROR_RISE,
    confidence: float = 0.95,
    curvatures: Sequence[str] = CURVATURES,
    tolerance: float = 1e-3,
    attained_tolerance: float = 0.005,
    prunable: Prunable = is_kernel,
    trainable: Prunable | None = None,
    scores: PyTree | None = None,
    groups: Any = None,
    statistics_fn: Callable[[PyTree], PyTree] | None = None,
    weight_fn: Callable[[PyTree], jax.Array] | None = None,
    max_matvecs: int = MAX_MATVECS,
    max_products: float = MAX_PRODUCTS,
    settings: Settings = DEFAULT,
    model: nnx.Module | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Assessment:
    r"""How sparse this network can be pruned: predicted, attained and certified.

    Predicted are the limits of `pruning_limit` from the Hessian and the Gauss-Newton matrix. Measured is
    where the loss of the network that is cut leaves the tolerance. Attained is the sparsest network within it
    that `attained_limit` builds. Certified is, by `certify`, how sparse the networks on the way to it may be
    so that their error on new data is no more than a point above the unpruned network's.

    Cost: that of these functions. Without test data nothing is certified, and the result says so.

    Args:
        predict_fn: `predict_fn(params, batch) -> outputs`, as for `gauss_newton`.
        loss_fn: `loss_fn(outputs, batch) -> scalar`, the mean over the batch's examples, convex in outputs.
        params: pytree of parameters, the trained network.
        batches: the data to keep the loss low on, as for `hessian`.
        key: of the random probes.
        loss_tolerance: eps, the rise of the loss that is allowed. None: the standard deviation of the
            batches' losses, as the paper takes it.
        test_batches: examples that have had no part in training, pruning, or choosing anything.
        error_fn: `error_fn(params, batch) -> (n,)`, the risk of each example, within `error_bounds`. None:
            its class is wrong, where batches are (inputs, integer labels) and outputs have the shape
            (n, classes).
        error_bounds: lowest and highest risk of an example.
        error_bound: what the mean risk is to stay below. None: it may rise by `error_rise`.
        error_rise: above the mean risk of the unpruned network, in units of the risk; a point by default. The
            two networks are compared example by example.
        confidence: with which probability at least the certificate is right.
        curvatures: which of "hessian" and "gauss_newton" predict.
        tolerance: wanted accuracy of the predicted limits, in sparsity.
        attained_tolerance: wanted accuracy of the attained one.
        prunable: as for `hessian`.
        trainable: as for `prune`: other parameters that move when weights are readjusted.
        scores: as for `pruning_limit`: another order than that of the magnitudes.
        groups: as for `pruning_limit`: channels, heads, blocks, or weights of one label go together.
        statistics_fn: as for `prune`: takes the statistics of batch norm anew after every cut on the way to
            the attained limit. Limits and the cut are of the network with the statistics that it has.
        weight_fn: how much a batch counts, as for `hessian`.
        max_matvecs: budget of each curvature, as for `pruning_limit`.
        max_products: budget of the search, as for `attained_limit`.
        settings: as for `prune`.
        model: the network of `jaxlimit.models` that `params` are of. With `out` the pruned network is also
            written under PyTorch's names, as `models.save_torch_state` does.
        out: folder for the results: limit.json, spectra, the pruned network with its mask as safetensors,
            figures and a self-contained report.html. Work that was interrupted goes on with the same call
            and gives the same bits; a folder of another assessment is refused.
        progress: whether to show, on standard error, how far the work is.

    Returns:
        The limits, the cut, the network that was attained, and the certificate; `print` shows one table.

    Raises:
        ImportError: `out` needs packages that are not installed.
        ValueError: as for these functions; batches that are all alike, or a single one, and no
            `loss_tolerance`; test data that are the data of `batches`; params that are not of `model`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jaxlimit import batched
        >>> def predict(w, x): return x @ w
        >>> def loss(outputs, x): return jnp.mean((outputs - 10.0) ** 2)
        >>> weights, data = jnp.arange(1.0, 5.0)[:, None], batched(jnp.ones((4, 4)), 4)
        >>> found = assess(predict, loss, weights, data, jax.random.key(0), loss_tolerance=0.1)
        >>> found.recommendation
        'cut to .247 as it is; .750 with readjustment; nothing is certified'
    """
    require_problem(CALL, params, predict_fn=predict_fn, loss_fn=loss_fn)
    require_weight_fn(weight_fn)
    _require_curvatures(curvatures)
    key = require_key("key", key)
    risk = {"bounds": error_bounds, "bound": error_bound, "rise": error_rise, "confidence": confidence}
    certifying = certifying_of(predict_fn, params, batches, test_batches, error_fn, **risk)
    if out is not None:
        require_extra()
    statistics = None
    if loss_tolerance is not None:
        require_positive("loss_tolerance", loss_tolerance)
    if loss_tolerance is None or out is not None:
        statistics = loss_statistics(MeanLoss(predict_fn, loss_fn), params, batches, weight_fn=weight_fn)
    question = Question(
        predict_fn=predict_fn,
        loss_fn=loss_fn,
        params=params,
        batches=batches,
        key=key,
        loss_tolerance=_spread(statistics) if loss_tolerance is None else float(loss_tolerance),
        tolerance=tolerance,
        attained_tolerance=attained_tolerance,
        max_matvecs=max_matvecs,
        max_products=max_products,
        prunable=prunable,
        trainable=trainable,
        scores=scores,
        groups=groups,
        statistics_fn=statistics_fn,
        weight_fn=weight_fn,
        settings=settings,
        certifying=certifying,
        model=model,
    )
    if out is not None and statistics is not None:
        with _watched(progress) as monitor:
            return assess_into(Path(out), question, curvatures, statistics, monitor)
    with _watched(progress) as monitor, tempfile.TemporaryDirectory() as folder:
        return answer(Answering(question, Path(folder), False, monitor), curvatures, Performer(monitor))


@contextlib.contextmanager
def _watched(progress: bool) -> Iterator[Monitor]:
    """Shows progress if it is to be shown, and hears Ctrl-C."""
    with Interrupt() as interrupt, make_monitor(interrupt) if progress else Silent(interrupt) as monitor:
        yield monitor


def _require_curvatures(curvatures: Sequence[str]) -> None:
    known = set(CURVATURES)
    if isinstance(curvatures, str) or not curvatures or not {*curvatures} <= known:
        raise ValueError(f"curvatures must be some of {', '.join(CURVATURES)}, got {curvatures!r}.")


def _spread(statistics: LossStatistics | None) -> float:
    """The paper's loss tolerance."""
    spread = math.nan if statistics is None else statistics.batch_std
    if not (spread > 0 and math.isfinite(spread)):
        raise ValueError(
            f"the default loss tolerance, the standard deviation of the batches' losses, is {spread:g}: give "
            "several batches, or a loss_tolerance."
        )
    return spread
