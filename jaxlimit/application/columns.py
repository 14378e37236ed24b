"""Tables of numbers as CSV: a column for each quantity, all digits, read back to the same bits."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jaxlimit.core.writing import DamagedFile, write_file


def write_columns(path: Path, columns: Mapping[str, NDArray[np.float64]]) -> None:
    """Writes a table as CSV with all digits, NaN as an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in zip(*columns.values(), strict=True):
        writer.writerow("" if np.isnan(value) else repr(float(value)) for value in row)
    write_file(path, text.getvalue())


def read_columns(path: Path) -> dict[str, NDArray[np.float64]]:
    """Reads what `write_columns` wrote, to the same bits.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row has a wrong number of cells or a cell is no number; the message names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing.")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.reader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DamagedFile(f"{path} is damaged, no table of text: {error}", path) from error
    if not lines or "sparsity" not in lines[0]:
        message = f"{path} is damaged: its first line must name the columns, one of them sparsity."
        raise DamagedFile(message, path)
    values = np.full((len(lines) - 1, len(lines[0])), np.nan)
    for number, cells in enumerate(lines[1:]):
        try:
            values[number] = [float(cell) if cell else np.nan for cell in cells]
        except ValueError as error:
            raise DamagedFile(f"{path} is damaged in line {number + 2}: {error}", path) from error
    return dict(zip(lines[0], values.T, strict=True))
