"""The notebooks: stored with outputs, and every cell, with the assertions that end each, runs.

After a change, outputs are made by `jupyter nbconvert --execute --inplace`, or by nbclient as below.
"""

from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
SECONDS_A_CELL = 600

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_there_are_notebooks():
    assert len(NOTEBOOKS) == 3


@every_notebook
def test_outputs_of_one_run_from_top_to_bottom_are_kept(path):
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("text/html" in output.get("data", {}) or output.output_type == "stream" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)


@every_notebook
def test_ends_in_a_comparison(path):
    assert "assert " in read(path).cells[-1].source


@pytest.mark.nightly
@every_notebook
def test_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in conftest.py: small matrices gain nothing from more
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(read(path), timeout=SECONDS_A_CELL, resources=resources).execute()
