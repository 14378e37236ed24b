"""`progress=True` shows a bar, or lines, in every public call that tells its progress."""

import inspect
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlimit
from jaxlimit.core import terminal
from jaxlimit.core.interrupt import Interrupt
from jaxlimit.core.terminal import Bars, Lines, Shown, make_monitor, takes_bar

KEY = jax.random.key(0)
DATA = jaxlimit.batched(np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32), 10)
WEIGHTS = jnp.arange(1.0, 5.0)[:, None]


def predict(w, x):
    return x @ w


def squares(outputs, x):
    return jnp.mean((outputs - jnp.sum(x, axis=1, keepdims=True)) ** 2)


def loss(w, x):
    return squares(predict(w, x), x)


def limits(call, **options):
    curvature = jaxlimit.hessian(loss, WEIGHTS, DATA)
    return call(curvature, KEY, loss_tolerance=1.0, which=["one_shot"], **options)


CALLS = {
    "pruning_limit": lambda **o: limits(jaxlimit.pruning_limit, **o),
    "layer_limits": lambda **o: limits(jaxlimit.layer_limits, **o),
    "sparsity_sweep": lambda **o: jaxlimit.sparsity_sweep(
        lambda w, x: {"loss": loss(w, x)}, WEIGHTS, DATA, [0.0, 0.5], **o
    ),
    "finetuned_sweep": lambda **o: jaxlimit.finetuned_sweep(loss, WEIGHTS, DATA, [0.5], num_steps=2, **o),
    "prune": lambda **o: jaxlimit.prune(predict, squares, WEIGHTS, DATA, 0.5, max_products=1, **o),
    "attained_limit": lambda **o: jaxlimit.attained_limit(
        predict, squares, WEIGHTS, DATA, loss_tolerance=9.0, max_products=9, **o
    ),
}
TITLES = {
    "pruning_limit": ["pruning limit"],
    "layer_limits": ["params"],
    "sparsity_sweep": ["sparsity sweep"],
    "finetuned_sweep": ["fine-tuned sweep"],
    "prune": ["pruned network"],
    "attained_limit": ["attained limit", "without pruning"],
}


def test_every_public_call_that_tells_its_progress_is_tested():
    functions = {
        name: thing for name in jaxlimit.__all__ if inspect.isfunction(thing := getattr(jaxlimit, name))
    }
    told = {name for name, thing in functions.items() if "progress" in inspect.signature(thing).parameters}
    assert told == {*CALLS, "assess"}


@pytest.mark.parametrize("name", CALLS)
def test_a_line_for_each_stage_and_the_same_result(name, capsys):
    """Where there is no terminal, as here; the result is that without progress."""
    found = CALLS[name](progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert [line[:20].strip() for line in lines] == TITLES[name]
    assert repr(found) == repr(CALLS[name](progress=False))
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="progress must be True or a function, got 'bar'"):
        CALLS[name](progress="bar")


@pytest.mark.parametrize(("missing", "monitor"), [("", Bars), ("rich", Lines)])
def test_bars_on_a_terminal_where_they_can_be_drawn(monkeypatch, missing, monitor):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(terminal.importlib.util, "find_spec", lambda name: None if name == missing else name)
    assert isinstance(make_monitor(Interrupt()), monitor)


def test_a_bar_in_a_notebook_is_shown_once_and_moved(monkeypatch):
    """By a real IPython: its kernel and its display alone are by hand."""
    IPython = pytest.importorskip("IPython")
    shown, moved = [], []
    handle = SimpleNamespace(update=lambda content, raw: moved.append(content))
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setattr(IPython.display, "display", lambda content, **_: (shown.append(content), handle)[1])
    monkeypatch.setattr(terminal, "MOVED", -1.0)

    @takes_bar(lambda done: Shown("products <H v>", done, 1000, "spread .1"))
    def work(*, progress=None):
        progress(1)
        progress(7)

    work(progress=True)
    assert [content["text/html"].count("<progress") for content in (*shown, *moved)] == [1, 1, 1, 1]
    assert "products &lt;H v&gt;" in shown[0]["text/html"]
    assert 'value="1" max="1000"' in moved[0]["text/html"]
    assert moved[1]["text/plain"].endswith("7 of 1,000 spread .1")
    assert 'value="7" max="7"' in moved[2]["text/html"]
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace())  # a shell on a terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    assert isinstance(make_monitor(Interrupt()), Lines)


def test_a_bar_ends_where_an_error_ends_the_work(monkeypatch):
    """Its terminal is restored."""
    ended = []
    monkeypatch.setattr(Lines, "__exit__", lambda self, *error: ended.append(error[0]))

    @takes_bar(lambda done: Shown("work", done, 2))
    def work(*, progress=None):
        progress(1)
        raise FloatingPointError

    with pytest.raises(FloatingPointError):
        work(progress=True)
    assert ended == [FloatingPointError]
