"""Samples of the line that the training thread runs, by open phase.

The recorder's thread takes the training thread's frame some 10 times a second; the training thread does nothing. A
thread that wakes from a sleep gets the interpreter's lock where the training thread releases it by itself, so a plain
sample misses code that holds it (0 % of samples instead of 57 % of the time, with blocks of 2 ms). So a sample is
*armed*: the switch interval is shortened, the thread sleeps for a random 2 to 12 ms, and looks then. Then it gets the
lock within 20 us, on the line that was running.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import TYPE_CHECKING

from traceml.clock import monotonic_ns
from traceml.database.schema import LINE_OTHER, LINE_OUTSIDE, LINE_STARTUP, Phase, Slot
from traceml.recorder.user_code import UserCode, is_ours

if TYPE_CHECKING:
    from traceml.database.flight import FlightFile

__all__ = ["LineSampler"]

_ARMED_S = 20e-6
_LEAST_S, _MOST_S = 0.002, 0.012
_MAX_LINES = 512
_MAX_DEPTH = 200
_COMPREHENSIONS = tuple(f".<locals>.<{name}>" for name in ("listcomp", "genexpr", "dictcomp", "setcomp"))
_PHASES = len(Phase)
_STEP_START = int(Slot.STEP_START)

_Key = tuple[int, CodeType | None, int, CodeType | None]


class LineSampler:
    """Counts samples by (open phase, line of the user's code, library function that it has called).

    Args:
        flight: takes the rows of `schema.LINES`, and has the open slots.
        thread: returns the id of the training thread.
        user: tells the user's code.
    """

    def __init__(self, flight: FlightFile, thread: Callable[[], int], user: UserCode | None = None) -> None:
        self.samples = 0
        """Samples so far."""
        self._slots, self._steps, self._lines = flight.open_slots, flight.ring("steps"), flight.ring("lines")
        self._name_id, self._thread = flight.names.id_of, thread
        self._user = user or UserCode()
        self._counts: dict[_Key, int] = {}
        self._ids: dict[_Key, tuple[int, int]] = {}

    def sample(self, wait: Callable[[float], object]) -> None:
        """Take one sample of the training thread, on the recorder's thread.

        Args:
            wait: sleeps for so many seconds, or less when the recorder's thread is needed.
        """
        usual = sys.getswitchinterval()
        sys.setswitchinterval(_ARMED_S)
        armed = sys.getswitchinterval()
        try:
            wait(_LEAST_S + (_MOST_S - _LEAST_S) * os.urandom(1)[0] / 255)  # the module `random` costs the rank 2 ms
            frame = sys._current_frames().get(self._thread())
        finally:
            if sys.getswitchinterval() == armed:  # else the script has set its own in the meantime
                sys.setswitchinterval(usual)

        if frame is not None:
            key = self._key(frame)
            if key in self._counts or len(self._counts) < _MAX_LINES:
                self._counts[key] = self._counts.get(key, 0) + 1
                self.samples += 1

    def flush(self) -> None:
        """Append the counts since the last call as rows."""
        now, step = monotonic_ns(), self._slots[Slot.STEP]
        for key, count in self._counts.items():
            ids = self._ids.get(key)
            if ids is None and len(self._ids) < _MAX_LINES:
                ids = self._ids[key] = self._names_of(key)

            if ids is not None:
                self._lines.append(now, step, key[0], *ids, count)

        self._counts.clear()

    def _key(self, frame: FrameType) -> _Key:
        phase = self._open_phase()
        library: CodeType | None = None
        found: FrameType | None = frame
        for _ in range(_MAX_DEPTH):
            if found is None:
                break

            code = found.f_code
            if self._user.contains(found):
                return phase, code, found.f_lineno, library

            library = library or (None if _is_hidden(code) else code)
            found = found.f_back

        return phase, None, 0, library

    def _open_phase(self) -> int:
        slots = self._slots
        latest, phase = 0, LINE_OTHER if slots[_STEP_START] else self._between()
        for number in range(_PHASES):
            if slots[number] > latest:
                latest, phase = slots[number], number

        return phase

    def _between(self) -> int:
        return LINE_OUTSIDE if self._steps.appended else LINE_STARTUP

    def _names_of(self, key: _Key) -> tuple[int, int]:
        _, code, line, library = key
        user = self._id(code, line) if code is not None else -1
        return user, self._id(library, library.co_firstlineno) if library is not None else -1

    def _id(self, code: CodeType, line: int) -> int:
        known = self._name_id(f"{code.co_filename}:{line} {_function(code)}")
        return -1 if known is None else known


def _function(code: CodeType) -> str:
    """Return the name of the function, also for a comprehension inside it."""
    name = code.co_qualname
    while name.endswith(_COMPREHENSIONS):
        name = name.rpartition(".<locals>.")[0]

    return name


def _is_hidden(code: CodeType) -> bool:
    """Return whether naming a library function tells nobody anything: imports, generated code, and traceml."""
    return code.co_filename.startswith("<") or is_ours(code.co_filename)
