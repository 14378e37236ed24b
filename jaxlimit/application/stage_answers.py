"""What `assess` asks and answers, asked of the network of a run."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxlimit.application.answering import NO_NETWORK
from jaxlimit.application.answers import Cut
from jaxlimit.application.assessment import Assessment
from jaxlimit.application.job import PROBES, Job, in_batches
from jaxlimit.application.question import Question, certifying_of
from jaxlimit.application.stage_training import Trained
from jaxlimit.limits.result import PruningLimit
from jaxlimit.measuring.certificates import Certificate
from jaxlimit.pruning.result import Attained
from jaxlimit.training.losses import cross_entropy


def question_of(job: Job, trained: Trained) -> Question:
    """How sparse the network may be for its training loss, certified on the test examples."""

    def predict(params: Any, batch: Any) -> Any:
        return trained.predict(params, batch[0])

    batches, test_batches = in_batches(job.examples), in_batches(job.test)
    return Question(
        predict_fn=predict,
        loss_fn=lambda logits, batch: cross_entropy(logits, batch[1]),
        params=trained.params,
        batches=batches,
        key=job.key(PROBES),
        loss_tolerance=trained.loss_tolerance,
        tolerance=job.options.tolerance,
        certifying=certifying_of(predict, trained.params, batches, test_batches, None),
    )


def cut_of(columns: Mapping[str, NDArray[np.float64]], measured: Mapping[str, Any]) -> Cut:
    """What the sweep of the pruned network found.

    Args:
        columns: of curves.csv.
        measured: thresholds, by name.
    """
    losses = columns["train_loss"].tolist()
    return Cut(
        sparsity=measured["loss"]["value"],
        next=measured["loss"]["next"],
        sparsities=tuple(columns["sparsity"].tolist()),
        losses=tuple(x if np.isfinite(x) else None for x in losses),
        errors=tuple((1 - columns["test_accuracy"]).tolist()),
    )


def predicted_of(document: Mapping[str, Any]) -> dict[str, PruningLimit]:
    """The limits in limit.json, by curvature."""
    return {name: PruningLimit.from_json(found) for name, found in document["limits"].items()}


def assessment_of(
    document: Mapping[str, Any], columns: Mapping[str, NDArray[np.float64]]
) -> Assessment | None:
    """The assessment in the files of a run; None where it is from before there was any.

    Args:
        document: limit.json.
        columns: curves.csv.
    """
    if "attained" not in document:
        return None
    stored = document["certificate"]
    return Assessment(
        predicted=predicted_of(document),
        cut=cut_of(columns, document["measured"]),
        attained=Attained.from_json(document["attained"]),
        certificate=None if stored is None else Certificate.from_json(stored),
        not_certified=NO_NETWORK if stored is None else "",
    )
