"""The folder of an assessment: what it is of, its stages entered in limit.json, and its report.

config.json           what decides the numbers
limit.json            limits, cut, attained, certificate, versions, seconds; grows stage by stage
spectrum-NAME.npz     per curvature: spectral measure, delta(s) / D, limits against the loss tolerance
pruned.safetensors    the attained network, and its masks
pruned-torch.safetensors  the same network as a state dict of PyTorch, if it is one of `jaxlimit.models`
certified.safetensors, certified-torch.safetensors  the sparsest network that is certified, likewise
figures/, report.html
"""

import importlib.util
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlimit import plots
from jaxlimit.application import page, run_folder
from jaxlimit.application.answering import Answering, answer
from jaxlimit.application.assessment import COLUMNS, Assessment
from jaxlimit.application.ledger import Found, Ledger, Stage
from jaxlimit.application.pruned_files import require_writable
from jaxlimit.application.question import Certifying, Question, arrays_of, first_batch
from jaxlimit.application.run_folder import CONFIG, FIGURES, REPORT
from jaxlimit.application.spectra import load_spectrum
from jaxlimit.core.leaves import is_array
from jaxlimit.core.storage import Purpose, about, claim, ordered_sum
from jaxlimit.core.terminal import Monitor
from jaxlimit.core.trees import PyTree, flatten, leaf_names, named_leaves, partition
from jaxlimit.core.writing import write_file
from jaxlimit.geometry.groups import group_labels
from jaxlimit.measuring.loss_statistics import LossStatistics
from jaxlimit.measuring.risks import ExampleRisks
from jaxlimit.pruning.readjustable import movable
from jaxlimit.pruning.statistics import statistics as statistics_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXTRA = ("safetensors", "matplotlib", "jinja2")
COMMAND = "jaxlimit.assess(...)"
ASSESSMENT = Purpose(
    "an assessment",
    CONFIG,
    "{folder} holds files that are not of an assessment ({file}, ...): name another out.",
    "{folder} holds an assessment with {values}: give the same arguments to go on, name another out, or "
    "remove the folder.",
)
# Devices may sum the loss up in another order.
SAME = 1e-4
CAPTIONS = {
    "assessment": "Loss and error of the network: cut as it is (line), and readjusted on the way to the "
    "attained limit (points). Above: the predicted limits, and what was measured.",
    "transition": "The phase transition. The statistical dimension of the cone falls as weights go; where it "
    "meets the diagonal, fewer weights are left than it takes to stay within the tolerance.",
    "spectrum": "Cumulative spectral measure, unsmoothed. Dotted: the ridge a of the width limit.",
    "sensitivity": "The limits if the loss tolerance were another one, from the same spectra.",
}


def require_extra() -> None:
    """Raises ImportError where a package that writes the folder is not installed."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'out needs {", ".join(missing)}: pip install "jaxlimit[cli]"')


def assess_into(
    folder: Path,
    question: Question,
    curvatures: Sequence[str],
    statistics: LossStatistics,
    monitor: Monitor,
) -> Assessment:
    """The assessment, each stage of which is computed once, whatever interrupts it.

    Args:
        folder: made if missing.
        question: what is asked.
        curvatures: which predict.
        statistics: of the losses of the batches.
        monitor: told about the progress.

    Raises:
        ValueError: the folder is of another assessment or something else, or a file in it is damaged; two
            arrays that would have one name in a file.
    """
    weights = question.weights
    require_writable(named_leaves(question.params), named_leaves(weights))
    held = claim(folder, ASSESSMENT, _identity(question, curvatures, statistics))
    try:
        ledger = Ledger(folder, COMMAND, monitor)
        ledger.document["loss_tolerance"] = question.loss_tolerance
        ledger.document["network"] = {"train_loss": statistics.mean}
        found = answer(Answering(question, folder, True, monitor), curvatures, ledger)

        def write(_: Any = None) -> Found[None]:
            write_report(folder, found, ledger.document)
            return Found(None, {"finished": True})

        where = str(folder / REPORT)
        ledger.perform(Stage("report", "report", 1, write, lambda _: Found(None, {}), lambda _: where))
    finally:
        held.lock.release()
    return found


def _identity(question: Question, curvatures: Sequence[str], statistics: LossStatistics) -> dict[str, Any]:
    """What decides the numbers, as JSON values."""
    certifying: Any = question.certifying
    if isinstance(certifying, Certifying):
        names = ("bounds", "bound", "rise", "confidence")
        certifying = {name: getattr(question.certifying, name) for name in names}
        certifying |= _tested(question.certifying, question.params)  # pyright: ignore
    key = question.key
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    weights, rest = partition(question.params, question.prunable)
    trainable = question.trainable
    numbers = ("tolerance", "attained_tolerance", "max_matvecs", "max_products")
    return {
        "dim": flatten(weights).size,
        "weights": _checksum(weights),
        "others": _checksum(rest),
        "scores": None if question.scores is None else _checksum(question.scores),
        "groups": None if question.groups is None else _checksum(group_labels(weights, question.groups)),
        "trainable": None if trainable is None else leaf_names(partition(question.params, trainable)[0]),
        "statistics": _statistics(question),
        "num_examples": statistics.num_examples,
        "loss": about(statistics.mean, SAME * abs(statistics.mean)),
        "loss_tolerance": about(question.loss_tolerance, SAME * question.loss_tolerance),
        "first_batch": _checksum(first_batch(question.batches)),
        "key": np.asarray(data).tolist(),
        "curvatures": list(curvatures),
        "certifying": certifying,
        **{name: getattr(question, name) for name in numbers},
        **asdict(question.settings),
    }


def _tested(certifying: Certifying, params: PyTree) -> dict[str, Any]:
    """All test examples, and what the unpruned network's risk on them is."""
    risks = ExampleRisks(certifying.error_fn, certifying.batches, certifying.bounds)(params)
    data = ordered_sum(np.array([_checksum(batch) for batch in arrays_of(certifying.batches)]))
    return {
        "test_examples": len(risks),
        "test_data": data,
        "risk": about(float(np.mean(risks)), SAME + 2 / len(risks)),
    }


def _statistics(question: Question) -> dict[str, float] | None:
    """What the statistics of the unpruned network are, taken anew."""
    if question.statistics_fn is None:
        return None
    moving = movable(question.params, question.prunable, question.trainable)
    return statistics_of(question.statistics_fn, *partition(question.params, moving)).identity


def _checksum(tree: PyTree) -> float:
    """Of all numbers: of random keys their bits, of complex ones both parts."""
    parts = []
    for x in filter(is_array, jax.tree.leaves(tree)):
        x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        parts += [x.real, x.imag] if jnp.issubdtype(x.dtype, jnp.complexfloating) else [x]
    return ordered_sum(flatten(parts))


def write_report(folder: Path, found: Assessment, document: Mapping[str, Any]) -> Path:
    """Writes figures/*.png and *.pdf, and report.html, and returns the path of the latter."""
    pictures = save_figures(folder, make_figures(folder, found))
    text = page.render(
        title="How sparse can this network be pruned?",
        sentences=found.sentences,
        tables=[table(found), pruned_table(document["pruned"], *certified_notes(document))],
        captions=CAPTIONS,
        pictures=pictures,
        details=page.details(document),
        command=document["command"],
    )
    write_file(folder / REPORT, text)
    return folder / REPORT


def save_figures(folder: Path, figures: Mapping[str, "Figure"]) -> dict[str, page.Picture]:
    """Writes figures/NAME.png and, one column wide for print, NAME.pdf; returns them for the page."""
    pictures = {}
    for name, figure in figures.items():
        path = folder / FIGURES / f"{name}.png"
        write_file(path, partial(figure.savefig, format="png", metadata={"Software": None}))
        plots.narrow(figure)
        pdf = {"Creator": None, "Producer": None, "CreationDate": None}
        write_file(path.with_suffix(".pdf"), partial(figure.savefig, format="pdf", metadata=pdf))
        shown = io.BytesIO()
        figure.savefig(shown, format="png", metadata={"Software": None})
        pictures[name] = page.Picture(path.read_bytes(), shown.getvalue())
    return pictures


def table(found: Assessment, notes: Sequence[str] = ()) -> page.Table:
    """The table of an assessment, for the page, with further notes."""
    return page.Table("Predicted, attained, certified", COLUMNS, found.rows(), [*found.notes(), *notes])


def certified_notes(document: Mapping[str, Any]) -> list[str]:
    """Where the certified network is; folders of before have none."""
    name = document.get("certified_file")
    return [f"In {name}: the certified network of {document['certificate']['sparsity']:.4f}."] if name else []


def pruned_table(sizes: Mapping[str, Any], *notes_on_others: str) -> page.Table:
    """What is left of the attained network, and how large it is; with notes on other networks."""
    rows = [(name, f"{share:.2%}") for name, share in sizes["kept_share"].items()]
    notes = [
        f"In {run_folder.PRUNED}: the network, and beside each pruned array NAME its mask, NAME.mask. All "
        f"parameters take {sizes['bytes']:,} bytes; compressed by zlib {sizes['compressed_bytes']:,}, before "
        f"pruning {sizes['dense_compressed_bytes']:,}."
    ]
    if "shrunk_num_params" in sizes:
        left, whole = sizes["shrunk_num_params"], sizes["num_params"]
        notes.append(
            f"Without the units that compute nothing, by jaxlimit.shrink: {left:,} of {whole:,} parameters."
        )
    if sizes.get("torch"):
        notes.append(f"In {sizes['torch']}: the same network as a state dict of PyTorch.")
    if sizes["vanished"]:
        notes.append(f"Warning: nothing is left of {', '.join(sizes['vanished'])}.")
    notes += notes_on_others
    return page.Table("The pruned network", ("", "kept"), [("Share of the weights kept", rows)], notes)


def make_figures(folder: Path, found: Assessment) -> dict[str, "Figure"]:
    """The figures by name, in the order of `CAPTIONS`."""
    spectra = {name: load_spectrum(run_folder.spectrum_path(folder, name)) for name in found.predicted}
    limits = {name: limit.estimates() for name, limit in found.predicted.items()}
    halfwidth = next(iter(found.predicted.values())).transition_halfwidth
    ridges = {name: limit.ridge for name, limit in found.predicted.items()}
    return {
        "assessment": plot(found),
        "transition": plots.plot_transition({n: x.curve for n, x in spectra.items()}, limits, halfwidth),
        "spectrum": plots.plot_spectrum({n: x.measure for n, x in spectra.items()}, ridges),
        "sensitivity": plots.plot_sensitivity(
            {n: x.sensitivity for n, x in spectra.items()}, found.attained.loss_tolerance, limits=limits
        ),
    }


def plot(found: Assessment) -> "Figure":
    """Loss and error against sparsity, as cut and as attained, below the limits."""
    cut, attained, certificate = found.cut, found.attained, found.certificate
    grid = np.array(cut.sparsities)
    tried = np.array(sorted(attained.tried)).reshape(-1, 2)
    bound = attained.dense_loss + attained.loss_tolerance
    panels = {"loss": {"cut": (grid, np.array(cut.losses, float)), "attained": (tried[:, 0], tried[:, 1])}}
    bounds = {"loss": (bound, "loss before, plus tolerance")}
    measured = {"cut within the tolerance": cut.sparsity, "sparsest attained": attained.sparsity}
    dense = found.dense_error
    if cut.errors is not None and dense is not None and certificate is not None:
        paired = certificate.bounds[0] < 0
        errors = dict(zip(certificate.sparsities, certificate.means, strict=True))
        points = {s: error + (dense if paired else 0.0) for s, error in errors.items()}
        if found.attained_error is not None:
            points[attained.sparsity] = found.attained_error
        panels["test error"] = {
            "cut": (grid, np.array(cut.errors, float)),
            "attained": (np.array([*points]), np.array([*points.values()])),
        }
        bounds["test error"] = (certificate.bound + (dense if paired else 0.0), "bound to be certified")
        if certificate.sparsity is not None:
            measured["certified"] = certificate.sparsity
    limits = {name: limit.estimates() for name, limit in found.predicted.items()}
    return plots.plot_assessment(panels, limits=limits, measured=measured, bounds=bounds)
