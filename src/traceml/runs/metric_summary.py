"""What a run logged, in a few numbers per name, and how its trackers stand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from traceml.database.reader import Frame, StoreReader
from traceml.database.schema import LOGGED, METRICS, NAMES
from traceml.runs.report_types import MetricSection, TrackerSection
from traceml.track.tracker_state import DeliveryPhase, TrackerState, states_of

__all__ = ["MetricSummary", "trackers"]

# A report is read by people and loaded whole; a run may have a hundred thousand names.
_SHOWN_NAMES = 1000
_FRAMES = 256
_WAITING = {
    DeliveryPhase.WAITING,
    DeliveryPhase.OPEN,
    DeliveryPhase.UNAUTHORIZED,
    DeliveryPhase.BROKEN,
    DeliveryPhase.STOPPED,
}


class MetricSummary:
    """Last, least, greatest value and count per name, followed by cursor; all attempts and ranks."""

    def __init__(self) -> None:
        self._after = 0
        self._names: dict[tuple[int, int], str] = {}
        self._ranks: dict[int, int] = {}
        self._found: dict[str, list[float]] = {}  # name -> [last, its time, least, greatest, count]
        self.hidden = 0
        """Names that are not kept, because there are too many."""
        self._hidden: set[tuple[int, int]] = set()

    def update(self, reader: StoreReader) -> bool:
        """Take in what came since the last call; return whether there was anything."""
        if METRICS.name not in reader.tables:
            return False  # written before values were

        found = False
        while frames := reader.frames_of((NAMES.name, METRICS.name), self._after, _FRAMES):
            found = True
            self._after = frames[-1].id
            for frame in frames:
                self._take(reader, frame)

        return found

    def section(self) -> dict[str, MetricSection]:
        """Return the report's section; a value that is not finite is None there."""
        return {
            name: MetricSection(last=_finite(last), min=_finite(least), max=_finite(greatest), count=int(count))
            for name, (last, _, least, greatest, count) in self._found.items()
        }

    def _take(self, reader: StoreReader, frame: Frame) -> None:
        if frame.table == NAMES.name:
            self._names.update(((frame.stream, row["id"]), row["name"]) for row in frame.maps())
            return

        if frame.stream not in self._ranks:
            self._ranks = {record.id: record.rank for record in reader.streams()}

        rows = np.frombuffer(frame.data, METRICS.dtype)
        order = np.argsort(rows["name_id"], kind="stable")
        ids, starts = np.unique(rows["name_id"][order], return_index=True)
        values, times = rows["value"][order], rows["t_ns"][order]
        least, greatest = np.fmin.reduceat(values, starts), np.fmax.reduceat(values, starts)
        ends = [*starts[1:], len(values)]
        for at, (number, start, end) in enumerate(zip(ids.tolist(), starts.tolist(), ends, strict=True)):
            entry = self._entry(frame.stream, number)
            if entry is None:
                continue

            if times[end - 1] >= entry[1]:
                entry[0], entry[1] = float(values[end - 1]), float(times[end - 1])

            entry[2], entry[3] = float(np.fmin(entry[2], least[at])), float(np.fmax(entry[3], greatest[at]))
            entry[4] += end - start

    def _entry(self, stream: int, number: int) -> list[float] | None:
        name = self._names.get((stream, number), f"(name {number})")
        rank = self._ranks[stream]
        name = name if rank == 0 else f"{name}/rank_{rank}"
        if name not in self._found and len(self._found) >= _SHOWN_NAMES:
            self._hidden.add((stream, number))
            self.hidden = len(self._hidden)
            return None

        return self._found.setdefault(name, [math.nan, -1.0, math.nan, math.nan, 0])


def trackers(run_dir: Path, reader: StoreReader | None = None) -> list[TrackerSection]:
    """Return the report's section on trackers.

    Args:
        run_dir: the run's folder.
        reader: its store, to count the pending rows; without one they are unknown.
    """
    logged = None
    if reader is not None and METRICS.name in reader.tables:
        logged = reader.stored(METRICS.name) + reader.stored(LOGGED.name)

    return [_tracker(state, logged) for state in states_of(run_dir)]


def _tracker(state: TrackerState, logged: int | None) -> TrackerSection:
    return TrackerSection(
        backend=state.backend,
        state=str(state.phase),
        delivered=state.delivered,
        pending=state.pending(logged) if logged is not None else None,
        failed=state.failed,
        filtered=state.filtered,
        fallback=state.fallback,
        derived=state.derived,
        masked=state.masked,
        latency_ms=None if state.latency_ms is None else round(state.latency_ms, 3),
        target=state.target,
        urls=[each["url"] for each in state.experiments.values() if each.get("url")],
        error=state.error if state.phase in _WAITING else "",
        reasons=dict(state.reasons),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
