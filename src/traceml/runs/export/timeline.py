"""Export of a run as a trace: ranks as processes, steps and phases as slices, counters, arrows at sync points.

Bounds of steps and all durations are exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from traceml.database.schema import (
    EVALS,
    FINGERPRINTS,
    INFO,
    LIMITS,
    LINES,
    LOADER_WORKERS,
    LOGGED,
    LOSSES,
    METRICS,
    PACKED,
    PAUSES,
    TELEMETRY,
)
from traceml.database.schema import STEPS as STEP_ROWS
from traceml.database.store.reader import Frame, RunEvent, StreamRecord
from traceml.diagnosis.facts.trainings.group_use import GroupUse
from traceml.errors import StoreError
from traceml.runs.export import trace_tracks as tracks
from traceml.runs.export.frame_pass import FramePass
from traceml.runs.export.sample_tracks import MetricTracks, SampleTracks
from traceml.runs.export.step_tracks import StepTracks
from traceml.runs.rows.group_rows import read_group_use
from traceml.traces.writer.writer import Writer

__all__ = ["TimelineExporter", "origin_of"]

_NOT_SHOWN = (TELEMETRY, LIMITS, LOADER_WORKERS, LINES, LOSSES, FINGERPRINTS, PAUSES)
_TABLES = (*(table.name for table in PACKED if table not in _NOT_SHOWN), LOGGED.name, INFO.name)
_TEXT = 500  # characters of a text that go into the trace


class TimelineExporter:
    """Writes a store to a trace, in one pass, frame by frame."""

    def __init__(self, frames: FramePass, writer: Writer) -> None:
        self._frames, self._writer, self._clocks = frames, writer, frames.clocks
        clocks, self._tracks = frames.clocks, tracks.TraceTracks(writer)
        self._samples = SampleTracks(writer, self._tracks, clocks)
        self._metrics = MetricTracks(writer, self._tracks, clocks, frames.name_of)
        self._steps = StepTracks(writer, self._tracks, clocks, frames.name_of)

    @property
    def steps(self) -> int:
        """Steps that were written."""
        return self._steps.steps

    @property
    def names(self) -> int:
        """Names of processes and tracks that were written, which count as events of the file and not of the run."""
        return self._tracks.names

    def write(self) -> None:
        """Write everything that can be read."""
        self._steps.learn(list(self._frames.streams.values()), self._group_use())
        self._frames.read(_TABLES, self._take)
        self._steps.write()
        self._metrics.write()
        self._samples.write()
        with self._frames.noting():
            for event in self._frames.reader.events():
                self._mark_event(event)

    def _group_use(self) -> GroupUse:
        try:
            return read_group_use(self._frames.reader)
        except (StoreError, KeyError, ValueError) as error:
            self._frames.damage[f"use of the process group: {error}"] = None
            return GroupUse()

    def _take(self, stream: StreamRecord, frame: Frame) -> None:
        dtype = self._frames.reader.dtype(frame.table)
        if dtype is not None:
            self._take_rows(stream, frame.table, np.frombuffer(frame.data, dtype))
            return

        for row in frame.maps():
            self._mark_row(stream, frame.table, row)

    def _take_rows(self, stream: StreamRecord, table: str, rows: Any) -> None:
        if table in StepTracks.tables:
            self._steps.add(stream, table, rows)
        elif table == METRICS.name:
            self._metrics.add(stream, rows)
        elif table == EVALS.name:
            self._evals(stream, rows)
        elif table in self._samples.tables:
            self._samples.add(stream, table, rows)

    def _evals(self, stream: StreamRecord, rows: Any) -> None:
        pid, tid = self._tracks.rank(stream, tracks.EVALS)
        for row in rows:
            end_ns = self._clocks.from_monotonic(stream.id, int(row["t_end_ns"]))
            args = {"before_step": int(row["step"]), "batches": int(row["batches"])}
            start_ns = end_ns - int(row["ns"])
            self._writer.write_span("evaluation", start_ns, end_ns, pid=pid, tid=tid, cat="evaluation", args=args)

    def _mark_event(self, event: RunEvent) -> None:
        """Write an event of the run as an instant."""
        pid, tid = self._tracks.host("aggregator")
        text = event.kind if event.kind != "verdict" else f"verdict {event.data.get('verdict', {}).get('kind', '')}"
        facts = _plain({"event": event.kind, **event.data})
        self._writer.write_instant(text, event.epoch_ns, cat="event", scope="g", pid=pid, tid=tid, args=facts)

    def _mark_row(self, stream: StreamRecord, log: str, row: Mapping[str, Any]) -> None:
        """Write a row of a log as an instant."""
        is_info = log == INFO.name
        date = self._clocks.from_monotonic if is_info else self._clocks.from_wall_clock
        named = " ".join(str(row[key]) for key in ("kind", "name") if row.get(key))
        text, at_ns = str(row.get("kind", "info")) if is_info else named, date(stream.id, int(row.get("t_ns", 0)))
        pid, tid = self._tracks.rank(stream, tracks.EVENTS)
        self._writer.write_instant(text, at_ns, cat="event", pid=pid, tid=tid, args=_plain(row))


def origin_of(frames: FramePass) -> int:
    """Return the start of the store's first second, in epoch nanoseconds."""
    reader, first = frames.reader, list[int]()
    with suppress(StoreError):  # the run's start is enough
        for frame in reader.frames_of((STEP_ROWS.name, "process", "host"), limit=64):
            rows = np.frombuffer(frame.data, reader.dtype(frame.table))
            is_step = frame.table == STEP_ROWS.name
            stamp = int(rows["t_end_ns"][0] - rows["total_ns"][0]) if is_step else int(rows["t_ns"][0])
            first.append(frames.clocks.from_monotonic(frame.stream, stamp))

    started = reader.meta().get("run", {}).get("started")
    if started is not None:
        first.append(int(float(started) * 1e9))

    return min(first, default=0) // 10**9 * 10**9


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain fields of a row, with texts cut."""
    return {
        key: value[:_TEXT] if isinstance(value, str) else value
        for key, value in row.items()
        if isinstance(value, (str, int, float, bool)) and key != "t_ns"
    }
