"""Wake-up of sleeping threads."""

from __future__ import annotations

import threading

__all__ = ["Waker", "idle_waiters", "wake_idle_waiters"]


class Waker:
    """Wakes one thread once; a second wake-up has no effect."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def wake(self) -> None:
        """Wake the thread that sleeps, or the next one that sleeps here."""
        try:
            self._lock.release()
        except RuntimeError:  # another thread has done it
            pass

    def sleep(self, timeout_s: float = -1) -> bool:
        """Sleep until `wake` is called; False when the time is over first."""
        return self._lock.acquire(timeout=timeout_s)


# Threads in wait_all, of every Runtime: a task of one may wait for tasks of another.
idle_waiters: list[Waker] = []


def wake_idle_waiters() -> None:
    """Let all threads in wait_all check again: a task has ended, or waits itself."""
    while idle_waiters:
        try:
            idle_waiters.pop().wake()
        except IndexError:  # another thread was faster
            return
