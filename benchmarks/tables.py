"""Tables of the benchmarks, written into the pages of docs/ and into the README.

A page shows results/NAME.md between two markers, so that it can be read wherever Markdown is:

    <!-- table: benchmarks/results/NAME.md -->

    | ... |

    <!-- end of table -->

To show a new table, write the first marker alone on a line and run

    python benchmarks/tables.py

which adds the rest, and writes every other table anew. Run it whenever a benchmark has written
results/NAME.md; tests/test_tables.py fails until page and table are the same.
"""

import re
from pathlib import Path

from jaxlimit.core import writing

ROOT = Path(__file__).parents[1]
END = "<!-- end of table -->"
# A marker with all that follows up to its end; a marker without an end before the next marker is new.
TABLE = re.compile(
    rf"^<!-- table: (?P<path>\S+) -->\n(?:(?:(?!<!-- table: )(?!{END}).*\n)*?{END}\n)?", flags=re.MULTILINE
)


def pages() -> list[Path]:
    """Every page that may show a table."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def shown(page: str) -> list[str]:
    """Paths of the tables that the text of a page shows."""
    return [match["path"] for match in TABLE.finditer(page)]


def with_tables(page: str) -> str:
    """The text of a page, with each of its tables as it is now."""

    def block(match: re.Match[str]) -> str:
        return f"<!-- table: {match['path']} -->\n\n{(ROOT / match['path']).read_text().strip()}\n\n{END}\n"

    return TABLE.sub(block, page)


def main() -> None:
    """Writes the pages whose tables have changed, and says which."""
    for path in pages():
        before = path.read_text()
        after = with_tables(before)
        if after != before:
            writing.write_file(path, after)
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
