"""Export of a run as a trace: ranks as processes, steps and phases as slices, counters, arrows at sync points.

A row has the duration of each phase, not its time. Phases are drawn one after the other in their usual order. Bounds of
steps and all durations are exact.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from traceml.database.schema import (
    DEVICE_STEPS,
    EVALS,
    FINGERPRINTS,
    LIMITS,
    LINES,
    LOADER_WORKERS,
    LOGS,
    LOSSES,
    NAMES,
    PACKED,
    PAUSES,
    PHASE_LABELS,
    PHASE_ORDER,
    TELEMETRY,
    USER_PHASES,
    StepFlag,
    unpack_bits,
)
from traceml.database.schema import STEPS as STEP_ROWS
from traceml.database.store.reader import Frame, StoreReader, StreamRecord
from traceml.diagnosis.steps.step_split import has_group, own_backward
from traceml.errors import StoreError
from traceml.runs.export import trace_tracks as tracks
from traceml.runs.export.counters import CounterExporter
from traceml.runs.export.export_progress import Progress, no_progress
from traceml.runs.export.flow_arrows import FlowArrows, SyncArrival
from traceml.runs.rows.clocks import RunClocks
from traceml.traces.writer.writer import Writer

__all__ = ["TimelineExporter", "origin_of", "rows_with_waiting", "step_slices"]

_ORDER = (*PHASE_ORDER, *(label for label in PHASE_LABELS if label not in (*PHASE_ORDER, "user")))
_CATEGORIES = {"input_wait": "input", "h2d": "transfer", "comm": "comm", "checkpoint": "checkpoint"}
_NAMED_FLAGS = (StepFlag.SKIPPED, StepFlag.INFERRED, StepFlag.EXPLICIT, StepFlag.PROFILED)
_FLAGS = {int(flag): str(flag.name).lower() for flag in _NAMED_FLAGS}
_DEVICE_FLAG = int(StepFlag.DEVICE)
_HELD_ROWS = 4096  # step rows per stream that may wait for their user phases
_NOT_SHOWN = (TELEMETRY, LIMITS, LOADER_WORKERS, LINES, LOSSES, FINGERPRINTS, PAUSES)
_TABLES = (*(table.name for table in PACKED if table not in _NOT_SHOWN), *(log.name for log in LOGS))


@dataclass(slots=True)
class _Lane:
    """State of a stream between its frames."""

    stream: StreamRecord
    until_ns: int = 0
    device_until_ns: int = 0
    held: deque[Any] = field(default_factory=deque)
    user: dict[int, list[tuple[str, int]]] = field(default_factory=dict)
    began: dict[int, int] = field(default_factory=dict)


class TimelineExporter:
    """Writes a store to a trace, in one pass, frame by frame.

    Args:
        reader: the store.
        writer: the trace.
        clocks: the ranks' clocks.
    """

    def __init__(self, reader: StoreReader, writer: Writer, clocks: RunClocks) -> None:
        self._reader, self._writer, self._clocks = reader, writer, clocks
        self._tracks = tracks.TraceTracks(writer)
        self._counters = CounterExporter(writer, self._tracks, clocks)
        self._arrows = FlowArrows()
        self._lanes: dict[int, _Lane] = {}
        self._world: dict[int, int] = {}
        self._flows = 0
        self.steps = 0
        """Steps that were written."""
        self.damage: list[str] = []
        """Messages about unreadable parts of the store."""

    def write(self, progress: Progress = no_progress) -> None:
        """Write everything but unreadable parts, which `damage` lists.

        Args:
            progress: see `Progress`.

        Raises:
            StoreError: the streams cannot be read.
        """
        self._learn_streams()
        after = 0
        try:
            last = self._reader.last_id()
            while frames := self._reader.frames_of(_TABLES, after):
                after = frames[-1].id
                progress(after, last)
                for frame in frames:
                    self._take(frame)
        except StoreError as error:
            self.damage.append(str(error))

        for lane in self._lanes.values():
            self._release(lane, None)

        self._write_events()

    def _write_events(self) -> None:
        try:
            for event in self._reader.events():
                self._counters.event(event)
        except StoreError as error:
            self.damage.append(str(error))

    def _learn_streams(self) -> None:
        for stream in self._reader.streams():
            if stream.id not in self._lanes:
                self._lanes[stream.id] = _Lane(stream)

        ranks: dict[int, set[int]] = {}
        for lane in self._lanes.values():
            if not lane.stream.facts.get("helps"):
                ranks.setdefault(lane.stream.attempt, set()).add(lane.stream.rank)

        self._world = {attempt: len(of_attempt) for attempt, of_attempt in ranks.items()}

    def _take(self, frame: Frame) -> None:
        lane = self._lanes.get(frame.stream)
        if lane is None:
            return  # newer than this export

        try:
            dtype = self._reader.dtype(frame.table)
            if dtype is None:
                self._take_log(lane, frame)
            else:
                self._take_rows(lane, frame.table, np.frombuffer(frame.data, dtype))
        except (StoreError, KeyError, ValueError) as error:
            self.damage.append(f"frame {frame.id} of {frame.table}: {error}")

    def _take_log(self, lane: _Lane, frame: Frame) -> None:
        for row in frame.maps():
            if frame.table == NAMES.name:
                self._counters.name(lane.stream.id, int(row["id"]), str(row["name"]))
            elif frame.table in self._counters.logs:
                self._counters.logs[frame.table](lane.stream, row)

    def _take_rows(self, lane: _Lane, table: str, rows: Any) -> None:
        if table == STEP_ROWS.name:
            for row in self._with_waiting(lane, rows):
                self._step(lane, row)
        elif table == USER_PHASES.name:
            self._user_phases(lane, rows)
        elif table == EVALS.name:
            self._evals(lane, rows)
        elif table == DEVICE_STEPS.name:
            self._device_steps(lane, rows)
        elif table in self._counters.tables:
            for row in rows:
                self._counters.tables[table](lane.stream, row)

    def _with_waiting(self, lane: _Lane, rows: Any) -> list[dict[str, int]]:
        return rows_with_waiting(rows, grouped=has_group(self._world.get(lane.stream.attempt, 1)))

    def _step(self, lane: _Lane, row: dict[str, int]) -> None:
        """Write a step, or hold it until its user phases are known."""
        if not row["user_ns"]:
            self._write_step(lane, row, ())
            return

        lane.held.append(row)
        if len(lane.held) > _HELD_ROWS:
            self._write_held(lane)

    def _user_phases(self, lane: _Lane, rows: Any) -> None:
        for step, number, ns in zip(*(rows[name].tolist() for name in ("step", "name_id", "ns")), strict=True):
            lane.user.setdefault(step, []).append((self._counters.name_of(lane.stream.id, number), ns))

        while len(lane.user) > 2 * _HELD_ROWS:
            del lane.user[next(iter(lane.user))]  # their steps are lost

        self._release(lane, int(rows["step"][-1]))

    def _release(self, lane: _Lane, before: int | None) -> None:
        while lane.held and (before is None or lane.held[0]["step"] < before):
            self._write_held(lane)

    def _write_held(self, lane: _Lane) -> None:
        row = lane.held.popleft()
        self._write_step(lane, row, lane.user.pop(row["step"], ()))

    def _write_step(self, lane: _Lane, row: Mapping[str, int], user: Any) -> None:
        stream = lane.stream
        pid, tid = self._tracks.rank(stream, tracks.STEPS)
        end_ns = self._clocks.of_stamp(stream.id, row["t_end_ns"])
        begin_ns = end_ns - row["total_ns"]
        if begin_ns < lane.until_ns <= end_ns:
            begin_ns = lane.until_ns  # no overlap with the last step

        lane.until_ns = max(end_ns, lane.until_ns)
        bits = unpack_bits(row["bits"])
        if bits.flags & _DEVICE_FLAG:
            lane.began[row["step"]] = begin_ns
            if len(lane.began) > _HELD_ROWS:
                del lane.began[next(iter(lane.began))]

        args: dict[str, Any] = {"step": row["step"], "micro_batches": bits.micro_batches}
        args |= {name: True for flag, name in _FLAGS.items() if bits.flags & flag}
        self._writer.write_span("step", begin_ns, end_ns, pid=pid, tid=tid, cat="step", args=args)
        self._write_parts(lane, row, user, begin_ns, end_ns)
        self.steps += 1

    def _write_parts(self, lane: _Lane, row: Mapping[str, int], user: Any, begin_ns: int, end_ns: int) -> None:
        pid, tid = self._tracks.rank(lane.stream, tracks.STEPS)
        at_ns = began_ns = begin_ns
        for name, category, ns in step_slices(row, user):
            until_ns = min(at_ns + ns, end_ns)
            if until_ns > at_ns:
                self._writer.write_span(name, at_ns, until_ns, pid=pid, tid=tid, cat=category)

            if name == "wait" or (name == "comm" and until_ns > at_ns):
                self._add_arrival(lane, (row["step"], name), SyncArrival(pid, tid, began_ns, at_ns, until_ns))

            began_ns, at_ns = at_ns, until_ns

    def _add_arrival(self, lane: _Lane, point: tuple[int, str], arrival: SyncArrival) -> None:
        stream = lane.stream
        ranks = self._world.get(stream.attempt, 1)
        if ranks < 2:
            return

        for arrow in self._arrows.add_arrival((stream.attempt, *point), stream.rank, arrival, ranks):
            self._flows += 1
            source, target = arrow.source, arrow.target
            write = self._writer.write_flow
            write("s", "released", self._flows, arrow.from_ns, pid=source.pid, tid=source.tid, cat="comm")
            write("f", "released", self._flows, arrow.to_ns, pid=target.pid, tid=target.tid, cat="comm")

    def _evals(self, lane: _Lane, rows: Any) -> None:
        pid, tid = self._tracks.rank(lane.stream, tracks.EVALS)
        for row in rows:
            end_ns = self._clocks.of_stamp(lane.stream.id, int(row["t_end_ns"]))
            args = {"before_step": int(row["step"]), "batches": int(row["batches"])}
            start_ns = end_ns - int(row["ns"])
            self._writer.write_span("evaluation", start_ns, end_ns, pid=pid, tid=tid, cat="evaluation", args=args)

    def _device_steps(self, lane: _Lane, rows: Any) -> None:
        """Draw device steps, which have no dates, from the start of the CPU's step or the end of the last one."""
        pid, tid = self._tracks.rank(lane.stream, tracks.DEVICE)
        for row in self._with_waiting(lane, rows):
            began_ns = lane.began.pop(row["step"], None)
            if began_ns is None:
                continue  # its step is lost

            at_ns = max(began_ns, lane.device_until_ns)
            end_ns = lane.device_until_ns = at_ns + row["total_ns"]
            args = {"step": row["step"]}
            self._writer.write_span("step", at_ns, end_ns, pid=pid, tid=tid, cat="device", args=args)
            for name, ns in _device_slices(row):
                until_ns = min(at_ns + ns, end_ns)
                if until_ns > at_ns:
                    category = "comm" if name in ("wait", "comm") else "device"
                    self._writer.write_span(name, at_ns, until_ns, pid=pid, tid=tid, cat=category)

                at_ns = max(until_ns, at_ns)


def rows_with_waiting(rows: Any, *, grouped: bool) -> list[dict[str, int]]:
    """Return rows as maps, with the waiting inside backward as `wait_ns`: -1 where it was not measured.

    Args:
        rows: rows of steps or of device steps.
        grouped: whether the ranks wait for each other.
    """
    backward, own = rows["backward_ns"], np.where(rows["backward_own_ns"] < 0, np.nan, rows["backward_own_ns"])
    waits = np.full(len(rows), -1)
    if grouped:
        waits = np.where(np.isnan(own), -1, backward - own_backward(backward, own)).astype(np.int64)

    named = [dict(zip(rows.dtype.names, values, strict=True)) for values in rows.tolist()]
    for row, wait_ns in zip(named, waits.tolist(), strict=True):
        row["wait_ns"] = wait_ns

    return named


def step_slices(row: Mapping[str, int], user: Any) -> list[tuple[str, str, int]]:
    """Return (name, category, ns) of the parts of a step in drawing order."""
    slices, wait_ns = [], row["wait_ns"]
    for name in _ORDER:
        ns, category = row[f"{name}_ns"], _CATEGORIES.get(name, "compute")
        if name == "backward" and wait_ns >= 0:
            slices += [(name, category, ns - wait_ns), ("wait", "comm", wait_ns)]
        else:
            slices.append((name, category, ns))

    slices += [(name, "user", ns) for name, ns in user]
    slices.append(("user", "user", row["user_ns"] - sum(ns for _, ns in user)))
    return [*slices, ("other", "other", row["total_ns"] - sum(ns for *_, ns in slices))]


def _device_slices(row: Mapping[str, int]) -> list[tuple[str, int]]:
    wait_ns = max(row["wait_ns"], 0)
    own = ("backward", row["backward_ns"] - wait_ns)
    before, after = (("h2d", "forward"), ("comm", "optimizer"))
    return [*((n, row[f"{n}_ns"]) for n in before), own, ("wait", wait_ns), *((n, row[f"{n}_ns"]) for n in after)]


def origin_of(reader: StoreReader, clocks: RunClocks) -> int:
    """Return the start of the store's first second, in epoch nanoseconds."""
    first: list[int] = []
    for frame in reader.frames_of((STEP_ROWS.name, "process", "host"), limit=64):
        rows = np.frombuffer(frame.data, reader.dtype(frame.table))
        is_step = frame.table == STEP_ROWS.name
        stamp = int(rows["t_end_ns"][0] - rows["total_ns"][0]) if is_step else int(rows["t_ns"][0])
        first.append(clocks.of_stamp(frame.stream, stamp))

    started = reader.meta().get("run", {}).get("started")
    if started is not None:
        first.append(int(float(started) * 1e9))

    return min(first, default=0) // 10**9 * 10**9
