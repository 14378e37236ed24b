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
from jaxlimit.application.stage_limits import HALF
from jaxlimit.application.stage_training import Trained
from jaxlimit.limits.result import PruningLimit
from jaxlimit.measuring.certificates import Certificate
from jaxlimit.pruning.result import Attained
from jaxlimit.reference.paper_code import ReferenceLimit
from jaxlimit.training.losses import TITLES, cross_entropy


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
        groups=trained.groups,
        tolerance=job.options.tolerance,
        certifying=certifying_of(predict, trained.params, batches, test_batches, None),
        model=trained.model,
    )


def cut_of(columns: Mapping[str, NDArray[np.float64]], measured: Mapping[str, Any]) -> Cut:
    """What the sweep of the pruned network found.

    Args:
        columns: of curves.csv.
        measured: thresholds, by name.
    """
    swept = ~np.isnan(columns["test_accuracy"])
    losses = columns["train_loss"][swept].tolist()
    return Cut(
        sparsity=measured["loss"]["value"],
        next=measured["loss"]["next"],
        sparsities=tuple(columns["sparsity"][swept].tolist()),
        losses=tuple(x if np.isfinite(x) else None for x in losses),
        errors=tuple((1 - columns["test_accuracy"][swept]).tolist()),
    )


def predicted_of(document: Mapping[str, Any]) -> dict[str, PruningLimit]:
    """The limits in limit.json, by curvature."""
    return {name: PruningLimit.from_json(found) for name, found in document["limits"].items()}


def assessment_of(document: Mapping[str, Any], columns: Mapping[str, NDArray[np.float64]]) -> Assessment:
    """The assessment in the files of a run.

    Args:
        document: limit.json.
        columns: curves.csv.
    """
    stored = document["certificate"]
    return Assessment(
        predicted=predicted_of(document),
        cut=cut_of(columns, document["measured"]),
        attained=Attained.from_json(document["attained"]),
        certificate=None if stored is None else Certificate.from_json(stored),
        not_certified=NO_NETWORK if stored is None else "",
        attained_error=document["attained_error"],
    )


def notes(document: Mapping[str, Any]) -> list[str]:
    """What a run knows beside the assessment, by paragraph."""
    measured, network = document["measured"], document["network"]
    accuracies = {"accuracy": "cut", "finetuned_accuracy": "fine-tuned"}
    within = [
        f"{kind} to {measured[key]['value']:.4f}" for key, kind in accuracies.items() if key in measured
    ]
    notes = [f"Test accuracy unpruned {network['test_accuracy']:.2%}; within one point {', '.join(within)}."]
    if "finetuned" in measured:
        found = measured["finetuned"]
        notes.append(
            f"Fine-tuned with Adam at each sparsity, all examples a step, the network stays within the "
            f"tolerance up to {found['value']:.4f} (the next one is {found['next']:.4f})."
        )
    for name, found in document["limits"].items():
        if "reference" in found:
            notes.append(ReferenceLimit(**found["reference"]).against(found["width"]["value"]))
        if HALF in found:
            half = found[HALF]
            notes.append(
                f"{TITLES[name]}: from {found['num_examples']:,} of {network['num_train']:,} training "
                f"examples. From half of these, width is {half:.4f} ({half - found['width']['value']:+.4f})."
            )
    return notes
