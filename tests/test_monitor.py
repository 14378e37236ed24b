"""Ctrl-C reaches a run, wherever Python is."""

import gc
import signal
import subprocess
import sys
import time

import pytest

from jaxlimit.core.interrupt import Interrupt


@pytest.fixture(autouse=True)
def listening():
    """Ctrl-C is heard, which a shell's background processes do not inherit."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def in_the_collector():
    """Sends Ctrl-C while garbage is collected."""

    def press(phase, _):
        if phase == "stop":
            gc.callbacks.remove(press)
            signal.raise_signal(signal.SIGINT)

    return lambda: (gc.callbacks.append(press), gc.collect())


def test_ctrl_c_inside_the_garbage_collector_is_remembered_without_a_traceback(in_the_collector, monkeypatch):
    """Where Python drops it: what shows such exceptions hears of others only."""
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        interrupt.check()
        in_the_collector()
        assert interrupt.pressed
        assert not shown
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()
    assert signal.getsignal(signal.SIGINT) is before
    in_the_collector()
    assert len(shown) == 1
    assert shown[0].exc_type is KeyboardInterrupt


def test_ctrl_c_is_raised_at_once():
    with Interrupt(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send Ctrl-C to one process")
def test_a_command_is_left_at_once_whatever_it_is_at():
    """Here in a decomposition that takes longer; with a message, a shell's code and no traceback."""
    code = """if True:
        import numpy as np
        from jaxlimit.core.interrupt import Interrupt
        from jaxlimit.core.lapack import tridiagonal_form
        with Interrupt(leave=True) as interrupt:
            interrupt.message = lambda: "told"
            print(flush=True)
            while True:
                tridiagonal_form(np.eye(3000))
        """
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    began = time.perf_counter()
    _, stderr = process.communicate(timeout=60)
    assert time.perf_counter() - began < 2
    assert (process.returncode, stderr) == (130, "told\n")


def test_nothing_is_interrupted_any_more_when_all_is_done():
    with Interrupt() as interrupt:
        interrupt.finish()
        signal.raise_signal(signal.SIGINT)
    interrupt.check()
