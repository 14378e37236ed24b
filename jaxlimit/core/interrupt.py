"""Ctrl-C, wherever the command is when it comes: in Python, in a compiler, in a decomposition.

Python hears it between two of its own instructions only, and the main thread may be at one for minutes. So a
process that belongs to a command is left by another thread: every file is written whole or not at all, and
nothing that is half done is of use. It does not take itself apart first, since libraries that are at work in
threads of their own do not survive that.
"""

import contextlib
import functools
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

INTERRUPTED = 130
"""Exit code, as a shell has it."""
# Seconds after which the process is left though its message could not be written.
PATIENCE = 1.0


class Interrupt:
    """What becomes of Ctrl-C in a `with` block.

    Args:
        leave: whether the process is left, after a message. Otherwise KeyboardInterrupt is raised, and
            remembered: within a callback of the garbage collector it gets lost.
    """

    def __init__(self, *, leave: bool = False) -> None:
        self.message: Callable[[], str] = lambda: "interrupted."
        self._leave, self.pressed, self._over = leave, False, False
        self._restore = contextlib.ExitStack()

    def __enter__(self) -> "Interrupt":
        with contextlib.suppress(ValueError):  # not the main thread: leave signals alone
            self._restore.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, self._press))
            self._restore.callback(setattr, sys, "unraisablehook", sys.unraisablehook)
            sys.unraisablehook = functools.partial(_unless_ctrl_c, sys.unraisablehook)
            if self._leave:
                self._watch()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        if not self._leave:
            self._restore.close()

    def finish(self) -> None:
        """Nothing is left to be interrupted: Ctrl-C has no effect any more."""
        self._over = True

    def check(self) -> None:
        """Raises KeyboardInterrupt if it was pressed and got lost."""
        if self.pressed:
            raise KeyboardInterrupt

    def _press(self, *_: object) -> None:
        if not (self._over or self._leave):
            self.pressed = True
            raise KeyboardInterrupt

    def _watch(self) -> None:
        """Starts the thread that the system's own handler of signals wakes."""
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        # The thread has the sockets as long as the process lives.
        threading.Thread(target=self._answer, args=(reader, writer), daemon=True).start()

    def _answer(self, reader: socket.socket, _: socket.socket) -> None:
        while reader.recv(1)[0] != signal.SIGINT or self._over:
            pass
        late = threading.Timer(PATIENCE, os._exit, (INTERRUPTED,))
        late.daemon = True
        late.start()
        shown = "\x1b[?25h\n" if os.isatty(2) else ""  # the cursor, which a bar hides
        with contextlib.suppress(OSError):
            os.write(2, f"{shown}{self.message()}\n".encode())
        os._exit(INTERRUPTED)


def _unless_ctrl_c(report: Callable[[Any], object], unraisable: Any) -> None:
    """Reports an exception that got lost; of a Ctrl-C no traceback is printed, since it is remembered."""
    if unraisable.exc_type is not KeyboardInterrupt:
        report(unraisable)
