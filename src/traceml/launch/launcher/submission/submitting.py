"""Submission of a launch to Slurm, through submitit.

Process: submitter.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from traceml import settings
from traceml.errors import SlurmError, TraceMLError, UsageError
from traceml.helper_programs import helper_program
from traceml.installation import install_command
from traceml.launch.launcher.assembly import users_path
from traceml.launch.launcher.submission.allocation_call import AllocationCall
from traceml.launch.launcher.submission.submitted_job import SubmittedJob
from traceml.supervise.aggregator_process import choose_run_id
from traceml.supervise.slurm_jobs import minutes_of

__all__ = ["SlurmOptions", "submit"]

_SIGNAL = re.compile(r"(?P<name>[A-Z]+[0-9]?|[0-9]+)@(?P<seconds>[0-9]+)")


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """Options of a job that is submitted to Slurm: the arguments of `Launcher.submit` of these names.

    Raises:
        UsageError: a value is not allowed.
    """

    nodes: int = 1
    time: int | str = 60
    partition: str | None = None
    gpus_per_node: int | None = None
    cpus_per_node: int | None = None
    mem: str | None = None
    account: str | None = None
    qos: str | None = None
    job_name: str | None = None
    signal: str = "USR2@120"
    retries: int = 3
    folder: str | Path | None = None
    sbatch: Mapping[str, str | int | bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("nodes", 1), ("gpus_per_node", 1), ("cpus_per_node", 1), ("retries", 0)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise UsageError(f"{name}={value!r}: give a number of at least {least}")

        if not self.minutes:
            raise UsageError(f"time={self.time!r}: give minutes, or a duration such as '1:30:00' or '1-12:00:00'")

        if self.signal and _SIGNAL.fullmatch(self.signal) is None:
            raise UsageError(f"signal={self.signal!r}: give a name and seconds, such as 'USR2@120', or '' for none")

    @property
    def minutes(self) -> int:
        """The time limit in minutes; 0 if it is not a duration."""
        return minutes_of(str(self.time)) or 0

    @property
    def warning_s(self) -> int:
        """Seconds between the signal and the end; 0 without one."""
        match = _SIGNAL.fullmatch(self.signal)
        return int(match["seconds"]) if match is not None else 0

    def parameters(self, name: str) -> dict[str, Any]:
        """Return the parameters of submitit's executor, without those that were not given.

        Args:
            name: name of the job if none was given.
        """
        more: dict[str, Any] = {"requeue": True} if self.retries else {"no-requeue": True}
        if self.signal:
            more["signal"] = self.signal

        chosen = {
            "job_name": self.job_name or name,
            "time": self.minutes,
            "nodes": self.nodes,
            "ntasks_per_node": 1,
            "cpus_per_task": self.cpus_per_node,
            "gpus_per_node": self.gpus_per_node,
            "partition": self.partition,
            "mem": self.mem,
            "account": self.account,
            "qos": self.qos,
            "use_srun": False,  # agents are steps; the job's first process stays out of the way of Slurm's signals
            "stderr_to_stdout": True,
            "additional_parameters": {**more, **self.sbatch},
        }
        return {key: value for key, value in chosen.items() if value is not None}


_PROGRAM = "traceml.launch.launcher.submission.allocation_main"


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
    folder = Path(options.folder or Path(config.log_dir or "traceml_logs") / "slurm" / "%j").expanduser().absolute()
    executor = submitit.SlurmExecutor(folder, max_num_timeout=options.retries)
    executor.update_parameters(**options.parameters(name), setup=_setup(executor.folder, run_id, options.warning_s))
    try:
        job = executor.submit(call)
    except (FailedJobError, FailedSubmissionError) as error:
        raise SlurmError(f"Slurm refuses the job: {str(error).strip()}") from error

    paths = job.task(0).paths
    return SubmittedJob(str(job.job_id), run_id, output=paths.stdout, outcome=paths.result_pickle)


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
        f"exec {shlex.join(helper_program(_PROGRAM, str(folder), unbuffered=True))}",
    ]
