"""The page of a flame graph."""

from __future__ import annotations

import re

from tests.runs.report.test_line_shares import line, report_with
from traceml.renderers.html.flame_page import flame_page
from traceml.runs.export.flame_graph import speedscope
from traceml.runs.report.report_types import TimeSection


def test_frames_are_as_wide_as_their_time() -> None:
    """A phase holds its lines, and these share its width."""
    page = flame_page(report_with(line("forward", 30, 0.75), line("forward", 10, 0.25, 9)))
    widths = re.findall(r"flex-grow:([\d.]+)", page)

    assert sorted(float(width) for width in widths) == [0.25, 0.75, 1.0]


def test_it_needs_no_network() -> None:
    """Style and script are inside, and text of the run is escaped."""
    report = report_with(line("forward", 3, 1.0))
    report.run.name = "<script>alert(1)</script>"
    page = flame_page(report)

    assert "http" not in page.replace("http-equiv", "")
    assert "<script>alert" not in page
    assert "&lt;script&gt;" in page


def test_a_run_without_samples_is_reported() -> None:
    """The page says so."""
    assert "No lines were sampled." in flame_page(report_with())


def test_a_phase_without_time_is_left_out() -> None:
    """A run that ended at once may have samples of a part that has no second."""
    report = report_with(line("startup", 3, 1.0))
    report.time = TimeSection(0.0, [])

    assert "No lines were sampled." in flame_page(report)
    assert speedscope(report)["profiles"][0]["weights"] == []
