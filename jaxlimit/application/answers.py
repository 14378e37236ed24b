"""The three answers: limits predicted from curvature, networks attained, what is certified of them.

Each is one function of a `Question`, for every caller the same.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxlimit.application.question import Certifying, Question
from jaxlimit.core.storage import Checkpoint
from jaxlimit.core.trees import PyTree, combine, partition
from jaxlimit.curvature.makers import gauss_newton, hessian
from jaxlimit.curvature.operator import Curvature
from jaxlimit.limits.budget import Progress
from jaxlimit.limits.pruning_limit import pruning_limit
from jaxlimit.limits.result import PruningLimit
from jaxlimit.measuring.certificates import Certificate, certify
from jaxlimit.measuring.risks import paired
from jaxlimit.measuring.sweeps import SPARSITIES, PrunedNetwork, Sweep
from jaxlimit.pruning.attained import attained_limit
from jaxlimit.pruning.readjustable import movable
from jaxlimit.pruning.result import Attained, Readjusting

# The cut is measured at every COARSE-th of `SPARSITIES`, then at all between the two around the crossing.
COARSE = 8
Told = Callable[[int, str], None]
"""Told how many units of work are done, and a note."""


def curvature_of(question: Question, name: str) -> Curvature:
    """The Hessian, or the Gauss-Newton matrix."""
    if name == "hessian":
        return hessian(question.loss, question.params, question.batches, **question.selection)
    return gauss_newton(
        question.predict_fn, question.loss_fn, question.params, question.batches, **question.selection
    )


def predicted(question: Question, name: str, checkpoint: Path | None, told: Told) -> PruningLimit:
    """All four limits from one curvature, where it has them."""

    def progress(state: Progress) -> None:
        told(state.num_matvecs, str(state))

    return pruning_limit(
        curvature_of(question, name),
        question.key,
        loss_tolerance=question.loss_tolerance,
        tolerance=question.tolerance,
        max_matvecs=question.max_matvecs,
        checkpoint=checkpoint,
        scores=question.scores,
        groups=question.groups,
        progress=progress,
    )


@dataclass(frozen=True)
class Cut:
    """What the loss does when weights are cut and none is readjusted.

    Attributes:
        sparsity: the last one measured before the loss first exceeds the tolerance.
        next: the one measured after it.
        sparsities: all that were measured.
        losses: mean losses there.
        errors: mean test errors there, None where they are not finite; None where no error is known.
    """

    sparsity: float
    next: float
    sparsities: tuple[float, ...]
    losses: tuple[float | None, ...]
    errors: tuple[float | None, ...] | None

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Cut":
        """The inverse of `to_json`."""
        found: dict[str, Any] = {n: tuple(x) if isinstance(x, list) else x for n, x in values.items()}
        return cls(**found)


def num_cuts(question: Question) -> int:
    """About how many cut networks `cut` measures, those on the test data included."""
    count = len(SPARSITIES[::COARSE]) + COARSE + 1
    return 2 * count if isinstance(question.certifying, Certifying) else count


def cut(question: Question, told: Told) -> Cut:
    """Where the loss of the network that is cut leaves the tolerance, and its test error on the way."""
    network = PrunedNetwork(
        question.params,
        lambda params, batch: {"loss": question.loss(params, batch)},
        scores=question.scores,
        groups=question.groups,
        **question.selection,
    )
    coarse = network.sweep(question.batches, SPARSITIES[::COARSE], progress=_told(told, 0))
    bound = coarse.metrics["loss"][0] + question.loss_tolerance
    fine = network.sweep(
        question.batches, _around(coarse, bound), progress=_told(told, len(coarse.sparsities))
    )
    grid, losses = _joined(coarse, fine, "loss")
    last = Sweep(grid, {"loss": losses}).first_crossing("loss", bound)
    after, errors = grid[grid > last], None
    if isinstance(question.certifying, Certifying):
        errors = _errors(question, question.certifying, question.params, grid, told)
    return Cut(
        sparsity=last,
        next=float(after[0]) if len(after) else 1.0,
        sparsities=tuple(grid.tolist()),
        losses=_finite(losses),
        errors=None if errors is None else _finite(errors),
    )


def _finite(values: NDArray[np.float64]) -> tuple[float | None, ...]:
    """JSON has no number that is not finite."""
    return tuple(x if np.isfinite(x) else None for x in values.tolist())


def _around(coarse: Sweep, bound: float) -> NDArray[np.float64]:
    """The sparsities of the grid from the last one before the crossing to the first beyond it."""
    last = coarse.first_crossing("loss", bound)
    beyond = coarse.sparsities[coarse.sparsities > last]
    ends = np.array([last - 1e-9, (beyond[0] if beyond.size else last) + 1e-9])
    start, stop = np.searchsorted(SPARSITIES, ends)
    return SPARSITIES[start:stop]


def _joined(first: Sweep, second: Sweep, metric: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    found = dict(zip(first.sparsities.tolist(), first.metrics[metric].tolist(), strict=True))
    found |= zip(second.sparsities.tolist(), second.metrics[metric].tolist(), strict=True)
    return np.array(sorted(found)), np.array([found[s] for s in sorted(found)])


def _errors(
    question: Question, certifying: Certifying, params: PyTree, grid: ArrayLike, told: Told
) -> NDArray[np.float64]:
    """Mean risk on the test data of a network that is cut."""

    def metrics(params: PyTree, batch: PyTree) -> dict[str, Any]:
        return {"error": jnp.mean(certifying.error_fn(params, batch).astype(jnp.float32))}

    order = {"scores": question.scores, "groups": question.groups, "prunable": question.prunable}
    network = PrunedNetwork(params, metrics, **order)
    found = network.sweep(certifying.batches, grid, progress=_told(told, np.size(grid)))
    return found.metrics["error"]


def error_of(question: Question, params: PyTree) -> float | None:
    """Mean risk of a network on the test data; None where none is known, or it is not finite."""
    if not isinstance(question.certifying, Certifying):
        return None
    error = float(_errors(question, question.certifying, params, [0.0], lambda done, note: None)[0])
    return error if np.isfinite(error) else None


def _told(told: Told, before: int) -> Callable[[int, int], None]:
    return lambda done, _: told(before + done, "")


def _is_floating(path: tuple, leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


@dataclass(frozen=True, eq=False)
class CertifiedNetwork:
    """The sparsest network that is certified on new data.

    Attributes:
        sparsity: share of its weights that are gone.
        params: as the unpruned ones, zero where weights are gone.
        mask: bool pytree of the weights that may be pruned, None elsewhere; True where one is not 0.
    """

    sparsity: float
    params: PyTree
    mask: PyTree


class Networks:
    """Networks of one shape in a folder, by their sparsity: of each the parameters that differ.

    Args:
        folder: where to.
        question: about the network that they come from.
    """

    def __init__(self, folder: Path, question: Question) -> None:
        self._folder = folder
        moving = movable(question.params, question.prunable, question.trainable)
        self._differ = moving if question.statistics_fn is None else _is_floating
        self._like, self._rest = partition(question.params, self._differ)

    def keep(self, sparsity: float, params: PyTree) -> None:
        """Stores a network; another one of this sparsity gives way."""
        with self._store() as store:
            store.save_tree(repr(float(sparsity)), partition(params, self._differ)[0])

    def __iter__(self) -> Iterator[tuple[float, PyTree]]:
        """(sparsity, params) in rising sparsity, read one after the other."""
        for name in sorted((path.stem for path in self._folder.glob("*.npz")), key=float):
            yield float(name), self[float(name)]

    def __getitem__(self, sparsity: float) -> PyTree:
        """The parameters of that network."""
        with self._store() as store:
            return combine(store.load_tree(repr(float(sparsity)), self._like), self._rest)

    def _store(self) -> Checkpoint:
        return Checkpoint(self._folder, {"networks": "of the attained limit"})


def attained(question: Question, networks: Networks, checkpoint: Path | None, told: Told) -> Attained:
    """The sparsest network that is built within the tolerance; `networks` keeps all that are within it."""

    def progress(state: Readjusting) -> None:
        told(round(state.num_products), str(state))

    return attained_limit(
        question.predict_fn,
        question.loss_fn,
        question.params,
        question.batches,
        loss_tolerance=question.loss_tolerance,
        tolerance=question.attained_tolerance,
        trainable=question.trainable,
        scores=question.scores,
        groups=question.groups,
        statistics_fn=question.statistics_fn,
        max_products=question.max_products,
        settings=question.settings,
        checkpoint=checkpoint,
        progress=progress,
        on_network=networks.keep if isinstance(question.certifying, Certifying) else None,
        **question.selection,
    )


def certified_network(
    question: Question, networks: Networks, certificate: Certificate | None
) -> CertifiedNetwork | None:
    """The network that a certificate is about; None where nothing is certified."""
    if certificate is None or certificate.sparsity is None:
        return None
    params = networks[certificate.sparsity]
    mask = jax.tree.map(lambda w: w != 0, partition(params, question.prunable)[0])
    return CertifiedNetwork(certificate.sparsity, params, mask)


def certified(question: Question, networks: Networks, told: Told) -> Certificate | None:
    """How far the networks that were attained are certified; None where there is nothing to certify.

    These networks, and their order, are made from the training data alone.
    """
    asked = question.certifying
    if not isinstance(asked, Certifying):
        return None

    def one_by_one() -> Iterator[tuple[float, PyTree]]:
        for number, (sparsity, params) in enumerate(networks):
            told(number, f"sparsity {sparsity:.4f}")
            yield sparsity, params

    found = one_by_one()
    first = next(found, None)
    if first is None:
        return None
    lower, upper = asked.bounds
    metric, bound, bounds = asked.error_fn, asked.bound, asked.bounds
    if bound is None:
        metric = paired(asked.error_fn, question.params)
        bound, bounds = asked.rise, (lower - upper, upper - lower)

    def all_of_them() -> Iterator[tuple[float, PyTree]]:
        yield first
        yield from found

    return certify(
        metric, all_of_them(), asked.batches, bound=bound, confidence=asked.confidence, bounds=bounds
    )
