"""Waits of a thread in a library, by its frames: for a child process, or for a lock file that it polls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import takewhile
from types import FrameType

from traceml.inspection.thread_frames import stack_frames

__all__ = ["awaited_child", "awaited_lock", "library_frames"]

_SUBPROCESS = "/subprocess.py"
_WAITS = ("wait", "communicate", "_wait", "_communicate")
# Files of torch.utils.cpp_extension and of filelock, which poll a file, and the attribute that has its path.
_LOCKS = {"/torch/utils/file_baton.py": "lock_file_path", "/filelock/_api.py": "lock_file"}
_DEPTH = 50  # torch.utils.cpp_extension is itself 20 calls deep


def library_frames(frame: FrameType | None, is_user: Callable[[FrameType], bool]) -> Iterator[FrameType]:
    """Return the open calls below the user's code, the innermost first.

    Args:
        frame: what the thread runs.
    """
    return takewhile(lambda each: not is_user(each), stack_frames(frame, _DEPTH))


def awaited_child(frame: FrameType | None, is_user: Callable[[FrameType], bool]) -> int | None:
    """Return the number of the child process; None where the user's code waits for none."""
    for each in library_frames(frame, is_user):
        if each.f_code.co_name in _WAITS and each.f_code.co_filename.endswith(_SUBPROCESS):
            child = each.f_locals.get("self")
            pid = getattr(child, "pid", None)
            return pid if type(pid) is int and getattr(child, "returncode", 0) is None else None

    return None


def awaited_lock(frame: FrameType | None, is_user: Callable[[FrameType], bool]) -> str:
    """Return the path of the lock file; empty where the user's code waits for none."""
    for each in library_frames(frame, is_user):
        name = next((name for file, name in _LOCKS.items() if each.f_code.co_filename.endswith(file)), None)
        if name is not None:
            path = getattr(each.f_locals.get("self"), name, "")
            return path if isinstance(path, str) else ""

    return ""
