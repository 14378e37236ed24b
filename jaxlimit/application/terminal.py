"""Progress of a run on the screen."""

import sys
import time
from typing import Any, Protocol

from jaxlimit.core.interrupt import Interrupt

# Seconds between two lines on the progress of a stage, where there is no terminal to show a bar.
QUIET = 60.0


class Monitor(Protocol):
    """Shows how far a run is."""

    def start(self, title: str, total: int) -> None:
        """A stage of `total` units of work begins."""
        ...

    def update(self, done: int, note: str = "") -> None:
        """So many units are done."""
        ...

    def finish(self, note: str) -> None:
        """The stage is over."""
        ...


def make_monitor(interrupt: Interrupt) -> "Bars | Lines":
    """Bars on a terminal, lines elsewhere; both on standard error."""
    return Bars(interrupt) if sys.stderr.isatty() else Lines(interrupt)


class Silent:
    """No progress is shown; Ctrl-C is heard."""

    def __init__(self, interrupt: Interrupt):
        self._interrupt = interrupt

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self, title: str, total: int) -> None:
        """Says nothing."""

    def update(self, done: int, note: str = "") -> None:
        """Says nothing."""
        self._interrupt.check()

    def finish(self, note: str) -> None:
        """Says nothing."""
        self._interrupt.check()


class Lines:
    """Progress where there is no terminal: a line for each stage, and one a minute in a long one."""

    def __init__(self, interrupt: Interrupt):
        self._interrupt, self._title, self._total = interrupt, "", 0
        self._start = self._last = time.perf_counter()

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self, title: str, total: int) -> None:
        """Sets the clock of a stage."""
        self._title, self._total = title, total
        self._start = self._last = time.perf_counter()

    def update(self, done: int, note: str = "") -> None:
        """Prints a line if the last one is a minute old."""
        self._interrupt.check()
        if time.perf_counter() - self._last > QUIET:
            self._last = time.perf_counter()
            self._print(f"{done:,} of {self._total:,} {note}")

    def finish(self, note: str) -> None:
        """Prints the stage with its seconds."""
        self._interrupt.check()
        self._print(note)

    def _print(self, note: str) -> None:
        seconds = time.perf_counter() - self._start
        print(f"{self._title:<20}{seconds:8.1f} s  {note}", file=sys.stderr, flush=True)


class Bars:
    """Progress on a terminal: a bar for each stage, with what is done, the time left and the state."""

    def __init__(self, interrupt: Interrupt):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._interrupt = interrupt
        self._progress = Progress(
            TextColumn("{task.description:<19}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        self._task: Any = None

    def __enter__(self) -> "Bars":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def start(self, title: str, total: int) -> None:
        """Adds a bar."""
        self._task = self._progress.add_task(title, total=total, note="")

    def update(self, done: int, note: str = "") -> None:
        """Moves the bar."""
        self._interrupt.check()
        self._progress.update(self._task, completed=done, note=note)

    def finish(self, note: str) -> None:
        """Fills the bar."""
        self._interrupt.check()
        task = self._progress.tasks[self._task]
        # The total of the products is a budget, and that of a sweep an estimate: what was done is all.
        self._progress.update(
            self._task, completed=max(task.completed, 1), total=max(task.completed, 1), note=note
        )
