"""Where a thread or a coroutine is: the Python line that a stalled task is on."""

from __future__ import annotations

import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

__all__ = ["Line", "line_of_coroutine", "line_of_thread"]

_OWN = str(Path(__file__).parent)
_STDLIB = sysconfig.get_path("stdlib")


@dataclass(frozen=True, slots=True)
class Line:
    """A line of Python that something is on; no file where it is a function that is not written in Python."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}" if self.file else f"inside {self.function}, no Python code"


def line_of_thread(ident: int) -> Line | None:
    """Return the innermost line of a thread, in the user's code where there is any."""
    frame = sys._current_frames().get(ident)
    try:
        return _users_line(frame)
    finally:
        del frame  # a frame keeps everything in it alive


def line_of_coroutine(coroutine: Any) -> Line | None:
    """Return the innermost line that a coroutine awaits on."""
    frames = []
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None)
        if frame is not None:
            frames.append(frame)

        coroutine = getattr(coroutine, "cr_await", None)

    for frame in reversed(frames):
        if not _is_foreign(frame):
            return _line(frame)

    return None


def _users_line(frame: FrameType | None) -> Line | None:
    innermost = frame
    while frame is not None and _is_foreign(frame):
        frame = frame.f_back

    found = frame or innermost
    return None if found is None or found.f_code.co_filename.startswith(_OWN) else _line(found)


def _is_foreign(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    library = file.startswith(_STDLIB) and "site-packages" not in file
    return library or file.startswith((_OWN, "<frozen"))


def _line(frame: FrameType) -> Line:
    return Line(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_qualname)
