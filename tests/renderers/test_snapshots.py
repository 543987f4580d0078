"""Snapshots of the card and the live view of fabricated runs.

After a change on purpose: `UPDATE_SNAPSHOTS=1 pytest tests/renderers/test_snapshots.py`, then read the difference.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from rich.console import Console

from tests.renderers.reports import REPORTS
from traceml.renderers.text.card import card
from traceml.renderers.text.live_panel import live_lines
from traceml.renderers.text.viewport import ASCII, UNICODE, Viewport
from traceml.renderers.views import run_view

SNAPSHOTS = Path(__file__).parent / "snapshots"
RUN = "20250102-030405-train-1a2b"
VIEWPORTS = {"80": Viewport(80, 24), "120": Viewport(120, 40), "ascii": Viewport(80, 24, ASCII)}


def plain(renderable, viewport: Viewport) -> str:
    console = Console(width=viewport.width, color_system=None, highlight=False, force_terminal=False)
    with console.capture() as capture:
        console.print(renderable)

    return "".join(f"{line.rstrip()}\n" for line in capture.get().splitlines())


def seen_card(name: str, viewport: Viewport) -> str:
    path = f"traceml_runs/{RUN}/report.json"
    return plain(card(run_view(REPORTS[name]()), viewport, report_path=path, again=f"traceml report {RUN}"), viewport)


def seen_live(name: str, viewport: Viewport) -> str:
    rates = [30 + 5 * math.sin(second / 4) for second in range(60)] if name != "too_early" else []
    return "".join(plain(line, viewport) for line in live_lines(run_view(REPORTS[name](), rates), viewport))


@pytest.mark.parametrize("viewport", VIEWPORTS)
@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize("kind", [seen_card, seen_live])
def test_look(kind, name, viewport):
    """The text is that of the snapshot, and no line is wider than the terminal."""
    seen = kind(name, VIEWPORTS[viewport])
    path = SNAPSHOTS / f"{kind.__name__.removeprefix('seen_')}_{name}_{viewport}.txt"
    if os.environ.get("UPDATE_SNAPSHOTS"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(seen, encoding="utf-8")

    assert seen == path.read_text(encoding="utf-8")
    assert max(map(len, seen.splitlines())) <= VIEWPORTS[viewport].width


@pytest.mark.parametrize("name", REPORTS)
def test_ascii_look_is_ascii(name):
    """Where the terminal has no UTF-8, nothing but ASCII is drawn."""
    assert (seen_card(name, Viewport(glyphs=ASCII)) + seen_live(name, Viewport(glyphs=ASCII))).isascii()


def test_answer_comes_first():
    """The headline is the first line below the top rule, and the card of two ranks fits on 24 rows."""
    lines = seen_card("slow_rank", Viewport(80, 24, UNICODE)).splitlines()

    assert lines[1] == " Rank 1 is slow in forward: the others wait, 79 % of step time"
    assert len(lines) <= 24
