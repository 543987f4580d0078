"""Identifiers of runs, of jobs, and of the ranks in them."""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "DEFAULT_PROJECT",
    "RUN_ID_ALLOWED",
    "RankIdentity",
    "detect_rank",
    "group_address",
    "is_new_run_id",
    "job_key",
    "launcher_job",
    "new_run_id",
    "run_name_of",
    "safe_run_id",
]

_UNIQUE = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")  # a UUID, as of `torchrun --standalone`
DEFAULT_PROJECT = "default"
"""Project of runs for which nobody names one."""
RUN_ID_ALLOWED = "a string with a letter, a digit or one of _=+@ in it, other than 'latest'"
"""What `safe_run_id` makes a folder's name of, in words."""

_given: set[str] = set()  # ids of runs that this process has chosen


class RankIdentity(NamedTuple):
    """Rank of a process in its job, in the terms of torch.distributed."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    attempt: int = 0
    source: str = "single process"


def detect_rank(environ: Mapping[str, str] = os.environ, joining: tuple[int, int] | None = None) -> RankIdentity:
    """Find this process's rank: an initialized process group, then torchrun's, OpenMPI's and Slurm's variables.

    Slurm's are those of a step only (`_slurm_step`). Where mpirun starts its daemons by srun, the ranks have both, and
    Slurm's are those of the daemon.

    Args:
        joining: rank and size of the process group that this process is about to join.

    Returns:
        The identity; by default rank 0 of 1.
    """
    attempt = _int(environ.get("TORCHELASTIC_RESTART_COUNT"), 0)
    distributed = sys.modules.get("torch.distributed")  # never import torch only to ask
    # Without distributed support, and while another thread imports it, the module lacks the function.
    is_initialized = getattr(distributed, "is_initialized", None)
    if distributed is not None and is_initialized is not None and is_initialized():
        joining = distributed.get_rank(), distributed.get_world_size()

    if joining is not None:
        local = _int(environ.get("LOCAL_RANK"), _int(environ.get("SLURM_LOCALID"), joining[0]))
        return RankIdentity(*joining, local, attempt, "torch.distributed")

    for source, rank_key, size_key, local_key in (
        ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("openmpi", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
        ("slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ):
        if source == "slurm" and _slurm_step(environ) is None:
            continue

        rank = _int(environ.get(rank_key), -1)
        size = _int(environ.get(size_key), -1)
        if 0 <= rank < size:
            return RankIdentity(rank, size, _int(environ.get(local_key), rank), attempt, source)

    return RankIdentity(attempt=attempt)


def job_key(environ: Mapping[str, str] = os.environ) -> str:
    """Return a key that is equal for all ranks of one job and for no other job.

    In this order: `TRACEML_RUN_ID`, the variables of the job's launcher (`launcher_job`), else this process alone
    (host, pid, start time).
    """
    if key := environ.get("TRACEML_RUN_ID") or launcher_job(environ):
        return key

    return f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"


def launcher_job(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the job's key by the variables of its launcher, None if there are none.

    In this order: torchrun's run id with its rendezvous address, OpenMPI's job, Slurm's job and step, the rendezvous
    address of manually started ranks. Slurm's job id alone is not enough: one allocation may have several jobs.
    """
    torchrun, address = environ.get("TORCHELASTIC_RUN_ID"), group_address(environ)
    if torchrun is not None and (port := environ.get("MASTER_PORT")):
        if _UNIQUE.fullmatch(torchrun):  # each attempt may have a rendezvous address of its own
            return f"torchrun-{torchrun}"

        # `none` is torchrun's default and the same for every job; the rendezvous address is not.
        master = f"{_master(environ.get('MASTER_ADDR', 'localhost'))}:{port}"
        return f"torchrun-{torchrun}@{master}" if torchrun != "none" else f"torchrun@{master}"

    sizes = [_int(environ.get(name), 1) for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE")]
    job = environ.get("PMIX_NAMESPACE") or environ.get("OMPI_MCA_ess_base_jobid")
    if job and sizes[1] > 1:
        return f"openmpi-{job}"

    if (job := environ.get("SLURM_JOB_ID")) and (step := _slurm_step(environ)):
        return f"slurm-{job}.{step}"

    return address if max(sizes) > 1 else None


def group_address(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return a key made of a process group's rendezvous address, None if it is not set."""
    address, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    return f"group@{_master(address)}:{port}" if address and port else None


def _master(address: str) -> str:
    """Return the host of a rendezvous address: of one that is the same on each host, this host's name."""
    is_own = address in ("localhost", "::1") or address.startswith("127.")
    return socket.gethostname() if is_own else address


def _slurm_step(environ: Mapping[str, str]) -> str | None:
    """Return the number of this task's step of a Slurm job, None outside of steps.

    A batch script also has a rank (0), the number of tasks that it may start, and the process id of its task. A
    container that is given only the rank of a task does not have that process id.
    """
    if step := environ.get("SLURM_STEP_ID"):
        return step

    return "0" if "SLURM_PROCID" in environ and "SLURM_TASK_PID" not in environ else None


def new_run_id(name: str, runs_dir: Path) -> str:
    """Return `YYYYMMDD-HHMMSS-<name>-<4 hex>`, in local time, which no run in the folder has yet.

    Of 300 jobs of one name that start in one second, two would have one id in half of the cases. A job whose folder is
    made later than its id, as that of `traceml run` and `submit`, is seen meanwhile in the process that chose it.
    """
    while True:
        run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{run_name_of(name)}-{os.urandom(2).hex()}"
        if run_id not in _given and not os.access(runs_dir / run_id, os.F_OK):
            _given.add(run_id)
            return run_id


def is_new_run_id(text: str) -> bool:
    """Return whether a text has the form of what `new_run_id` makes."""
    return re.fullmatch(r"\d{8}-\d{6}-.+-[0-9a-f]{4}", text) is not None


def safe_run_id(text: str) -> str:
    """Return a user's run id without the characters that a folder's name cannot have.

    Raises:
        ValueError: nothing is left of it.
    """
    name = _cut(re.sub(r"[^\w.=+@-]+", "-", _composed(text)).strip("-."), 200)
    if not name or name == "latest":
        raise ValueError(f"{text[:100]!r} cannot be the name of a run's folder. Allowed: {RUN_ID_ALLOWED}")

    return name


def run_name_of(text: str) -> str:
    """Return `text` reduced to the characters that are safe in a folder's name."""
    return _cut(re.sub(r"[^\w.-]+", "-", _composed(text)).strip("-._"), 48) or "run"


def _composed(text: str) -> str:
    """Return a text in which a letter and its accent are one character: an accent alone is no letter."""
    if text.isascii():
        return text

    import unicodedata  # every rank imports this module

    return unicodedata.normalize("NFC", text)


def _cut(name: str, most_bytes: int) -> str:
    """Return as much of a name as fits, in whole characters: a folder's name has at most 255 bytes, with a host's."""
    return name.encode("utf-8", "ignore")[:most_bytes].decode("utf-8", "ignore")


def _int(text: str | None, default: int) -> int:
    try:
        return int(text) if text is not None else default
    except ValueError:
        return default
