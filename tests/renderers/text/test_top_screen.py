"""The screen of `traceml top`."""

from __future__ import annotations

import pytest

from tests.renderers.reports import REPORTS, slow_rank, thousand_ranks
from traceml.renderers.text.top_screen import Tab, help_lines, page_rows, table_lines
from traceml.renderers.text.top_tables import (
    TableColumn,
    TableRow,
    TableView,
    TrendCell,
    memory_table,
    phases_table,
    ranks_table,
)
from traceml.renderers.text.viewport import ASCII, Viewport
from traceml.renderers.views import run_view

TABS = (Tab("p", "phases"), Tab("r", "ranks"), Tab("t", "metrics"))


def shown(report, table, first=0, viewport=None):
    return [
        line.plain
        for line in table_lines(run_view(report, [1.0, 2.0]), TABS, table, first, viewport or Viewport(80, 23))
    ]


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize("height", [8, 23, 50])
@pytest.mark.parametrize("width", [60, 80, 200])
def test_lines_keep_to_their_room(name, height, width):
    """There are exactly as many lines as the screen has, none wider than it."""
    report = REPORTS[name]()
    view = run_view(report)
    for table in (phases_table(report), ranks_table(view), memory_table(report)):
        lines = table_lines(view, TABS, table, 0, Viewport(width, height))
        assert len(lines) == height
        assert max(line.cell_len for line in lines) <= width

    assert len(help_lines(view, TABS, Viewport(width, height))) == height


def test_help_is_whole_on_a_narrow_screen():
    """Each key has all of its words: the line of the tables ended in an ellipsis."""
    viewport = Viewport(60, 23)
    assert not any(
        viewport.glyphs.ellipsis in line.plain for line in help_lines(run_view(slow_rank()), TABS, viewport)[4:]
    )


def test_pages_of_many_ranks():
    """A page shows the rows from the first on, and its position."""
    report = thousand_ranks()
    table = ranks_table(run_view(report))
    rows = page_rows(Viewport(80, 23))
    lines = shown(report, table, first=600)

    assert rows == 17
    assert [line.split()[0] for line in lines[4 : 4 + rows]] == [str(rank) for rank in range(600, 617)]
    assert lines[-1] == " rows 601-617 of 1,000"


def test_table_says_which_it_is_without_colors():
    lines = shown(slow_rank(), ranks_table(run_view(slow_rank())))

    assert lines[2] == " phases [ranks] metrics "
    assert lines[-2].startswith(" so far  Rank 1 is slow in forward")
    assert lines[-1] == " 2 rows"


def test_what_users_named_cannot_steer_the_terminal():
    """Control characters in names and texts are shown as escapes, and wide ones are counted as wide."""
    table = TableView(
        "t", (TableColumn("name", right=False), TableColumn("text", fills=True)), (TableRow(("\x1b[2J\n漢字", "x")),)
    )
    lines = shown(slow_rank(), table)

    assert lines[4].startswith(r" \x1b[2J\n漢字")
    assert "\x1b" not in "".join(lines)


def test_a_long_name_leaves_room_for_its_values():
    """On a narrow screen the name is cut, no number is."""
    columns = (TableColumn("metric", right=False), *map(TableColumn, ("last", "min", "max", "values")))
    row = TableRow(("validation/" * 9, "27.177 e+11", "18.001 e+11", "27.177 e+11", "9,177,000", TrendCell((1.0, 2.0))))
    trend = TableColumn("over its time", right=False, fills=True)
    lines = shown(slow_rank(), TableView("metrics", (*columns, trend), (row,)))

    (line,) = (line for line in lines if "validation/" in line)
    assert "…" in line
    assert "  9,177,000" in line


def test_trend_runs_from_the_least_to_the_most():
    """Negative values have a trend; constant or non-finite ones have none."""
    column = (TableColumn("", fills=True),)
    for values, drawn in (
        ((-3.0, -2.0, -1.0), "▁▅█"),
        ((1.0, 1.0), ""),
        ((float("nan"), 0.0, float("nan"), 8.0), "▁█"),
    ):
        assert shown(slow_rank(), TableView("t", column, (TableRow((TrendCell(values),)),)))[4].strip() == drawn


def test_ascii_look_is_ascii():
    report = slow_rank()
    view = run_view(report, [1.0])
    for table in (phases_table(report), memory_table(report)):
        assert "".join(line.plain for line in table_lines(view, TABS, table, 0, Viewport(80, 23, ASCII))).isascii()
