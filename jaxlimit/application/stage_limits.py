"""The stages that predict: the limits of each curvature."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxlimit import training
from jaxlimit.application import run_folder
from jaxlimit.application.job import PROBES, Job, in_batches
from jaxlimit.application.spectra import save_spectrum
from jaxlimit.application.stage_training import Trained
from jaxlimit.curvature.operator import Curvature
from jaxlimit.limits.budget import Progress
from jaxlimit.limits.dense_source import dense_fits
from jaxlimit.limits.estimate import LIMITS
from jaxlimit.limits.pruning_limit import MAX_MATVECS, pruning_limit
from jaxlimit.limits.result import PruningLimit
from jaxlimit.reference.paper_code import reference_limit

# Key of the width limit on the first half of the examples, where not all of them are used.
HALF = "width_of_half_the_examples"


@dataclass(frozen=True)
class Limits:
    """The limits that one curvature predicts.

    Attributes:
        curvature: its name.
        found: `PruningLimit.to_json`; of the Hessian also what the paper's code would predict, which knows
            single weights only; of part of the examples also the width limit of half of these.
    """

    curvature: str
    found: Mapping[str, Any]

    @property
    def predicted(self) -> dict[str, float]:
        """The limits that were found, by name."""
        return {name: self.found[name]["value"] for name in LIMITS if name in self.found}

    def to_json(self) -> dict[str, Any]:
        """Its part of limit.json."""
        return {"limits": {self.curvature: dict(self.found)}}


def find_limits(job: Job, trained: Trained, name: str, checkpoint: Path) -> Limits:
    """Predicts from one curvature, and keeps its spectrum."""
    num_examples = job.options.num_examples
    curvature = _curvature(job, trained, name, num_examples)
    asked = name == "hessian" and trained.groups is None
    reference = _reference(job, trained, curvature) if asked else {}
    limit = _limit(job, trained, curvature, LIMITS, checkpoint / "all")
    save_spectrum(run_folder.spectrum_path(job.folder, name), limit, trained.sparsities)
    found = limit.to_json() | reference
    if num_examples is not None and 1 < num_examples < len(job.train[1]):
        fewer = _curvature(job, trained, name, num_examples // 2)
        found[HALF] = _limit(job, trained, fewer, ["width"], checkpoint / "half").estimates()["width"].value
    return Limits(name, found)


def load_limits(document: Mapping[str, Any], name: str) -> Limits:
    """What `find_limits` found."""
    found = Limits(name, document["limits"][name])
    for value in found.predicted.values():
        math.isfinite(value)  # what later stages need is there, as numbers
    return found


def _curvature(job: Job, trained: Trained, name: str, num_examples: int | None) -> Curvature:
    """The curvature of the loss over the first so many training examples."""
    data = in_batches([array[:num_examples] for array in job.train])
    return training.classification_curvature(name, trained.predict, trained.params, data)


def _reference(job: Job, trained: Trained, hessian: Curvature) -> dict[str, Any]:
    """What the paper's own code would predict, from a probe of its own."""
    key = jax.random.fold_in(job.key(PROBES), 1)
    return {"reference": vars(reference_limit(hessian, key, loss_tolerance=trained.loss_tolerance))}


def _limit(
    job: Job, trained: Trained, curvature: Curvature, which: Sequence[str], checkpoint: Path
) -> PruningLimit:
    def progress(state: Progress) -> None:
        last = "eigendecomposition" if state.num_matvecs >= curvature.dim else "dense"
        job.monitor.update(state.num_matvecs, last if state.stage == "dense" else str(state))

    return pruning_limit(
        curvature,
        job.key(PROBES),
        loss_tolerance=trained.loss_tolerance,
        tolerance=job.options.tolerance,
        which=which,
        groups=trained.groups,
        checkpoint=str(checkpoint),
        progress=progress,
    )


def max_products(trained: Trained) -> int:
    """How many products the limits of a curvature take at most."""
    dim = trained.network["num_weights"]
    return dim if dense_fits(dim) else MAX_MATVECS
