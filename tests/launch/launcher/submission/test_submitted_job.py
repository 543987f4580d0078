"""The handle of a submitted job, next to a Slurm that does not know it any more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from traceml.errors import SlurmError, WaitTimeoutError
from traceml.launch.launcher.submission import submitted_job
from traceml.launch.launcher.submission.submitted_job import SubmittedJob

pytestmark = pytest.mark.process
_NO_SUCH_JOB = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
_NO_ANSWER = "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1"
_NO_DATABASE = "echo 'sacct: error: slurm_persist_conn_open_without_init: Connection refused' >&2; exit 1"
_NO_ACCOUNTING = "echo 'Slurm accounting storage is disabled' >&2; exit 1"


def slurm_that(folder: Path, monkeypatch: pytest.MonkeyPatch, **programs: str) -> None:
    """Put Slurm's commands first on the path."""
    for name, script in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SubmittedJob[Any]:
    monkeypatch.setattr(submitted_job, "_FORGOTTEN_S", 0.0)
    monkeypatch.setattr(submitted_job, "_POLL_S", 0.001)
    return SubmittedJob("7", "a-run", output=tmp_path / "7.out", outcome=tmp_path / "7.pkl")


@pytest.mark.parametrize("sacct", [_NO_ACCOUNTING, "exit 0"], ids=["no accounting", "not accounted"])
def test_a_job_that_slurm_has_forgotten_is_not_waited_for(
    job: SubmittedJob[Any], sacct: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its node may have died before the result was written: the wait had no end."""
    slurm_that(tmp_path, monkeypatch, scontrol=_NO_SUCH_JOB, sacct=sacct)

    with pytest.raises(SlurmError, match=rf"Slurm has forgotten job 7, .*its output: {tmp_path}/7.out"):
        job.result(timeout=60)


@pytest.mark.parametrize(
    ("scontrol", "sacct"),
    [
        (_NO_ANSWER, "exit 0"),
        (_NO_ANSWER, _NO_ACCOUNTING),
        (_NO_SUCH_JOB, _NO_DATABASE),
        (_NO_SUCH_JOB, "echo RUNNING"),
    ],
)
def test_a_slurm_that_does_not_answer_is_asked_again(
    job: SubmittedJob[Any], scontrol: str, sacct: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is known of the job then: it may run; so may one that accounting alone knows."""
    slurm_that(tmp_path, monkeypatch, scontrol=scontrol, sacct=sacct)

    with pytest.raises(WaitTimeoutError, match="job 7 is "):
        job.wait(timeout=0.2)
