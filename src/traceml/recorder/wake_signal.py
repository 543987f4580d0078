"""Signal that ends the sleep of one thread."""

from __future__ import annotations

from _thread import allocate_lock
from contextlib import suppress

__all__ = ["WakeSignal"]


class WakeSignal:
    """Like `threading.Event` for one sleeping thread, whose sleep takes 20 us of CPU time less.

    Only that thread calls `wait` and `clear`. A signal handler may call `set`, as it takes no lock that is held.
    """

    def __init__(self) -> None:
        self._is_set = False
        self._sleep = allocate_lock()
        self._sleep.acquire()

    def set(self) -> None:
        """Wake the thread, or end its next sleep at once."""
        self._is_set = True
        with suppress(RuntimeError):  # it is awake already
            self._sleep.release()

    def clear(self) -> None:
        """Let the next sleep last; for what was asked before, a turn follows."""
        self._is_set = False
        self._sleep.acquire(blocking=False)

    def wait(self, seconds: float) -> bool:
        """Sleep for at most this many seconds; return whether the signal is set."""
        if not self._is_set:
            self._sleep.acquire(timeout=seconds)

        return self._is_set
