"""Bytes that the threads of this process write: output, a checkpoint.

What the training thread writes is progress. Another thread may write for it, as in the background a checkpoint; or it
only reports now and then that it lives, or what the host does, also while the training hangs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from traceml.clock import monotonic_ns
from traceml.inspection.kernel_state import io_bytes
from traceml.recorder.no_progress.store_threads import StoreThreads

__all__ = ["ThreadOutput"]

_WINDOW_NS = 10 * 10**9
_MANY_BYTES = 100_000
"""What other threads write is progress if it is this much within a window."""


class ThreadOutput:
    """Counts the bytes that are progress: neither those of the calling thread are, nor those of torch's store.

    Args:
        training: returns the kernel's number of the training thread; 0 if it is not known.
    """

    def __init__(self, training: Callable[[], int]) -> None:
        self._training = training
        self._store_threads = StoreThreads()
        self._counted = 0  # bytes of other threads that were progress
        self._others: int | None = None  # bytes of other threads as of the last reading
        self._at_progress: int | None = None
        self._window = 0, 0  # when it began, and `_others` then

    @property
    def is_some(self) -> bool:
        """Whether other threads have written since `forget`, as of the last reading."""
        return self._at_progress is not None and (self._others or 0) > self._at_progress

    def forget(self) -> None:
        """Leave out what was written up to the next reading."""
        self._at_progress = None

    def progress_bytes(self) -> int:
        """Return the bytes so far that are progress: they grow with it."""
        own, others = self._read()
        now, before = monotonic_ns(), self._others
        began, first = self._window
        if before is None or now - began >= _WINDOW_NS:
            began, first = now, others if before is None else before

        if others - first >= _MANY_BYTES:
            self._counted += others - first
            began, first = now, others

        self._others, self._window = others, (began, first)
        self._at_progress = others if self._at_progress is None else self._at_progress
        return own + self._counted

    def _read(self) -> tuple[int, int]:
        """Return the bytes that the training thread has written, and those of other threads, also of ended ones."""
        own = _written(self._training())
        left_out = _written(threading.get_native_id()) + sum(map(_written, self._store_threads()))
        # Read last: what the training thread writes meanwhile is not taken for another thread's.
        return own, io_bytes("self")[1] - own - left_out


def _written(thread: int | str) -> int:
    return io_bytes(f"self/task/{thread}")[1] if thread else 0
