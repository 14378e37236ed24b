"""The README: its code runs as it stands, and its numbers are those of the code and of the committed runs."""

import contextlib
import io
import json
import re
from pathlib import Path

import digits
import jax
import pytest

import jaxlimit
from jaxlimit import models
from jaxlimit.core.trees import flatten
from jaxlimit.geometry.magnitude import magnitude_mask
from jaxlimit.limits.estimate import LIMITS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def printed(code):
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(code, "README.md", "exec"), {})
    return output.getvalue()


def numbers(text):
    return [float(x.replace(",", "")) for x in NUMBER.findall(text)]


@pytest.mark.slow
def test_the_python_example_prints_what_is_shown():
    (code,) = blocks("python")
    found, shown = printed(code), blocks("text")[1]
    assert NUMBER.sub("#", found).split() == NUMBER.sub("#", shown).split()
    # Training rounds differently on other machines; limits and loss then move a little.
    assert numbers(found) == pytest.approx(numbers(shown), rel=0.05, abs=1e-3)


def test_the_python_example_runs(monkeypatch):
    """On a narrower network, trained for two epochs: it prints the same words."""
    monkeypatch.setattr(models, "digits_net", lambda *, rngs: models.FullyConnected([64, 4, 10], rngs=rngs))
    (code,) = blocks("python")
    assert "epochs=400" in code
    found, shown = printed(code.replace("epochs=400", "epochs=2")), blocks("text")[1]
    table, last = found.split("status:")[0], shown.split("status:")[0]
    assert NUMBER.sub("#", table).split() == NUMBER.sub("#", last).split()


def test_the_one_shot_limit_shown_is_where_the_quadratic_model_reaches_the_tolerance():
    """Of the network that the example trains, by one product: -g^T c + c^T H c / 2 on either side of it."""
    network, shown = digits.trained("preset"), blocks("text")[1]
    tolerance, num_weights, num_examples = numbers(shown)[:3]
    (line,) = [line for line in shown.splitlines() if line.startswith("one_shot")]
    curvature = jaxlimit.hessian(network.loss, network.params, network.batches)
    assert (num_weights, num_examples) == (curvature.dim, curvature.num_examples)
    assert network.tolerance == pytest.approx(tolerance, rel=1e-3)

    def increase(sparsity):
        mask = magnitude_mask(curvature.weights, sparsity)
        removed = jax.tree.map(lambda w, kept: w * ~kept, curvature.weights, mask)
        linear, quadratic = (
            flatten(removed) @ flatten(v) for v in (curvature.gradient, curvature.matvec(removed))
        )
        return quadratic / 2 - linear

    _, lower, upper = numbers(line)[:3]
    assert increase(lower) <= tolerance <= increase(upper)


@pytest.mark.parametrize("seed", [0, 1])
def test_committed_runs_hold_the_numbers_and_the_claims(seed):
    run = json.loads((ROOT / "benchmarks" / "results" / f"digits-seed{seed}.json").read_text())
    assert run["command"] == f"jaxlimit run --seed {seed}"
    hessian, cut, attained = run["limits"]["hessian"], run["measured"]["loss"]["value"], run["attained"]
    assert abs(hessian["one_shot"]["value"] - cut) <= 0.01
    if seed == 0:
        table = blocks("text")[0]
        for limits in run["limits"].values():
            for name in LIMITS:
                limit, rise = limits[name], limits["rises"][name]
                shown = f"{limit['value']:.4f}  [{limit['lower']:.4f}, {limit['upper']:.4f}]"
                assert re.search(f"{re.escape(shown)} +{rise:.3g} ", table)
        answer = f"attained {attained['sparsity']:.4f} ({cut:.4f} without readjustment)"
        assert answer in " ".join(table.split())
        assert f"errs on {run['attained_error']:.1%}".replace("%", " %") in README
    else:
        for value in (*(hessian[name]["value"] for name in ("one_shot", "cone", "readjusted")), cut):
            assert f"{value:.3f}"[1:] in README
        assert f"{attained['sparsity']:.3f}"[1:] in README


def test_the_documented_commands_are_the_ones_of_continuous_integration():
    setup, tests = (block.strip() for block in blocks("sh"))
    assert setup.endswith(".venv/bin/jaxlimit run")
    assert '-e ".[cli,test]"' in tests
    assert tests.endswith(".venv/bin/pytest -n 2")
    script = (ROOT / ".ci" / "run").read_text()
    assert 'pip install --quiet -e ".[cli,test,dev,docs]"' in script
    assert "\npytest -n 2 " in script
