"""`benchmarks/device_runs.py`: time that is over interrupts a run, and the next call finishes it."""

import sys
from pathlib import Path

import pytest

from jaxlimit.core import writing

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import common
import device_runs


@pytest.mark.nightly
def test_a_run_that_was_interrupted_is_finished_by_the_next_call(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    call = ["device_runs.py", "--work", str(tmp_path), "--epochs", "1", "--runs", "digits", "--seconds"]
    limit, result = tmp_path / "digits-1" / "limit.json", tmp_path / "results" / "digits-1.json"
    monkeypatch.setattr(sys, "argv", [*call, "0.5"])
    device_runs.main()
    assert not limit.exists() or not writing.read_json(limit)["finished"]
    assert not result.exists()
    monkeypatch.setattr(sys, "argv", [*call, "300"])
    device_runs.main()
    assert writing.read_json(result)["command"] == "jaxlimit run digits --epochs 1"
    assert {"attained", "certificate"} <= writing.read_json(result).keys()
