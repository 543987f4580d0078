"""The chart of a trace analysis."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from traceml.renderers.charts.trace_chart import trace_page, trace_picture

NASTY = "a$b$ <script>alert(1)</script> \x1b[31m"


def result(*names: str, by: str = "name") -> dict[str, Any]:
    """Return an analysis with groups of these names, the first the longest."""
    groups = [
        {by: name, "count": 3, "sum_us": 9000 - 1000 * n, "self_us": 500, "mean_us": 3000.0, "p50_us": 10, "p99_us": 20}
        for n, name in enumerate(names)
    ]
    files = [{"path": "/traces/run.pfw", "events": 9, "bytes": 1, "damage": []}]
    return {"schema": "traceml.analysis/1", "files": files, "events": 9, "by": [by], "groups": groups, "where": ""}


class _Parts(HTMLParser):
    """Tags and outside addresses of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]


def test_the_page_has_the_groups_and_loads_nothing() -> None:
    """Chart and table in one file without scripts; references stay inside."""
    page = trace_page(result("forward", "backward"), top=20)
    parts = _Parts(page)

    assert {"svg", "table"} <= set(parts.tags)
    assert not {"script", "link", "img", "iframe"} & set(parts.tags)
    assert all(address.startswith("#") for address in parts.loads)
    assert "url(http" not in page
    assert "@import" not in page
    assert page.count("forward") >= 2
    assert "run.pfw: 9 events; 2 of 2 groups" in page


def test_shares_are_of_all_groups_not_of_those_drawn() -> None:
    """With --top the shares stay those of the table in the terminal."""
    page = trace_page(result("a", "b", "c"), top=1)

    share = 100 * 9000 / (9000 + 8000 + 7000)
    assert f"{share:.0f} %" in page
    assert "1 of 3 groups" in page
    assert "<td>b</td>" not in page


def test_names_are_text() -> None:
    """A name from a trace is neither markup, nor a formula, nor a control character."""
    page = trace_page(result(NASTY), top=5)

    assert "<script>" not in page
    assert "\x1b" not in page
    assert "a$b$ &lt;script&gt;" in page


def test_long_names_are_cut_in_the_chart_and_whole_in_the_table() -> None:
    """A label of hundreds of characters would leave no room for bars."""
    name = "module." * 30
    page = trace_page(result(name), top=5)

    labels = re.findall(r">([^<]*module[^<]*)</text>", page)
    assert [len(label) for label in labels] == [48]
    assert f"<td>{name}</td>" in page


def test_the_picture_grows_with_the_groups() -> None:
    """A PNG with its size in the header."""
    few, many = (trace_picture(result(*map(str, range(count))), top=40) for count in (2, 40))
    heights = [int.from_bytes(picture[20:24]) for picture in (few, many)]

    assert few.startswith(b"\x89PNG")
    assert heights[1] > 3 * heights[0]


@pytest.mark.parametrize("draw", [trace_page, trace_picture])
def test_nothing_to_draw_is_no_error(draw) -> None:
    """A condition that nothing passes gives an empty chart."""
    assert draw(result(), top=5)


def test_groups_without_self_time_have_one_bar() -> None:
    """Chosen measures may leave it out."""
    made = result("a")
    del made["groups"][0]["self_us"]

    assert "itself" not in trace_page(made, top=5)
    assert "itself" in trace_page(result("a"), top=5)
