"""Samples and logged values in a trace, written in blocks of rows: counters of ranks and hosts, and one per name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traceml.database.row_arrays import rows_by
from traceml.database.schema import GPU, HOST, METRICS, PROCESS, TORCH_MEMORY
from traceml.database.store.reader import StreamRecord
from traceml.database.store.run_clocks import RunClocks
from traceml.runs.export.event_blocks import EventBlock, EventBlocks, EventKind, WaitingRows, as_json
from traceml.runs.export.trace_tracks import EVENTS, TraceTracks
from traceml.traces.writer.writer import Writer

__all__ = ["MetricTracks", "SampleTracks"]

_BLOCK = 4096  # rows of a block, at most: 2 MB of text
_GPU = ("utilization_pct", "memory_used_bytes", "temperature_c", "power_w", "sm_clock_mhz")
_TORCH = ("allocated_bytes", "reserved_bytes")
_HOST = (("cpu", "cpu_pct"), ("memory", "memory_used_bytes"))
_READ = {
    PROCESS.name: ["t_ns", "rss_bytes", "cpu_ns"],
    TORCH_MEMORY.name: ["t_ns", "device", *_TORCH],
    HOST.name: ["t_ns", *(field for _, field in _HOST)],
    GPU.name: ["t_ns", "index", *_GPU],
}

_METRIC_BLOCK = 16_384  # events of a block, at most: 2 MB of text
_METRIC_COLUMNS = ("t_ns", "step", "name_id", "value")
_NOT_FINITE = ("nan", "inf", "-inf")


@dataclass(frozen=True, slots=True)
class _Counter:
    """A counter, and its value in each row."""

    name: str
    fields: tuple[str, ...]
    texts: NDArray[Any]  # row x field, as JSON in bytes
    shown: NDArray[np.bool_]  # whether a row has an event of it


class SampleTracks:
    """Writes samples of processes, hosts, GPUs and torch's memory."""

    tables = frozenset(_READ)
    """Names of the tables whose rows it takes."""

    def __init__(self, writer: Writer, tracks: TraceTracks, clocks: RunClocks) -> None:
        self._blocks, self._tracks, self._clocks = EventBlocks(writer), tracks, clocks
        self._rows = WaitingRows(lambda stream, table, rows: self._tables[table](stream, rows), _BLOCK)
        self._cpu: dict[int, tuple[int, int]] = {}  # by stream: time and CPU time of its last sample
        self._speaks: dict[tuple[str, int], int] = {}  # by host and attempt
        self._tables: dict[str, Callable[[StreamRecord, Any], None]] = {
            PROCESS.name: self._process,
            TORCH_MEMORY.name: self._torch_memory,
            HOST.name: lambda stream, rows: self._of_host(stream, rows, _HOST),
            GPU.name: self._gpu,
        }

    def add(self, stream: StreamRecord, table: str, rows: Any) -> None:
        """Take rows of a table; they are written sometime later.

        Raises:
            KeyError: a column is missing.
        """
        if table == HOST.name and self._speaks.setdefault((stream.host, stream.attempt), stream.id) != stream.id:
            return  # another rank of this host reports the same

        self._rows.add(stream, table, rows[_READ[table]])

    def write(self) -> None:
        """Write the waiting rows."""
        self._rows.write()

    def _process(self, stream: StreamRecord, rows: Any) -> None:
        t_ns, cpu_ns = rows["t_ns"], rows["cpu_ns"]
        before = self._cpu.get(stream.id, (t_ns[0], cpu_ns[0]))
        self._cpu[stream.id] = t_ns[-1], cpu_ns[-1]
        passed, spent = np.diff(t_ns, prepend=before[0]), np.diff(cpu_ns, prepend=before[1])
        shown = passed > 0
        shares = spent / np.where(shown, passed, 1)
        percent = [round(100 * share, 2) for share in shares.tolist()]
        self._of_rank(
            stream,
            t_ns,
            [
                _counter("memory", rows, ("rss_bytes",), np.ones(len(rows), bool)),
                _Counter("cpu", ("pct_of_a_core",), as_json(percent)[:, None], shown),
            ],
        )

    def _torch_memory(self, stream: StreamRecord, rows: Any) -> None:
        for device, of_device in rows_by(rows, "device"):
            counter = _counter(f"device {device} memory", of_device, _TORCH, np.ones(len(of_device), bool))
            self._of_rank(stream, of_device["t_ns"], [counter])

    def _gpu(self, stream: StreamRecord, rows: Any) -> None:
        for number, of_gpu in rows_by(rows, "index"):
            self._of_host(stream, of_gpu, [(f"gpu {number}", field) for field in _GPU])

    def _of_rank(self, stream: StreamRecord, t_ns: Any, counters: Sequence[_Counter]) -> None:
        self._write(self._tracks.rank(stream, EVENTS), stream, t_ns, counters)

    def _of_host(self, stream: StreamRecord, rows: Any, fields: Sequence[tuple[str, str]]) -> None:
        """Write a counter for each (name, field), where the value is finite and known: a negative one is not."""
        counters = [
            _counter(name, rows, (field,), np.isfinite(rows[field]) & (rows[field] >= 0)) for name, field in fields
        ]
        if any(counter.shown.any() for counter in counters):
            self._write(self._tracks.host(stream.host), stream, rows["t_ns"], counters)

    def _write(self, track: tuple[int, int], stream: StreamRecord, t_ns: Any, counters: Sequence[_Counter]) -> None:
        """Write the counters row by row: those of one name stay in the order of time."""
        shown = np.stack([counter.shown for counter in counters], axis=1)
        kinds = [EventKind(counter.name, "sample", counter.fields, phase="C") for counter in counters]
        kind = np.broadcast_to(np.arange(len(kinds)), shown.shape)[shown]
        at_ns = np.broadcast_to(self._clocks.from_monotonic(stream.id, t_ns)[:, None], shown.shape)[shown]
        texts = np.stack([counter.texts for counter in counters], axis=1)[shown]
        self._blocks.write(EventBlock(*track, kinds, kind, at_ns, texts))


def _counter(name: str, rows: Any, fields: tuple[str, ...], shown: NDArray[np.bool_]) -> _Counter:
    texts = np.stack([as_json(np.where(shown, rows[field], 0).tolist()) for field in fields], axis=1)
    return _Counter(name, fields, texts, shown)


class MetricTracks:
    """Writes metrics: as counters, and values that are not finite, which viewers cannot draw, as instants.

    Args:
        name_of: returns the name of a metric by stream and number.
    """

    def __init__(
        self, writer: Writer, tracks: TraceTracks, clocks: RunClocks, name_of: Callable[[int, int], str]
    ) -> None:
        self._blocks, self._tracks, self._clocks, self._name_of = EventBlocks(writer), tracks, clocks, name_of
        self._rows = WaitingRows(lambda stream, _, rows: self._write_rows(stream, rows), _METRIC_BLOCK)

    def add(self, stream: StreamRecord, rows: Any) -> None:
        """Take rows of `schema.METRICS`; they are written sometime later.

        Raises:
            KeyError: a column is missing.
        """
        self._rows.add(stream, METRICS.name, rows[list(_METRIC_COLUMNS)])

    def write(self) -> None:
        """Write the waiting rows."""
        self._rows.write()

    def _write_rows(self, stream: StreamRecord, rows: Any) -> None:
        pid, tid = self._tracks.rank(stream, EVENTS)
        form = _forms(rows["value"])
        found, kind = np.unique(rows["name_id"] * (1 + len(_NOT_FINITE)) + form, return_inverse=True)
        kinds = [self._kind(stream.id, *divmod(each, 1 + len(_NOT_FINITE))) for each in found.tolist()]
        numbers = as_json(np.where(form == 0, rows["value"], 0.0).tolist())
        if form.any():
            numbers = np.where(form > 0, rows["step"].astype("S"), numbers)

        at_ns = self._clocks.from_wall_clock(stream.id, rows["t_ns"])
        self._blocks.write(EventBlock(pid, tid, kinds, kind, at_ns, numbers[:, None]))

    def _kind(self, stream: int, number: int, form: int) -> EventKind:
        name = self._name_of(stream, number)
        if not form:
            return EventKind(name, "metric", ("value",), phase="C")

        value = _NOT_FINITE[form - 1]
        return EventKind(f"{name} is {value}", "metric", ("step",), {"metric": name, "value": value}, "i")


def _forms(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return 0 for each finite value, else one plus the place in `_NOT_FINITE`."""
    return np.select([np.isnan(values), values == np.inf, values == -np.inf], [1, 2, 3], 0)
