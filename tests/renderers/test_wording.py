"""Words for restarts, and for the cost and the gain of a finding."""

from __future__ import annotations

import pytest

from tests.renderers.reports import finding, straggler
from traceml.renderers.wording import cost_text, gain_sentence, phase_heading, restarts_text, tracker_text
from traceml.runs.report.line_shares import PhaseLines
from traceml.runs.report.report_types import RestartSection, TrackerSection


@pytest.mark.parametrize(
    ("restarts", "text"),
    [
        ([(30, 12.0)], "Restarted once: rank 1, RuntimeError at step 30 (lost 12 s)"),
        ([(None, None)], "Restarted once: rank 1, RuntimeError before the first step"),
        (
            [(1, 1.0), (2000, 2.0)],
            (
                "Restarted twice: rank 1, RuntimeError at step 1 (lost 1.0 s); "
                "rank 1, RuntimeError at step 2,000 (lost 2.0 s)"
            ),
        ),
        (
            [(1, None), (2, None), (3, None), (4, None)],
            (
                "Restarted 4 times: last rank 1, RuntimeError at step 2; rank 1, RuntimeError at step 3; "
                "rank 1, RuntimeError at step 4"
            ),
        ),
    ],
)
def test_restarts_in_words(restarts, text):
    """The newest three are told, each with rank, reason, step and time."""
    sections = [
        RestartSection(attempt=number, ranks=[1], reason="RuntimeError", step=step, lost_s=lost)
        for number, (step, lost) in enumerate(restarts)
    ]
    assert restarts_text(sections) == text


def test_a_restart_by_the_scheduler_names_no_rank():
    """All ranks were ended alike."""
    section = RestartSection(attempt=0, reason="preempted by the scheduler", step=30, lost_s=12.0)
    assert restarts_text([section]) == "Restarted once: preempted by the scheduler at step 30 (lost 12 s)"


@pytest.mark.parametrize(
    ("told", "says"),
    [
        (straggler(), "steps are 4.7x faster once this is fixed"),
        (finding("EVAL_HEAVY", speedup_if_fixed=1.43), "the run is 1.43x faster once this is fixed"),
        (straggler(summary="Without it steps would be 4.7x faster."), None),
        (straggler(next="Set num_workers=2; about 4.7x faster."), None),
        (straggler(next="Put the data on a faster disk."), "steps are 4.7x faster once this is fixed"),
        (finding(), None),
    ],
)
def test_the_gain_is_reported_once(told, says):
    """A gain that the summary or the advice names is not told again."""
    assert gain_sentence(told) == says


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("INPUT_BOUND", "40 % of step time"),
        ("STARTUP", "40 % of the run's time"),
        ("DUPLICATE_DATA", "40 % of the ranks' work"),
        ("STEPS_SKIPPED", "40 % of the steps"),
        ("HANG", None),
        ("RANK_LOST", None),
    ],
)
def test_the_cost_is_of_what_the_kind_costs(kind, says):
    """A share of the run, of work or of steps is not told as one of step time; a lost rank has none."""
    assert cost_text(finding(kind, cost_share=0.4)) == says
    assert cost_text(finding(kind)) is None


@pytest.mark.parametrize(("seconds", "text"), [(12.0, "Forward, 12 s"), (0.0, "Forward"), (None, "Forward")])
def test_the_heading_of_lines_has_the_time_that_is_known(seconds, text):
    """Samples of a phase of which the hooks saw nothing would stand under `0.0 s`."""
    assert phase_heading(PhaseLines("forward", 3, seconds, ())) == text


@pytest.mark.parametrize(
    ("delivered", "derived", "pending", "text"),
    [
        (203, 31, 0, "jsonl 203 delivered"),
        (0, 31, 0, "jsonl 31 derived values delivered"),  # a script that logs nothing has its step times there
        (0, 31, 5, "jsonl 0 delivered, 5 pending"),
        (0, 0, 0, "jsonl 0 delivered"),
    ],
)
def test_a_tracker_of_a_run_that_logs_nothing_has_its_derived_values(delivered, derived, pending, text):
    assert tracker_text(TrackerSection(backend="jsonl", delivered=delivered, derived=derived, pending=pending)) == text
