"""Clocks of all hosts on one time line, the aggregator's wall clock."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from traceml.database.store.reader import StreamRecord

__all__ = ["RunClocks"]

T = TypeVar("T", int, NDArray[np.int64])

# Streams of one host have one monotonic clock; two machines of the same name have different boot times.
_SAME_CLOCK_NS = 50_000_000


class RunClocks:
    """Converts timestamps of any rank to dates.

    Each rank measured the offset of the aggregator's clock from its monotonic clock. Ranks of one host share the most
    exact of these measurements, so that they are exact relative to each other. A rank without a measurement uses the
    wall clock of its host.
    """

    def __init__(self, streams: Iterable[StreamRecord]) -> None:
        self._offsets: dict[int, int] = {}
        self._shifts: dict[int, int] = {}
        streams = list(streams)
        measured: dict[str, list[tuple[int, int]]] = {}  # by host: each with each would take seconds for 10,000 ranks
        for stream in streams:
            if (found := _measured(stream)) is not None:
                measured.setdefault(stream.host, []).append(found)

        for stream in streams:
            own = _own(stream)
            of_host = measured.get(stream.host, ())
            near = [(rtt, offset) for offset, rtt in of_host if abs(offset - own) < _SAME_CLOCK_NS]
            self._offsets[stream.id] = offset = min(near)[1] if near else own
            self._shifts[stream.id] = offset - _wall(stream, offset)

    def from_monotonic(self, stream: int, monotonic_ns: T) -> T:
        """Return the epoch nanoseconds of a monotonic timestamp of a stream, or of an array of them."""
        return monotonic_ns + self._offsets[stream]

    def from_wall_clock(self, stream: int, epoch_ns: T) -> T:
        """Return the epoch nanoseconds of a date that a stream took from the wall clock of its host."""
        return epoch_ns + self._shifts[stream]


def _measured(stream: StreamRecord) -> tuple[int, int] | None:
    offset = stream.facts.get("clock_offset_ns")
    return None if offset is None else (int(offset), int(stream.facts.get("clock_rtt_ns", 0)))


def _own(stream: StreamRecord) -> int:
    measured = _measured(stream)
    return _wall(stream, 0) if measured is None else measured[0]


def _wall(stream: StreamRecord, otherwise: int) -> int:
    """Return the offset of the host's wall clock from its monotonic clock."""
    pair: Any = stream.facts.get("clock")
    return int(pair[1]) - int(pair[0]) if pair and len(pair) == 2 and any(pair) else otherwise
