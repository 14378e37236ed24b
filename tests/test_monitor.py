"""Ctrl-C reaches a run, wherever Python is."""

import gc
import signal
import sys

import pytest

from jaxlimit.application.interrupt import Interrupt


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
