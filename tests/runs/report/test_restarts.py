"""Restarts: the ranks that ended each attempt, and the time until steps went on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.diagnosis.fabricated import Job, rows_of
from tests.runs.fabricated_store import add_rank, run_facts
from traceml.database.snapshots.rank_snapshot import ABORT, SNAPSHOT, RankSnapshot
from traceml.database.store.reader import StoreReader
from traceml.database.store.store import StoreWriter
from traceml.diagnosis.facts.core_waits import COMPETING_PROCESSES
from traceml.diagnosis.facts.ends import ATTEMPT, END
from traceml.diagnosis.facts.job_facts_builder import JobFactsBuilder
from traceml.renderers.wording import restarts_text
from traceml.run_folder import STORE_NAME
from traceml.runs.report.report import build_report
from traceml.runs.report.report_types import RestartSection
from traceml.runs.rows.run_summary_reader import read_run_summary

SECOND = 10**9


def attempt(writer: StoreWriter, number: int, steps: int, begins_s: int, *ends: dict[str, Any]) -> None:
    """Add two ranks whose first step ends at a second of the monotonic clock, and later ones each second."""
    for rank, (rows, end) in enumerate(zip(rows_of(Job(steps=max(steps, 1), ranks=2)), ends, strict=True)):
        rows["t_end_ns"] = (begins_s + np.arange(len(rows))) * SECOND
        add_rank(writer, rank, rows[:steps], attempt=number, boot_id="boot", clock=[(begins_s - 1) * SECOND, 0], **end)


def store(folder: Path) -> StoreWriter:
    folder.mkdir()
    writer = StoreWriter(folder / STORE_NAME)
    writer.put_meta("run", run_facts(attempt=1))
    return writer


def read(folder: Path) -> JobFactsBuilder:
    """Return the facts of the last attempt."""
    with StoreReader(folder / STORE_NAME) as reader:
        return read_run_summary(reader).facts_builder


def failed(**facts: Any) -> dict[str, Any]:
    return {"state": "failed", "exit": facts}


RAISED = failed(exception="RuntimeError", message="no", last_step=29, step=30, at_s=1.0)
SWEPT = {"state": "killed", "exit": {"signal": 15, "last_step": 29, "at_s": 2.0}}
FINE = {"state": "finished"}


def test_a_restart_names_rank_reason_step_and_time(tmp_path: Path) -> None:
    """The time is that from the last step before to the first step after, by the monotonic clock."""
    with store(tmp_path / "run") as writer:
        attempt(writer, 0, 30, 100, SWEPT, RAISED)
        attempt(writer, 1, 50, 141, FINE, FINE)

    report = build_report(tmp_path / "run")

    expected = RestartSection(attempt=0, ranks=[1], reason="RuntimeError", step=30, lost_s=12.0)
    assert report.run.restarts == [expected]
    assert report.run.attempt == 1


def test_each_restart_is_listed(tmp_path: Path) -> None:
    """An attempt without a step counts from its connection; one that goes on has lost an unknown time so far."""
    with store(tmp_path / "run") as writer:
        attempt(writer, 0, 30, 100, {"state": "killed", "exit": {"signal": 9, "last_step": 29}}, SWEPT)
        attempt(writer, 1, 0, 200, failed(code=3, at_s=1.0), SWEPT)
        attempt(writer, 2, 10, 205, {"state": "lost"}, FINE)
        attempt(writer, 3, 0, 300, FINE, FINE)

    found = build_report(tmp_path / "run").run.restarts

    assert [(each.ranks, each.reason, each.lost_s) for each in found] == [
        ([0], "SIGKILL", None),
        ([0], "exit code 3", 6.0),
        ([0], "lost without a report", None),
    ]


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ({"state": "killed", "exit": {"signal": 9, "oom": "group"}}, "out of memory"),
        (failed(exception="torch.OutOfMemoryError", message="CUDA out of memory."), "out of memory"),
        ({"state": "killed", "exit": {"signal": 9, "oom": "host"}}, "SIGKILL"),
        ({"state": "lost", "exit": {"host_lost": "its agent was lost"}}, "lost with the host"),
    ],
)
def test_lack_of_memory_and_a_lost_host_are_reasons(tmp_path: Path, end: dict[str, Any], reason: str) -> None:
    """Where it is certain, as the finding about the last attempt says it."""
    with store(tmp_path / "run") as writer:
        attempt(writer, 0, 30, 100, SWEPT, end)
        attempt(writer, 1, 50, 141, FINE, FINE)

    (found,) = build_report(tmp_path / "run").run.restarts
    assert (found.ranks, found.reason) == ([1], reason)


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        ("preempted", "preempted by the scheduler"),
        ("requeued", "queued again by the scheduler"),
        ("cancelled", "ended by the scheduler"),
        ("time_limit", "ended by the scheduler at its time limit"),
    ],
)
def test_an_attempt_that_the_scheduler_ended_blames_no_rank(tmp_path: Path, cause: str, reason: str) -> None:
    """SIGTERM is how the scheduler ends a job; also where the launcher passed it on."""
    ended = {"state": "killed", "exit": {"signal": 15, "last_step": 29, "step": 30, "scheduler": cause}}
    passed_on = {"state": "killed", "exit": {**ended["exit"], "stopped": True}}
    for number, end in enumerate((ended, passed_on)):
        with store(tmp_path / f"run{number}") as writer:
            attempt(writer, 0, 30, 100, end, end)
            attempt(writer, 1, 50, 141, FINE, FINE)

        expected = RestartSection(attempt=0, ranks=[], reason=reason, step=30, lost_s=12.0)
        assert build_report(tmp_path / f"run{number}").run.restarts == [expected]


def test_a_rank_that_left_early_is_the_reason(tmp_path: Path) -> None:
    """The others failed because they needed it, as the verdict says where no restart follows."""
    peer = failed(exception="RuntimeError", message="Connection closed by peer", last_step=29, step=30, at_s=2.0)
    left = {"state": "finished", "exit": {"last_step": 29, "step": 29, "at_s": 1.0}}
    with store(tmp_path / "run") as writer:
        attempt(writer, 0, 30, 100, peer, left)
        attempt(writer, 1, 50, 141, FINE, FINE)

    [restart] = build_report(tmp_path / "run").run.restarts
    assert (restart.ranks, restart.reason, restart.step) == ([1], "ended before the others", 30)
    assert restarts_text([restart]).startswith("Restarted once: rank 1, ended before the others at step 30")


def test_an_attempt_that_the_launcher_stopped_blames_no_rank(tmp_path: Path) -> None:
    """As torchrun does when another host joins, and `traceml run` when it is interrupted."""
    stopped = {"state": "killed", "exit": {"signal": 15, "last_step": 29, "step": 30, "stopped": True}}
    with store(tmp_path / "run") as writer:
        attempt(writer, 0, 30, 100, stopped, stopped)
        attempt(writer, 1, 50, 141, FINE, FINE)

    expected = RestartSection(attempt=0, ranks=[], reason="stopped by the launcher", step=30, lost_s=12.0)
    assert build_report(tmp_path / "run").run.restarts == [expected]


def test_a_rank_whose_end_nobody_saw_was_in_the_last_step_that_arrived(tmp_path: Path) -> None:
    """Its host is gone: it was not lost before its first step."""
    lost = {"state": "lost", "exit": {"at_s": 3.0, "unsent": True}}
    with store(tmp_path / "run") as writer:
        attempt(writer, 0, 30, 100, lost, lost)
        attempt(writer, 1, 50, 141, FINE, FINE)

    [restart] = build_report(tmp_path / "run").run.restarts
    assert (restart.ranks, restart.reason, restart.step) == ([0, 1], "lost without a report", 29)


def test_a_rank_that_failed_before_the_scheduler_is_the_reason(tmp_path: Path) -> None:
    """The scheduler's words say nothing of an exception."""
    swept = {"state": "killed", "exit": {**SWEPT["exit"], "scheduler": "requeued"}}
    with store(tmp_path / "run") as writer:
        attempt(writer, 0, 30, 100, swept, failed(**{**RAISED["exit"], "scheduler": "requeued"}))
        attempt(writer, 1, 50, 141, FINE, FINE)

    (found,) = build_report(tmp_path / "run").run.restarts
    assert (found.ranks, found.reason) == ([1], "RuntimeError")


def test_an_attempt_that_was_ended_as_it_hung_is_a_restart(tmp_path: Path) -> None:
    """Its processes ended by SIGTERM, which alone looks as if the launcher had ended them for another one."""
    with store(tmp_path / "run") as writer:
        writer.event(ABORT, {"why": "hang", "attempt": 0})
        ended = {"state": "killed", "exit": {"signal": 15, "last_step": 79, "step": 80, "at_s": 2.0}}
        attempt(writer, 0, 80, 100, ended, ended)
        attempt(writer, 1, 50, 200, FINE, FINE)

    report = build_report(tmp_path / "run")

    expected = RestartSection(attempt=0, ranks=[], reason="hung", step=80, lost_s=21.0)
    assert report.run.restarts == [expected]
    assert restarts_text(report.run.restarts) == "Restarted once: hung at step 80 (lost 21 s)"


def test_an_attempt_that_ended_well_is_no_restart(tmp_path: Path) -> None:
    """A run that is continued under its id has attempts, and nothing was lost."""
    with store(tmp_path / "run") as writer:
        attempt(writer, 0, 30, 100, FINE, FINE)
        attempt(writer, 1, 50, 141, FINE, FINE)

    assert build_report(tmp_path / "run").run.restarts == []


def test_the_time_of_a_hang_is_that_since_the_last_progress(tmp_path: Path) -> None:
    """The recorder of a rank that was stopped cannot tell how old its step is, and outside a step there is none."""
    with store(tmp_path / "run") as writer:
        attempt(writer, 0, 30, 100, SWEPT, RAISED)
        attempt(writer, 1, 30, 141, *[{"state": "killed", "exit": {"signal": 15, "open_step": 30, "open_s": 0.0}}] * 2)
        for rank in (0, 1):
            seen = RankSnapshot(at_ns=200 * SECOND, rank=rank, quiet_s=30.0, step=30, in_step=True, answered="kernel",
                                process_state="T")  # fmt: skip
            writer.event(SNAPSHOT, {**seen.to_row(), "t_ns": seen.at_ns, "attempt": 1})

        writer.put_meta("run", run_facts(attempt=1, state="hung"))

    report = build_report(tmp_path / "run")

    assert report.verdict.kind == "HANG"
    assert report.time is not None
    assert report.time.hang_s == report.verdict.evidence["quiet_s"] == pytest.approx(30.0)


@pytest.mark.parametrize(("phase", "made"), [("backward", 29), ("input_wait", 30)])
def test_the_step_in_which_an_attempt_hung_is_not_productive(tmp_path: Path, phase: str, made: int) -> None:
    """A collective that times out raises, and the end of the process writes the row; waiting never counts."""
    timed_out = failed(exception="RuntimeError", last_step=28, step=29, open_s=1000.0, open_phase=phase, at_s=1.0)
    with store(tmp_path / "run") as writer:
        attempt(writer, 0, 30, 100, timed_out, timed_out)
        attempt(writer, 1, 50, 300, FINE, FINE)

    report = build_report(tmp_path / "run")

    assert report.time is not None
    assert (report.time.productive_steps, report.time.repeated_steps) == (50, made)


@pytest.mark.parametrize(("phase", "hung_s"), [("startup", 90.0), ("checkpoint", 90.0), ("exit", 90.0), (None, 0.0)])
def test_an_earlier_attempt_may_hang_outside_of_steps(tmp_path: Path, phase: str | None, hung_s: float) -> None:
    """In start-up, while it saves, at its end: snapshots show it, where no step is open. Others were just ended."""
    with store(tmp_path / "run") as writer:
        attempt(writer, 0, 0 if phase == "startup" else 30, 100, SWEPT, SWEPT)
        attempt(writer, 1, 50, 300, FINE, FINE)
        for rank in (0, 1) if phase else ():
            seen = RankSnapshot(at_ns=200 * SECOND, rank=rank, quiet_s=hung_s, step=-1 if phase == "startup" else 29,
                                answered="recorder", phase=phase or "", process_state="S")  # fmt: skip
            writer.event(SNAPSHOT, {**seen.to_row(), "t_ns": seen.at_ns, "attempt": 0})

    report = build_report(tmp_path / "run")

    assert report.time is not None
    assert report.time.hang_s == pytest.approx(hung_s)


def test_what_was_seen_of_an_earlier_attempt_is_not_said_of_the_last(tmp_path: Path) -> None:
    """Who ended it, as a scheduler that queued the job again, and the programs that took its cores."""
    signal = {"signal": 15, "time": 1_700_000_009.0, "sender": "slurmstepd", "sender_pid": 8, "waited_s": 1.0}
    with store(tmp_path / "run") as writer:
        attempt(writer, 0, 30, 100, SWEPT, SWEPT)
        writer.event(COMPETING_PROCESSES, {"cores": {"ffmpeg": 2.0}, "started": {}})
        writer.event(END, {"state": "stopped", "status": 143, "ended_by": signal})
        writer.commit()
        before = read(tmp_path / "run")
        writer.event(ATTEMPT, {"attempt": 1})
        attempt(writer, 1, 50, 141, *[{"state": "running"}] * 2)
        writer.put_meta("run", run_facts(attempt=1, state="running", ended=None))

    assert before.ended_by is not None
    assert before.competing_processes.others == {"ffmpeg": 2.0}
    now = read(tmp_path / "run")
    assert now.ended_by is None
    assert now.competing_processes.others == {}
    assert build_report(tmp_path / "run").verdict.kind != "RANK_LOST"
