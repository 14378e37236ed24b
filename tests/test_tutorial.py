"""The tutorial of the documentation runs from its first block to its last, and ends in a pruned network."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "tutorial.md").read_text()


def run(code, folder, monkeypatch):
    monkeypatch.chdir(folder)
    names = {}
    exec(compile(code, "tutorial.py", "exec"), names)
    return names


def code():
    return "\n".join(re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL))


@pytest.mark.nightly
def test_ends_in_a_certified_network_that_can_be_read_again(tmp_path, monkeypatch):
    names = run(code(), tmp_path, monkeypatch)
    removed = np.concatenate([np.ravel(~np.asarray(kept)) for kept in jax.tree.leaves(names["mask"])])
    assert removed.mean() == pytest.approx(names["answer"].attained.sparsity)
    assert names["answer"].certificate.sparsity > 0.8
    again = names["jaxlimit"].load_assessment("results/tutorial")
    assert repr(again) == repr(names["answer"])


def test_the_blocks_are_one_program_that_uses_what_the_page_defines():
    compile(code(), "tutorial.py", "exec")
    assert '-e ".[cli]"' in PAGE
