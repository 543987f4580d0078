"""Frames of other threads, where it is safe to walk them.

Python 3.11 may collect garbage inside the end of a function whose frame somebody holds. A walk that passes there at
that moment makes a second object of the ending frame; the object outlives the frame, and who walks it later reads freed
memory. The interpreter's lock can be passed on at that moment only if the collector calls Python code: so while it
calls ours, a thread is not walked.
"""

from __future__ import annotations

import sys
from types import CodeType, FrameType

from traceml.witness.user_files import is_ours

__all__ = ["mark_collector_code", "thread_frame", "thread_frames"]

_MAX_DEPTH = 6  # the callback calls two functions of ours
_called_by_collector: set[CodeType] = set()


def mark_collector_code(code: CodeType) -> None:
    """Mark code that the garbage collector calls; it and what it calls is ours, and short."""
    _called_by_collector.add(code)


def thread_frame(ident: int) -> FrameType | None:
    """Return the frame that a thread runs; None where there is none, and while the collector calls our code in it.

    Args:
        ident: the thread's identifier.
    """
    frame = sys._current_frames().get(ident)
    return frame if frame is not None and _is_safe(frame) else None


def thread_frames() -> dict[int, FrameType]:
    """Return the frames that all threads run, by identifier, without those in which the collector calls our code."""
    return {ident: frame for ident, frame in sys._current_frames().items() if _is_safe(frame)}


def _is_safe(frame: FrameType) -> bool:
    found: FrameType | None = frame
    for _ in range(_MAX_DEPTH):
        if found is None or not is_ours(found.f_code.co_filename):
            break

        if found.f_code in _called_by_collector:
            return False

        found = found.f_back

    return True
