"""Current line of Python of a thread or a coroutine."""

from __future__ import annotations

import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

__all__ = ["CodeLocation", "location_of_coroutine", "location_of_thread"]

_OWN = str(Path(__file__).parent)
_STDLIB = sysconfig.get_path("stdlib")


@dataclass(frozen=True, slots=True)
class CodeLocation:
    """A line of Python; without a file for a function that is not written in Python."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}" if self.file else f"inside {self.function}, no Python code"


def location_of_thread(ident: int) -> CodeLocation | None:
    """Return the innermost line of a thread, in the user's code if there is any."""
    frame = innermost = sys._current_frames().get(ident)
    try:
        while frame is not None and _is_foreign(frame):
            frame = frame.f_back

        found = frame or innermost
        return None if found is None or found.f_code.co_filename.startswith(_OWN) else _location(found)
    finally:
        del frame, innermost  # a frame keeps everything in it alive


def location_of_coroutine(coroutine: Any) -> CodeLocation | None:
    """Return the innermost line of the user's code that a coroutine awaits on."""
    frames = []
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None)
        if frame is not None:
            frames.append(frame)

        coroutine = getattr(coroutine, "cr_await", None)

    for frame in reversed(frames):
        if not _is_foreign(frame):
            return _location(frame)

    return None


def _is_foreign(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    library = file.startswith(_STDLIB) and "site-packages" not in file
    return library or file.startswith((_OWN, "<frozen"))


def _location(frame: FrameType) -> CodeLocation:
    return CodeLocation(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_qualname)
