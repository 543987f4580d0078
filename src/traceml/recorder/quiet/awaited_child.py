"""The child process that a thread waits for in `subprocess`: it may wait for the child's output, by `poll`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from types import FrameType

from traceml.inspection.thread_frames import stack_frames

__all__ = ["awaited_child"]

_FILE = "/subprocess.py"
_WAITS = ("wait", "communicate", "_wait", "_communicate")
_MAX_DEPTH = 20


def awaited_child(frame: FrameType | None, is_user: Callable[[FrameType], bool]) -> int | None:
    """Return the number of the child; None where the user's code waits for none."""
    for each in takewhile(lambda each: not is_user(each), stack_frames(frame, _MAX_DEPTH)):
        if each.f_code.co_name in _WAITS and each.f_code.co_filename.endswith(_FILE):
            child = each.f_locals.get("self")
            pid = getattr(child, "pid", None)
            return pid if type(pid) is int and getattr(child, "returncode", 0) is None else None

    return None
