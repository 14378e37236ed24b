"""No folder of the package imports one that stands above it, and no modules import each other in a circle.

The order of the folders stands in benchmarks/layout.py, which also draws it for the documentation.
"""

import graphlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

layout = pytest.importorskip("layout")


def test_every_folder_has_its_place():
    found = {layout.folder_of(module) for module in layout.modules()} - {"jaxlimit"}
    assert found == set(layout.FOLDERS)


def test_no_import_runs_upwards():
    assert layout.upward_imports() == []


def test_an_import_that_runs_upwards_is_found(monkeypatch):
    upward = layout.Import("jaxlimit.core.trees", "jaxlimit.limits.result")
    through_the_top = layout.Import("jaxlimit.spectrum.lanczos", "jaxlimit")
    downward = layout.Import("jaxlimit.limits.result", "jaxlimit.core.trees")
    monkeypatch.setattr(layout, "imports", lambda: iter([upward, through_the_top, downward]))
    assert layout.upward_imports() == [upward, through_the_top]


def test_no_modules_import_each_other_in_a_circle():
    graph = {}
    for each in layout.imports():
        graph.setdefault(each.module, set()).add(each.imported)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, with the circle
