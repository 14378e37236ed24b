"""Progress of a run on the screen, and Ctrl-C."""

import contextlib
import functools
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

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


class Interrupt:
    """Remembers Ctrl-C: raised inside a callback of the garbage collector, it gets lost there."""

    def __init__(self) -> None:
        self.pressed, self._restore = False, contextlib.ExitStack()

    def __enter__(self) -> "Interrupt":
        with contextlib.suppress(ValueError):  # not the main thread: leave signals alone
            self._restore.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, self._press))
            self._restore.callback(setattr, sys, "unraisablehook", sys.unraisablehook)
            sys.unraisablehook = functools.partial(_unless_ctrl_c, sys.unraisablehook)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore.close()

    def _press(self, *_: object) -> None:
        self.pressed = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raises KeyboardInterrupt if it was pressed and got lost."""
        if self.pressed:
            raise KeyboardInterrupt


def _unless_ctrl_c(report: Callable[[Any], object], unraisable: Any) -> None:
    """Reports an exception that got lost; of a Ctrl-C no traceback is printed, since it is remembered."""
    if unraisable.exc_type is not KeyboardInterrupt:
        report(unraisable)


def make_monitor(interrupt: Interrupt) -> "Bars | Lines":
    """Bars on a terminal, lines elsewhere; both on standard error."""
    return Bars(interrupt) if sys.stderr.isatty() else Lines(interrupt)


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
