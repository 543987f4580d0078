"""Garbage collections of this process, timed by the interpreter's own callbacks.

A step without a collection costs nothing. A collection costs two calls, 0.9 us together; only one of a millisecond or
more is looked at. The callback runs wherever an object is made, also inside our own hooks and in any thread: so it
takes no lock and appends to nothing but a deque, which the recorder's thread empties.
"""

from __future__ import annotations

import gc
import sys
from collections import deque
from collections.abc import Callable, Sequence
from types import CodeType, FrameType
from typing import NamedTuple

from traceml.clock import monotonic_ns
from traceml.database.flight.open_phase import open_phase
from traceml.database.schema import Slot

__all__ = ["LONG_NS", "Collection", "CollectionWatch"]

LONG_NS = 1_000_000
"""From here on a collection is told by itself; shorter ones are told together."""
_MAX_WAITING = 512
_MAX_DEPTH = 50
_OLDEST = 2


class Collection(NamedTuple):
    """A collection, or several short ones together.

    Attributes:
        t_end_ns: its end, monotonic.
        step: the open step.
        phase: the open phase, as in `schema.PAUSES`.
        ns: its wall time.
        together: how many they are.
        generation: the oldest generation that it visited.
        code, line: the user's code that called `gc.collect`; None, 0 where the interpreter decided.
    """

    t_end_ns: int
    step: int
    phase: int
    ns: int
    together: int
    generation: int
    code: CodeType | None = None
    line: int = 0


class CollectionWatch:
    """Times collections from `start` to `stop`.

    Args:
        slots: open slots of the flight file.
        is_evaluating: tells whether an evaluation runs, whose time is in no step.
        is_user: tells the user's code.
    """

    def __init__(
        self,
        slots: Sequence[int] | memoryview[int],
        is_evaluating: Callable[[], bool],
        is_user: Callable[[FrameType], bool],
    ) -> None:
        self._slots, self._is_evaluating, self._is_user = slots, is_evaluating, is_user
        self._began_ns = 0
        self._counts: tuple[int, ...] = ()
        self._long: deque[Collection] = deque(maxlen=_MAX_WAITING)
        self._short_ns = self._short = 0
        self._told = 0, 0

    def start(self) -> None:
        """Time collections from now on."""
        gc.callbacks.append(self._called)

    def stop(self) -> None:
        """Time no more collections."""
        if self._called in gc.callbacks:
            gc.callbacks.remove(self._called)

    def take_long(self) -> list[Collection]:
        """Return the long collections since the last call, at most 512."""
        return [self._long.popleft() for _ in range(len(self._long))]

    def take_short(self) -> tuple[int, int]:
        """Return number and wall time in ns of the short collections since the last call."""
        # Only the callback writes these sums: it may come at any moment, and nothing is lost.
        count, ns = self._short, self._short_ns
        told, told_ns = self._told
        self._told = count, ns
        return count - told, ns - told_ns

    def _called(self, when: str, info: dict[str, int]) -> None:
        try:
            if when == "start":
                self._counts = gc.get_count()
                self._began_ns = monotonic_ns()
            elif self._began_ns:
                self._ended(monotonic_ns(), info["generation"])
        except Exception:  # noqa: BLE001 - fail open: the interpreter would print it into the user's output
            self.stop()

    def _ended(self, now: int, generation: int) -> None:
        ns, self._began_ns = now - self._began_ns, 0
        if ns < LONG_NS:
            self._short += 1
            self._short_ns += ns
            return

        phase, _ = open_phase(self._slots, has_steps=True)
        step = -1 if self._is_evaluating() else self._slots[Slot.STEP]
        code, line = self._caller(sys._getframe(2), generation)
        self._long.append(Collection(now, step, max(phase, -1), ns, 1, generation, code, line))

    def _caller(self, frame: FrameType | None, generation: int) -> tuple[CodeType | None, int]:
        """Return the user's line that called for a collection; None where the interpreter decided."""
        if frame is None or not _was_called(frame.f_code, generation, self._counts):
            return None, 0

        found: FrameType | None = frame
        for _ in range(_MAX_DEPTH):
            if found is None:
                break

            if self._is_user(found):
                return found.f_code, found.f_lineno

            found = found.f_back

        return frame.f_code, frame.f_lineno


def _was_called(code: CodeType, generation: int, counts: Sequence[int]) -> bool:
    """Return whether code called `gc.collect`: the interpreter collects only above its thresholds.

    The oldest generation's count may stay above its threshold for long, as the interpreter waits until the generation
    has grown by a quarter. So code that names `collect` counts as having called it.
    """
    above = counts[generation] > gc.get_threshold()[generation]
    return not gc.isenabled() or not above or (generation == _OLDEST and "collect" in code.co_names)
