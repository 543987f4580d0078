"""Advice on loader workers that died."""

from __future__ import annotations

from traceml.diagnosis.facts.ends.lost_workers import LostWorker
from traceml.formatting import bytes_text
from traceml.process_ends import CRASHES

__all__ = ["BUS_ERROR", "KILL", "for_shared_memory", "for_worker"]

BUS_ERROR = 7
"""Number of SIGBUS, by which a process ends that writes to shared memory when that is full."""
KILL = 9
"""Number of SIGKILL."""


def for_worker(lost: LostWorker) -> str:
    """Return advice on a loader worker that died."""
    if lost.signal == KILL:
        return _for_killed_worker(lost)

    if lost.signal == BUS_ERROR:
        return for_shared_memory(lost.shm_bytes)

    if lost.signal in CRASHES:
        return (
            "Native code of the dataset crashed (a decoder, a library after fork): run with num_workers=0 and "
            "python -X faulthandler to see the line."
        )

    if lost.signal is not None:
        return "Find out what sent the signal to the worker: a kill command, or the scheduler."

    return "The dataset or a library that it uses called os._exit or sys.exit: run with num_workers=0 to see where."


def _for_killed_worker(lost: LostWorker) -> str:
    if lost.oom_kills == 0:
        return "The kernel's out-of-memory killer ended no process here: look for a kill command or a scheduler."

    limit = "" if lost.memory_limit_bytes is None else f" of {bytes_text(lost.memory_limit_bytes)}"
    less = "use fewer workers, a smaller prefetch_factor, or arrays instead of large Python lists in the dataset"
    if lost.oom_kills:
        return f"The kernel's out-of-memory killer was at work: {less}, or raise the memory limit{limit}."

    return f"Look for the kernel's out-of-memory killer (dmesg). If it was that: {less}."


def for_shared_memory(shm_bytes: int | None = None) -> str:
    """Return advice on shared memory that ran out."""
    size = "" if shm_bytes is None else f" of {bytes_text(shm_bytes)}"
    wanted = max(8, 2 * ((shm_bytes or 0) >> 30))
    docker = f"docker run --shm-size={wanted}g or --ipc=host"
    return (
        f"Shared memory has probably run out: give /dev/shm{size} more room ({docker}; in Kubernetes an emptyDir with "
        "medium Memory), or use fewer loader workers or a smaller prefetch_factor."
    )
