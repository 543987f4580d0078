"""The child process that a thread of Python waits for, by the frames of `subprocess`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from types import FrameType

from traceml.inspection.thread_frames import stack_frames

__all__ = ["awaited_child"]

_SUBPROCESS = "/subprocess.py"
_WAITS = ("wait", "communicate", "_wait", "_communicate")
_WAIT_DEPTH = 20


def awaited_child(frame: FrameType | None, is_user: Callable[[FrameType], bool]) -> int | None:
    """Return the number of the child; None where the user's code waits for none."""
    for each in takewhile(lambda each: not is_user(each), stack_frames(frame, _WAIT_DEPTH)):
        if each.f_code.co_name in _WAITS and each.f_code.co_filename.endswith(_SUBPROCESS):
            child = each.f_locals.get("self")
            pid = getattr(child, "pid", None)
            return pid if type(pid) is int and getattr(child, "returncode", 0) is None else None

    return None
