"""The one writer: a file is written whole or not at all.

It is written beside its place under a name of its own, brought to the disk and renamed, so that a process
killed at any moment leaves either the old file or the new one.
"""

import contextlib
import json
import os
import re
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

FORMAT = 1
"""Version of the JSON files: what their names mean."""


# Names of files that are being written, or were when their process was killed.
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp$")


def is_leftover(path: Path) -> bool:
    """Whether this is a file that a writer of this module has not finished."""
    return _TEMPORARY.search(path.name) is not None and path.is_file()


def write_file(path: Path, content: bytes | str | Callable[[BinaryIO], object]) -> None:
    """Writes a file whole or not at all; makes its folder.

    Args:
        path: where to.
        content: what to write, or a function that writes it to the file it is handed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # the new name, too, is to outlive a power cut; not on Windows
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Writes strict JSON (no NaN), indented."""
    write_file(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def read_json(path: Path, kind: str = "a run") -> dict[str, Any]:
    """Reads a JSON object in this version's format.

    Args:
        path: of the file.
        kind: of work that it belongs to, for the messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a JSON object, or of another format than this version's.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: {path.parent} is not the folder of {kind}, or not yet far enough."
        )
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged, it is not JSON ({error}): remove {path.parent} to start anew."
        ) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{path} is not of {kind} of this version (its format must be {FORMAT}).")
    return document
