"""`benchmarks/device.py`: no step is done twice, none that fails holds up another, the small plan runs."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import common
import device


def test_steps_go_on_where_they_stopped_and_a_failure_is_a_result(tmp_path):
    calls = []

    def step(name):
        def compute():
            calls.append(name)
            if name == "b":
                raise MemoryError("too large\nfor this device")
            return {"value": name}

        return compute

    steps = {name: step(name) for name in ("a", "b", "c")}
    assert device.perform(steps, tmp_path, seconds=0) == {}
    first = device.perform({"a": steps["a"]}, tmp_path, seconds=60)
    assert first["a"]["value"] == "a"
    assert device.perform(steps, tmp_path, seconds=0).keys() == {"a"}
    found = device.perform(steps, tmp_path, seconds=60)
    assert (found["b"]["failed"], found["c"]["value"], calls) == ("too large", "c", ["a", "b", "c"])


def test_the_plan_has_every_network_at_every_precision():
    names = set(device.plan(small=False))
    wanted = {
        f"product {n} {o} {p}" for n in device.EXAMPLES for o in device.OPERATORS for p in device.PRECISIONS
    }
    assert wanted <= names
    assert {f"limit {precision}" for precision in device.PRECISIONS} | {"machine", "run"} <= names


@pytest.mark.nightly
def test_the_small_plan_runs_on_a_cpu_and_publishes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["device.py", "--work", str(tmp_path), "--small"])
    monkeypatch.setattr(device.jax.config, "update", lambda *_: None)
    device.main()
    assert "product" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()
    found = json.loads((tmp_path / "product-digits-hessian-highest.json").read_text())
    assert found["timed"]["gradient"] > 0
    assert found["bytes"]["kept"] > 0
