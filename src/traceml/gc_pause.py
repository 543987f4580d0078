"""A pause of Python's collector, which any thread may begin while others are in one."""

from __future__ import annotations

import gc
import os
from _thread import RLock

__all__ = ["GcPause", "gc_pause"]


class GcPause:
    """Keeps the collector off until the last pause has ended. A program that switches it off meanwhile finds it on.

    The lock is held for moments only: a thread in a pause may wait for one that begins another.
    """

    def __init__(self) -> None:
        self._lock = RLock()  # a signal handler may come in between
        self._depth = 0
        self._is_off = False

    def __enter__(self) -> None:
        """Begin no collection from now on; those of `gc.collect` in another thread do no harm."""
        with self._lock:
            self._depth += 1
            if gc.isenabled():
                self._is_off = True
                gc.disable()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._depth = max(self._depth - 1, 0)  # a fork has ended those before it
            if not self._depth:
                self._resume()

    def forget(self) -> None:
        """End the pauses of the parent's threads in a forked child."""
        self._lock, self._depth = RLock(), 0
        self._resume()

    def _resume(self) -> None:
        if self._is_off:
            self._is_off = False
            gc.enable()


gc_pause = GcPause()
"""The one of this process."""
os.register_at_fork(after_in_child=gc_pause.forget)
