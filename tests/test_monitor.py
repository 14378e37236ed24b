"""Ctrl-C reaches a run, wherever Python is."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlimit import batched, finetuned_sweep, sparsity_sweep
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

    return lambda: (gc.callbacks.append(press), gc.collect(0))


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


def slow_loss(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"] - y) ** 2)


SLOW = {"a": np.full((200, 100), 0.01, np.float32), "b": np.full((100, 1), 0.01, np.float32)}
SWEEPS = {
    "sparsity_sweep": lambda data, **given: sparsity_sweep(
        lambda params, batch: {"loss": slow_loss(params, batch)}, SLOW, data, np.arange(401) / 400, **given
    ),
    "finetuned_sweep": lambda data, **given: finetuned_sweep(slow_loss, SLOW, data, [0.5, 0.9], **given),
}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send Ctrl-C to one process")
@pytest.mark.parametrize("name", SWEEPS)
def test_sweeps_hear_ctrl_c_while_a_program_computes(name):
    """It comes from another thread, in the midst of a call; the sweep would take many more seconds."""
    rng, pressed = np.random.default_rng(0), []
    data = batched((rng.random((12_000, 200), np.float32), rng.random((12_000, 1), np.float32)), 500)

    def press():
        pressed.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(0.1, press)

    def progress(done, total):
        if done and not timer.ident:
            timer.start()

    with pytest.raises(KeyboardInterrupt):
        SWEEPS[name](data, progress=progress)
    assert time.perf_counter() - pressed[0] < 2


def test_nothing_is_interrupted_any_more_when_all_is_done():
    with Interrupt() as interrupt:
        interrupt.finish()
        signal.raise_signal(signal.SIGINT)
    interrupt.check()
