"""Advice about hangs: the next thing to do about one."""

from __future__ import annotations

from collections.abc import Mapping

from traceml.database.snapshots.rank_snapshot import ProcessSnapshot, RankSnapshot, WorkerSnapshot
from traceml.diagnosis.advice import EVEN_BATCHES, EVEN_OR_TOGETHER, SAME_COLLECTIVES, WITHOUT_ANSWERS, longer_limit
from traceml.diagnosis.hangs.blame import RENDEZVOUS, HangCause
from traceml.diagnosis.hangs.hang_detection import DetectedHang
from traceml.diagnosis.hangs.hang_wording import failed_thread, handling_rank, rivals
from traceml.diagnosis.hangs.rank_state import (
    COMPUTING,
    FOR_JOIN,
    WAITS_FOR_THREAD,
    awaited_thread,
    blocked_worker,
    calling_thread,
    doing,
    is_blocked_by_full_pipe,
    is_in_join,
    is_spawned,
    running_threads,
)
from traceml.formatting import ranks_text

__all__ = ["hang_advice"]


def hang_advice(found: DetectedHang) -> str:
    """Return one sentence about what to do next."""
    cause, snapshots = found.blame.cause, found.snapshots
    first = next(iter(found.stuck), None)
    what = _ADVICE.get(cause)
    handling = handling_rank(found)
    if handling is not None and (handling.rank in found.blame.waits or handling.phase == "exit"):
        return _for_exception(handling, found)

    if cause is HangCause.CYCLE and any(wait.is_p2p for wait in found.blame.waits.values()):
        return _OF_TRANSFERS

    if cause is HangCause.UNANSWERED and not found.blame.ranks:
        return _OF_CALLS

    if cause is HangCause.UNANSWERED and all(wait.operation == RENDEZVOUS for wait in found.blame.waits.values()):
        return f"{_OF_ABSENT} {_ADVICE[HangCause.RENDEZVOUS]}"

    if cause in _APART and any(map(is_in_join, snapshots.values())):
        return _OF_JOIN

    if rivals(found) is not None:
        return _OF_RIVALS

    if cause is HangCause.CYCLE and _holds_lock_in_collective(found):
        return f"{what} {_WITHOUT_LOCKS}"

    if cause is HangCause.RENDEZVOUS and any(map(is_spawned, snapshots.values())):
        return f"{_OF_SPAWNED} {what}"

    if what is not None:
        return what

    wait = found.blame.waits.get(first.rank) if first is not None else None
    if wait is not None and not wait.is_p2p:  # it waits for the others, too, as in new_group
        return SAME_COLLECTIVES

    text = _advice_for(first, found) if first is not None else _check_process(found)
    is_slow = found.timed_out and cause is HangCause.NEVER_CAME
    return f"{text} If it should take so long, {longer_limit()}" if is_slow else text


def _for_exception(handling: RankSnapshot, found: DetectedHang) -> str:
    """Return the advice about an exception that a rank handles while it waits for others, or has failed with."""
    away = f": it took rank {handling.rank} away from the others" if len(found.snapshots) > 1 else ""
    first = f"Look at that exception first{away}."
    if handling.rank not in found.blame.waits:
        return f"{first} {_for_wait(handling)}".rstrip()

    return f"{first} {_AT_EXIT if handling.phase == 'exit' else _IN_HANDLERS}"


def _check_process(found: DetectedHang) -> str:
    failed = failed_thread(found)
    if failed is not None:
        return (
            f"If what it waits for comes from thread {failed[1].name!r}, look at that exception: a thread that fails "
            "must tell those that wait for it, as concurrent.futures does."
        )

    others = found.blame.waits and found.blame.ranks
    why = (
        f"Find out what keeps {ranks_text(found.blame.ranks)} there while the others have moved on"
        if others
        else "Find out what is waited for there, and why it never arrives"
    )
    return f"{why}." if found.is_over else f"{why}; `traceml stacks` shows what each rank does now."


_OF_TRANSFERS = "Give each send a receive on the other rank, and each receive a send, in the same order on both ranks."
_APART = (HangCause.DATA_ENDED, HangCause.MISMATCH, HangCause.SIZES)
_OF_RIVALS = (
    "If that thread uses the same process group, give it one of its own (torch.distributed.new_group(); for "
    "dcp.async_save its argument process_group): which of two threads in one group goes first is left to chance."
)
_WITHOUT_LOCKS = "Hold no lock in a thread's collective for which the training waits."
_OF_JOIN = (
    "Move collectives of the script out of `with Join(...)`: a rank without data answers those of the models and "
    "optimizers that Join was given, and no others. Or give each rank the same number of batches (drop_last=True)."
)
_OF_CALLS = (
    "Find out what these calls wait for: no rank is known to wait for another one. A timeout turns such a wait into an "
    "error."
)
_OF_ABSENT = (
    "Look at the processes of the ranks that did not answer: whether they run, and what they do before "
    "init_process_group."
)
_OF_SPAWNED = (
    "The script starts these ranks itself: if torchrun (or `traceml run --nproc-per-node`) has started the script, do "
    "that without it, as ranks below torchrun look for a store of torchrun, and rank 0 makes none."
)
_AT_END: Mapping[tuple[str, str], str] = {
    ("multiprocessing/queues.py", "_finalize_join"): (
        "A multiprocessing.Queue waits at the end until all that was put into it is read: let its reader empty it, or "
        "call cancel_join_thread() of the queue, which drops the rest."
    ),
    ("multiprocessing/util.py", "_exit_function"): (
        "multiprocessing waits at the end for all processes that the script has started: tell them to end before, or "
        "make them daemons: Process(daemon=True)."
    ),
    ("futures/thread.py", "_python_exit"): (
        "A ThreadPoolExecutor waits at the end for all that was submitted to it: tell that task to end before the "
        "script does, or run it in a thread of its own, as a daemon: Thread(daemon=True)."
    ),
}
"""Advice on what the interpreter waits for at its end, by file and function."""
_AT_EXIT = "What runs at the end of the process (atexit) must not wait for other ranks, which do not end."
_IN_HANDLERS = (
    "Code that handles an exception (except, finally, the end of a `with` block) must not wait for other ranks, which "
    "have none to handle."
)
_ADVICE: Mapping[HangCause, str] = {
    HangCause.MISMATCH: SAME_COLLECTIVES,
    HangCause.SIZES: "Give the tensors of that collective the same size on every rank.",
    HangCause.ROOTS: (
        "Pass the same src or dst to that collective on every rank: it names one rank, not the caller's own."
    ),
    HangCause.CYCLE: "Let all ranks of these groups call these collectives in the same order.",
    HangCause.ENDED: EVEN_OR_TOGETHER,
    HangCause.DATA_ENDED: EVEN_BATCHES,
    HangCause.ALONE: "Call that collective on every rank, or on none: look for a branch on the rank around it.",
    HangCause.NETWORK: (
        "All of them called the same collective: look at the network between the ranks and at the devices (dmesg; with "
        "NCCL also NCCL_DEBUG=INFO). With gloo, look at communication hooks that call collectives in callbacks."
    ),
    HangCause.RENDEZVOUS: (
        "Compare MASTER_ADDR, MASTER_PORT and the world size of all ranks: the address must be one at which the others "
        "reach rank 0, and as many ranks as the world size says must join. Then look at firewalls between the hosts."
    ),
    HangCause.UNANSWERED: "Look at the processes of the ranks that did not answer, and at their hosts.",
}


def _advice_for(snapshot: RankSnapshot, found: DetectedHang) -> str:
    if snapshot.process_state == "T":
        return "Continue the process with `kill -CONT`, and find out what stopped it."

    worker = blocked_worker(snapshot)
    if worker is not None:
        if doing(worker).endswith("waiting for a lock") and worker.start_method in ("", "fork"):
            return (
                "Do not use a lock in the dataset that the training process may hold when it starts its workers: "
                "create it in the worker (worker_init_fn), or start workers with multiprocessing_context='spawn'."
            )

        default = "Look at what the dataset does there; `DataLoader(timeout=60)` turns such a wait into an error."
        return _for_wait(worker) or default

    if doing(snapshot).startswith(COMPUTING):
        on_device = (
            " If it reads a result from the device (.item(), .cpu()), it waits for what an earlier line has launched: "
            "a kernel that does not end, or a collective that another rank has not joined."
        )
        return (
            "Look at what that line computes, and with which data: a loop may never end there, or take very long."
            f"{on_device if snapshot.uses_device else ''}"
        )

    return _for_wait(snapshot) or _for_held_lock(snapshot) or _for_thread(snapshot) or _check_process(found)


def _holds_lock_in_collective(found: DetectedHang) -> bool:
    """Whether the training thread of a rank waits for another one, while a thread of the rank is in a collective."""
    waiting = ((found.snapshots[rank], wait) for rank, wait in found.blame.waits.items() if rank in found.snapshots)
    return any(
        calling_thread(snapshot, wait) is not None and doing(snapshot).endswith(WAITS_FOR_THREAD)
        for snapshot, wait in waiting
    )


def _for_thread(snapshot: RankSnapshot) -> str:
    """Return the advice about a lock, a queue or an event that may wait for the only other thread; empty for others.

    Or for one of several threads at the same line, as those that answer remote calls.
    """
    threads = running_threads(snapshot)
    line = threads[0].line if threads else None
    is_waited_for = all(thread.line == line and not thread.exception for thread in threads)
    if line is None or not is_waited_for or not doing(snapshot).endswith(WAITS_FOR_THREAD):
        return ""

    is_one, name = len(threads) == 1, threads[0].name
    which = f"the {len(threads)} threads"
    if is_one:
        which = f"thread {name!r}" if name else "its thread"

    if doing(snapshot).endswith(FOR_JOIN):
        of, it = (which, "it") if is_one else (f"one of {which}", "them")
        return (
            f"If join() is of {of}, find out what keeps {it} at {line.place}, and tell {it} to end before. "
            "join(timeout=60) ends such a wait."
        )

    wait, it = ("waits", "it") if is_one else ("wait", "one of them")
    return (
        f"Find out what {which} {wait} for at {line.place}: {it} may hold the lock, or be the one to fill or empty the "
        "queue, or to set the event. A lock must not be held during a wait; a timeout, as of acquire(timeout=60), "
        "turns such a wait into an error."
    )


def _for_held_lock(snapshot: RankSnapshot) -> str:
    """Return the advice about a call of C code that keeps the interpreter to itself; empty for others."""
    if not (snapshot.is_waiting_for_gil or doing(snapshot).startswith("in C code")):
        return ""

    if snapshot.process_state == "R":
        return (
            "Look at what that call computes and with which data: a regular expression can take forever on some texts, "
            "and no other thread runs meanwhile."
        )

    return (
        "Find out what that call waits for, or computes. No other thread of the process runs meanwhile: if one of them "
        "is to end the wait, the call must release the GIL (ctypes.CDLL does, ctypes.PyDLL does not)."
    )


def _for_wait(snapshot: RankSnapshot | WorkerSnapshot) -> str:
    """Return the advice about what a process waits for by itself; empty if there is none."""
    what, blocker = doing(snapshot), snapshot.blocker
    if isinstance(snapshot, WorkerSnapshot) and snapshot.state == "T":
        return _continued(snapshot.pid)

    if blocker is not None and blocker.state == "T":
        return _continued(blocker.pid)

    for frame in snapshot.frames:
        if text := _AT_END.get(("/".join(frame.file.split("/")[-2:]), frame.function.rpartition(".")[2])):
            return text

    if awaited_thread(snapshot) is not None:
        return "Tell that thread to end before the script does, or make it a daemon: Thread(daemon=True)."

    if "writing to std" in what:
        return "Let the parent process read that pipe, or send the output to a file."

    if "writing to" in what:
        return (
            "Find out which process should read that pipe, and what it waits for: a child stops reading when nobody "
            "reads its own output. communicate() writes and reads at the same time."
        )

    if "frozen" in what:
        return "Thaw the cgroup (`docker unpause`, `scontrol resume`), and find out who froze it."

    if "waiting for a disk" in what:
        return "Look at the disk, or the server, of that file system: dmesg, mount."

    if "file lock" in what:
        return _for_lock(blocker)

    if blocker is not None:
        return _for_blocker(blocker)

    if "stdin" in what:
        return WITHOUT_ANSWERS

    if what.startswith(("connecting to", "waiting for the network")):
        return "Give the connection a timeout, so that it fails and can be tried again, and look at the server."

    return ""


def _continued(pid: int) -> str:
    return f"Continue process {pid} with `kill -CONT {pid}`, and find out what stopped it."


def _for_lock(holder: ProcessSnapshot | None) -> str:
    if holder is None:
        return "Look for a process that holds the lock, or remove a stale lock file."

    if holder.is_self:
        return "Open the file only once: a process that opens it twice waits for its own lock."

    if holder.rank is not None:
        return f"Let {ranks_text((holder.rank,))} release the lock before it waits for other ranks."

    return f"Find out why process {holder.pid} keeps the lock, or end it: `kill {holder.pid}`."


def _for_blocker(blocker: ProcessSnapshot) -> str:
    if blocker.end and not blocker.pid:
        return (
            "The result of a process that died never arrives: look in the output and in `dmesg` for what ended it, "
            "often a lack of memory. concurrent.futures.ProcessPoolExecutor raises BrokenProcessPool then; a Pool "
            "waits forever."
        )

    if blocker.end:
        return (
            f"Find out from its output why process {blocker.pid} has ended. With a timeout, queue.get(timeout=60), the "
            "script can look at the exitcode of its processes from time to time."
        )

    if is_blocked_by_full_pipe(blocker):
        return "Read the output of that process while it runs: communicate() instead of wait(), or send it to a file."

    return f"Find out what process {blocker.pid} does; a timeout (`subprocess.run(timeout=60)`) ends such a wait."
