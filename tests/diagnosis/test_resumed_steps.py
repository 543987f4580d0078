"""Step numbers of a training that has resumed: those that its script counts."""

from __future__ import annotations

import numpy as np

from tests.diagnosis.fabricated import Job, window_of
from tests.diagnosis.memory.memories import leaking
from tests.diagnosis.rules.slowdowns.test_related_findings import adds_in
from traceml.database.schema import LOSSES
from traceml.diagnosis.facts.device_events import GpuHealthHistory
from traceml.diagnosis.facts.ends import EndingSignal, RankExit
from traceml.diagnosis.facts.growing_objects import growing_of
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.job_facts_builder import JobFactsBuilder
from traceml.diagnosis.facts.numerics import LossHistory
from traceml.diagnosis.facts.run_time import RunTime
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


def test_the_step_at_which_a_container_was_counted_is_counted_on() -> None:
    """As the step since which memory grows, beside which it stands."""
    grown = {"path": "losses", "file": "/me/train.py", "function": "main", "line": 41, "kind": "list", "count": 4000,
             "per_step": 1.0, "item_bytes": 4 << 20}  # fmt: skip
    facts = JobFacts(**leaking(), growing={0: growing_of({"step": 1100, "grown": [grown]})}, resumes_at=4000)

    found = next(each for each in diagnose(window_of(Job(ranks=1)), facts) if each.kind is Kind.MEMORY_LEAK)

    assert f"since step {found.evidence['since_step']:,}" in found.summary
    assert "it had 4,000 at step 5,100" in found.summary
    assert found.evidence["since_step"] > 4000
    assert found.evidence["counted_at_step"] == 5100


def test_the_step_in_which_a_rank_had_waited_is_counted_on() -> None:
    """It may be another one than that of the rank that came furthest."""
    swept = {"state": "killed", "signal": 15, "stopped": True, "last_step": 811}
    evaluates = RankExit(rank=0, open_phase="evaluation", **swept)
    waits = RankExit(rank=1, open_step=812, open_phase="backward", open_s=211.0, **swept)
    job = {"world_size": 2, "state": "stopped", "exits": (evaluates, waits), "time": RunTime(wall_s=900.0)}
    facts = JobFacts(**job, ended_by=EndingSignal(15, 1e6), resumes_at=4000)

    found = diagnose(window_of(Job(ranks=2, steps=31)), facts)[0]

    assert "after step 4,811" in found.summary
    assert "Rank 1 had been in step 4,812 for 3:31" in found.summary


def test_the_part_of_the_run_that_has_a_cost_is_counted_on() -> None:
    """The first epoch after the restart fills the cache anew; the machine takes cores in parts of the run."""

    def found(resumes_at: int) -> Finding:
        job = Job(ranks=1, steps=400, wander=0.5, wander_steps=60)
        window = window_of(job, adds_in(slice(0, 60), "input_wait", 18.0), seed=3)
        return diagnose(window, JobFacts(world_size=1, resumes_at=resumes_at))[0]

    before, after = found(0), found(4000)

    until = before.evidence["until_step"]
    assert after.evidence["until_step"] == 4000 + until
    assert f" of it is before step {until}." in before.summary
    assert f" of it is before step {4000 + until:,}." in after.summary


def test_the_checkpoint_to_go_back_to_is_counted_on() -> None:
    """It is from before the step that precedes the first loss which is not finite."""
    losses, rows = LossHistory(), np.zeros(200, LOSSES.dtype)
    rows["step"], rows["loss"] = np.arange(200), np.where(np.arange(200) < 42, 1.0, np.nan)
    losses.add(0, rows)

    found = diagnose(window_of(Job(ranks=1, steps=200)), JobFacts(losses=losses, latest=(199,), resumes_at=4000))[0]

    assert "Go back to a checkpoint from before step 4,041." in found.next
    assert "and of step 4,042" in found.next
    assert (found.evidence["since_step"], found.evidence["checkpoint_before_step"]) == (4042, 4041)


def test_the_step_of_a_device_fault_is_counted_on() -> None:
    """Of several events each has its own."""
    health = GpuHealthHistory()
    for xid, step in ((79, 42), (74, 57)):
        health.add(0, {"index": 0, "xid": xid, "step": step})

    found = diagnose(window_of(Job(ranks=1)), JobFacts(health=health, resumes_at=4000))[0]

    assert (found.kind, "in step 4,042" in found.summary, "in step 4,057" in found.summary) == (
        Kind.DEVICE_FAULT, True, True,
    )  # fmt: skip
