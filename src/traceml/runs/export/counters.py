"""Samples and events as counters and instants of a trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from traceml.database.schema import GPU, HOST, INFO, LOGGED, PROCESS, TORCH_MEMORY
from traceml.database.store.reader import RunEvent, StreamRecord
from traceml.runs.export.trace_tracks import EVENTS, TraceTracks
from traceml.runs.rows.clocks import RunClocks
from traceml.traces.writer.writer import Writer

__all__ = ["CounterExporter"]

_TEXT = 500  # characters of a text that go into the trace
_GPU = ("utilization_pct", "memory_used_bytes", "temperature_c", "power_w", "sm_clock_mhz")


class CounterExporter:
    """Writes samples and events.

    Args:
        writer: the trace.
        tracks: its tracks.
        clocks: the ranks' clocks.
    """

    def __init__(self, writer: Writer, tracks: TraceTracks, clocks: RunClocks) -> None:
        self._writer, self._tracks, self._clocks = writer, tracks, clocks
        self._names: dict[tuple[int, int], str] = {}
        self._cpu: dict[int, tuple[int, int]] = {}
        self._speaks: dict[str, int] = {}
        self.tables: dict[str, Callable[[StreamRecord, Mapping[str, Any]], None]] = {
            PROCESS.name: self._process,
            TORCH_MEMORY.name: self._torch_memory,
            HOST.name: self._host,
            GPU.name: self._gpu,
        }
        """Function that writes a row of each table."""
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

    def _process(self, stream: StreamRecord, row: Mapping[str, Any]) -> None:
        t_ns, cpu_ns = int(row["t_ns"]), int(row["cpu_ns"])
        self._count(stream, "memory", t_ns, {"rss_bytes": int(row["rss_bytes"])})
        before = self._cpu.get(stream.id)
        self._cpu[stream.id] = t_ns, cpu_ns
        if before is not None and t_ns > before[0]:
            share = (cpu_ns - before[1]) / (t_ns - before[0])
            self._count(stream, "cpu", t_ns, {"pct_of_a_core": round(100 * share, 2)})

    def _torch_memory(self, stream: StreamRecord, row: Mapping[str, Any]) -> None:
        values = {name: int(row[name]) for name in ("allocated_bytes", "reserved_bytes")}
        self._count(stream, f"device {int(row['device'])} memory", int(row["t_ns"]), values)

    def _host(self, stream: StreamRecord, row: Mapping[str, Any]) -> None:
        if self._speaks.setdefault(stream.host, stream.id) != stream.id:
            return  # another rank of this host reports the same

        self._count_of_host(stream, "cpu", row, ("cpu_pct",))
        self._count_of_host(stream, "memory", row, ("memory_used_bytes",))

    def _gpu(self, stream: StreamRecord, row: Mapping[str, Any]) -> None:
        for name in _GPU:
            self._count_of_host(stream, f"gpu {int(row['index'])}", row, (name,))

    def _info(self, stream: StreamRecord, row: Mapping[str, Any]) -> None:
        at_ns = self._clocks.of_stamp(stream.id, int(row.get("t_ns", 0)))
        self._mark(stream, str(row.get("kind", "info")), at_ns, row)

    def _logged(self, stream: StreamRecord, row: Mapping[str, Any]) -> None:
        at_ns = self._clocks.of_date(stream.id, int(row.get("t_ns", 0)))
        self._mark(stream, " ".join(str(row[key]) for key in ("kind", "name") if row.get(key)), at_ns, row)

    def _mark(self, stream: StreamRecord, name: str, at_ns: int, row: Mapping[str, Any]) -> None:
        pid, tid = self._tracks.rank(stream, EVENTS)
        self._writer.write_instant(name, at_ns, cat="event", pid=pid, tid=tid, args=_plain(row))

    def _count(self, stream: StreamRecord, name: str, t_ns: int, values: Mapping[str, float]) -> None:
        pid, tid = self._tracks.rank(stream, EVENTS)
        at_ns = self._clocks.of_stamp(stream.id, t_ns)
        self._writer.write_counter(name, at_ns, values, cat="sample", pid=pid, tid=tid)

    def _count_of_host(self, stream: StreamRecord, name: str, row: Mapping[str, Any], fields: tuple[str, ...]) -> None:
        pid, tid = self._tracks.host(stream.host)
        values = {field: row[field].item() for field in fields if math.isfinite(row[field])}
        if values:
            at_ns = self._clocks.of_stamp(stream.id, int(row["t_ns"]))
            self._writer.write_counter(name, at_ns, values, cat="sample", pid=pid, tid=tid)


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain fields of a row, with texts cut."""
    return {
        key: value[:_TEXT] if isinstance(value, str) else value
        for key, value in row.items()
        if isinstance(value, (str, int, float, bool)) and key != "t_ns"
    }
