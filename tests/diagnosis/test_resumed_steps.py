"""Step numbers of a training that has resumed: those that its script counts."""

from __future__ import annotations

from tests.diagnosis.fabricated import Job, window_of
from traceml.diagnosis.facts.ends import RankExit
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.job_facts_builder import JobFactsBuilder
from traceml.diagnosis.findings import Finding, with_global_step_numbers
from traceml.diagnosis.kinds import Kind
from traceml.diagnosis.ruleset import diagnose

FAILED = RankExit(
    rank=1,
    state="failed",
    code=1,
    exception="ValueError: bad loss in step 31",
    file="/me/train.py",
    line=9,
    last_step=30,
    open_step=31,
    open_phase="forward",
)


def lost(resumes_at: int) -> Finding:
    job = Job(ranks=2, steps=31)
    facts = JobFacts(world_size=2, state="failed", exits=(FAILED,), latest=(31, 30), resumes_at=resumes_at)
    return diagnose(window_of(job), facts)[0]


def test_the_end_of_a_resumed_rank_has_the_step_of_its_script() -> None:
    """Also in the headline; what the exception says stays, and so do numbers of other things."""
    before, after = lost(0), lost(4000)

    assert (before.kind, after.kind) == (Kind.RANK_LOST, Kind.RANK_LOST)
    assert "ValueError: bad loss in step 31 at train.py:9" in before.summary
    assert after.summary == before.summary.replace(", in step 31", ", in step 4,031")
    assert "step 4,031" in after.headline
    assert {name: after.evidence[name] for name in ("step", "last_step", "resumed_at")} == {
        "step": 4031, "last_step": 4030, "resumed_at": 4000,
    }  # fmt: skip


def test_all_steps_of_a_change_are_counted_on() -> None:
    """A number that is no step of the evidence stays."""
    found = Finding.of(
        Kind.SLOWDOWN,
        summary="From step 10 to step 20 a step takes 2.0x as long, in every 20th step 7.",
        next="Look at step 20.",
        evidence={"since_step": 10, "until_step": 20, "factor": 2.0},
    )

    after = with_global_step_numbers(found, 100)

    assert after.summary == "From step 110 to step 120 a step takes 2.0x as long, in every 20th step 7."
    assert after.next == "Look at step 120."
    assert (after.evidence["since_step"], after.evidence["until_step"], after.evidence["factor"]) == (110, 120, 2.0)


def test_ranks_that_count_on_themselves_are_not_shifted() -> None:
    """`traceml.set_step` has given their steps the numbers of the script."""
    facts = JobFactsBuilder(2)
    facts.resumes_at = 40
    assert facts.build().resumes_at == 40

    facts.info(0, {"kind": "resumed", "step": 40, "before": 40})
    assert facts.build().resumes_at == 0
