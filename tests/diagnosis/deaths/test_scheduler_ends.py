"""Ends by the scheduler: time limit, preemption; and steps that an end loses."""

from __future__ import annotations

from typing import Any

import pytest

from traceml.diagnosis.deaths.lost_ranks import rank_lost
from traceml.diagnosis.facts.ends import EndingSignal, RankExit
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.facts.job_facts_builder import JobFactsBuilder
from traceml.diagnosis.kinds import Kind

LIMIT_S = 1_000_000.0


def ends(*exits: RankExit, job_end_s: float | None = LIMIT_S) -> JobFacts:
    return JobFacts(world_size=2, exits=exits, job_end_s=job_end_s)


def swept(rank: int, at_s: float = LIMIT_S, number: int = 15, **facts: object) -> RankExit:
    return RankExit(
        rank=rank,
        state="killed",
        signal=number,
        last_step=811,
        open_step=812,
        at_s=at_s,
        **facts,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("stopped", [True, None])
def test_the_limit_is_reported_with_the_lost_steps(stopped: bool | None) -> None:
    """Whether the launcher passed the signal on or the ranks got it themselves."""
    finding = rank_lost(ends(swept(0, stopped=stopped, saved_steps=700), swept(1, stopped=stopped)))

    assert finding.summary == (
        "The scheduler ended the job at its time limit (SIGTERM), in step 812; 112 steps since the last checkpoint "
        "are lost."
    )
    assert (finding.kind, finding.ranks, finding.headline) == (
        Kind.RANK_LOST, (), "Ended by the scheduler: time limit"
    )  # fmt: skip
    assert (finding.evidence["cause"], finding.evidence["lost_steps"]) == ("time_limit", 112)
    assert "--signal=USR2@120" in finding.next


@pytest.mark.parametrize(
    "facts",
    [
        {"ended_by": EndingSignal(15, LIMIT_S, "slurmstepd", 8, scheduler="time_limit", limit_s=1800.0)},
        {"job_end_s": LIMIT_S, "job_limit_s": 1800.0},
    ],
)
def test_the_length_of_the_limit_is_told(facts: dict[str, Any]) -> None:
    """As Slurm told `traceml run` when it was ended, or its variables at the start."""
    finding = rank_lost(JobFacts(world_size=2, exits=(swept(0, saved_steps=700, stopped=True), swept(1)), **facts))

    assert finding.summary == (
        "The scheduler ended the job at its time limit of 30 min (SIGTERM), in step 812; 112 steps since the last "
        "checkpoint are lost."
    )
    assert finding.evidence["limit_s"] == 1800.0


def test_the_length_of_the_limit_is_told_of_a_launch() -> None:
    """Each rank's report has it."""
    finding = rank_lost(ends(swept(0, scheduler="time_limit", limit_s=7260.0), job_end_s=None))

    assert "at its time limit of 2 h 1 min (SIGTERM)" in finding.summary


def test_a_preemption_is_told_of_one_host() -> None:
    """Slurm told `traceml run`; a rank that had failed before is the cause all the same."""
    by = EndingSignal(15, LIMIT_S, "slurmstepd", 8, scheduler="preempted", limit_s=1800.0)
    finding = rank_lost(JobFacts(exits=(swept(0, LIMIT_S + 1, stopped=True),), ended_by=by))
    failed = RankExit(rank=0, state="failed", code=1, exception="ValueError: no", at_s=LIMIT_S - 9)

    assert finding.summary == "The scheduler preempted the job (SIGTERM), in step 812."
    assert rank_lost(JobFacts(exits=(failed,), ended_by=by)).ranks == (0,)


def test_a_warning_comes_before_the_limit() -> None:
    """SIGUSR1 ends a script that does not handle it, minutes before."""
    early = swept(0, LIMIT_S - 120, number=10), swept(1, LIMIT_S - 120, number=10)

    assert rank_lost(ends(*early)).evidence["cause"] == "time_limit"


@pytest.mark.parametrize(
    "facts",
    [
        ends(swept(0), swept(1), job_end_s=None),
        ends(swept(0, LIMIT_S - 500), swept(1, LIMIT_S - 500)),
        ends(swept(0), RankExit(rank=1, state="failed", code=1, exception="ValueError: no", at_s=LIMIT_S - 1)),
        ends(swept(0), swept(1, number=11)),
        ends(swept(0), swept(1, number=9, oom="group")),
    ],
)
def test_other_ends_are_no_time_limit(facts: JobFacts) -> None:
    """No limit, long before it, an exception, a crash, lack of memory."""
    finding = rank_lost(facts)

    assert finding.evidence.get("cause") != "time_limit"


@pytest.mark.parametrize(
    ("cause", "words", "headline"),
    [
        ("preempted", "The scheduler preempted the job (SIGTERM), in step 812; ", "preemption"),
        ("requeued", "The scheduler ended the job to queue it again (SIGTERM), in step 812; ", "queued again"),
        ("cancelled", "The scheduler ended the job (SIGTERM), in step 812; ", "scancel or a lost node"),
        ("time_limit", "The scheduler ended the job at its time limit (SIGTERM), in step 812; ", "time limit"),
        (
            "warned",
            "The scheduler warned the job of its time limit, and the job ended (SIGTERM), in step 812; ",
            "warning",
        ),
    ],
)
@pytest.mark.parametrize("stopped", [True, None])
def test_what_the_scheduler_says_is_reported(stopped: bool | None, cause: str, words: str, headline: str) -> None:
    """Its own words count more than the announced limit, which is far away."""
    exits = swept(0, LIMIT_S - 5000, scheduler=cause, stopped=stopped, saved_steps=700)

    finding = rank_lost(ends(exits, swept(1, LIMIT_S - 5000, scheduler=cause, stopped=stopped)))

    assert finding.summary == words + "112 steps since the last checkpoint are lost."
    assert finding.headline == f"Ended by the scheduler: {headline}"
    assert finding.evidence["cause"] == cause


def test_a_script_that_exits_on_the_warning_was_ended_by_the_scheduler() -> None:
    """It saved and left with a status of its own: nothing is lost, and the status is told."""
    left = RankExit(rank=0, state="failed", code=3, last_step=59, saved_steps=60, at_s=1.0, scheduler="preempted")

    finding = rank_lost(JobFacts(exits=(left,)))

    assert finding.summary.startswith("The scheduler preempted the job (exit code 3)")
    assert "lost" not in finding.summary


@pytest.mark.parametrize(
    "other",
    [
        RankExit(rank=0, state="failed", code=1, exception="ValueError: no", at_s=1.0, scheduler="preempted"),
        swept(0, number=11, scheduler="preempted"),
        swept(0, number=9, oom="group", scheduler="preempted"),
    ],
)
def test_a_failure_before_the_preemption_is_the_cause(other: RankExit) -> None:
    """An exception, a crash, lack of memory: the scheduler came later."""
    finding = rank_lost(ends(other, swept(1, scheduler="preempted", stopped=True), job_end_s=None))

    assert "cause" not in finding.evidence or finding.evidence["cause"] == "out_of_memory"
    assert finding.ranks == (0,)


def test_a_job_that_was_stopped_by_hand_is_no_finding() -> None:
    """Ctrl-C, and a signal to the launcher long before the limit."""
    assert rank_lost(ends(*(swept(rank, LIMIT_S - 500, stopped=True) for rank in range(2)))) is None
    assert rank_lost(ends(swept(0, number=2), swept(1, number=2))) is None


@pytest.mark.parametrize(
    ("last", "saved", "words"),
    [
        (59, 50, "; 10 steps since the last checkpoint are lost"),
        (50, 50, "; 1 step since the last checkpoint is lost"),
        (49, 50, ""),
        (59, None, ""),
        (None, 50, ""),
    ],
)
def test_steps_since_the_last_checkpoint_are_lost(last: int | None, saved: int | None, words: str) -> None:
    """Another rank has saved; without any known save nothing is said."""
    failed = RankExit(rank=1, state="failed", code=3, last_step=last)

    finding = rank_lost(JobFacts(exits=(RankExit(rank=0, state="finished", saved_steps=saved), failed)))

    assert ("since the last checkpoint" in finding.summary) is bool(words)
    assert words in finding.summary


def test_the_limit_comes_from_the_rank() -> None:
    """Its `process` row."""
    builder = JobFactsBuilder(1)
    builder.info(0, {"kind": "process", "job_end_s": LIMIT_S, "job_limit_s": 1800.0})

    assert (builder.build().job_end_s, builder.build().job_limit_s) == (LIMIT_S, 1800.0)
