"""The folder of a run: what is in it, written so that it is readable at any moment, and read back.

    config.json           the preset and the options, all that decides the numbers
    weights.safetensors   every parameter of the trained network, named like layers.0.kernel
    limit.json            limits, measured thresholds, versions, seconds; grows stage by stage
    spectrum-NAME.npz     per curvature: spectral measure, delta(s) / D, limits against the loss tolerance
    curves.csv            one row a sparsity: loss and accuracy, measured without and with fine-tuning
    figures/, report.html

A file is written beside its place and renamed, and a stage is entered in limit.json after its other files,
so whatever limit.json names is there and whole.
"""

import csv
import io
import json
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

import jaxlimit
from jaxlimit.limits.estimate import LIMITS, Estimate
from jaxlimit.limits.result import LimitCurve, PruningLimit, Sensitivity
from jaxlimit.spectrum.measure import SpectralMeasure
from jaxlimit.training.losses import CURVATURES

FORMAT = 1
CONFIG, LIMIT, CURVES, WEIGHTS, REPORT = (
    "config.json",
    "limit.json",
    "curves.csv",
    "weights.safetensors",
    "report.html",
)
FIGURES = "figures"


def write_atomic(path: Path, content: bytes | str) -> None:
    """Writes a file whole or not at all; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Writes strict JSON (no NaN), indented, atomically."""
    write_atomic(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a JSON object, or of another format than this version's.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: {path.parent} is not the folder of a run, or not yet far enough."
        )
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged, it is not JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{path} is not of a run of this version (its format must be {FORMAT}).")
    return document


def write_columns(path: Path, columns: Mapping[str, NDArray[np.float64]]) -> None:
    """Writes a table as CSV with all digits, NaN as an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in zip(*columns.values(), strict=True):
        writer.writerow("" if np.isnan(value) else repr(float(value)) for value in row)
    write_atomic(path, text.getvalue())


def read_columns(path: Path) -> dict[str, NDArray[np.float64]]:
    """Reads what `write_columns` wrote, to the same bits.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row has a wrong number of cells or a cell is no number; the message names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing.")
    with path.open(newline="") as file:
        lines = list(csv.reader(file))
    if not lines or "sparsity" not in lines[0]:
        raise ValueError(f"{path} is damaged: its first line must name the columns, one of them sparsity.")
    values = np.full((len(lines) - 1, len(lines[0])), np.nan)
    for number, cells in enumerate(lines[1:]):
        try:
            values[number] = [float(cell) if cell else np.nan for cell in cells]
        except ValueError as error:
            raise ValueError(f"{path} is damaged in line {number + 2}: {error}") from error
    return dict(zip(lines[0], values.T, strict=True))


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide the numbers."""
    # Not that of an installed package: a source tree need not be installed.
    own = {"python": platform.python_version(), "jaxlimit": jaxlimit.__version__}
    return own | {name: version(name) for name in ("jax", "jaxlib", "numpy", "scipy", "flax", "optax")}


def device() -> dict[str, Any]:
    """What the numbers were computed on."""
    devices = jax.devices()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "count": len(devices),
        "cpu_cores": cores,
        "system": f"{platform.system()} {platform.machine()}",
    }


def save_spectrum(path: Path, limit: PruningLimit, sparsities: NDArray[np.float64]) -> None:
    """Stores what the plots need of a limit: its measure, curve and sensitivity."""
    arrays: dict[str, Any] = {"nodes": limit.measure.nodes, "weights": limit.measure.weights}
    arrays |= {f"curve_{name}": array for name, array in vars(limit.curve(sparsities)).items()}
    sensitivity = vars(limit.sensitivity())
    arrays |= {f"sensitivity_{name}": array for name, array in sensitivity.items() if array is not None}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomic(path, buffer.getvalue())


@dataclass(frozen=True)
class Spectrum:
    """What the plots need of one curvature, read back from disk."""

    measure: SpectralMeasure
    curve: LimitCurve
    sensitivity: Sensitivity


def load_spectrum(path: Path) -> Spectrum:
    """Reads what `save_spectrum` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing.")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        curve = {name: arrays[f"curve_{name}"] for name in LimitCurve.__dataclass_fields__}
        sensitivity: dict[str, Any] = {
            name: arrays.get(f"sensitivity_{name}") for name in Sensitivity.__dataclass_fields__
        }
        return Spectrum(
            SpectralMeasure(arrays["nodes"], arrays["weights"]),
            LimitCurve(**curve),
            Sensitivity(**sensitivity),
        )
    # NumPy raises whatever the damage leads to: BadZipFile, zlib.error, EOFError, ...
    except Exception as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def spectrum_path(folder: Path, curvature: str) -> Path:
    """Where the spectrum of a curvature is stored."""
    return folder / f"spectrum-{curvature}.npz"


def checkpoint_path(folder: Path, stage: str) -> Path:
    """Where training, or the Lanczos runs of a curvature, are kept until they are finished."""
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
    config, document = read_json(folder / CONFIG), read_json(folder / LIMIT)
    if not document.get("finished"):
        raise ValueError(
            f"the run in {folder} is not finished: go on with it first ({document.get('command')})."
        )
    spectra = {name: load_spectrum(spectrum_path(folder, name)) for name in document["limits"]}
    return Record(config, document, read_columns(folder / CURVES), spectra)


def prepare_folder(folder: Path, config: Mapping[str, Any], *, overwrite: bool) -> bool:
    """Makes the folder of a run, or finds out that a run in it can be continued.

    Args:
        folder: of the run.
        config: what decides its numbers; a folder with another one is refused.
        overwrite: remove the files of a run that is there. Other files are never touched.

    Returns:
        True if there is an unfinished run of the same configuration.

    Raises:
        ValueError: the folder holds a finished run, one of another configuration, or files of something else.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name another folder with --out.")
    if not (folder / CONFIG).exists():
        foreign = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        foreign = [name for name in foreign if name != CONFIG + ".tmp"]
        if foreign:
            raise ValueError(
                f"{folder} holds files that are not of a run ({foreign[0]}, ...): name another --out."
            )
        write_json(folder / CONFIG, config)
        return False
    if overwrite:
        _remove_run(folder)
        write_json(folder / CONFIG, config)
        return False
    finished = (folder / LIMIT).exists() and read_json(folder / LIMIT).get("finished", False)
    if finished:
        raise ValueError(
            f"{folder} holds a finished run: name another --out, or replace it with --overwrite."
        )
    different = _differences(read_json(folder / CONFIG), config)
    if different:
        raise ValueError(
            f"{folder} holds an unfinished run with {'; '.join(different)}: give the same options to go on, "
            "name another --out, or replace it with --overwrite."
        )
    return True


def _differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    return [
        f"{'preset' if name == 'name' else name} = {stored.get(section, {}).get(name)}, not {value}"
        for section in ("preset", "options")
        for name, value in wanted[section].items()
        if stored.get(section, {}).get(name) != value
    ]


def _remove_run(folder: Path) -> None:
    # limit.json first: without it no stage counts as done, so an interrupt here leaves nothing misleading.
    for name in (LIMIT, REPORT, CURVES, WEIGHTS):
        (folder / name).unlink(missing_ok=True)
    for stage in ("training", *CURVATURES):
        shutil.rmtree(checkpoint_path(folder, stage), ignore_errors=True)
    for curvature in CURVATURES:
        spectrum_path(folder, curvature).unlink(missing_ok=True)
    for figure in (folder / FIGURES).glob("*.png"):
        figure.unlink()
