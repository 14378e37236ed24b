"""The README: its code runs as it stands, and its numbers are those of the code and of the committed runs."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_example_prints_what_is_shown():
    (code,) = blocks("python")
    shown = blocks("text")[1]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "README.md", "exec"), {})
    assert NUMBER.sub("#", printed.getvalue()).split() == NUMBER.sub("#", shown).split()
    ours = [float(x.replace(",", "")) for x in NUMBER.findall(printed.getvalue())]
    theirs = [float(x.replace(",", "")) for x in NUMBER.findall(shown)]
    # Training rounds differently on other machines; limits and loss then move a little.
    assert ours == pytest.approx(theirs, rel=0.05, abs=1e-3)


@pytest.mark.parametrize("seed", [0, 1])
def test_committed_runs_hold_the_numbers_and_the_claims(seed):
    run = json.loads((ROOT / "benchmarks" / "results" / f"digits-seed{seed}.json").read_text())
    assert run["command"] == f"jaxlimit run --seed {seed}"
    hessian = {row["limit"]: row for row in run["comparison"] if row["curvature"] == "hessian"}
    assert abs(hessian["one_shot"]["difference"]) <= 0.01
    assert abs(hessian["cone"]["difference"]) <= 0.02
    assert abs(hessian["readjusted"]["difference"]) <= 0.02
    if seed == 0:
        table = blocks("text")[0]
        for row in run["comparison"]:
            assert f"{row['predicted']:.4f}  [{row['lower']:.4f}, {row['upper']:.4f}]" in table
            assert f"{row['difference']:+.4f}" in table
    else:
        for name in ("one_shot", "cone", "readjusted"):
            assert f"{hessian[name]['predicted']:.3f}"[1:] in README
            assert f"{hessian[name]['measured']:.3f}"[1:] in README


def test_the_documented_commands_are_the_ones_of_continuous_integration():
    setup, tests = (block.strip() for block in blocks("sh"))
    assert setup.endswith(".venv/bin/jaxlimit run")
    assert tests.endswith(".venv/bin/pytest -n 2")
    script = (ROOT / ".ci" / "run").read_text()
    assert 'pip install --quiet -e ".[cli,test,dev,docs]"' in script
