"""The report of a run: predicted against measured, as a table for the terminal and as one HTML page.

Everything is made from the files of the run's folder (see `record`); nothing is computed anew.
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jaxlimit import plots
from jaxlimit.application import run_folder
from jaxlimit.application.comparison import COLUMNS, headline, notes, table_groups
from jaxlimit.application.run_folder import Record
from jaxlimit.limits.estimate import LIMITS

if TYPE_CHECKING:
    from matplotlib.figure import Figure


THRESHOLDS = {"loss": "loss", "finetuned": "fine-tuned loss"}
CAPTIONS = {
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
    "thresholds measured on the same sweeps (interpolated between the sparsities measured).",
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
        label: (tolerances, np.array([_crossing(sparsity, loss, base + eps) for eps in tolerances]))
        for label, (sparsity, loss) in curves.items()
    }


def _crossing(sparsity: NDArray[np.float64], values: NDArray[np.float64], bound: float) -> float:
    """Where the values first exceed the bound, linear between the points."""
    index = int(np.argmax(np.append(values > bound, True)))
    if index in (0, len(values)):
        return float(sparsity[0] if index == 0 else sparsity[-1])
    fraction = (bound - values[index - 1]) / (values[index] - values[index - 1])
    return float(sparsity[index - 1] + fraction * (sparsity[index] - sparsity[index - 1]))


def write_report(folder: Path, run: Record) -> Path:
    """Writes figures/*.png and report.html, and returns the path of the latter."""
    pictures: dict[str, bytes] = {}
    for name, figure in make_figures(run).items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
        run_folder.write_atomic(folder / run_folder.FIGURES / f"{name}.png", buffer.getvalue())
        pictures[name] = buffer.getvalue()
    path = folder / run_folder.REPORT
    run_folder.write_atomic(path, render(run, pictures))
    return path


def render(run: Record, pictures: Mapping[str, bytes]) -> str:
    """The page: one file, no external resource.

    Args:
        run: what to report.
        pictures: PNGs by the names of `CAPTIONS`, in the order shown.
    """
    document, preset = run.document, run.config["preset"]
    figures = "\n".join(
        f'<figure><img alt="{name}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        f"<figcaption>{html.escape(CAPTIONS[name])}</figcaption></figure>"
        for name, png in pictures.items()
    )
    body = "\n".join(
        f'<tr class="group"><th colspan="{len(COLUMNS)}">{html.escape(title)}</th></tr>'
        + "".join(map(_row, rows))
        for title, rows in table_groups(document)
    )
    heads = "".join(f"<th>{name}</th>" for name in COLUMNS)
    details = {
        "preset": preset | run.config["options"],
        "network": document["network"],
        "Hessian": _details(document, "hessian"),
        "Gauss-Newton": _details(document, "gauss_newton"),
        "seconds": document["seconds"],
        "versions": document["versions"],
        "device": document["device"],
    }
    lists = "".join(_definitions(title, values) for title, values in details.items() if values)
    command = f"<p>Made by <code>{html.escape(document['command'])}</code></p>"
    return PAGE.format(
        title=html.escape(f"Pruning limit: {preset['name']}, seed {run.config['options']['seed']}"),
        headline=html.escape(headline(document)),
        table=f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>",
        notes="".join(f"<p>{html.escape(note)}</p>" for note in notes(document)),
        figures=figures,
        details=lists + command,
    )


def _row(cells: Sequence[str]) -> str:
    head, *rest = map(html.escape, cells)
    return f"<tr><th>{head}</th>{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>"


def _details(document: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = document["limits"].get(name, {})
    return {key: value for key, value in found.items() if key not in (*LIMITS, "reference")}


def _definitions(title: str, values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(key.replace('_', ' '))}</th><td>{html.escape(_shown(value))}</td></tr>"
        for key, value in values.items()
    )
    return f"<section><h3>{html.escape(title)}</h3><table>{rows}</table></section>"


def _shown(value: Any) -> str:
    if value is None:
        return "default"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (
        f"{value:.5g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    )


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 60rem;
  margin: 2rem auto; padding: 0 1.2rem; }}
h1 {{ font-size: 1.6rem; margin-bottom: .2rem; }}
h2 {{ font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }}
h3 {{ font-size: 1rem; margin: 1rem 0 .3rem; }}
.lead {{ font-size: 1.05rem; color: #444; margin-top: 0; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: .18rem .7rem; vertical-align: top; }}
th:first-child {{ text-align: left; font-weight: normal; }}
thead th {{ border-bottom: 2px solid #444; font-weight: 600; }}
.group th {{ font-weight: 600; padding-top: .7rem; }}
.notes p {{ margin: .25rem 0; font-size: .9rem; color: #444; }}
figure {{ margin: 1.6rem 0; }}
figure img {{ width: 100%; max-width: 46rem; display: block; }}
figcaption {{ font-size: .9rem; color: #444; max-width: 46rem; }}
.details {{ columns: 2 22rem; font-size: .85rem; }}
.details section {{ break-inside: avoid; }}
.details th, .details td {{ text-align: left; padding: .05rem .6rem .05rem 0; }}
code {{ background: #f3f3f3; padding: .1rem .3rem; overflow-wrap: anywhere; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p class="lead">{headline}</p>
<h2>Predicted against measured</h2>
{table}
<div class="notes">{notes}</div>
<h2>Figures</h2>
{figures}
<h2>How it was made</h2>
<div class="details">{details}</div>
</body>
</html>
"""
