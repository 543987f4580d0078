"""Classification of blocking library calls by a thread's frames: waits for a child process, a lock file, or a rank.

Of ranks these are the facts that the flight recorder of torch does not have: the peer of gloo's sends and receives, and
the roots of collectives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import takewhile
from types import FrameType
from typing import TYPE_CHECKING, Any

from traceml.clock import process_start_ticks
from traceml.inspection.kernel_state import uncollected_status
from traceml.inspection.loaded_modules import loaded_module
from traceml.inspection.thread_frames import stack_frames
from traceml.process_ends import end_of_status

if TYPE_CHECKING:
    from traceml.database.snapshots.rank_snapshot import GroupSnapshot

__all__ = [
    "awaited_child", "awaited_lock", "called_collective", "dead_sender", "library_frames", "open_transfer", "with_root",
]  # fmt: skip

_SUBPROCESS = "/subprocess.py"
_WAITS = ("wait", "communicate", "_wait", "_communicate")
# Files of torch.utils.cpp_extension and of filelock, which poll a file, and the attribute that has its path.
_LOCKS = {"/torch/utils/file_baton.py": "lock_file_path", "/filelock/": "lock_file"}
_MULTIPROCESSING, _POOL, _TORCH = "/multiprocessing/", "/multiprocessing/pool.py", "/torch/"
_DEPTH = 50  # torch.utils.cpp_extension is itself 20 calls deep
_FILE = "/torch/distributed/distributed_c10d.py"
_PEERS = {"send": "dst", "recv": "src", "send_object_list": "dst", "recv_object_list": "src"}
_ROOTS = {"broadcast": "src", "scatter": "src", "reduce": "dst", "gather": "dst"}


def library_frames(frame: FrameType | None, is_user: Callable[[FrameType], bool]) -> Iterator[FrameType]:
    """Return a thread's open calls below the user's code, the innermost first."""
    return takewhile(lambda each: not is_user(each), stack_frames(frame, _DEPTH))


def awaited_child(frame: FrameType | None, is_user: Callable[[FrameType], bool]) -> int | None:
    """Return the pid of the child process that the user's code waits for; None if it waits for none."""
    for each in library_frames(frame, is_user):
        if each.f_code.co_name in _WAITS and each.f_code.co_filename.endswith(_SUBPROCESS):
            child = each.f_locals.get("self")
            pid = getattr(child, "pid", None)
            return pid if type(pid) is int and getattr(child, "returncode", 0) is None else None

    return None


def dead_sender(frame: FrameType | None, is_user: Callable[[FrameType], bool]) -> tuple[int, str] | None:
    """Return the process that was to answer a wait in `multiprocessing`, for a queue or an event, and has ended.

    Returns:
        The pid of the child that has failed or, where all have ended, of the one with the lowest pid, and how it ended.
        The pid is 0 for a child of a Pool, which has replaced it. None if there is no such child, or the user's code
        does not wait there.
    """
    calls = list(library_frames(frame, is_user))
    files = [each.f_code.co_filename for each in calls]
    module = loaded_module("multiprocessing.process")
    if module is None or not any(_MULTIPROCESSING in file for file in files) or any(_TORCH in file for file in files):
        return None

    waiting = next((each.f_locals.get("self") for each in calls if each.f_code.co_filename.endswith(_POOL)), None)
    if waiting is not None:
        return (0, "has died") if _has_replaced_worker(getattr(waiting, "_pool", None)) else None

    started = [getattr(getattr(each, "_popen", None), "pid", None) for each in list(module._children)]
    pids = sorted(pid for pid in started if type(pid) is int)
    ends = {pid: status for pid in pids if (status := uncollected_status(pid)) is not None}
    failed = next((pid for pid, status in ends.items() if status), None)
    if failed is None and len(ends) == len(pids):
        failed = next(iter(ends), None)

    return None if failed is None else (failed, end_of_status(ends[failed]))


def _has_replaced_worker(pool: Any) -> bool:
    """Return whether a process of a Pool has died. The Pool starts another one, and waits for the result forever.

    The thread that replaces them was started after the first ones.
    """
    handler = getattr(pool, "_worker_handler", None)
    began = process_start_ticks(handler.native_id) if handler is not None else None
    if began is None or pool._maxtasksperchild is not None:
        return False

    pids = (getattr(each, "pid", None) for each in list(pool._pool))  # a ThreadPool has threads, without one
    starts = (process_start_ticks(pid) for pid in pids if type(pid) is int)
    return any(start is not None and start > began + 1 for start in starts)


def awaited_lock(frame: FrameType | None, is_user: Callable[[FrameType], bool]) -> str:
    """Return the path of the lock file; empty if the user's code waits for none."""
    for each in library_frames(frame, is_user):
        name = next((name for file, name in _LOCKS.items() if file in each.f_code.co_filename), None)
        path = getattr(each.f_locals.get("self"), name, "") if name is not None else ""
        if path and isinstance(path, str):
            return path

    return ""


def called_collective(frame: FrameType | None, is_user: Callable[[FrameType], bool]) -> str:
    """Return the function of torch.distributed that a thread has called, and is in; empty if in none."""
    name = ""
    for call in _calls(frame, is_user):
        name = call.f_code.co_name

    return name


def open_transfer(frame: FrameType | None, is_user: Callable[[FrameType], bool]) -> GroupSnapshot | None:
    """Return the operation that the user's code has called, with the rank at its other end if that is an argument."""
    from traceml.database.snapshots.rank_snapshot import GroupSnapshot  # a healthy rank does not pay for it

    found = None
    for call in _calls(frame, is_user):
        name = call.f_code.co_name
        if name in _PEERS:
            found = GroupSnapshot(operation=name, in_flight=True, is_p2p=True, peer=_rank(call, _PEERS[name]))

    return found


def with_root(
    groups: Iterable[GroupSnapshot], frame: FrameType | None, is_user: Callable[[FrameType], bool]
) -> tuple[GroupSnapshot, ...]:
    """Return the operations, the one that the user's code has called with the root that it was given."""
    groups = tuple(groups)
    call = next((call for call in _calls(frame, is_user) if call.f_code.co_name in _ROOTS), None)
    if call is None:
        return groups

    name = call.f_code.co_name
    called = [group for group in groups if group.in_flight and group.operation == name]
    root = _rank(call, _ROOTS[name]) if len(called) == 1 else None
    return tuple(replace(group, peer=root) if group in called else group for group in groups)


def _calls(frame: FrameType | None, is_user: Callable[[FrameType], bool]) -> Iterator[FrameType]:
    """Return the open functions of torch.distributed below the user's code, the innermost first."""
    return (each for each in library_frames(frame, is_user) if each.f_code.co_filename.endswith(_FILE))


def _rank(call: FrameType, name: str) -> int | None:
    """Return the rank that a function was given; None if it was given none, or one of a group."""
    value = call.f_locals.get(name)
    return value if type(value) is int and value >= 0 else None
