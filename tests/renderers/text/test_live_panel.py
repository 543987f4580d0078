"""The live view's lines."""

from __future__ import annotations

import pytest

from tests.renderers.reports import REPORTS, healthy, slow_rank, thousand_ranks, too_early
from traceml.renderers.text.live_panel import live_lines, panel_height
from traceml.renderers.text.viewport import Viewport
from traceml.renderers.views import run_view
from traceml.runs.report.report_types import RestartSection


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize("height", [8, 12, 24, 50])
@pytest.mark.parametrize("width", [60, 80, 200])
def test_lines_keep_to_their_room(name, height, width):
    """The number of lines is exact, and none is wider than the screen."""
    view = run_view(REPORTS[name](), [1.0, 2.0])
    ranks = max(len(view.ranks), view.report.run.world_size)

    lines = live_lines(view, Viewport(width, height))

    assert len(lines) == panel_height(ranks, height) <= max(height, 8)
    assert max(line.cell_len for line in lines) <= width


@pytest.mark.parametrize(
    ("width", "seen"),
    [(100, ["196 steps/s", "p99", "3,206,260 tokens/s", "1,000 steps"]), (60, ["196 steps/s", "1,000 steps"])],
)
def test_the_data_rate_is_beside_the_speed(width, seen):
    """Where there is room, the speed line has the tokens of the whole job; it is never cut."""
    line = live_lines(run_view(healthy(), [1.0, 2.0]), Viewport(width, 24))[1].plain

    assert all(text in line for text in seen)
    assert ("tokens" in line) is (width == 100)
    assert len(line) <= width
    assert "…" not in line


def test_height_does_not_change_while_ranks_arrive():
    """A job of a known size has its final height from the first draw."""
    early = too_early()
    early.run.world_size = 2

    assert len(live_lines(run_view(early), Viewport())) == len(live_lines(run_view(slow_rank()), Viewport()))


def test_many_ranks_are_capped_and_counted():
    """Of a thousand ranks sixteen are shown, the slowest among them, and the rest are counted."""
    lines = [line.plain for line in live_lines(run_view(thousand_ranks()), Viewport(80, 25))]

    assert len(lines) == 25
    assert sum(line.startswith(" ▸") for line in lines) == 1
    assert any(line.startswith(" ▸  617") for line in lines)
    assert "   … 984 more, steps of 25.4 ms to 26.0 ms" in lines


def test_losses_and_overhead_are_always_there():
    """The last line has lost rows and overhead."""
    assert live_lines(run_view(healthy()), Viewport())[-1].plain == (
        " tracing no row lost of 8,012 · overhead 5.1 us per step (0.02 %)"
    )


def test_unknown_losses_are_no_zero():
    """Of a host out of reach nobody knows what was lost; before there is a report nothing is claimed."""
    report = healthy()
    report.telemetry.rows_lost = None

    assert live_lines(run_view(report), Viewport())[-1].plain.startswith(" tracing losses unknown of 8,012")
    assert "unknown" not in live_lines(run_view(too_early()), Viewport())[-1].plain


def test_color_tells_phases_apart():
    """With colors a rank's bar has a background per phase; without, labels and bars alone."""
    with_color = live_lines(run_view(slow_rank()), Viewport(color=True))[4]
    without = live_lines(run_view(slow_rank()), Viewport())[4]

    assert any("on blue" in str(span.style) for span in with_color.spans)
    assert not any(" on " in str(span.style) for span in without.spans)
    assert "|forward" in without.plain


def test_a_restart_is_seen_while_the_job_runs():
    """The panel keeps its height; the advice gives a row to the note."""
    restarted = slow_rank()
    restarted.run.restarts = [RestartSection(attempt=0, ranks=[1], reason="RuntimeError", step=30, lost_s=12.0)]

    lines = [line.plain for line in live_lines(run_view(restarted), Viewport(80, 25))]

    assert " note    Restarted once: rank 1, RuntimeError at step 30 (lost 12 s)" in lines
    assert len(lines) == len(live_lines(run_view(slow_rank()), Viewport(80, 25)))
