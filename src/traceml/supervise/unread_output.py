"""Output that nobody reads: at the end of a job a full pipe must not keep its processes.

A process that writes to a full pipe waits for the reader, also if it was asked to end: Python with its traceback,
torchrun with its log, and this program with the verdict.
"""

from __future__ import annotations

import contextlib
import os
import select
import stat
import threading
import time
from collections.abc import Callable, Iterable

__all__ = ["UnreadOutput"]

_EVERY_S, _CHUNK_BYTES = 0.5, 65536


class UnreadOutput:
    """Reads pipes that stay full while a job is ending, in a thread. A context manager.

    Args:
        files: descriptors that the job writes to; those that are not pipes are left alone.
        is_ending: returns whether the job has to end, or has ended. Before, the reader may be slow.
        full_for_s: time for which a pipe must have been full meanwhile.
    """

    def __init__(
        self,
        files: Iterable[int],
        is_ending: Callable[[], bool],
        keep: Callable[[bytes], object],
        full_for_s: float = 10.0,
    ) -> None:
        self._is_ending, self._keep, self._full_for_s = is_ending, keep, full_for_s
        self._full_since: dict[int, float | None] = dict.fromkeys(file for file in files if _is_pipe(file))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="traceml-unread", daemon=True)

    def __enter__(self) -> UnreadOutput:
        if self._full_since:
            self._thread.start()

        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._full_since:
            self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(min(_EVERY_S, self._full_for_s)):
            for file in self._full_since:
                with contextlib.suppress(OSError):  # without the right to read it, it stays full
                    self._check(file)

    def _check(self, file: int) -> None:
        if not (_is_full(file) and self._is_ending()):
            self._full_since[file] = None
            return

        since_s = self._full_since[file]
        if since_s is None:
            self._full_since[file] = time.monotonic()
        elif time.monotonic() - since_s >= self._full_for_s:
            self._empty(file)

    def _empty(self, file: int) -> None:
        """Read what is in the pipe; a writer may fill it again at once, which the next turn reads."""
        reader = os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            with contextlib.suppress(BlockingIOError):
                self._keep(os.read(reader, _CHUNK_BYTES))
        finally:
            os.close(reader)


def _is_pipe(file: int) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(file).st_mode)
    except OSError:  # it is closed
        return False


def _is_full(file: int) -> bool:
    """Whether a write would wait; not if the reader has closed its end: a write fails."""
    poll = select.poll()
    poll.register(file, select.POLLOUT)
    return not poll.poll(0)
