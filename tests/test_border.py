"""Random strangers, the first of those of `benchmarks/border.py`: right, refused in our words, and no fault.

The oracle is float64 and dense, of all examples at once: `benchmarks/border_cases.py`. The strangers lie on
eight devices, parts of this machine's processor, in a process of their own.
"""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "border.py"


@pytest.mark.parametrize(
    ("draws", "seed"),
    [(3, 0), pytest.param(60, 1, marks=pytest.mark.nightly), pytest.param(60, 2, marks=pytest.mark.nightly)],
)
def test_no_stranger_gets_a_wrong_number_or_a_foreign_error(draws, seed):
    command = [sys.executable, str(SCRIPT), "--draws", str(draws), "--seed", str(seed), "--no-keep"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
