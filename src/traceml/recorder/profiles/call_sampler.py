"""Lines of the user's code that call the operators of a profile, by time."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from traceml.inspection.thread_frames import thread_frame
from traceml.inspection.user_files import display_path
from traceml.recorder.user_code import user_line

__all__ = ["CallSampler"]

_MAX_SAMPLES = 20_000


class CallSampler:
    """Samples of the line of the user's code that the training thread runs, each with its time.

    Operators release the interpreter's lock, so most samples are taken inside them.

    Args:
        thread: returns the id of the training thread.
        contains: whether the user wrote the code of a frame.
    """

    def __init__(self, thread: Callable[[], int], contains: Callable[[FrameType], bool]) -> None:
        self._thread, self._contains = thread, contains
        self._samples: list[tuple[int, int]] = []
        self._places: dict[tuple[str, int, str], int] = {}

    def sample(self) -> None:
        """Take a sample."""
        if len(self._samples) >= _MAX_SAMPLES:
            return

        code, line = user_line(thread_frame(self._thread()), self._contains)
        if code is None:
            return

        place = (display_path(code.co_filename), line, code.co_qualname)
        self._samples.append((time.time_ns(), self._places.setdefault(place, len(self._places))))

    def to_row(self) -> dict[str, Any]:
        """Return `places` (file, line, function), and `samples` (epoch nanoseconds, number of the place)."""
        return {"places": [list(place) for place in self._places], "samples": self._samples}
