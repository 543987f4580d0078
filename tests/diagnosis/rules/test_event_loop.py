"""Trainings in a coroutine: the event loop waits where the training awaits something."""

from __future__ import annotations

import pytest

from tests.diagnosis.fabricated import Job, adds, window_of
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.sampled_lines import SampledLine
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.ruleset import diagnose

ALONE = Job(ranks=1, steps=220, grouped=False)
WAITS = "/lib/python3.11/selectors.py:468 EpollSelector.select"


def found(library: str | None, *faults) -> Finding:
    lines = (
        SampledLine(0, "other", "/x/train.py", 88, "main", library, 80),
        SampledLine(0, "forward", "/x/train.py", 9, "main", None, 20),
    )
    window = window_of(ALONE, adds("other", 40), *faults)
    return next(each for each in diagnose(window, JobFacts(lines=lines)) if each.kind is Kind.RESIDUAL_HEAVY)


def test_waiting_in_the_event_loop_is_no_code_to_make_cheaper() -> None:
    """`asyncio.run(...)` is on the stack alone, as the coroutine is suspended."""
    finding = found(WAITS)

    assert "where the event loop waits" in finding.summary
    assert finding.next.startswith("Look at what the training awaits")


@pytest.mark.parametrize("library", [None, "/lib/json/encoder.py:1 encode"])
def test_code_that_runs_is_to_be_made_cheaper(library: str | None) -> None:
    """It is none of the event loop's."""
    finding = found(library)

    assert "event loop" not in finding.summary
    assert finding.next.startswith("Make train.py:88 main cheaper")


def test_headline_and_summary_have_one_share() -> None:
    """The line has a share of the phase, in which rare long steps are; the cost has none of them."""
    finding = found(None, adds("other", 400, every=40))
    share = finding.headline.partition(" of step time")[0]

    assert f"({share}, not counting rare long steps)" in finding.summary


@pytest.mark.parametrize(("busy", "waits"), [(0.05, True), (0.95, False)])
def test_code_that_waits_is_not_to_be_made_cheaper(busy: float, waits: bool) -> None:
    """A loop that polls a deque until another thread has filled it."""
    polls = SampledLine(0, "other", "/x/train.py", 15, "next_batch", None, 80, int(1e9), int(busy * 1e9))
    forward = SampledLine(0, "forward", "/x/train.py", 9, "main", None, 20)
    found = diagnose(window_of(ALONE, adds("other", 40)), JobFacts(lines=(polls, forward)))

    finding = next(each for each in found if each.kind is Kind.RESIDUAL_HEAVY)
    assert finding.next.startswith("train.py:15 next_batch waits there" if waits else "Make train.py:15 next_batch")


@pytest.mark.parametrize(
    ("library", "told"), [("/lib/multiprocessing/connection.py:390 Connection._recv", True), (None, False)]
)
def test_processes_that_are_waited_for_are_named(library: str | None, told: bool) -> None:
    """Environments in processes of their own, whose answers are read from pipes."""
    steps = SampledLine(0, "other", "/x/train.py", 19, "Vec.step", library, 80, int(1e9), int(0.05e9))
    forward = SampledLine(0, "forward", "/x/train.py", 9, "main", None, 20)
    found = diagnose(window_of(ALONE, adds("other", 40)), JobFacts(lines=(steps, forward)))

    finding = next(each for each in found if each.kind is Kind.RESIDUAL_HEAVY)
    assert finding.next.startswith("train.py:19 Vec.step waits there")
    assert ("for answers from other processes: make their work cheaper" in finding.next) == told
    assert ("find out for what" in finding.next) != told
