"""When things happened, on one time line for all hosts: the aggregator's wall clock."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from traceml.database.reader import StreamRecord

__all__ = ["RunClocks"]

T = TypeVar("T", int, NDArray[np.int64])

# Streams of one host have one monotonic clock; two machines of the same name were not booted at the same moment.
_SAME_CLOCK_NS = 50_000_000


class RunClocks:
    """Turns stamps of any rank into dates.

    Each rank measured how far the aggregator's clock is from its own monotonic one. Ranks of one host share the most
    exact of these measurements, so that they are exact among themselves. A rank that never measured has its own host's
    wall clock.

    Args:
        streams: the run's streams.
    """

    def __init__(self, streams: Iterable[StreamRecord]) -> None:
        self._offsets: dict[int, int] = {}
        self._shifts: dict[int, int] = {}
        streams = list(streams)
        measured = [(stream, *_measured(stream)) for stream in streams if _measured(stream) is not None]  # type: ignore[misc]
        for stream in streams:
            own = _own(stream)
            near = [
                (rtt, offset)
                for other, offset, rtt in measured
                if other.host == stream.host and abs(offset - own) < _SAME_CLOCK_NS
            ]
            self._offsets[stream.id] = offset = min(near)[1] if near else own
            self._shifts[stream.id] = offset - _wall(stream, offset)

    def of_stamp(self, stream: int, monotonic_ns: T) -> T:
        """Return the epoch nanoseconds of a monotonic stamp of a stream, or of an array of them."""
        return monotonic_ns + self._offsets[stream]

    def of_date(self, stream: int, epoch_ns: T) -> T:
        """Return the epoch nanoseconds of a date that a stream took from its own host's wall clock."""
        return epoch_ns + self._shifts[stream]


def _pair(stream: StreamRecord) -> tuple[int, int] | None:
    pair: Any = stream.facts.get("clock")
    return (int(pair[0]), int(pair[1])) if pair and len(pair) == 2 and any(pair) else None


def _measured(stream: StreamRecord) -> tuple[int, int] | None:
    offset = stream.facts.get("clock_offset_ns")
    return None if offset is None else (int(offset), int(stream.facts.get("clock_rtt_ns", 0)))


def _own(stream: StreamRecord) -> int:
    if (measured := _measured(stream)) is not None:
        return measured[0]

    return _wall(stream, 0)


def _wall(stream: StreamRecord, otherwise: int) -> int:
    """Return how far the host's own wall clock is from its monotonic one."""
    pair = _pair(stream)
    return pair[1] - pair[0] if pair is not None else otherwise
