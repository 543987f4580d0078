"""Schedule of a collector: one reading, or one every `interval` seconds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from traceml.clock import own_time as time
from traceml.track.plugins.interfaces import CollectorInterface
from traceml.track.plugins.metric import Metric
from traceml.track.rank.logged_values import DeferredValue, checked_name, number_of, plain, step_of

__all__ = ["readings"]

_SHORTEST_S = 0.1


def readings(
    collector: CollectorInterface, failed: Callable[[Exception], None], stopped: threading.Event | None = None
) -> Iterator[list[Any]]:
    """Yield the rows of each reading, as msgpack can hold them.

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
            found: Any = collector.collect()
            rows = [_checked(row) for row in (found if isinstance(found, Iterable) else [found])]
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


def _checked(row: Any) -> Metric | dict[Any, Any]:
    """Return a row with values that msgpack can hold.

    Raises:
        TypeError: it is neither a Metric nor a dict, or its name is no text, or its step no whole number.
    """
    if isinstance(row, Mapping):
        return {key: plain(value) for key, value in row.items()}
    if not isinstance(row, Metric):
        raise TypeError(f"collect() must return a list of Metric and dict, not of {type(row).__name__} {row!r:.100}")

    value, step = number_of(row.value), None if row.step is None else step_of(row.step)
    number = value.number() if isinstance(value, DeferredValue) else plain(value)
    return replace(row, name=checked_name(row.name), value=number, step=step)
