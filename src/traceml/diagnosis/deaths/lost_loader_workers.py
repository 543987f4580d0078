"""Loader workers that died: as the cause of their rank's end, or while the rank continued."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from traceml.database.states import RunStatus
from traceml.diagnosis.facts.ends import LostWorker, RankExit, ended_badly, worker_in
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.findings import Finding, known_facts
from traceml.diagnosis.kinds import Kind
from traceml.formatting import bytes_text, capitalized, count_text, percent_text, ranks_text
from traceml.process_ends import CRASHES, exit_text

__all__ = [
    "BUS_ERROR", "KILL", "death_words", "for_mapped_file", "for_shared_memory", "for_worker", "worker_causing_end",
    "worker_evidence", "worker_lost",
]  # fmt: skip

# What reading a batch of a worker that is gone raises, where torch does not notice its end first.
_CONNECTION_CUT = ("ConnectionResetError", "ConnectionRefusedError", "BrokenPipeError", "EOFError")
_NO_SOCKET = "FileNotFoundError: [Errno 2] No such file or directory"  # the message about a missing file has its name
_CONTINUED = "The script continued; batches of that iterator may be missing."
_ENDED = "The rank has ended, too, without a further step."


def worker_lost(facts: JobFacts, explained: Iterable[int] = ()) -> Finding | None:
    """Return the finding about workers that died while their rank continued: the first of them.

    Args:
        explained: ranks whose end is a finding already; those that torch ended for a worker are not told again.
    """
    ended = {each.rank: each for each in ended_badly(facts.exits)}
    known = {*explained, *(rank for rank, each in ended.items() if worker_causing_end(each, facts) is not None)}
    lost = [(rank, each) for rank, workers in facts.lost_workers.items() if rank not in known for each in workers]
    if not lost or facts.state == RunStatus.STOPPED:
        return None

    lost.sort(key=lambda each: (each[1].step is None, each[1].step or 0, each[0]))
    rank, first = lost[0]
    more = f"; {count_text(len(lost) - 1)} more died later" if len(lost) > 1 else ""

    step = ", before the first step" if first.step is None else f", in step {count_text(first.step)}"
    died = f"{capitalized(death_words(first))} on {ranks_text((rank,))}{step}{more}"
    return Finding.of(
        Kind.WORKER_LOST,
        ranks=tuple(sorted({rank for rank, _ in lost})),
        phase="input_wait",
        summary=f"{died}. {_ENDED if rank in ended and _is_of_end(first, ended[rank]) else _CONTINUED}",
        next=for_worker(first),
        evidence=worker_evidence(first) | {"lost": len(lost)},
    )


def _is_of_end(lost: LostWorker, ended: RankExit) -> bool:
    """Whether a rank made no further step after the death of its worker."""
    return ended.step is None or (lost.step is not None and lost.step >= ended.step)


def worker_causing_end(ended: RankExit, facts: JobFacts) -> LostWorker | None:
    """Return the worker whose death ended a rank; None if something else did."""
    lost, exception = facts.lost_workers.get(ended.rank, ()), ended.exception or ""
    reported = worker_in(exception)
    if reported is not None:
        return next((each for each in lost if each.pid == reported.pid), reported)

    is_cut = exception.startswith(_CONNECTION_CUT) or exception == _NO_SOCKET
    return lost[-1] if lost and is_cut and ended.open_phase == "input_wait" else None


def death_words(lost: LostWorker) -> str:
    """Return `loader worker 1 (process 4711) was killed by signal 9 (SIGKILL)`."""
    name = f"{'a loader worker' if lost.worker is None else f'loader worker {lost.worker}'} (process {lost.pid})"
    return f"{name} {exit_text(lost.code, lost.signal)}"


def worker_evidence(lost: LostWorker) -> dict[str, Any]:
    """Return the facts about a death, as a finding has them."""
    return known_facts(
        worker=lost.worker,
        workers=lost.workers,
        worker_pid=lost.pid,
        worker_signal=lost.signal,
        worker_code=lost.code,
        step=lost.step,
        oom_kills=lost.oom_kills,
        shm_bytes=lost.shm_bytes if lost.signal == BUS_ERROR else None,
        shm_used_bytes=lost.shm_used_bytes if lost.signal == BUS_ERROR else None,
        memory_limit_bytes=lost.memory_limit_bytes if lost.signal == KILL else None,
    )


BUS_ERROR = 7
"""Number of SIGBUS, by which a process ends that writes to shared memory when that is full."""
KILL = 9
"""Number of SIGKILL."""
_AMPLE_GIB = 8
_AMPLE_BYTES = _AMPLE_GIB << 30  # free after the death: no batch of a worker needs so much


def for_worker(lost: LostWorker) -> str:
    """Return advice on a loader worker that died."""
    if lost.signal == KILL:
        return _for_killed_worker(lost)

    if lost.signal == BUS_ERROR:
        shared, used = lost.shm_bytes, lost.shm_used_bytes
        if shared is not None and used is not None and shared - used >= _AMPLE_BYTES:
            return for_mapped_file(used, shared)

        return for_shared_memory(shared)

    if lost.signal in CRASHES:
        return (
            "Native code of the dataset crashed (a decoder, a library after fork): run with num_workers=0 and "
            "python -X faulthandler to see the line."
        )

    if lost.signal is not None:
        return "Find out what sent the signal to the worker: a kill command, or the scheduler."

    if lost.code is None:
        return "Look in the output for what ended it, and in dmesg for the kernel's out-of-memory killer."

    return "The dataset or a library that it uses called os._exit or sys.exit: run with num_workers=0 to see where."


def _for_killed_worker(lost: LostWorker) -> str:
    if lost.oom_kills == 0:
        return "The kernel's out-of-memory killer ended no process here: look for a kill command or a scheduler."

    limit = "" if lost.memory_limit_bytes is None else f" of {bytes_text(lost.memory_limit_bytes)}"
    less = "use fewer workers, a smaller prefetch_factor, or arrays instead of large Python lists in the dataset"
    if lost.oom_kills:
        return f"The kernel's out-of-memory killer was at work: {less}, or raise the memory limit{limit}."

    return f"Look for the kernel's out-of-memory killer (dmesg). If it was that: {less}."


def for_mapped_file(used: int, shared: int, where: str = "") -> str:
    """Return advice on SIGBUS where little of the shared memory was used.

    Args:
        where: the line that reads the file, as ` at train.py:12 f`.
    """
    return (
        f"Of /dev/shm only {percent_text(used / shared)} was used: probably a mapped file{where} has become shorter, "
        "or could not be read (numpy.memmap, safetensors, torch.load with mmap). Write a new file and rename it, "
        "instead of changing one that a job reads; dmesg reports a failing disk."
    )


def for_shared_memory(shm_bytes: int | None = None) -> str:
    """Return advice on shared memory that ran out."""
    size = "" if shm_bytes is None else f" of {bytes_text(shm_bytes)}"
    wanted = max(_AMPLE_GIB, 2 * ((shm_bytes or 0) >> 30))
    docker = f"docker run --shm-size={wanted}g or --ipc=host"
    return (
        f"Shared memory has probably run out: give /dev/shm{size} more room ({docker}; in Kubernetes an emptyDir with "
        "medium Memory), or use fewer loader workers or a smaller prefetch_factor."
    )
