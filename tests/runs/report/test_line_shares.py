"""Sampled lines by phase."""

from __future__ import annotations

import json

import pytest

from traceml.runs.report.line_shares import LibraryCall, LinesDocument, lines_by_phase, lines_of_workers
from traceml.runs.report.report_types import LineSection, PhaseSection, Report, TimePart, TimeSection


def report_with(*lines: LineSection) -> Report:
    report = Report.empty("run")
    report.lines = list(lines)
    report.steps.count = 1000
    report.phases = [PhaseSection(phase="forward", mean_ms=4.0), PhaseSection(phase="augment", mean_ms=2.0)]
    report.time = TimeSection(20.0, [TimePart("startup", 8.0, 0.4), TimePart("evaluation", 1.0, 0.05)])
    return report


def line(phase: str, samples: int, share: float, number: int = 7, library: str | None = None) -> LineSection:
    return LineSection(
        phase=phase, samples=samples, share=share, file="/x/train.py", line=number, function="main", library=library
    )


def test_phases_have_the_time_of_the_hooks():
    """Not of the samples; the user's phases are one, and outside steps is what the run's time says."""
    lines = [line("forward", 5, 1.0), line("user", 40, 1.0), line("startup", 9, 1.0), line("outside", 3, 1.0)]

    phases = lines_by_phase(report_with(*lines))

    assert [(each.phase, each.seconds) for each in phases] == [
        ("user", 2.0), ("startup", 8.0), ("forward", 4.0), ("outside", 1.0)
    ]  # fmt: skip


@pytest.mark.parametrize(("phases", "seconds"), [(("outside",), (4.0,)), (("outside", "after"), (1.0, 3.0))])
def test_time_after_the_last_step_is_that_of_its_lines(phases, seconds):
    """Without lines of its own it is time outside steps, where an evaluation is."""
    report = report_with(*(line(phase, 9, 1.0) for phase in phases))
    report.time.parts.append(TimePart("idle", 3.0, 0.15))

    assert {each.phase: each.seconds for each in lines_by_phase(report)} == dict(zip(phases, seconds, strict=True))


def test_a_line_is_there_once():
    """With the library functions that it had called."""
    (phase,) = lines_by_phase(
        report_with(line("forward", 30, 0.6, library="a.py:1 f"), line("forward", 15, 0.3, 9), line("forward", 5, 0.1))
    )

    assert [(each.place, each.calls) for each in phase.lines] == [
        ("/x/train.py:7 main", (LibraryCall("a.py:1 f", 0.6),)), ("/x/train.py:9 main", ())
    ]  # fmt: skip
    assert phase.lines[0].share == pytest.approx(0.7)


def test_lines_of_workers_are_beside_those_of_the_training():
    """They have no part in the time of the training thread, and come last in the document."""
    report = report_with(line("workers", 90, 1.0, 9), line("forward", 5, 1.0))

    assert [each.phase for each in lines_by_phase(report)] == ["forward"]
    assert [(each.phase, each.samples, each.seconds) for each in lines_of_workers(report)] == [("workers", 90, None)]
    assert [each.phase for each in LinesDocument.of(report).phases] == ["forward", "workers"]


def test_lines_as_a_document():
    """With what the table shows, unrounded."""
    report = report_with(line("forward", 30, 0.75, library="a.py:1 f"), line("forward", 10, 0.25, 9))

    document = json.loads(LinesDocument.of(report).to_json())

    (phase,) = document["phases"]
    assert (document["run"], phase["phase"], phase["samples"], phase["seconds"]) == ("run", "forward", 40, 4.0)
    assert [(each["line"], each["share"]) for each in phase["lines"]] == [(7, 0.75), (9, 0.25)]
    assert phase["lines"][0]["calls"] == [{"library": "a.py:1 f", "share": 0.75}]
