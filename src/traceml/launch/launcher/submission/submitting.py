"""Submission of a launch to Slurm, through submitit.

Process: submitter.
"""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path
from typing import Any

from traceml import settings
from traceml.errors import SlurmError, TraceMLError
from traceml.installation import install_command
from traceml.launch.launcher.assembly import users_path
from traceml.launch.launcher.submission.allocation_call import AllocationCall
from traceml.launch.launcher.submission.slurm_options import SlurmOptions
from traceml.launch.launcher.submission.submitted_job import SubmittedJob
from traceml.own_programs import own_program
from traceml.supervise.aggregator_process import choose_run_id

__all__ = ["submit"]

_PROGRAM = "traceml.launch.launcher.submission.allocation"


def submit(call: AllocationCall, options: SlurmOptions, name: str, run_name: str | None = None) -> SubmittedJob[Any]:
    """Submit a launch, and return the handle of its job.

    Args:
        name: the function's or the script's.
        run_name: part of the run's id; None: as set elsewhere, else `name`.

    Raises:
        TraceMLError: submitit is not installed.
        SlurmError: this host cannot submit, or Slurm refuses the job.
    """
    try:
        import submitit
        from submitit.core.utils import FailedJobError, FailedSubmissionError
    except ImportError as error:
        text = f"submitting needs submitit, which is not installed: {install_command('submit')}"
        raise TraceMLError(text) from error

    if not shutil.which("sbatch") or not shutil.which("srun"):
        raise SlurmError("sbatch and srun are not on the PATH: submit from a login node of the cluster")

    config = settings.load()
    run_id = choose_run_id(config, run_name or config.run_name or name)
    executor = submitit.SlurmExecutor(_folder(options, config.log_dir), max_num_timeout=options.retries)
    executor.update_parameters(**options.parameters(name), setup=_setup(executor.folder, run_id, options.warning_s))
    try:
        job = executor.submit(call)
    except (FailedJobError, FailedSubmissionError) as error:
        raise SlurmError(f"Slurm refuses the job: {str(error).strip()}") from error

    paths = job.task(0).paths
    return SubmittedJob(str(job.job_id), run_id, output=paths.stdout, outcome=paths.result_pickle)


def _folder(options: SlurmOptions, log_dir: str | Path) -> Path:
    return Path(options.folder or Path(log_dir or "traceml_logs") / "slurm" / "%j").expanduser().absolute()


def _setup(folder: Path, run_id: str, warning_s: int) -> list[str]:
    """Return the lines of the job's script before submitit's own command, which is not reached.

    A shell that waits for its child dies of Slurm's SIGTERM, and Slurm then kills the child before it can write the
    report. So the program takes the shell's place.
    """
    path = os.pathsep.join(users_path())
    return [
        "export SUBMITIT_EXECUTOR=slurm",
        f"export TRACEML_RUN_ID={shlex.quote(run_id)}",
        f"export TRACEML_JOB_WARNING_S={warning_s}",
        *([f"export PYTHONPATH={shlex.quote(path)}"] if path else []),
        f"exec {shlex.join(own_program(_PROGRAM, str(folder), unbuffered=True))}",
    ]
