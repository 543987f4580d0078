"""The Slurm allocation of this process: its nodes, and the number of workers of each."""

from __future__ import annotations

import logging
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from traceml.errors import SlurmError

__all__ = ["Allocation", "ScontrolError", "allocation", "step_command", "task_options"]

_SCONTROL_TIMEOUT_S = 30
_MAX_DIGITS = 6  # of a number of CPUs, tasks or nodes

# What a job's tasks get, of which srun would give our step one task's part, or refuse it.
_TASK_OPTIONS = (
    "SLURM_CPUS_PER_TASK", "SRUN_CPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_GPUS", "SLURM_GPUS_PER_TASK",
    "SLURM_GPUS_PER_SOCKET", "SLURM_NTASKS_PER_GPU", "SLURM_CPUS_PER_GPU", "SLURM_MEM_PER_GPU", "SLURM_GPU_BIND",
)  # fmt: skip

_log = logging.getLogger("traceml.launch")


class ScontrolError(SlurmError):
    """The nodes of a job cannot be told: containers often lack Slurm's programs, or their configuration."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """The nodes of a Slurm job."""

    job_id: str
    # Number of workers without GPUs by node: the requested tasks, else the allocated CPUs; None if Slurm does not
    # report it.
    workers: Mapping[str, int | None]
    # Number of the component of a heterogeneous job by node; empty for other jobs.
    groups: Mapping[str, int] = field(default_factory=dict)


def allocation(environ: Mapping[str, str]) -> Allocation | None:
    """Read the allocation from the environment; None outside of one.

    Raises:
        SlurmError: it cannot be read, or this process is one of several tasks, which would all launch.
    """
    job_id = environ.get("SLURM_JOB_ID") or environ.get("SLURM_JOBID")
    if not job_id:
        return None

    tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1":
        raise SlurmError(
            f"this process is one of {tasks} tasks of a step of Slurm's job {job_id}; each would launch all workers. "
            "Start the script once: by sbatch, under salloc, or by `srun --ntasks=1`. "
            "If only one of the tasks launches, unset SLURM_STEP_NUM_TASKS in it."
        )

    workers: dict[str, int | None] = {}
    groups: dict[str, int] = {}
    for group in range(_number(environ, "SLURM_HET_SIZE", 0)):
        for node, count in _workers(environ, job_id, f"_HET_GROUP_{group}").items():
            if node in groups:
                _log.warning(
                    "%s is in components %d and %d of job %s: used in the first", node, groups[node], group, job_id
                )
                continue

            workers[node], groups[node] = count, group

    return Allocation(job_id, workers or _workers(environ, job_id), groups)


def _workers(environ: Mapping[str, str], job_id: str, group: str = "") -> dict[str, int | None]:
    """Return the number of workers by node, of a whole job or of one of its components.

    Args:
        job_id: for errors.
        group: suffix of the variables of a component.
    """
    listed = environ.get(f"SLURM_JOB_NODELIST{group}") or environ.get(f"SLURM_NODELIST{group}")
    if not listed:
        raise SlurmError(f"job {job_id} of Slurm has no SLURM_JOB_NODELIST{group}: its nodes are unknown")

    nodes = _expand(listed, environ)
    counts = _counts(environ, group)
    if len(counts) != len(nodes):
        counts = [None] * len(nodes)

    return dict(zip(nodes, counts, strict=True))


def _counts(environ: Mapping[str, str], group: str) -> Sequence[int | None]:
    """Return the number of workers of each node, in the order of nodes."""
    cpus = _read_counts(environ.get(f"SLURM_JOB_CPUS_PER_NODE{group}", ""))
    if "SLURM_STEP_NUM_TASKS" in environ:  # in a step, variables of tasks are the step's
        per_task = max(1, _number(environ, "SLURM_CPUS_PER_TASK", 1))
        return [max(1, count // per_task) for count in cpus]

    # Slurm always sets the tasks per node, by default 1: use them only if the user asked for tasks
    asked = f"SLURM_NTASKS{group}" in environ or f"SLURM_NTASKS_PER_NODE{group}" in environ
    return _read_counts(environ.get(f"SLURM_TASKS_PER_NODE{group}", "")) if asked else cpus


def step_command(node: str, group: int | None = None) -> list[str]:
    """Return the command prefix for a step of one task on a node, with all of the job's resources there.

    It must run without `task_options`. Standard streams are passed through unchanged; `--overlap` lets it start while
    other steps run.
    """
    return [
        "srun",
        "--overlap",
        "--nodes=1",
        "--ntasks=1",
        "--ntasks-per-node=1",
        *([] if group is None else [f"--het-group={group}"]),
        f"--nodelist={node}",
        "--unbuffered",
        "--cpu-bind=none",
        "--mpi=none",
        "--export=ALL",
        "--quiet",
    ]


def task_options(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a job that srun would take as options of the step."""
    return {name: environ[name] for name in _TASK_OPTIONS if name in environ}


def _expand(listed: str, environ: Mapping[str, str]) -> list[str]:
    if "[" not in listed:
        return listed.split(",")

    command = ["scontrol", "show", "hostnames", listed]
    try:
        done = subprocess.run(
            command,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_SCONTROL_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        text = f"`{' '.join(command)}` cannot be run, so the job's nodes are unknown: {error}; or name the hosts"
        raise ScontrolError(text) from error

    # As Python decodes the variables, whatever the locale of the script: srun is given these names.
    nodes = os.fsdecode(done.stdout).split()
    if done.returncode or not nodes:
        *_, why = ["it printed nothing", *done.stderr.decode(errors="replace").strip().splitlines()]
        text = f"`{' '.join(command)}` ended with {done.returncode}, so the job's nodes are unknown: {why}"
        raise ScontrolError(f"{text}; or name the hosts")

    return nodes


def _read_counts(text: str) -> list[int]:
    """Read `4(x2),2` as 4, 4, 2."""
    found: list[int] = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text, re.ASCII):
        if len(number) > _MAX_DIGITS or len(times) > _MAX_DIGITS:
            raise SlurmError(f"{text[:100]!r} cannot be the CPUs or tasks of Slurm's nodes")

        found += [int(number)] * int(times or 1)

    return found


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    """Return the value of one of Slurm's variables."""
    text = environ.get(name, str(default))
    if not re.fullmatch(rf"\d{{1,{_MAX_DIGITS}}}", text, re.ASCII):
        raise SlurmError(f"{name} is {text[:100]!r}, not a number as Slurm sets it: unset it, or start a job of Slurm")

    return int(text)
