"""Ctrl-C, wherever Python is when it comes."""

import contextlib
import functools
import signal
import sys
from collections.abc import Callable
from typing import Any


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
