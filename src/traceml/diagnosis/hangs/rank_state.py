"""State of a rank by its snapshot: whether it waits in a collective, what else it does, and whether that is normal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile

from traceml.database.snapshots.rank_snapshot import (
    BUSY_CORES,
    FrameSnapshot,
    GroupSnapshot,
    ProcessSnapshot,
    RankSnapshot,
    ThreadSnapshot,
    WorkerSnapshot,
)
from traceml.formatting import ranks_text
from traceml.inspection.kernel_state import AwaitedKind
from traceml.inspection.thread_frames import is_event_loop

__all__ = [
    "COMPUTING", "FOR_JOIN", "REMOTE_CALLS", "WAITS_FOR_THREAD", "awaited_thread", "blocked_worker", "calling_thread",
    "collective_wait", "device_wait", "doing", "gil_holder", "is_blocked_by_full_pipe", "is_busy", "is_expected_wait",
    "is_in_collective", "is_in_join", "is_in_long_call", "is_spawned", "rival_thread", "running_threads",
]  # fmt: skip

_DISTRIBUTED = "/torch/distributed/"
# Its modules whose own functions wait for other ranks. Others load a checkpoint, or run the forward of a model.
_WAITING = tuple(
    f"{_DISTRIBUTED}{name}.py"
    for name in ("distributed_c10d", "_functional_collectives", "rendezvous", "utils", "_state_dict_utils")
)
_JOIN = "/torch/distributed/algorithms/join.py"
_POINT_TO_POINT = ("send", "recv", "isend", "irecv", "batch_isend_irecv", "send_object_list", "recv_object_list")
REMOTE_CALLS = ("rpc_sync", "rpc_async", "remote", "shutdown", "_wait_all", "_all_gather", "_barrier")
"""Calls of torch.distributed.rpc: what they wait for is what the other rank runs for them."""
_PIPELINES, _RPC = "/torch/distributed/pipelining/", "/torch/distributed/rpc/"
COMPUTING = "computing"
_WRAPPERS = ("wrapper", "inner", "inner_func", "wrapped", "__call__")
_COMPILER = ("/torch/_dynamo/", "/torch/_inductor/")
_WAITING_PHASES = ("backward", "comm")
_ENGINE = "_engine_run_backward"
_INPUT = "waiting for input"
_LOCK = "waiting for a lock"
FOR_JOIN = "waiting for a thread to end"
# Functions that wait for a lock which another thread releases when it has done its part, by file.
_THREAD_CALLS = {
    "queue.py get": "waiting for an item of a queue",
    "queue.py put": "waiting for room in a queue",
    "concurrent/futures/_base.py result": "waiting for a result of an executor",
    "threading.py Event.wait": "waiting for an event to be set",
    "threading.py Condition.wait": "waiting for a condition to be notified",
    "threading.py Barrier.wait": "waiting for other threads at a barrier",
    "threading.py Semaphore.acquire": "waiting for a semaphore",
    "threading.py Thread.join": FOR_JOIN,
}
WAITS_FOR_THREAD = (_LOCK, *_THREAD_CALLS.values())
"""What `doing` returns of a thread that waits for another one."""
# Kernel functions in which a process sleeps, by the first that begins like it.
_SLEEPS = (
    ("hrtimer_nanosleep", "sleeping"),
    ("do_nanosleep", "sleeping"),
    ("futex", _LOCK),
    ("do_wait", "waiting for a child process to end"),
    ("locks_lock", "waiting for a file lock"),
    ("flock", "waiting for a file lock"),
    ("fcntl", "waiting for a file lock"),
    ("anon_pipe_read", "reading from a pipe that nobody writes to"),
    ("pipe_read", "reading from a pipe that nobody writes to"),
    ("unix_stream_read", "waiting for data from another process"),
    ("sk_wait", "waiting for the network"),
    ("wait_for_partner", "waiting for another process to open the pipe"),
    ("tcp_", "waiting for the network"),
    ("inet_csk_accept", "waiting for a connection"),
    ("inet_", "waiting for the network"),
    ("wait_for_connect", "waiting for the network"),
    ("ep_poll", _INPUT),
    ("do_epoll_wait", _INPUT),
    ("do_sys_poll", _INPUT),
    ("do_select", _INPUT),
    ("poll_schedule", _INPUT),
    ("do_sigtimedwait", "waiting for a signal"),
    ("sigsuspend", "waiting for a signal"),
    ("__do_sys_pause", "waiting for a signal"),
)
_PIPE_WRITES = ("anon_pipe_write", "pipe_write")
_FROZEN = "frozen by its cgroup"
_STOPPED = "stopped by a signal"
_FREEZERS = ("__refrigerator", "do_freezer_trap", "get_signal")
_VFORKS = ("kernel_clone", "wait_for_vfork_done")
_POLLED_LOCK = f"{AwaitedKind.LOCK} "
# What `waits_on` says of a connection.
_CONNECTIONS: dict[str, str] = {
    AwaitedKind.CONNECTION: "waiting for the network ({})",
    AwaitedKind.CONNECTING: "connecting to {}",
}
_DISK = ("request_wait_answer", "fuse_", "io_schedule", "folio_wait", "wait_on_page", "rpc_", "nfs", "blk_", "jbd2")


def awaited_thread(snapshot: RankSnapshot | WorkerSnapshot) -> ThreadSnapshot | None:
    """Return the thread that the interpreter waits for at its end."""
    if not isinstance(snapshot, RankSnapshot):
        return None

    is_at_end = any(frame.function == "_shutdown" and frame.file.endswith("threading.py") for frame in snapshot.frames)
    return next((thread for thread in snapshot.threads if not thread.is_daemon), None) if is_at_end else None


def gil_holder(snapshot: RankSnapshot) -> ThreadSnapshot | None:
    """Return the thread that holds the GIL for which the training thread waits; None if several may be it."""
    threads = running_threads(snapshot)
    return threads[0] if snapshot.is_waiting_for_gil and len(threads) == 1 else None


def running_threads(snapshot: RankSnapshot) -> list[ThreadSnapshot]:
    """Return the other threads but for those that only wait for other ranks, in a collective that a library calls."""
    return [thread for thread in snapshot.threads if thread.line is not None or not thread.collective]


def calling_thread(snapshot: RankSnapshot, wait: GroupSnapshot) -> ThreadSnapshot | None:
    """Return the thread that has called the collective that a rank waits in; None if it is the training's.

    The training thread may be in another one, of the same group.
    """
    called = [frame.function for frame in _library_frames(snapshot.frames) if _DISTRIBUTED in frame.file]
    is_own = not called or any(wait.operation in name for name in called) or _has_other_groups(snapshot, wait)
    if not wait.operation or (is_in_collective(snapshot) and is_own):
        return None

    return next((thread for thread in snapshot.threads if wait.operation in thread.collective), None)


def is_in_collective(snapshot: RankSnapshot) -> bool:
    """Whether the training thread is in a collective itself, by its stack or its phase."""
    return bool(_distributed_call(snapshot.frames)) or snapshot.phase in _WAITING_PHASES


def _has_other_groups(snapshot: RankSnapshot, wait: GroupSnapshot) -> bool:
    """Whether a collective of another group is in flight: it may be the one of a thread."""
    return any(group.in_flight and group.name != wait.name for group in snapshot.groups)


def rival_thread(snapshot: RankSnapshot, wait: GroupSnapshot) -> ThreadSnapshot | None:
    """Return a thread that is in a collective beside that of the training thread, and perhaps in the same group.

    Then chance decides on each rank which of the two comes first.
    """
    if wait.is_p2p or not is_in_collective(snapshot) or _has_other_groups(snapshot, wait):
        return None

    return next((thread for thread in snapshot.threads if thread.collective), None)


def is_blocked_by_full_pipe(snapshot: RankSnapshot | WorkerSnapshot | ProcessSnapshot) -> bool:
    """Whether a process writes to a pipe that nobody reads."""
    return snapshot.wchan.startswith(_PIPE_WRITES)


def is_expected_wait(snapshot: RankSnapshot, *, is_alone: bool = False) -> bool:
    """Whether no progress is normal: input from a terminal, a debugger, job control, an idle notebook, compiling."""
    flags = (snapshot.is_waiting_for_terminal, snapshot.is_debugged, snapshot.is_suspended, snapshot.is_idle_notebook)
    files = [frame.file for frame in snapshot.frames]
    if any(flags) or snapshot.process_state == "t":
        return True

    compiles = snapshot.is_compiling or any(part in file for part in _COMPILER for file in files)
    return compiles and (is_alone or collective_wait(snapshot) is None) and snapshot.cpu_share != 0.0


def is_busy(snapshot: RankSnapshot) -> bool:
    """Whether a rank that waits for no other one, or the process that it waits for, computes or transfers.

    One that is ready to run computes, however little of a core it gets, unless it only polls. Another thread
    that writes a little may work for it, or only report that the process lives. A rank that holds the GIL inside one
    call must use a core, except before the first step, where such a call may read a large file.
    """
    runs = snapshot.process_state == "R" and not snapshot.is_polling
    if _holds_gil(snapshot):
        return runs and (snapshot.step < 0 or (snapshot.cpu_share or 0.0) >= BUSY_CORES)

    worker, blocker = blocked_worker(snapshot), snapshot.blocker
    if worker is not None and (worker.state == "R" or (worker.cpu_share or 0.0) >= BUSY_CORES):
        return True

    runs = runs or (blocker is not None and blocker.state == "R")
    return runs or snapshot.is_busy_itself or snapshot.has_output


def is_in_long_call(snapshot: RankSnapshot) -> bool:
    """Whether a rank computes in one call that holds the GIL, after its first step."""
    return _holds_gil(snapshot) and snapshot.step >= 0 and is_busy(snapshot)


def _holds_gil(snapshot: RankSnapshot) -> bool:
    return snapshot.is_gil_held or snapshot.answered == "signal"


def is_in_join(snapshot: RankSnapshot) -> bool:
    """Whether a rank has left `with Join(...)`, and answers the collectives of the ranks that still have data."""
    return any(frame.function.endswith("__exit__") and frame.file.endswith(_JOIN) for frame in snapshot.frames)


def is_spawned(snapshot: RankSnapshot) -> bool:
    """Whether a rank is a process of `multiprocessing`, which another process of the script has started."""
    return any(frame.file.endswith("/multiprocessing/process.py") for frame in snapshot.frames)


def blocked_worker(snapshot: RankSnapshot) -> WorkerSnapshot | None:
    """Return the loader worker whose batch the rank waits for."""
    return next((worker for worker in snapshot.workers if worker.waits_for_batch is not None), None)


def collective_wait(snapshot: RankSnapshot) -> GroupSnapshot | None:
    """Return the collective that a rank waits in; None if it does something else.

    An operation in flight proves nothing, as it may be waited for later: the stack, the open phase or the kernel's
    state must show the wait. Where the operation is not known, the group has no members and no number. A process that
    is stopped or frozen waits in none: the others wait for it, whichever it is in.
    """
    if snapshot.process_state == "T" or _is_frozen(snapshot.process_state, snapshot.wchan):
        return None

    flying = [group for group in snapshot.groups if group.in_flight]
    called = _distributed_call(snapshot.frames)
    if called in _POINT_TO_POINT or (called and _is_transfer(snapshot.frames, has_flying=bool(flying))):
        default = GroupSnapshot(operation=called, in_flight=True, is_p2p=True)
        return next((group for group in flying if group.is_p2p), default)

    if not flying and not _is_known_to_wait(snapshot.frames):
        called = ""

    if not (called or _is_inside(snapshot, has_flying=bool(flying))):
        return None

    if flying:
        alike = (group for group in flying if called and group.operation and group.operation in called)
        return next(alike, flying[0])

    if called or not snapshot.groups:
        return GroupSnapshot(operation=called, in_flight=True)

    return None  # a backward pass that computes


def device_wait(snapshot: RankSnapshot) -> GroupSnapshot | None:
    """Return the collective in flight of a rank that may wait for the device, as `loss.item()` does; else None.

    A thread that waits for the device uses a core. So it may also compute, or wait for a kernel.
    """
    if not snapshot.uses_device or snapshot.process_state != "R" or snapshot.is_polling:
        return None

    return next((group for group in snapshot.groups if group.in_flight and not group.is_p2p and group.number > 0), None)


def _distributed_call(frames: Sequence[FrameSnapshot]) -> str:
    """Return the function of torch.distributed that the user's code is in: the outermost one of the innermost run."""
    name = ""
    for frame in frames:
        if frame.is_user:
            break

        if _DISTRIBUTED in frame.file and frame.function.rpartition(".")[2] not in _WRAPPERS:
            name = frame.function.rpartition(".")[2]

    return name


def _is_known_to_wait(frames: Sequence[FrameSnapshot]) -> bool:
    """Whether the user's code is in a function that waits for other ranks, whatever torch has recorded of it."""
    return any(frame.file.endswith(_WAITING) for frame in _library_frames(frames))


def _library_frames(frames: Sequence[FrameSnapshot]) -> Iterator[FrameSnapshot]:
    """Return the frames below the user's code, the innermost first."""
    return takewhile(lambda each: not each.is_user, frames)


def _is_transfer(frames: Sequence[FrameSnapshot], *, has_flying: bool) -> bool:
    """Whether the innermost frames are of a pipeline's schedule, or of a remote call: neither is a collective."""
    file = frames[0].file
    return (_PIPELINES in file and not has_flying) or _RPC in file


def _is_inside(snapshot: RankSnapshot, *, has_flying: bool) -> bool:
    if snapshot.phase == "comm":
        return True

    innermost = snapshot.frames[0] if snapshot.frames else FrameSnapshot()
    # Below the engine that runs the backward pass, torch.compile makes its code the first time.
    compiles = snapshot.is_compiling and innermost.function.rpartition(".")[2] != _ENGINE
    if snapshot.phase in _WAITING_PHASES and not innermost.is_user and not compiles:
        return True

    # `work.wait()` is C code, called by the user's line: a lock, as far as the kernel knows.
    return has_flying and snapshot.wchan.startswith("futex")


def doing(snapshot: RankSnapshot | WorkerSnapshot) -> str:
    """Return what the process does, as far as the kernel and its silence show it: `sleeping`; empty if they do not."""
    state = snapshot.process_state if isinstance(snapshot, RankSnapshot) else snapshot.state
    if state == "T":
        return _STOPPED

    if _is_frozen(state, snapshot.wchan):
        return _FROZEN

    if state in ("Z", "X"):
        return "dead"

    if isinstance(snapshot, RankSnapshot) and snapshot.is_waiting_for_gil:
        holder = gil_holder(snapshot)
        line = holder.line if holder is not None else None
        whose = f"its thread in {line.place}" if line else "another thread"
        return f"waiting for the GIL, which {whose} holds in C code"

    is_polling = isinstance(snapshot, RankSnapshot) and snapshot.is_polling and state == "R"
    what = _by_kernel(snapshot, "S" if is_polling else state)
    is_held = isinstance(snapshot, RankSnapshot) and _holds_gil(snapshot)
    return f"in C code that holds the GIL, {what or 'waiting'}" if is_held else what


def _is_frozen(state: str, wchan: str) -> bool:
    """Whether a cgroup keeps the process from running: a signal could end that sleep, but for its state."""
    return wchan.startswith(_FREEZERS) or (state == "D" and any(wchan.startswith(start) for start, _ in _SLEEPS))


def _by_kernel(snapshot: RankSnapshot | WorkerSnapshot, state: str) -> str:
    if snapshot.wchan.startswith(_VFORKS):
        return "waiting for a child process to start"

    if state == "D" or snapshot.wchan.startswith(_DISK):
        return f"waiting for a disk{_bracketed(*_path(snapshot.waits_on))}"

    if is_blocked_by_full_pipe(snapshot):
        return f"writing to {snapshot.waits_on or 'a pipe'}, which nobody reads"

    if state != "R":
        return _waiting(snapshot)

    on_device = isinstance(snapshot, RankSnapshot) and snapshot.uses_device
    return f"{COMPUTING}, or waiting for the device" if on_device else COMPUTING


def _waiting(snapshot: RankSnapshot | WorkerSnapshot) -> str:
    dead = snapshot.blocker
    if dead is not None and dead.end:
        which = f"its child process {dead.pid}" if dead.pid else "a process of its Pool"
        return f"waiting for another process ({which} {dead.end})"

    words = next((text for start, text in _SLEEPS if snapshot.wchan.startswith(start)), "")
    path = snapshot.waits_on.removeprefix(_POLLED_LOCK)
    if words.endswith("file lock") or path != snapshot.waits_on:
        return "waiting for a file lock" + _bracketed(*_path(path), *_held_by(snapshot.blocker))

    if snapshot.waits_on == "stdin":
        return "waiting for input on stdin"

    kind, _, target = snapshot.waits_on.partition(" ")
    if kind in _CONNECTIONS:
        return _CONNECTIONS[kind].format(target)

    if words == _INPUT and any(is_event_loop(frame.file) for frame in snapshot.frames):
        return "waiting for an event"

    child = _for_child(snapshot.blocker) if snapshot.wchan else ""
    return child or (words == _LOCK and _thread_call(snapshot.frames)) or words


def _thread_call(frames: Sequence[FrameSnapshot]) -> str:
    """Return what a thread waits for in the outermost call of the script that is known to wait; empty if in none."""
    called = [*_library_frames(frames)]
    waits = (words for frame in reversed(called) for call, words in _THREAD_CALLS.items() if _is_call(frame, call))
    return next(waits, "")


def _is_call(frame: FrameSnapshot, call: str) -> bool:
    file, function = call.split(" ")
    return frame.file.endswith(f"/{file}") and f".{frame.function}".endswith(f".{function}")


def _held_by(holder: ProcessSnapshot | None) -> list[str]:
    if holder is None:
        return []

    if holder.is_self:
        return ["held by this process itself"]

    if holder.rank is not None:
        return [f"held by {ranks_text((holder.rank,))}"]

    return [", ".join(filter(None, [f"held by process {holder.pid}", holder.name]))]


def _for_child(child: ProcessSnapshot | None) -> str:
    if child is None:
        return ""

    unread = f"nobody reads its {child.waits_on or 'output'}" if is_blocked_by_full_pipe(child) else ""
    stopped = _STOPPED if child.state == "T" else ""
    return f"waiting for process {child.pid} to end{_bracketed(child.name, unread, stopped)}"


def _path(target: str) -> list[str]:
    return [target] if target.startswith("/") else []


def _bracketed(*parts: str) -> str:
    text = ", ".join(filter(None, parts))
    return f" ({text})" if text else ""
