"""The folder of a run: what is in it, written so that it is readable at any moment, and read back.

    config.json           the preset and the options, all that decides the numbers
    weights.safetensors   every parameter of the trained network, named like layers.0.kernel
    limit.json            limits, measured thresholds, versions, seconds; grows stage by stage
    spectrum-NAME.npz     per curvature: spectral measure, delta(s) / D, limits against the loss tolerance
    curves.csv            one row a sparsity: loss and accuracy, measured without and with fine-tuning
    pruned.safetensors    the sparsest network that was attained, and its masks
    pruned-torch.safetensors  the same network as a state dict of PyTorch
    certified.safetensors, certified-torch.safetensors  the sparsest network that is certified, likewise
    figures/, report.html

A stage is entered in limit.json after its other files, so whatever limit.json names is there and whole.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxlimit.application.columns import read_columns
from jaxlimit.application.spectra import Spectrum, load_spectrum
from jaxlimit.core.locks import lock
from jaxlimit.core.storage import Claim, Purpose, claim, stored_identity
from jaxlimit.core.writing import content_of, read_json, remove, write_json
from jaxlimit.limits.estimate import LIMITS, Estimate
from jaxlimit.training.losses import CURVATURES

CONFIG, LIMIT, CURVES, MODEL, PRUNED, PRUNED_TORCH, CERTIFIED, CERTIFIED_TORCH, REPORT = (
    "config.json",
    "limit.json",
    "curves.csv",
    "weights.safetensors",
    "pruned.safetensors",
    "pruned-torch.safetensors",
    "certified.safetensors",
    "certified-torch.safetensors",
    "report.html",
)
FIGURES = "figures"
RUN = Purpose(
    "a run",
    CONFIG,
    "{folder} holds files that are not of a run ({file}, ...): name another --out.",
    "{folder} holds an unfinished run with {values}: give the same options to go on, name another --out, or "
    "replace it with --overwrite.",
)


def spectrum_path(folder: Path, curvature: str) -> Path:
    """Where the spectrum of a curvature is stored."""
    return folder / f"spectrum-{curvature}.npz"


def checkpoint_path(folder: Path, stage: str) -> Path:
    """Where training, the Lanczos runs of a curvature, or fine-tuned rows are kept until all are there."""
    return folder / f"checkpoint-{stage}"


@dataclass(frozen=True)
class Record:
    """A run, read from its folder.

    Attributes:
        config: config.json.
        document: limit.json.
        columns: curves.csv; empty before the sweep.
        spectra: by curvature.
    """

    config: dict[str, Any]
    document: dict[str, Any]
    columns: dict[str, NDArray[np.float64]]
    spectra: dict[str, Spectrum]

    @property
    def limits(self) -> dict[str, dict[str, Estimate]]:
        """The estimates, by curvature and name."""
        return {
            curvature: {name: Estimate(**found[name]) for name in LIMITS if name in found}
            for curvature, found in self.document["limits"].items()
        }

    def measured_curve(self, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Sparsities and values of a column of curves.csv, where it was measured."""
        sparsity = self.columns["sparsity"]
        values = self.columns.get(name, np.full(len(sparsity), np.nan))
        known = ~np.isnan(values)
        return sparsity[known], values[known]


def read_record(folder: Path) -> Record:
    """Reads the folder of a finished run.

    Raises:
        FileNotFoundError: no folder, or a file is missing.
        ValueError: a file is damaged, or the run is not finished; the message says which.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}.")
    config, document = read_json(folder / CONFIG, alone=False), read_json(folder / LIMIT)
    if not document.get("finished"):
        raise ValueError(
            f"the run in {folder} is not finished: go on with it first ({document.get('command')})."
        )
    with content_of(folder / CONFIG):
        _ = config["preset"]["name"], config["options"]["seed"]
    with content_of(folder / LIMIT):
        paths = {name: spectrum_path(folder, name) for name in document["limits"]}
    spectra = {name: load_spectrum(path) for name, path in paths.items()}
    return Record(config, document, read_columns(folder / CURVES), spectra)


def is_finished(folder: Path) -> bool:
    """Whether the run in a folder has come to its end."""
    return (folder / LIMIT).exists() and read_json(folder / LIMIT).get("finished", False) is True


def prepare_folder(folder: Path, config: Mapping[str, Any], *, overwrite: bool) -> Claim:
    """Makes the folder of a run, or finds out that a run in it can be continued.

    Args:
        folder: of the run.
        config: what decides its numbers; a folder with another one is refused.
        overwrite: remove the files of a run that is there. Other files are never touched.

    Returns:
        The folder in use, to be kept until the run is done; `.resumed` where it holds an unfinished run of
        the same configuration.

    Raises:
        ValueError: the folder holds a finished run, one of another configuration, or files of something else;
            or another process works there.
    """
    there = (folder / CONFIG).exists()
    if not there:
        stored_identity(folder, RUN, config)  # refuses files of something else before anything is written
    held = lock(folder, wait=False)
    if there and overwrite:
        _remove_run(folder)
        write_json(folder / CONFIG, config)
    elif is_finished(folder):
        raise ValueError(
            f"{folder} holds a finished run: its results are in {folder / REPORT}, which `jaxlimit report "
            f"{folder}` makes again. Name another --out for another run, or replace it with --overwrite."
        )
    found = claim(folder, RUN, config, wait=False)
    return Claim(held, found.resumed and not overwrite)


def _remove_run(folder: Path) -> None:
    # limit.json first: without it no stage counts as done, so an interrupt here leaves nothing misleading.
    for name in (LIMIT, REPORT, CURVES, MODEL, PRUNED, PRUNED_TORCH, CERTIFIED, CERTIFIED_TORCH):
        remove(folder / name)
    for stage in ("training", *CURVATURES, "finetuned", "attained", "networks"):
        remove(checkpoint_path(folder, stage))
    for curvature in CURVATURES:
        remove(spectrum_path(folder, curvature))
    for kind in ("*.png", "*.pdf"):
        for figure in (folder / FIGURES).glob(kind):
            remove(figure)
