"""What people see: the card and the live view of fabricated runs, as files beside this one.

After a change on purpose: `UPDATE_SNAPSHOTS=1 pytest tests/renderers/test_looks.py`, then read the difference.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from rich.console import Console

from tests.renderers.reports import REPORTS
from traceml.renderers.card import card
from traceml.renderers.live import live_lines
from traceml.renderers.look import ASCII, UNICODE, Look
from traceml.renderers.views import live_view, run_view

SNAPSHOTS = Path(__file__).parent / "snapshots"
RUN = "20250102-030405-train-1a2b"
LOOKS = {"80": Look(80, 24), "120": Look(120, 40), "ascii": Look(80, 24, ASCII)}


def plain(renderable, look: Look) -> str:
    console = Console(width=look.width, color_system=None, highlight=False, force_terminal=False)
    with console.capture() as capture:
        console.print(renderable)

    return "".join(f"{line.rstrip()}\n" for line in capture.get().splitlines())


def seen_card(name: str, look: Look) -> str:
    path = f"traceml_runs/{RUN}/report.json"
    return plain(card(run_view(REPORTS[name]()), look, report_path=path, again=f"traceml report {RUN}"), look)


def seen_live(name: str, look: Look) -> str:
    rates = [30 + 5 * math.sin(second / 4) for second in range(60)] if name != "too_early" else []
    return "".join(plain(line, look) for line in live_lines(live_view(REPORTS[name](), rates), look))


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize("kind", [seen_card, seen_live])
def test_look(kind, name, look):
    """The text is that of the snapshot, and no line is wider than the terminal."""
    seen = kind(name, LOOKS[look])
    path = SNAPSHOTS / f"{kind.__name__.removeprefix('seen_')}_{name}_{look}.txt"
    if os.environ.get("UPDATE_SNAPSHOTS"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(seen, encoding="utf-8")

    assert seen == path.read_text(encoding="utf-8")
    assert max(map(len, seen.splitlines())) <= LOOKS[look].width


@pytest.mark.parametrize("name", REPORTS)
def test_ascii_look_is_ascii(name):
    """Where the terminal has no UTF-8, nothing but ASCII is drawn."""
    assert (seen_card(name, Look(glyphs=ASCII)) + seen_live(name, Look(glyphs=ASCII))).isascii()


def test_answer_comes_first():
    """The headline is the first line below the top rule, and the card of two ranks fits on 24 rows."""
    lines = seen_card("slow_rank", Look(80, 24, UNICODE)).splitlines()

    assert lines[1] == " Rank 1 is slow in forward: the others wait, 79 % of step time"
    assert len(lines) <= 24
