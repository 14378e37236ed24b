"""Every public name is in the documentation, and every table of the benchmarks.

These tests look at a site that was built before, in the folder that $JAXLIMIT_SITE names:

    mkdocs build --strict --site-dir site && JAXLIMIT_SITE=site pytest -m docs

Names are looked up in the site's inventory (objects.inv), which mkdocstrings writes for other projects to
link to: a name is there only if its docstring was rendered.
"""

import html
import inspect
import os
import sys
import zlib
from pathlib import Path

import pytest

import jaxlimit
from jaxlimit import baselines, data, experiments, geometry, models, plots, training
from jaxlimit.application import presets
from jaxlimit.core import trees
from jaxlimit.curvature import operator
from jaxlimit.geometry import magnitude
from jaxlimit.limits import (
    allocation,
    cone,
    estimate,
    one_shot,
    readjusted,
    result,
    status,
    width,
)
from jaxlimit.reference import paper_code
from jaxlimit.spectrum import basis, bracket, lanczos, measure, probes, rules, tridiagonal
from jaxlimit.training import descent, model_files

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
import tables  # noqa: E402

pytestmark = pytest.mark.docs


@pytest.fixture(scope="module")
def site():
    return Path(os.environ["JAXLIMIT_SITE"])


def documented(site):
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    return {line.split()[0] for line in zlib.decompress(inventory).decode().splitlines()}


def public_names(module):
    """What a module defines, or re-exports where it is a package."""
    names = getattr(module, "__all__", None) or [
        name
        for name, thing in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(thing) or inspect.isclass(thing))
        and thing.__module__.startswith(module.__name__)
    ]
    return {f"{module.__name__}.{name}" for name in names}


def test_every_public_name_is_documented(site):
    names = documented(site)
    assert not {f"jaxlimit.{name}" for name in jaxlimit.__all__} - names
    # A name at the top level need not be there a second time under its module.
    top = set(jaxlimit.__all__)
    # Of pytrees, for the modules above.
    helpers = {
        "flatten",
        "unflatten",
        "frozen",
        "thawed",
        "as_array",
        "leaf_names",
        "leaf_paths",
        "named_arrays",
        "named_leaves",
        "path_name",
    }
    for module in (
        paper_code,
        operator,
        data,
        geometry,
        basis,
        lanczos,
        magnitude,
        models,
        plots,
        presets,
        trees,
        bracket,
        measure,
        probes,
        rules,
        tridiagonal,
        result,
        cone,
        estimate,
        one_shot,
        readjusted,
        status,
        width,
    ):
        missing = public_names(module) - names
        assert not {name for name in missing if name.rpartition(".")[2] not in top | helpers}, module
    for module in (allocation, baselines, descent, experiments, training, model_files):
        assert not public_names(module) - names


SHOWN = [
    (page, name)
    for page in tables.pages()
    if page.parent.name == "docs"
    for name in tables.shown(page.read_text())
]


@pytest.mark.parametrize(("page", "name"), SHOWN, ids=[name for _, name in SHOWN])
def test_tables_of_the_benchmarks_are_rendered_as_tables(site, page, name):
    rows = (ROOT / name).read_text().splitlines()
    first = [cell.strip() for cell in rows[2].strip("|").split("|")]
    text = (site / page.stem / "index.html").read_text()
    assert first[0] in text
    assert all(f">{html.escape(cell)}</td>" in text for cell in first[1:] if cell)
