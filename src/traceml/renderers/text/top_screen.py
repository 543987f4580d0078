"""The screen of `traceml top`: one table of a running job, in pages, with the verdict below."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text

from traceml.formatting import plural, printable
from traceml.renderers.text.bars import bar, sparkline
from traceml.renderers.text.live_panel import note_text, rule_line, speed_line, verdict_line
from traceml.renderers.text.top_tables import BarCell, TableColumn, TableRow, TableView, TrendCell
from traceml.renderers.text.viewport import Viewport
from traceml.renderers.views import RunView

__all__ = ["KEYS", "MIN_HEIGHT", "Tab", "help_lines", "page_rows", "table_lines"]

MIN_HEIGHT = 8
_FRAME_ROWS = 6  # rule, speed, tabs, heads, verdict, position in the table
_MAX_CELL_WIDTH = 32  # columns of a text, unless it fills the rest
_MIN_FILL = 8


@dataclass(frozen=True, slots=True)
class Tab:
    """One of the tables: its key, and its name, which contains the key's letter."""

    key: str
    name: str


KEYS = (
    ("Tab, left and right arrows", "next table, previous table"),
    ("up and down arrows, j k", "one row down or up"),
    ("PgDn PgUp, space b", "one page down or up"),
    ("Home End, g G", "first row, last row"),
    ("? or h", "this help"),
    ("q, Escape, Ctrl-C", "quit; the job continues"),
)
"""Keys and their effect, in addition to the keys of the tables."""


def page_rows(viewport: Viewport) -> int:
    """Return the number of rows of a page of a table."""
    return max(viewport.height - _FRAME_ROWS, 1)


def table_lines(view: RunView, tabs: Sequence[Tab], table: TableView, first: int, viewport: Viewport) -> list[Text]:
    """Return the screen's lines, exactly `viewport.height`."""
    room = page_rows(viewport)
    shown = table.rows[first : first + room]
    widths = _widths(table.columns, table.rows, viewport.width)
    body = [_line(row, table.columns, widths, viewport) for row in shown] or [Text(f" {table.empty}", style="dim")]
    body += [Text() for _ in range(room - len(body))]
    heads = _line(TableRow(tuple(column.head for column in table.columns), "dim"), table.columns, widths, viewport)
    position = Text().append(_position(first, len(shown), len(table.rows)), style="dim")
    if view.notes:
        position.append("  ").append(note_text(view))

    lines = [rule_line(view, viewport), speed_line(view, viewport), _tabs_line(tabs, table.name), heads, *body]
    return [viewport.cut(line) for line in (*lines, verdict_line(view), position)]


def help_lines(view: RunView, tabs: Sequence[Tab], viewport: Viewport) -> list[Text]:
    """Return the help on the keys, exactly `viewport.height` lines."""
    lines = [rule_line(view, viewport), speed_line(view, viewport), _tabs_line(tabs, ""), Text()]
    keys_of_tables = (" ".join(tab.key for tab in tabs), "the table with this letter")
    for keys, does in (keys_of_tables, *KEYS):
        lines.append(Text(f"  {keys:<28}", style="bold").append(does, style="not bold"))

    lines += [Text() for _ in range(viewport.height - len(lines))]
    return [viewport.cut(line) for line in lines[: viewport.height]]


def _tabs_line(tabs: Sequence[Tab], shown: str) -> Text:
    """Return the names of the tables with their keys; the shown one is in brackets, so also visible without colors."""
    line = Text()
    for tab in tabs:
        if tab.name == shown:
            line.append(f"[{tab.name}]", style="bold reverse")
            continue

        before, _, after = tab.name.partition(tab.key)
        line.append(f" {before}", style="dim").append(tab.key, style="bold underline not dim").append(
            f"{after} ", "dim"
        )

    return line


def _position(first: int, shown: int, rows: int) -> str:
    if shown < rows:
        return f" rows {first + 1:,}-{first + shown:,} of {rows:,}"

    return f" {plural(rows, 'row')}"


def _widths(columns: Sequence[TableColumn], rows: Sequence[TableRow], width: int) -> list[int]:
    """Return the width that each column's cells need; columns that fill share the rest.

    Where that is too wide, the widest text gives way: what is measured stays whole.
    """
    widths = [0 if column.fills else cell_len(column.head) for column in columns]
    for row in rows:
        for at, cell in enumerate(row.cells):
            if isinstance(cell, str) and not columns[at].fills:
                widths[at] = max(widths[at], min(cell_len(printable(cell)), _MAX_CELL_WIDTH))

    fills = [at for at, column in enumerate(columns) if column.fills]
    left = width - sum(widths) - 2 * len(columns)
    texts = [at for at, column in enumerate(columns) if not column.right and not column.fills]
    missing = _MIN_FILL * len(fills) - left
    if missing > 0 and texts:
        widest = max(texts, key=lambda at: widths[at])
        widths[widest] = max(widths[widest] - missing, min(widths[widest], _MIN_FILL))
        left = width - sum(widths) - 2 * len(columns)

    for at in fills:
        widths[at] = max(left // len(fills), _MIN_FILL)

    return widths


def _line(row: TableRow, columns: Sequence[TableColumn], widths: Sequence[int], viewport: Viewport) -> Text:
    line = Text(style=row.style)
    for cell, column, width in zip(row.cells, columns, widths, strict=True):
        line.append("  " if line.cell_len else " ")
        if isinstance(cell, BarCell):
            line.append_text(bar(cell.share, width, viewport, style=cell.style if viewport.color else ""))
        elif isinstance(cell, TrendCell):
            line.append(_trend(cell.values, min(width, 40), viewport), style="cyan")
        else:
            line.append(_fitted(cell, width, column.right, viewport))

    return line


def _trend(values: Sequence[float], width: int, viewport: Viewport) -> str:
    """Return values as levels between their minimum and their maximum."""
    shown = [value for value in values if math.isfinite(value)][-width:]
    if not shown or max(shown) == min(shown):
        return ""

    return sparkline([value - min(shown) for value in shown], width, viewport).lstrip()


def _fitted(cell: str, width: int, right: bool, viewport: Viewport) -> str:
    text = Text(printable(cell))
    if text.cell_len > width:
        mark = viewport.glyphs.ellipsis[:1]
        text.truncate(max(width - len(mark), 0))
        text.append(mark)

    blanks = " " * (width - text.cell_len)
    return blanks + text.plain if right else text.plain + blanks
