"""The one writer: a file is written whole or not at all.

It is written beside its place under a name of its own, brought to the disk and renamed, so that a process
killed at any moment leaves either the old file or the new one.
"""

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

FORMAT = 1
"""Version of the JSON files: what their names mean."""
REMEDY = "remove it, and the command that wrote it computes it anew"
"""What to do where a file is damaged."""


class DamagedFile(ValueError):
    """A file does not hold what was written to it; `remove` is the file or folder to remove."""

    def __init__(self, message: str, remove: Path) -> None:
        super().__init__(message)
        self.remove = remove


# Names of what is being written or removed, or was when its process was killed.
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp$")


def is_leftover(path: Path) -> bool:
    """Whether this is what `write_file` or `remove` has not finished."""
    return _TEMPORARY.search(path.name) is not None


def remove(path: Path) -> None:
    """Removes a file or a folder, if there is one: a folder is gone as a whole or not at all."""
    if path.is_dir() and not is_leftover(path):
        path = path.rename(_temporary(path))
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")


def write_file(path: Path, content: bytes | str | Callable[[BinaryIO], object]) -> None:
    """Writes a file whole or not at all; makes its folder.

    Args:
        path: where to.
        content: what to write, or a function that writes it to the file it is handed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
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


def read_json(path: Path, kind: str = "a run", *, alone: bool = True) -> dict[str, Any]:
    """Reads a JSON object in this version's format.

    Args:
        path: of the file.
        kind: of work that it belongs to, for the messages.
        alone: where it is damaged it may be removed alone; otherwise its folder with it.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFile: it is not a JSON object, or of another format than this version's.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: {path.parent} is not the folder of {kind}, or not yet far enough."
        )
    remedy = REMEDY if alone else f"remove {path.parent} to start anew"
    try:
        document = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        message = f"{path} is damaged, it is not JSON ({error}): {remedy}."
        raise DamagedFile(message, path if alone else path.parent) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        message = f"{path} is not of {kind} of this version (its format must be {FORMAT})."
        raise DamagedFile(message, path if alone else path.parent)
    return document


@contextlib.contextmanager
def content_of(path: Path, *also: type[Exception]) -> Iterator[None]:
    """A block that uses what was read from a file: what is missing or of another kind is said of the file.

    Args:
        path: of the file.
        also: what else is raised where a value of the file is wrong.

    Raises:
        DamagedFile: in place of these errors, and of those of a missing name or a wrong type.
    """
    try:
        yield
    except (LookupError, TypeError, AttributeError, StopIteration, *also) as error:
        what = f"{type(error).__name__}: {error}"
        raise DamagedFile(f"{path} is damaged, or of another version ({what}): {REMEDY}.", path) from error
