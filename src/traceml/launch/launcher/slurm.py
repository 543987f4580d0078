"""The Slurm allocation of this process: its nodes, and the number of workers of each."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from traceml.errors import SlurmError

__all__ = ["Allocation", "allocation", "step_command"]

_SCONTROL_TIMEOUT_S = 30


@dataclass(frozen=True, slots=True)
class Allocation:
    """The nodes of a Slurm job.

    Attributes:
        job_id: Slurm's id of the job.
        workers: number of workers without GPUs by node: the requested tasks, else the allocated CPUs; None if Slurm
            does not report it.
    """

    job_id: str
    workers: Mapping[str, int | None]


def allocation(environ: Mapping[str, str]) -> Allocation | None:
    """Read the allocation from the environment; None outside of one.

    Raises:
        SlurmError: it cannot be read.
    """
    job_id = environ.get("SLURM_JOB_ID") or environ.get("SLURM_JOBID")
    if not job_id:
        return None

    listed = environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
    if not listed:
        raise SlurmError(f"job {job_id} of Slurm has no SLURM_JOB_NODELIST: its nodes are unknown")

    nodes = _expand(listed, environ)
    # Slurm always sets the tasks per node, by default 1: use them only if the user asked for tasks
    asked = "SLURM_NTASKS" in environ or "SLURM_NTASKS_PER_NODE" in environ
    per_node = environ.get("SLURM_TASKS_PER_NODE") if asked else environ.get("SLURM_JOB_CPUS_PER_NODE")
    counts = _counts(per_node or "")
    if len(counts) != len(nodes):  # in a step, which may have fewer nodes than the job
        counts = [None] * len(nodes)

    return Allocation(job_id, dict(zip(nodes, counts, strict=True)))


def step_command(node: str) -> list[str]:
    """Return the command prefix for a step of one task on a node, with all of the job's resources there.

    Standard streams are passed through unchanged; `--overlap` lets it start beside other steps.
    """
    return [
        "srun",
        "--overlap",
        "--nodes=1",
        "--ntasks=1",
        "--ntasks-per-node=1",
        f"--nodelist={node}",
        "--unbuffered",
        "--cpu-bind=none",
        "--mpi=none",
        "--export=ALL",
        "--quiet",
    ]


def _expand(listed: str, environ: Mapping[str, str]) -> list[str]:
    command = ["scontrol", "show", "hostnames", listed]
    try:
        done = subprocess.run(
            command, env=dict(environ), capture_output=True, text=True, timeout=_SCONTROL_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmError(f"`{' '.join(command)}` cannot be run, so the job's nodes are unknown: {error}") from error

    if done.returncode or not done.stdout.split():
        raise SlurmError(f"`{' '.join(command)}` ended with {done.returncode}: {done.stderr.strip()}")

    return done.stdout.split()


def _counts(text: str) -> Sequence[int | None]:
    """Read `4(x2),2` as 4, 4, 2."""
    found: list[int | None] = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        found += [int(number)] * int(times or 1)

    return found
