"""Selector of a server with many connections: it waits some milliseconds for more of them, and reads all at once."""

from __future__ import annotations

import selectors
import time
from collections.abc import Callable

__all__ = ["BatchSelector"]

MANY_CONNECTIONS = 256
"""With fewer connections nothing waits."""
# Ten thousand ranks that send once a second would wake the process ten thousand times a second: iterations of the loop
# and switches of the process were a third of the CPU time. An ack waits for a tick of 100 ms anyway.
_PAUSE_S = 0.01


class BatchSelector(selectors.DefaultSelector):  # type: ignore[misc, valid-type, unused-ignore]
    """The default selector, with a pause between the first ready connection and the answer where there are many."""

    def __init__(self, sleep: Callable[[float], object] = time.sleep) -> None:
        super().__init__()
        self._sleep = sleep

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Return what is ready; see `selectors.BaseSelector.select`."""
        ready: list[tuple[selectors.SelectorKey, int]] = super().select(timeout)
        if not ready or len(self.get_map()) < MANY_CONNECTIONS or (timeout is not None and timeout <= 0):
            return ready

        self._sleep(_PAUSE_S)
        return super().select(0)
