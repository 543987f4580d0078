"""The user's line in whose call something happened."""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType, FrameType

__all__ = ["user_line"]

_MAX_DEPTH = 100


def user_line(frame: FrameType | None, is_user: Callable[[FrameType], bool]) -> tuple[CodeType | None, int]:
    """Return the code and line of the innermost frame of the user's; None, 0 where there is none.

    Args:
        frame: where to begin.
        is_user: tells the user's code.
    """
    for _ in range(_MAX_DEPTH):
        if frame is None:
            break

        if is_user(frame):
            return frame.f_code, frame.f_lineno

        frame = frame.f_back

    return None, 0
