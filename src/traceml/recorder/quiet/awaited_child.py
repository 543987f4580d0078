"""The child process that a thread waits for in `subprocess`: it may wait for the child's output, by `poll`."""

from __future__ import annotations

from collections.abc import Callable
from types import FrameType

__all__ = ["awaited_child"]

_FILE = "/subprocess.py"
_WAITS = ("wait", "communicate", "_wait", "_communicate")
_MAX_DEPTH = 20


def awaited_child(frame: FrameType | None, is_user: Callable[[FrameType], bool]) -> int | None:
    """Return the number of the child; None where the user's code waits for none.

    Args:
        frame: what the thread runs.
        is_user: whether the user wrote the code of a frame.
    """
    for _ in range(_MAX_DEPTH):
        if frame is None or is_user(frame):
            break

        if frame.f_code.co_name in _WAITS and frame.f_code.co_filename.endswith(_FILE):
            child = frame.f_locals.get("self")
            pid = getattr(child, "pid", None)
            return pid if type(pid) is int and getattr(child, "returncode", 0) is None else None

        frame = frame.f_back

    return None
