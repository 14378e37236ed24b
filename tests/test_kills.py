"""A process that is really killed goes on to the same bits; `benchmarks/kills.py` kills it oftener."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))


@pytest.mark.nightly
def test_killed_processes_go_on_to_the_same_bits():
    import kills

    found = kills.experiment(num_kills=1, seed=1, work=(2, 64))
    assert found["kills"] >= 1
    assert set(found["result"]["hessian limits"]) >= {"width"}
