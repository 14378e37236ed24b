"""Predicted against measured: which threshold answers which limit, and the table of both."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxlimit.limits.estimate import LIMITS
from jaxlimit.limits.status import Code, code_of
from jaxlimit.reference.paper_code import ReferenceLimit
from jaxlimit.training.losses import TITLES

OPTIMISTIC = (
    "Gauss-Newton calls flat what is flat only to first order in the network: read its width, cone and "
    "readjusted limits as optimistic."
)
# Key of the width limit on the first half of the examples, where not all of them are used.
HALF = "width_of_half_the_examples"
# Characters a line of the text, and the table's, for a terminal of 80 columns.
WIDTH = 79
COLUMNS = ("", "predicted", "interval", "true rise", "measured", "differs by", "test accuracy")


@dataclass(frozen=True)
class Comparison:
    """One predicted limit beside the measured threshold that answers the same question.

    Attributes:
        curvature, limit: what was predicted.
        predicted, lower, upper: the estimate.
        rise: of the training loss there, the network pruned and nothing readjusted; None if it is not finite.
        measured_by: "loss" (of the pruned network) or "finetuned" (after fine-tuning on the mask).
        measured: the threshold, None where it was not measured.
        difference: predicted - measured.
        test_accuracy: measured in the same way at the predicted sparsity, None where it was not measured.
    """

    curvature: str
    limit: str
    predicted: float
    lower: float
    upper: float
    rise: float | None
    measured_by: str
    measured: float | None
    difference: float | None
    test_accuracy: float | None


def compare(document: Mapping[str, Any], columns: Mapping[str, NDArray[np.float64]]) -> list[Comparison]:
    """Pairs every predicted limit with what was measured.

    one_shot predicts the loss of the pruned network as it is; width, cone and readjusted predict whether
    some weights on the same support reach the loss, which fine-tuning answers.

    Args:
        document: limit.json.
        columns: curves.csv.
    """
    rows = []
    for curvature, found in document["limits"].items():
        for name in LIMITS:
            if name not in found:
                continue
            value = found[name]["value"]
            by, prefix = ("loss", "") if name == "one_shot" else ("finetuned", "finetuned_")
            measured = document["measured"].get(by, {}).get("value")
            difference = None if measured is None else value - measured
            accuracy = value_below(columns, f"{prefix}test_accuracy", value)
            predicted = value, found[name]["lower"], found[name]["upper"]
            rise = found.get("rises", {}).get(name)
            rows.append(Comparison(curvature, name, *predicted, rise, by, measured, difference, accuracy))
    return rows


def value_below(columns: Mapping[str, NDArray[np.float64]], name: str, sparsity: float) -> float | None:
    """A column at the largest measured sparsity that is not above the one given."""
    known = ~np.isnan(columns.get(name, np.full(len(columns["sparsity"]), np.nan)))
    known &= columns["sparsity"] <= sparsity + 1e-9
    return float(columns[name][known][-1]) if np.any(known) else None


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of the comparison, as strings."""

    def shown(name: str, form: str) -> str:
        value = row.get(name)
        return "-" if value is None else format(value, form)

    return (
        row["limit"],
        format(row["predicted"], ".4f"),
        f"[{row['lower']:.4f}, {row['upper']:.4f}]",
        shown("rise", ".3g"),
        shown("measured", ".4f"),
        shown("difference", "+.4f"),
        shown("test_accuracy", ".2%"),
    )


def comparison_table(document: Mapping[str, Any]) -> str:
    """The table of predicted against measured, for a terminal."""
    groups = table_groups(document)
    header = list(zip(*(["", "", *name.split()][-2:] for name in COLUMNS), strict=True))
    lines = [*header, *(row for _, rows in groups for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    widths[0] += 2

    def text(cells: Sequence[str]) -> str:
        first = ("  " + cells[0] if cells[0] else "").ljust(widths[0])
        return "  ".join(
            [first, *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]
        )

    rule = "-" * len(text(header[0]))
    parts = [headline(document).replace(" (", "\n("), "", *map(text, header), rule]
    for title, rows in groups:
        parts += [title, *(text(row) for row in rows)]
    fill = partial(textwrap.fill, width=WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    paragraphs = [fill(note) for note in notes(document)]
    return "\n".join([*parts, rule, *paragraphs])


def table_groups(document: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """The cells of the table under `COLUMNS`, by curvature."""
    rows = document["comparison"]
    return [
        (TITLES[name], [_cells(row) for row in rows if row["curvature"] == name])
        for name in document["limits"]
    ]


def headline(document: Mapping[str, Any]) -> str:
    """What the limits are limits of, in a line."""
    network = document["network"]
    return (
        f"Sparsity that costs a loss of at most {document['loss_tolerance']:.4g} "
        f"(training loss {network['train_loss']:.4g}; {network['num_weights']:,} weights)"
    )


def notes(document: Mapping[str, Any]) -> list[str]:
    """What the reader of the table must know, by paragraph."""
    measured = document["measured"]
    tuned = "for the others the same after fine-tuning the weights that are left"
    notes = [
        "true rise: of the training loss at the predicted sparsity, pruned and nothing readjusted.",
        "measured: for one_shot the largest sparsity at which the training loss of the pruned network stays "
        f"within the tolerance; {tuned if 'finetuned' in measured else 'the others were not measured'}. "
        f"Measured to {_resolution(measured):g} of sparsity.",
        "test accuracy: at the predicted sparsity, pruned or fine-tuned in the same way.",
    ]
    network = document["network"]
    dense = f"Test accuracy unpruned {network['test_accuracy']:.2%}"
    kinds = [("accuracy", "pruned"), ("finetuned_accuracy", "fine-tuned")]
    within = [f"{kind} to {measured[key]['value']:.4f}" for key, kind in kinds if key in measured]
    notes.append(f"{dense}; within one point of it: {', '.join(within)}.")
    if "gauss_newton" in document["limits"]:
        notes.append(OPTIMISTIC)
    for name, found in document["limits"].items():
        if code_of(found) is not Code.EXACT:
            notes.append(f"{TITLES[name]}: {found['status']}")
        if "reference" in found:
            notes.append(ReferenceLimit(**found["reference"]).against(found["width"]["value"]))
        if HALF in found:
            used, half = found["num_examples"], found[HALF]
            notes.append(
                f"{TITLES[name]}: from {used:,} of {network['num_train']:,} training examples. From half of "
                f"these, width is {half:.4f} ({half - found['width']['value']:+.4f})."
            )
    return notes


def _resolution(measured: Mapping[str, Any]) -> float:
    return round(
        max(found["next"] - found["value"] for key, found in measured.items() if "accuracy" not in key), 4
    )
