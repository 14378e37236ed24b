"""What the plots need of a limit, on disk: its spectral measure, curve and sensitivity, as NumPy arrays."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxlimit.core.writing import DamagedFile, write_file
from jaxlimit.limits.result import LimitCurve, PruningLimit, Sensitivity
from jaxlimit.spectrum.measure import SpectralMeasure


def save_spectrum(path: Path, limit: PruningLimit, sparsities: NDArray[np.float64]) -> None:
    """Stores what the plots need of a limit: its measure, curve and sensitivity."""
    arrays: dict[str, Any] = {"nodes": limit.measure.nodes, "weights": limit.measure.weights}
    arrays |= {f"curve_{name}": array for name, array in vars(limit.curve(sparsities)).items()}
    sensitivity = vars(limit.sensitivity())
    arrays |= {f"sensitivity_{name}": array for name, array in sensitivity.items() if array is not None}
    write_file(path, lambda file: np.savez_compressed(file, **arrays))


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
        raise DamagedFile(f"{path} is damaged: {error}", path) from error
