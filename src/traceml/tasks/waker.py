"""Wake-up of sleeping threads."""

from __future__ import annotations

import threading

__all__ = ["Waker", "WakerList", "idle_waiters"]


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


class WakerList:
    """Wakers of threads that wait for the same event."""

    def __init__(self) -> None:
        self._wakers: list[Waker] = []

    def add(self, waker: Waker) -> None:
        """Add a waker for the next event."""
        self._wakers.append(waker)

    def discard(self, waker: Waker) -> None:
        """Remove a waker, unless the event has removed it."""
        try:
            self._wakers.remove(waker)
        except ValueError:
            pass

    def wake_all(self) -> None:
        """Wake all threads and forget them."""
        while self._wakers:
            try:
                self._wakers.pop().wake()
            except IndexError:  # another thread was faster
                return

    def clear(self) -> None:
        """Forget all threads, in a forked child."""
        self._wakers.clear()


# Threads in wait_all, of every Runtime: a task of one may wait for tasks of another.
idle_waiters = WakerList()
