"""The call that a submitted job executes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import pytest

from traceml.errors import SlurmError, WorkerFailedError
from traceml.launch.launcher import assembly
from traceml.launch.launcher.launch_options import FunctionCall, LaunchOptions
from traceml.launch.launcher.submission.allocation_call import AllocationCall


@pytest.mark.parametrize(("state", "error"), [("COMPLETING", SlurmError), ("RUNNING", WorkerFailedError)])
def test_a_worker_that_ends_with_a_cancelled_job_is_no_failure(
    state: str, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm ends the launcher and its workers at once: the launcher may notice theirs before it is ended itself."""

    def run_function(*_: Any) -> NoReturn:
        raise WorkerFailedError("localhost", 0, 0, signal=15)

    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho 'JobId=7 JobState={state} Reason=None Restarts=0'\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(assembly, "run_function", run_function)

    outcome = AllocationCall(options=LaunchOptions(), call=FunctionCall(print))()

    assert type(outcome.error) is error
