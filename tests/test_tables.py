"""Tables of the benchmarks stand in the pages as they are in benchmarks/results."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
import tables  # noqa: E402

PAGES = tables.pages()


@pytest.mark.parametrize("path", PAGES, ids=[str(path.relative_to(ROOT)) for path in PAGES])
def test_pages_hold_their_tables_as_they_are(path):
    page = path.read_text()
    assert tables.with_tables(page) == page, "run python benchmarks/tables.py"
    assert "--8<--" not in page, "a web view shows the path of an include: see benchmarks/tables.py"


def test_every_table_stands_in_a_page():
    written = {str(path.relative_to(ROOT)) for path in (ROOT / "benchmarks" / "results").glob("*.md")}
    assert written == {name for path in PAGES for name in tables.shown(path.read_text())}


def test_a_new_marker_gets_its_table_and_an_old_table_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    (tmp_path / "a.md").write_text("| a |\n")
    (tmp_path / "b.md").write_text("| b |\n")
    page = (
        "before\n<!-- table: a.md -->\nbetween\n"
        "<!-- table: b.md -->\n\n| old |\n\n<!-- end of table -->\nafter\n"
    )
    assert tables.with_tables(page) == (
        "before\n<!-- table: a.md -->\n\n| a |\n\n<!-- end of table -->\nbetween\n"
        "<!-- table: b.md -->\n\n| b |\n\n<!-- end of table -->\nafter\n"
    )
