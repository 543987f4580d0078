"""Bytes that the threads of this process write: output, a checkpoint.

What the training thread writes is progress. Another thread may write a checkpoint for it, in the background. Or it may
only write heartbeats or the state of the host, which continues while the training hangs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress

from traceml.clock import monotonic_ns
from traceml.inspection.kernel_state import io_bytes, read_text

__all__ = ["StoreThreads", "ThreadOutput"]

_WINDOW_NS = 10 * 10**9
_MANY_BYTES = 100_000
"""What other threads write is progress if it is this much within a window."""

_TASKS = "/proc/self/task"
_NAME = "pt_tcpstore"
_LOOKS = 3  # a thread gets its name when it runs for the first time


class StoreThreads:
    """Finds the threads of this process in which torch's store answers, though the training does nothing.

    The TCPStore of torch.distributed is in a thread of one rank. The others ask it again and again while they wait for
    a rank, and so do the heartbeats of NCCL. They are searched for again when the threads of the process change; for
    one thread.
    """

    def __init__(self) -> None:
        self._known: list[str] = []
        self._looks = 0
        self._found: list[str] = []

    def __call__(self) -> list[str]:
        """Return the kernel's numbers of these threads; none where the system does not name threads."""
        tasks: list[str] = []
        with suppress(OSError):
            tasks = os.listdir(_TASKS)  # noqa: PTH208 - names alone

        if tasks != self._known:
            self._known, self._looks = tasks, 0

        if self._looks < _LOOKS:
            self._looks += 1
            self._found = [task for task in tasks if read_text(f"{_TASKS}/{task}/comm").startswith(_NAME)]

        return self._found


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
