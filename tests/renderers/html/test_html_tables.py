"""Tables of the report's page."""

from __future__ import annotations

from traceml.renderers.html.html_tables import line_list
from traceml.renderers.views import run_view
from traceml.runs.report.report_types import LineSection, Report


def test_lines_of_loader_workers_come_last():
    """They are not a part of the training's time, and their heading says what their share is of."""
    report = Report.empty("run")
    report.lines = [
        LineSection(phase="workers", file="data.py", line=3, function="decode", samples=90, share=1.0),
        LineSection(phase="forward", file="train.py", line=9, function="train", samples=5, share=1.0),
    ]

    forward, workers = line_list(run_view(report))

    assert "<h3><i></i>Forward</h3>" in forward
    assert "<h3><i></i>Loader workers, while they make batches</h3>" in workers
    assert "data.py:3 decode" in workers
