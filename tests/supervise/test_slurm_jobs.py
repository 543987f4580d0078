"""Slurm's durations, and what it says of a job."""

from __future__ import annotations

import stat
import time
from pathlib import Path

import pytest

from traceml.errors import SlurmError
from traceml.supervise import slurm_jobs
from traceml.supervise.slurm_jobs import (
    is_cancelled,
    minutes_of,
    read_job,
    requeue_job,
    scheduler_end,
    scheduler_facts,
)

_SHOWN = (
    "JobId=7 JobName=train JobState={state} Reason={reason} Requeue=1 Restarts={restarts} TimeLimit={limit} "
    "StartTime=2020-01-01T00:00:00 EndTime={end} PreemptEligibleTime=2020-01-01T00:00:00 PreemptTime={preempted}"
)
_USUAL = {
    "state": "RUNNING", "reason": "None", "restarts": "0", "limit": "UNLIMITED", "end": "Unknown", "preempted": "None",
}  # fmt: skip


def slurm_that_shows(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a `scontrol` first on the path that prints a text: such states of a real one last for moments."""
    program = folder / "scontrol"
    program.write_text(f"#!/bin/sh\necho '{text}'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        ("90:00", 90),
        ("0:30", 1),
        ("1:30:00", 90),
        ("00:01:01", 2),
        ("1-12", 2160),
        ("1-12:30", 2190),
        ("1-00:00:00", 1440),
        ("UNLIMITED", None),
        ("1:2:3:4", None),
        ("-5", None),
        ("", None),
    ],
)
def test_durations_are_read(text: str, minutes: int | None) -> None:
    """All of Slurm's forms, rounded up to minutes."""
    assert minutes_of(text) == minutes


@pytest.mark.parametrize(
    ("shown", "why"),
    [
        ({}, None),
        ({"preempted": "2020-01-01T00:10:00"}, "preempted"),
        ({"state": "PREEMPTED"}, "preempted"),
        ({"state": "TIMEOUT"}, "time_limit"),
        ({"state": "COMPLETING", "reason": "TimeLimit"}, "time_limit"),
        ({"limit": "00:10:00"}, "time_limit"),
        ({"end": "2020-01-01T00:10:00"}, "time_limit"),
        ({"restarts": "1"}, "requeued"),
        ({"state": "CANCELLED", "end": "2020-01-01T00:10:00"}, None),
    ],
)
def test_why_slurm_ends_a_job(
    shown: dict[str, str], why: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the text that `scontrol` prints; a cancelled job, or one that runs, is not ended by the scheduler."""
    slurm_that_shows(_SHOWN.format_map(_USUAL | shown), tmp_path, monkeypatch)

    assert scheduler_end({"SLURM_JOB_ID": "7"}) == why
    assert scheduler_end({}) is None


def test_a_jobs_name_in_another_encoding_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm prints the bytes that it was given, whatever the locale of who asks."""
    shown = _SHOWN.format_map(_USUAL | {"state": "TIMEOUT"}).replace("train", "gr\\344\\337e")
    slurm_that_shows("", tmp_path, monkeypatch)
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\nprintf '{shown}'\n")

    assert scheduler_end({"SLURM_JOB_ID": "7"}) == "time_limit"


def test_a_slurm_that_does_not_answer_does_not_use_up_the_time_to_store_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A controller ends many jobs at once; both commands have one limit, so the second is not asked after it."""
    monkeypatch.setattr(slurm_jobs, "_FACTS_S", 0.1)
    slurm_that_shows("", tmp_path, monkeypatch)
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexec sleep 1000\n")
    accounting = tmp_path / "sacct"
    accounting.write_text(f"#!/bin/sh\necho TIMEOUT; touch {tmp_path}/asked\n")
    accounting.chmod(0o755)

    assert scheduler_facts({"SLURM_JOB_ID": "7"}) == {}
    assert not (tmp_path / "asked").exists()

    (tmp_path / "scontrol").write_text("#!/bin/sh\nexit 1\n")  # it has forgotten the job
    monkeypatch.setattr(slurm_jobs, "_FACTS_S", 60.0)

    assert scheduler_facts({"SLURM_JOB_ID": "7"}) == {"scheduler": "time_limit"}


@pytest.mark.parametrize(
    ("shown", "cancelled"),
    [
        ({}, False),
        ({"state": "COMPLETING"}, True),
        ({"state": "CANCELLED"}, True),
        ({"state": "COMPLETING", "reason": "TimeLimit"}, False),
        ({"state": "COMPLETING", "preempted": "2020-01-01T00:10:00"}, False),
    ],
)
def test_a_cancelled_job_is_one_that_slurm_ends_without_a_reason(
    shown: dict[str, str], cancelled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its processes still run while Slurm calls it COMPLETING."""
    slurm_that_shows(_SHOWN.format_map(_USUAL | shown), tmp_path, monkeypatch)

    assert is_cancelled({"SLURM_JOB_ID": "7"}) is cancelled
    assert (scheduler_facts({"SLURM_JOB_ID": "7"}) == {"scheduler": "cancelled"}) is cancelled
    assert not is_cancelled({})


def test_a_submitted_job_knows_when_it_was_warned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An end between the signal and the limit comes from the warning; before it, or without one, it does not."""
    end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 100))
    slurm_that_shows(_SHOWN.format_map(_USUAL | {"end": end}), tmp_path, monkeypatch)

    assert scheduler_end({"SLURM_JOB_ID": "7", "TRACEML_JOB_WARNING_S": "180"}) == "warned"
    assert scheduler_end({"SLURM_JOB_ID": "7", "TRACEML_JOB_WARNING_S": "50"}) is None
    assert scheduler_end({"SLURM_JOB_ID": "7", "TRACEML_JOB_WARNING_S": "50"}, early_s=60) == "warned"
    assert scheduler_end({"SLURM_JOB_ID": "7"}, early_s=60) is None


def test_without_slurm_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading says so by None, a request by an error that names the command."""
    monkeypatch.setenv("PATH", str(tmp_path))

    assert read_job("7") is None
    with pytest.raises(SlurmError, match="`scontrol requeue 7` cannot be run"):
        requeue_job("7")
