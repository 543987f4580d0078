"""The screen of `traceml top`: one table of a running job at a time, in pages, with its verdict below."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text

from traceml.renderers.bars import bar, sparkline
from traceml.renderers.live import rule_line, speed_line, verdict_line
from traceml.renderers.look import Look
from traceml.renderers.tables import Bar, Column, Row, TableView, Trend
from traceml.renderers.views import LiveView

__all__ = ["KEYS", "MIN_HEIGHT", "Tab", "help_lines", "page_rows", "table_lines", "tabs_line"]

MIN_HEIGHT = 8
_FRAME_ROWS = 6  # rule, speed, tabs, heads, verdict, and where in the table we are
_MOST = 32  # columns of a text that is not the last
_LEAST_FILL = 8


@dataclass(frozen=True, slots=True)
class Tab:
    """One of the tables: its key and its name, which has the key's letter in it."""

    key: str
    name: str


KEYS = (
    ("o p r m t l s", "overview, phases, ranks, memory, metrics, logs, system"),
    ("Tab, arrows left and right", "the next table, the one before"),
    ("arrows up and down, j k", "a row down, a row up"),
    ("PgDn PgUp, space b", "a page down, a page up"),
    ("Home End, g G", "to the first row, to the last"),
    ("? or h", "this help"),
    ("q, Escape, Ctrl-C", "leave; the job goes on"),
)
"""What the keys do."""


def page_rows(look: Look) -> int:
    """Return how many rows of a table are seen at a time."""
    return max(look.height - _FRAME_ROWS, 1)


def table_lines(view: LiveView, tabs: Sequence[Tab], table: TableView, first: int, look: Look) -> list[Text]:
    """Return the screen's lines, exactly `look.height`.

    Args:
        view: the job now.
        tabs: the tables there are.
        table: the one to show.
        first: its first row to show.
        look: the room there is.
    """
    room = page_rows(look)
    shown = table.rows[first : first + room]
    widths = _widths(table.columns, table.rows, look.width)
    body = [_line(row, table.columns, widths, look) for row in shown] or [Text(f" {table.empty}", style="dim")]
    body += [Text() for _ in range(room - len(body))]
    heads = _line(Row(tuple(column.head for column in table.columns), "dim"), table.columns, widths, look)
    where = Text(_where(first, len(shown), len(table.rows)), style="dim")
    lines = [rule_line(view.now, look), speed_line(view, look), tabs_line(tabs, table.name), heads, *body]
    return [cut(line, look) for line in (*lines, verdict_line(view.now), where)]


def help_lines(view: LiveView, tabs: Sequence[Tab], look: Look) -> list[Text]:
    """Return the help on the keys, exactly `look.height` lines."""
    lines = [rule_line(view.now, look), speed_line(view, look), tabs_line(tabs, ""), Text()]
    for keys, does in KEYS:
        lines.append(Text(f"  {keys:<28}", style="bold").append(does, style="not bold"))

    lines += [Text() for _ in range(look.height - len(lines))]
    return [cut(line, look) for line in lines[: look.height]]


def tabs_line(tabs: Sequence[Tab], shown: str) -> Text:
    """Return the names of the tables with their keys; the one that is shown stands out, also without colours."""
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


def cut(line: Text, look: Look) -> Text:
    """Return a line that is no wider than the screen."""
    line.no_wrap = True
    if line.cell_len > look.width:
        line.truncate(look.width - len(look.glyphs.ellipsis))
        line.append(look.glyphs.ellipsis)

    return line


def _where(first: int, shown: int, rows: int) -> str:
    if shown < rows:
        return f" rows {first + 1:,}-{first + shown:,} of {rows:,}"

    return f" {rows:,} row{'' if rows == 1 else 's'}"


def _widths(columns: Sequence[Column], rows: Sequence[Row], width: int) -> list[int]:
    """Give each column what its cells need; what is left goes to those that fill."""
    widths = [0 if column.fills else cell_len(column.head) for column in columns]
    for row in rows:
        for at, cell in enumerate(row.cells):
            if isinstance(cell, str) and not columns[at].fills:
                widths[at] = max(widths[at], min(cell_len(_plain(cell)), _MOST))

    fills = [at for at, column in enumerate(columns) if column.fills]
    left = width - sum(widths) - 2 * len(columns)
    for at in fills:
        widths[at] = max(left // len(fills), _LEAST_FILL)

    return widths


def _line(row: Row, columns: Sequence[Column], widths: Sequence[int], look: Look) -> Text:
    line = Text(style=row.style)
    for cell, column, width in zip(row.cells, columns, widths, strict=True):
        line.append("  " if line.cell_len else " ")
        if isinstance(cell, Bar):
            line.append_text(bar(cell.share, width, look, style=cell.style if look.color else ""))
        elif isinstance(cell, Trend):
            line.append(_trend(cell.values, min(width, 40), look), style="cyan")
        else:
            line.append(_fitted(cell, width, column.right, look))

    return line


def _trend(values: Sequence[float], width: int, look: Look) -> str:
    """Return values as levels between the least and the most of them."""
    shown = [value for value in values if math.isfinite(value)][-width:]
    if not shown or max(shown) == min(shown):
        return ""

    return sparkline([value - min(shown) for value in shown], width, look).lstrip()


def _plain(cell: str) -> str:
    """Return a text that cannot steer the terminal: names and logs are the user's."""
    return cell if cell.isprintable() else "".join(char if char.isprintable() else " " for char in cell)


def _fitted(cell: str, width: int, right: bool, look: Look) -> str:
    text = Text(_plain(cell))
    if text.cell_len > width:
        mark = look.glyphs.ellipsis[:1]
        text.truncate(max(width - len(mark), 0))
        text.append(mark)

    blanks = " " * (width - text.cell_len)
    return blanks + text.plain if right else text.plain + blanks
