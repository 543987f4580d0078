"""Schedule of a collector: one reading, or one every `interval` seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from traceml.track.plugins.interfaces import CollectorInterface

__all__ = ["readings"]

_SHORTEST_S = 0.1


def readings(
    collector: CollectorInterface, failed: Callable[[Exception], None], stopped: threading.Event | None = None
) -> Iterator[list[Any]]:
    """Yield the rows of each reading.

    Args:
        collector: read once, or every `interval` seconds (at least 0.1). After a reading that takes longer than that,
            readings are skipped.
        failed: called with the first failure; a collector that fails is read again at its next time.
        stopped: ends the readings.
    """
    stopped = stopped or threading.Event()
    has_failed = False
    due = time.monotonic()
    while not stopped.is_set():
        try:
            rows = list(collector.collect())
        except Exception as error:  # noqa: BLE001 - code of a third party
            rows = []
            if not has_failed:
                failed(error)

            has_failed = True

        if rows:
            yield rows
        if collector.interval is None:
            return

        due = max(due + max(collector.interval, _SHORTEST_S), time.monotonic())
        stopped.wait(due - time.monotonic())
