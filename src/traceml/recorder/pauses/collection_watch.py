"""Garbage collections of this process, timed by the interpreter's own callbacks.

A step without a collection costs nothing. A collection costs two calls, 0.9 us together; only one of a millisecond or
more is looked at. The callback runs wherever an object is made, also inside our own hooks and in any thread: so it
takes no lock, appends to nothing but a deque, which the recorder's thread empties, and looks at no frame. The line of a
call is noted by a wrapper of `gc.collect`. A signal during a collection is handled where the callback begins; what its
handler raises, such as KeyboardInterrupt, would be lost there, so the hooks in C pass it on to the script.
"""

from __future__ import annotations

import functools
import gc
import logging
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from types import CodeType, FrameType
from typing import Any, NamedTuple

from traceml.clock import monotonic_ns
from traceml.database.flight.flight_header import open_phase
from traceml.database.schema import Slot
from traceml.fail_open import fail_open
from traceml.inspection.thread_frames import running_line
from traceml.instrument.native.extension import extension
from traceml.instrument.patches import Patches
from traceml.recorder.user_code import user_line

__all__ = ["LONG_NS", "Collection", "CollectionWatch"]

LONG_NS = 1_000_000
"""From here on a collection is reported by itself; shorter ones are reported together."""
_MAX_WAITING = 512
_log = logging.getLogger("traceml")


class Collection(NamedTuple):
    """A collection, or several short ones together.

    Attributes:
        t_end_ns: its end, monotonic.
        phase: the open phase, as in `schema.PAUSES`.
        together: how many they are.
        generation: the oldest generation that it visited.
        code, line: the user's code that called `gc.collect`, itself or through a library, or a library's where no
            code of the user did; None, 0 if the interpreter decided.
        library, library_line: the library's code that called it; None, 0 if the user's code did.
    """

    t_end_ns: int
    step: int
    phase: int
    ns: int
    together: int
    generation: int
    code: CodeType | None = None
    line: int = 0
    library: CodeType | None = None
    library_line: int = 0


class CollectionWatch:
    """Times collections from `start` to `stop`.

    Args:
        is_evaluating: returns whether an evaluation runs, whose time is in no step.
    """

    def __init__(
        self,
        slots: Sequence[int] | memoryview[int],
        is_evaluating: Callable[[], bool],
        is_user: Callable[[FrameType], bool],
    ) -> None:
        self._slots, self._is_evaluating, self._is_user = slots, is_evaluating, is_user
        self._callback: Callable[..., None] = self._called
        self._began_ns = 0
        self._caller: tuple[CodeType, int, CodeType | None, int] | None = None
        self._patches = Patches()
        self._long: deque[Collection] = deque(maxlen=_MAX_WAITING)
        self._short_ns = self._short = 0
        self._reported = 0, 0

    def start(self) -> None:
        """Time collections from now on."""
        native = extension()
        if native is not None and hasattr(native, "passing_on"):  # an older build has it not
            self._callback = native.passing_on((self._called, threading.main_thread().ident))

        gc.callbacks.append(self._callback)
        self._patches.replace(gc, "collect", self._noting_collect(gc.collect))

    def stop(self) -> None:
        """Time no more collections."""
        if self._callback in gc.callbacks:
            gc.callbacks.remove(self._callback)

        self._patches.restore()

    def drain_long(self) -> list[Collection]:
        """Return the long collections since the last call, at most 512."""
        return [self._long.popleft() for _ in range(len(self._long))]

    def drain_short(self) -> tuple[int, int]:
        """Return number and wall time in ns of the short collections since the last call."""
        # Only the callback writes these sums: it may come at any moment, and nothing is lost.
        count, ns = self._short, self._short_ns
        reported, reported_ns = self._reported
        self._reported = count, ns
        return count - reported, ns - reported_ns

    def _noting_collect(self, original: Callable[..., int]) -> Callable[..., int]:
        """Return `gc.collect` that notes the line which called it."""

        @functools.wraps(original)
        def collect(*args: Any, **kwargs: Any) -> int:
            with fail_open(_log, "recorder", "a collection's line is not reported", once=True):
                self._caller = self._caller_of(sys._getframe(1))

            try:
                return original(*args, **kwargs)
            finally:
                self._caller = None

        return collect

    def _caller_of(self, frame: FrameType) -> tuple[CodeType, int, CodeType | None, int]:
        own = frame.f_code, running_line(frame)
        if self._is_user(frame):
            return *own, None, 0

        code, line = user_line(frame.f_back, self._is_user)
        return *((code, line) if code is not None else own), *own

    def _called(self, when: str, info: dict[str, int]) -> None:
        try:
            if when == "start":
                self._began_ns = monotonic_ns()
                return

            began, self._began_ns = self._began_ns, 0
            now = monotonic_ns()
            if not began:
                return

            if now - began < LONG_NS:
                self._short += 1
                self._short_ns += now - began
                return

            phase, _ = open_phase(self._slots, True)
            step = -1 if self._is_evaluating() else self._slots[Slot.STEP]
            caller = self._caller or ()
            self._long.append(Collection(now, step, max(phase, -1), now - began, 1, info["generation"], *caller))
        except Exception:  # the interpreter would print it into the user's output, at each collection
            self.stop()
            with fail_open(_log, "recorder", "garbage collections are not timed any more", level=logging.DEBUG):
                raise
