"""Progress on the screen: of a run, stage by stage, and of a function that is called with `progress=True`."""

import functools
import html
import importlib.util
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

from jaxlimit.core.interrupt import Interrupt

# Seconds between two lines on the progress of a stage, where there is no terminal to show a bar; and between
# two moves of a bar in a notebook.
QUIET, MOVED = 60.0, 0.2
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class Shown(NamedTuple):
    """What a bar shows: the title of a stage, how much of how much work is done, and a note."""

    title: str
    done: int
    total: int
    note: str = ""


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


def make_monitor(interrupt: Interrupt) -> "Bars | Cells | Lines":
    """Bars in a notebook; on standard error bars on a terminal where rich can draw them, else lines."""
    if _in_notebook():
        return Cells(interrupt)
    if importlib.util.find_spec("rich") is not None and sys.stderr.isatty():
        return Bars(interrupt)
    return Lines(interrupt)


def _in_notebook() -> bool:
    """Whether IPython runs this as the kernel of a notebook, not as a shell on a terminal."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None


def takes_bar(
    read: Callable[..., Shown],
) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Lets a function with a keyword `progress`, which it calls with its news, take True: to show a bar.

    Args:
        read: what the bar shows of the news; a bar for each title.

    Examples:
        >>> @takes_bar(lambda done: Shown("squares", done, 3))
        ... def squares(*, progress=None):
        ...     for i in range(3):
        ...         if callable(progress): progress(i)
        ...     return [0, 1, 4]
        >>> squares(progress=True), squares(progress=print)
        0
        1
        2
        ([0, 1, 4], [0, 1, 4])
    """

    def decorated(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        @functools.wraps(function)
        def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            progress: Any = kwargs.get("progress")
            if progress is None or progress is False or callable(progress):
                return function(*args, **kwargs)
            if progress is not True:
                raise ValueError(f"progress must be True or a function, got {progress!r:.50}.")
            with Interrupt() as interrupt, make_monitor(interrupt) as monitor:
                bar = _Bar(monitor, read)
                kwargs["progress"] = bar
                result = function(*args, **kwargs)
                bar.finish()
            return result

        return call

    return decorated


class _Bar:
    """A function that is called with news, and shows them."""

    def __init__(self, monitor: Monitor, read: Callable[..., Shown]) -> None:
        self._monitor, self._read = monitor, read
        self._last: Shown | None = None

    def __call__(self, *news: Any) -> None:
        shown = self._read(*news)
        if self._last is None or shown.title != self._last.title:
            self.finish()
            self._monitor.start(shown.title, shown.total)
        self._last = shown
        self._monitor.update(shown.done, shown.note)

    def finish(self) -> None:
        """Of the last title."""
        if self._last is not None:
            self._monitor.finish(self._last.note)


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


class Cells:
    """Progress in a notebook: a bar for each stage below the cell, in the page's own HTML."""

    def __init__(self, interrupt: Interrupt):
        self._interrupt, self._title, self._done, self._total = interrupt, "", 0, 0
        self._handle: Any = None
        self._start = self._last = time.perf_counter()

    def __enter__(self) -> "Cells":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self, title: str, total: int) -> None:
        """Adds a bar."""
        from IPython.display import display

        self._title, self._done, self._total = title, 0, total
        self._start = self._last = time.perf_counter()
        self._handle = display(self._shown(0, ""), raw=True, display_id=True)

    def update(self, done: int, note: str = "") -> None:
        """Moves the bar, a few times a second at most."""
        self._interrupt.check()
        self._done = done
        if time.perf_counter() - self._last > MOVED:
            self._last = time.perf_counter()
            self._handle.update(self._shown(done, note), raw=True)

    def finish(self, note: str) -> None:
        """Fills the bar: what was done is all, and took so many seconds."""
        self._interrupt.check()
        self._total = max(self._done, 1)
        seconds = f"in {time.perf_counter() - self._start:.1f} s  {note}"
        self._handle.update(self._shown(self._total, seconds), raw=True)

    def _shown(self, done: int, note: str) -> dict[str, str]:
        counted = f"{done:,} of {self._total:,} {note}"
        bar = f'<progress value="{done}" max="{max(self._total, 1)}"></progress>'
        told = f"<code>{html.escape(self._title)}</code> {bar} {html.escape(counted)}"
        return {"text/html": told, "text/plain": f"{self._title:<20}{counted}"}


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
