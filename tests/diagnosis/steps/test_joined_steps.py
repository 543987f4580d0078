"""Steps at which ranks wait for those with more batches: they are neither jitter nor a slow network."""

from __future__ import annotations

from tests.diagnosis.fabricated import Job, window_of
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.job_facts_builder import JobFactsBuilder
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.ruleset import diagnose

PAIR = Job(ranks=2)
LEFT = (40, 90, 140, 190)


def waits(window) -> None:
    """Make the ranks wait for others at the end of some epochs."""
    at = [column for column, step in enumerate(window.steps.tolist()) if step in LEFT]
    window.total[:, at] += 2e9
    window.times["comm"][:, at] += 2e9


def test_a_wait_at_the_end_of_join_is_no_jitter():
    """The ranks report where they have left `with Join(...)`; the wait may be in the next step."""
    window = window_of(PAIR)
    waits(window)
    facts = JobFactsBuilder(2)
    assert Kind.JITTER in {each.kind for each in diagnose(window, JobFacts(world_size=2))}

    for step in LEFT:
        facts.info(0, {"kind": "joined", "step": step - 1})

    joined = facts.build().joined
    assert not {Kind.JITTER, Kind.COMM_BOUND} & {
        each.kind for each in diagnose(window, JobFacts(world_size=2, joined=joined))
    }
