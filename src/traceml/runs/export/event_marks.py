"""Events and logged values that are not numbers, as instants of a trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from traceml.database.schema import INFO, LOGGED
from traceml.database.store.reader import RunEvent, StreamRecord
from traceml.runs.export.trace_tracks import EVENTS, TraceTracks
from traceml.runs.rows.aligned_clocks import RunClocks
from traceml.traces.writer.writer import Writer

__all__ = ["EventMarks"]

_TEXT = 500  # characters of a text that go into the trace


class EventMarks:
    """Writes events, and keeps the names of streams."""

    def __init__(self, writer: Writer, tracks: TraceTracks, clocks: RunClocks) -> None:
        self._writer, self._tracks, self._clocks = writer, tracks, clocks
        self._names: dict[tuple[int, int], str] = {}
        self.logs: dict[str, Callable[[StreamRecord, Mapping[str, Any]], None]] = {
            INFO.name: self._info,
            LOGGED.name: self._logged,
        }

    def name(self, stream: int, number: int, name: str) -> None:
        """Record a name by its number."""
        self._names[stream, number] = name

    def name_of(self, stream: int, number: int) -> str:
        """Return a name by its number."""
        return self._names.get((stream, number), f"(name {number})")

    def event(self, event: RunEvent) -> None:
        """Write an event of the run."""
        pid, tid = self._tracks.host("aggregator")
        text = event.kind if event.kind != "verdict" else f"verdict {event.data.get('verdict', {}).get('kind', '')}"
        facts = _plain({"event": event.kind, **event.data})
        self._writer.write_instant(text, event.epoch_ns, cat="event", scope="g", pid=pid, tid=tid, args=facts)

    def _info(self, stream: StreamRecord, row: Mapping[str, Any]) -> None:
        at_ns = self._clocks.of_stamp(stream.id, int(row.get("t_ns", 0)))
        self._mark(stream, str(row.get("kind", "info")), at_ns, row)

    def _logged(self, stream: StreamRecord, row: Mapping[str, Any]) -> None:
        at_ns = self._clocks.of_date(stream.id, int(row.get("t_ns", 0)))
        self._mark(stream, " ".join(str(row[key]) for key in ("kind", "name") if row.get(key)), at_ns, row)

    def _mark(self, stream: StreamRecord, name: str, at_ns: int, row: Mapping[str, Any]) -> None:
        pid, tid = self._tracks.rank(stream, EVENTS)
        self._writer.write_instant(name, at_ns, cat="event", pid=pid, tid=tid, args=_plain(row))


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain fields of a row, with texts cut."""
    return {
        key: value[:_TEXT] if isinstance(value, str) else value
        for key, value in row.items()
        if isinstance(value, (str, int, float, bool)) and key != "t_ns"
    }
