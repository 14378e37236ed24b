"""Stages of work, each computed once: performed as they come, or entered in limit.json of a folder.

A stage writes its files, and what it found is then entered in limit.json with the seconds it took. Work that
was interrupted goes through the same stages and loads what is entered.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from jaxlimit.application import machine, run_folder
from jaxlimit.core.terminal import Monitor
from jaxlimit.core.writing import FORMAT, content_of, read_json, remove, write_json


class Result(Protocol):
    """What a stage found."""

    def to_json(self) -> dict[str, Any]:
        """Its part of limit.json."""
        ...


R = TypeVar("R", bound=Result)
T = TypeVar("T")


@dataclass(frozen=True)
class Found(Generic[T]):
    """A result with its part of limit.json beside it."""

    value: T
    part: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Its part of limit.json."""
        return self.part


@dataclass(frozen=True)
class Stage(Generic[R]):
    """A stage of a run.

    Attributes:
        name: in limit.json.
        title: on the screen.
        total: number of units of work that its progress counts.
        compute: `compute() -> result`.
        load: `load(limit.json) -> result`, where an earlier process has computed it.
        told: `told(result)`, the sentence on the screen.
        checkpoint: folder that is removed once the result is entered, or None.
    """

    name: str
    title: str
    total: int
    compute: Callable[[], R]
    load: Callable[[Mapping[str, Any]], R]
    told: Callable[[R], str]
    checkpoint: Path | None = None


class Performer:
    """Performs stages one after the other and keeps nothing.

    Args:
        monitor: told about the progress.
    """

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    def perform(self, stage: Stage[R]) -> R:
        """The result of a stage."""
        self._monitor.start(stage.title, stage.total)
        result = stage.compute()
        self._monitor.finish(stage.told(result))
        return result


class Ledger(Performer):
    """limit.json of a run under way: what its stages have found so far.

    Args:
        folder: of the run.
        command: as typed.
        monitor: told about the progress.
    """

    def __init__(self, folder: Path, command: str, monitor: Monitor) -> None:
        super().__init__(monitor)
        self._path = folder / run_folder.LIMIT
        self.document: dict[str, Any] = {
            "format": FORMAT,
            "finished": False,
            "command": command,
            "network": {},
            "loss_statistics": {},
            "loss_tolerance": None,
            "limits": {},
            "measured": {},
            "seconds": {},
        }
        if self._path.exists():
            self.document |= _like(self.document, self._path)
        self.document |= {"command": command, "versions": machine.versions(), "device": machine.device()}

    def perform(self, stage: Stage[R]) -> R:
        """The result of a stage: computed and entered, or loaded where it is entered."""
        entered = stage.name in self.document["seconds"]
        self._monitor.start(stage.title, 1 if entered else stage.total)
        start = time.perf_counter()
        if entered:
            with content_of(self._path):
                result = stage.load(self.document)
        else:
            result = stage.compute()
            self._enter(result.to_json())
            self.document["seconds"][stage.name] = round(time.perf_counter() - start, 2)
            write_json(self._path, self.document)
        if stage.checkpoint is not None:
            remove(stage.checkpoint)
        self._monitor.finish("loaded" if entered else stage.told(result))
        return result

    def _enter(self, found: Mapping[str, Any]) -> None:
        """Limits and thresholds stand beside those of other stages."""
        for name, value in found.items():
            both = name in ("limits", "measured")
            self.document[name] = self.document[name] | value if both else value


def _like(empty: dict[str, Any], path: Path) -> dict[str, Any]:
    """limit.json, with the names of an empty one and values of their kinds."""
    stored = read_json(path)
    with content_of(path):
        for name, value in empty.items():
            if isinstance(value, dict | list) and not isinstance(stored[name], type(value)):
                raise TypeError(f"{name} is {stored[name]!r}")
    return stored
