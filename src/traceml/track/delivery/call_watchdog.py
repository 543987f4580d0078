"""Thread that ends its process when a call into a library does not return.

Delivery runs at a low priority, so while a training uses every core it may wait for one most of the time.
That time does not count as hanging.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator

from traceml.inspection.kernel_state import core_wait_ns
from traceml.track.tracker_state import EXIT_AGAIN

__all__ = ["CallWatchdog"]

_POLL_S = 0.1


class CallWatchdog:
    """Watches one call at a time, of the thread that created the watchdog.

    Args:
        on_hang: called with the name of the call and its allowed seconds, just before the process ends.
    """

    def __init__(self, on_hang: Callable[[str, float], None]) -> None:
        self._on_hang = on_hang
        self._task = f"self/task/{threading.get_native_id()}"
        self._call: tuple[str, float, float] | None = None
        self._end_at_s: float | None = None
        self._thread = threading.Thread(target=self._watch, name="traceml-watchdog", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def watch(self, name: str, allowed_s: float) -> Iterator[None]:
        """Limit the block to `allowed_s` seconds."""
        self._call = name, allowed_s, self._counted_s() + allowed_s
        try:
            yield
        finally:
            self._call = None

    def end_within(self, seconds: float) -> None:
        """End the process after `seconds`, whatever it does then."""
        if self._end_at_s is None:
            self._end_at_s = time.monotonic() + seconds

    def _watch(self) -> None:
        while True:
            time.sleep(_POLL_S)
            now_s, call = time.monotonic(), self._call
            if self._end_at_s is not None and now_s > self._end_at_s:
                os._exit(EXIT_AGAIN)

            if call is not None and self._counted_s() > call[2]:
                try:
                    self._on_hang(call[0], call[1])
                finally:
                    os._exit(EXIT_AGAIN)

    def _counted_s(self) -> float:
        """Return a clock that stops while the calling thread waits for a core."""
        return time.monotonic() - core_wait_ns(self._task) / 1e9
