"""How results show themselves: the same table as text on a terminal and as HTML in a notebook."""

import html
import textwrap
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import NamedTuple

# Characters a line, for a terminal of 80 columns.
WIDTH = 79
# Of a longer table only the ends are shown, and every so many rows between them.
MOST_ROWS = 15
fill = partial(textwrap.fill, width=WIDTH, subsequent_indent="  ", break_on_hyphens=False)
_SCROLLS = "overflow-x: auto; max-width: 100%"
_CELL = "text-align: right; white-space: nowrap"


class View(NamedTuple):
    """What is shown of a result.

    Attributes:
        title: a sentence above the table.
        head: names of the columns; none: there is no table.
        rows: their cells, the first of which names the row; a row of one cell is the title of those below it.
        notes: sentences below the table.
    """

    title: str
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()

    def text(self) -> str:
        """Lines for a terminal.

        Examples:
            >>> print(View("Weights", ("layer", "number"), [("first", "48"), ("last", "7")]).text())
            Weights
            layer  number
            first      48
            last        7
        """
        return "\n".join([fill(self.title), *aligned([self.head, *self.rows]), *map(fill, self.notes)])

    def html(self) -> str:
        """The same for a notebook; a table that is wider than the page scrolls."""
        return "".join(self._html())

    def _html(self) -> Iterator[str]:
        yield f"<p><strong>{html.escape(self.title)}</strong></p>"
        if self.head:
            yield f'<div style="{_SCROLLS}"><table><thead><tr>'
            yield from (f"<th>{html.escape(name)}</th>" for name in self.head)
            yield "</tr></thead><tbody>"
            for row in self.rows:
                first, others = row[0], row[1:]
                span = "" if others else f' colspan="{len(self.head)}"'
                yield f'<tr><th style="text-align: left"{span}>{html.escape(first)}</th>'
                yield from (f'<td style="{_CELL}">{html.escape(cell)}</td>' for cell in others)
                yield "</tr>"
            yield "</tbody></table></div>"
        yield from (f"<p>{html.escape(note)}</p>" for note in self.notes)


class Displayed:
    """A result that prints as its view, and shows itself as a table in a notebook."""

    def _view(self) -> View:
        raise NotImplementedError

    def __repr__(self) -> str:
        return self._view().text()

    def _repr_html_(self) -> str:
        return self._view().html()


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines: the first column to the left, the others to the right; empty rows are left out.

    Examples:
        >>> aligned([("", "s"), ("cone", "0.91"), ("one_shot", "1")])
        ['             s', 'cone      0.91', 'one_shot     1']
    """
    whole = [row for row in rows if len(row) > 1]
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]

    def line(row: Sequence[str]) -> str:
        others = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=False)]
        return "  ".join([row[0].ljust(widths[0]) if others else row[0], *others]).rstrip()

    return [line(row) for row in rows if row]


def few(rows: Sequence[Sequence[str]], *, chosen: Collection[int] = ()) -> list[Sequence[str]]:
    """At most `MOST_ROWS` rows, evenly spread from the first to the last, and those of the chosen indices.

    Examples:
        >>> [row[0] for row in few([(str(i), "") for i in range(29)])][:3]
        ['0', '2', '4']
    """
    if len(rows) <= MOST_ROWS:
        return list(rows)
    last = len(rows) - 1
    spread = {round(i * last / (MOST_ROWS - 1)) for i in range(MOST_ROWS)}
    return [rows[i] for i in sorted(spread | {*chosen})]
