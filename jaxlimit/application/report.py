"""The report of a run as one HTML page: what was predicted, attained and certified, with its figures.

Everything is made from the files of the run's folder (see `run_folder`); nothing is computed anew.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from jaxlimit import plots
from jaxlimit.application import assessed_folder, page, run_folder
from jaxlimit.application.run_folder import Record
from jaxlimit.application.stage_answers import assessment_of, notes
from jaxlimit.core import writing
from jaxlimit.measuring.sweeps import Sweep

if TYPE_CHECKING:
    from matplotlib.figure import Figure


THRESHOLDS = {"loss": "loss", "finetuned": "fine-tuned loss"}
CAPTIONS = {
    "assessment": assessed_folder.CAPTIONS["assessment"],
    "loss": "Loss of the pruned network. Above: the predicted limits, and where the measured training losses "
    "first exceed the unpruned loss plus the tolerance, without and with fine-tuning. "
    "Fine-tuning pays no L1 term, so that it can go below the unpruned loss.",
    "accuracy": "Accuracy of the pruned network; limits and thresholds as above.",
    "transition": "The phase transition. The statistical dimension of the cone falls as weights go; where it "
    "meets the diagonal, fewer weights are left than it takes to stay within the tolerance. The bar "
    "below is the window around the width limit in which the probability falls from 95 % to 5 %.",
    "spectrum": "Cumulative spectral measure, unsmoothed. Dotted: the ridge a of the width limit. A "
    "direction counts as free to the degree a / (a + |λ|).",
    "sensitivity": "The limits if the loss tolerance were another one, from the same spectra, and the "
    "largest sparsities measured that stay within it, by the rule of the other figures and the table.",
}


def make_figures(run: Record) -> dict[str, "Figure"]:
    """The figures of a run by name, in the order of `CAPTIONS`."""
    document, measured = run.document, run.document["measured"]
    thresholds = {label: measured[key]["value"] for key, label in THRESHOLDS.items() if key in measured}
    loss_bound = document["network"]["train_loss"] + document["loss_tolerance"]
    accuracy = 100 * document["network"]["test_accuracy"]
    curves = {name: found.curve for name, found in run.spectra.items()}
    measures = {name: found.measure for name, found in run.spectra.items()}
    sensitivities = {name: found.sensitivity for name, found in run.spectra.items()}
    ridges = {name: found["ridge"] for name, found in document["limits"].items()}
    halfwidth = next(iter(document["limits"].values()))["transition_halfwidth"]
    return {
        "assessment": assessed_folder.plot(assessment_of(document, run.columns)),
        "loss": plots.plot_sweep(
            _sweep_curves(run, "loss"),
            ylabel="cross entropy (nats)",
            limits=run.limits,
            measured=thresholds,
            bound=(loss_bound, "train, unpruned, plus tolerance"),
            logarithmic=True,
        ),
        "accuracy": plots.plot_sweep(
            _sweep_curves(run, "accuracy", scale=100),
            ylabel="accuracy (%)",
            limits=run.limits,
            measured=thresholds,
            bound=(accuracy, "test, unpruned"),
        ),
        "transition": plots.plot_transition(curves, run.limits, halfwidth),
        "spectrum": plots.plot_spectrum(measures, ridges),
        "sensitivity": plots.plot_sensitivity(
            sensitivities,
            document["loss_tolerance"],
            limits=run.limits,
            measured=_measured_sensitivity(run),
        ),
    }


def _sweep_curves(run: Record, metric: str, scale: float = 1.0) -> dict[str, plots.Curve]:
    names = {
        "train": f"train_{metric}",
        "train, fine-tuned": f"finetuned_train_{metric}",
        "test": f"test_{metric}",
        "test, fine-tuned": f"finetuned_test_{metric}",
    }
    found = {label: run.measured_curve(name) for label, name in names.items() if name in run.columns}
    return {label: (sparsity, scale * values) for label, (sparsity, values) in found.items()}


def _measured_sensitivity(run: Record) -> dict[str, plots.Curve]:
    tolerances = run.document["loss_tolerance"] * np.geomspace(1 / 8, 8, 49)
    kinds = dict(zip(THRESHOLDS.values(), ("train_loss", "finetuned_train_loss"), strict=True))
    base = run.document["network"]["train_loss"]
    curves = {label: run.measured_curve(name) for label, name in kinds.items() if name in run.columns}
    return {
        label: (tolerances, np.array([_within(sparsity, loss, base + eps) for eps in tolerances]))
        for label, (sparsity, loss) in curves.items()
    }


def _within(sparsity: NDArray[np.float64], values: NDArray[np.float64], bound: float) -> float:
    """The last sparsity measured before the values first exceed the bound, as the table has it."""
    return Sweep(sparsity, {"loss": values}).first_crossing("loss", bound)


def write_report(folder: Path, run: Record) -> Path:
    """Writes figures/*.png and *.pdf, and report.html, and returns the path of the latter."""
    from jinja2 import TemplateError

    with writing.content_of(folder / run_folder.LIMIT, ValueError, TemplateError):
        pictures = assessed_folder.save_figures(folder, make_figures(run))
        text = render(run, pictures)
    path = folder / run_folder.REPORT
    writing.write_file(path, text)
    return path


def render(run: Record, pictures: Mapping[str, page.Picture]) -> str:
    """The page: one file, no external resource.

    Args:
        run: what to report.
        pictures: by the names of `CAPTIONS`, in the order shown.
    """
    document, preset, options = run.document, run.config["preset"], run.config["options"]
    assessment = assessment_of(document, run.columns)
    return page.render(
        title=f"Pruning limit: {preset['name']}, seed {options['seed']}",
        sentences=assessment.sentences,
        tables=[
            assessed_folder.table(assessment, notes(document)),
            assessed_folder.pruned_table(document["pruned"], *assessed_folder.certified_notes(document)),
        ],
        captions=CAPTIONS,
        pictures=pictures,
        details={
            "preset": preset | options,
            "network": document["network"],
            **page.details(document),
        },
        command=document["command"],
    )
