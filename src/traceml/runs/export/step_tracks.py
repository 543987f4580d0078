"""Steps, their phases, and arrows between ranks, written to a trace in blocks of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traceml.database.row_arrays import join_rows
from traceml.database.schema import DEVICE_STEPS, STEPS, USER_PHASES, StepFlag, unpack_bits
from traceml.database.store.reader import StreamRecord
from traceml.database.store.run_clocks import RunClocks
from traceml.diagnosis.facts.trainings.group_use import GroupUse
from traceml.diagnosis.steps.aligned_steps import Ints
from traceml.runs.export import trace_tracks as tracks
from traceml.runs.export.event_blocks import EventBlock, EventBlocks, EventKind
from traceml.runs.export.flow_arrows import FlowArrows, SyncArrows
from traceml.runs.export.step_parts import DEVICE_PARTS, STEP_PARTS, device_parts, part_bounds, step_parts, waiting_of
from traceml.traces.writer.writer import Writer

__all__ = ["StepTracks"]

_Bounds = tuple[Ints, Ints]  # starts and ends

_MAX_ROWS = 32_768  # rows of all ranks that wait to be written: 4 MB
_CELLS = 16_384  # spans of a block, at most: 2 MB of text
_MAX_HELD = 131_072  # rows of all ranks that may wait for rows of another table, and for each rank at least
_HELD_AT_LEAST = 4096
_NAMED_FLAGS = (StepFlag.SKIPPED, StepFlag.INFERRED, StepFlag.EXPLICIT, StepFlag.PROFILED)
_NAMED = sum(int(flag) for flag in _NAMED_FLAGS)
_DEVICE_FLAG = int(StepFlag.DEVICE)
_PART_NAMES = [name for name, _ in STEP_PARTS]
_USER = _PART_NAMES.index("user")
_BACKWARD, _WAIT, _COMM = (_PART_NAMES.index(name) for name in ("backward", "wait", "comm"))
_STEP_NUMBERS = ("step", "micro_batches")


@dataclass(slots=True)
class _Lane:
    """Rows of a stream that are not written yet, and where its tracks end."""

    stream: StreamRecord
    rows: dict[str, list[Any]] = field(default_factory=dict)
    began: dict[int, int] = field(default_factory=dict)
    until_ns: int = 0
    device_until_ns: int = 0

    def pop(self, table: str) -> Any:
        """Take the rows of a table; None if there are none."""
        parts = self.rows.pop(table, ())
        return join_rows(parts) if parts else None

    def put_back(self, table: str, rows: Any) -> None:
        """Keep rows for later."""
        if len(rows):
            self.rows[table] = [rows]


class StepTracks:
    """Writes steps and phases.

    Args:
        name_of: returns the name of a user phase by stream and number.
    """

    tables = (STEPS.name, USER_PHASES.name, DEVICE_STEPS.name)
    """Tables whose rows it takes."""

    def __init__(
        self,
        writer: Writer,
        trace_tracks: tracks.TraceTracks,
        clocks: RunClocks,
        name_of: Callable[[int, int], str],
    ) -> None:
        self._blocks, self._tracks, self._clocks, self._name_of = EventBlocks(writer), trace_tracks, clocks, name_of
        self._arrows = FlowArrows()
        self._lanes: dict[int, _Lane] = {}
        self._rank_tracks: dict[int, tuple[int, int]] = {}
        self._world: dict[int, int] = {}
        self._group = GroupUse()
        self._waiting = self._flows = 0
        self._most_held = _MAX_HELD
        self.steps = 0
        """Steps that were written."""

    def learn(self, streams: Sequence[StreamRecord], group: GroupUse) -> None:
        """Take the run's streams, and the use of its process group."""
        self._group = group
        ranks: dict[int, set[int]] = {}
        for stream in streams:
            self._lanes[stream.id] = _Lane(stream)
            if stream.is_rank:
                ranks.setdefault(stream.attempt, set()).add(stream.rank)

        self._world = {attempt: len(of_attempt) for attempt, of_attempt in ranks.items()}
        self._most_held = max(_MAX_HELD // max(len(self._lanes), 1), _HELD_AT_LEAST)

    def add(self, stream: StreamRecord, table: str, rows: Any) -> None:
        """Take rows; they are written sometime later.

        Raises:
            KeyError: a column is missing.
        """
        wanted = {STEPS.name: STEPS, USER_PHASES.name: USER_PHASES, DEVICE_STEPS.name: DEVICE_STEPS}[table].dtype
        self._lanes[stream.id].rows.setdefault(table, []).append(rows[list(wanted.names or ())])
        self._waiting += len(rows)
        if self._waiting >= _MAX_ROWS:
            self.write(final=False)

    def write(self, *, final: bool = True) -> None:
        """Write the waiting rows; those that belong to rows of another table to come only if `final`."""
        for lane in self._lanes.values():
            if lane.rows:
                self._write_steps(lane, final)
                self._write_device_steps(lane, final)

        self._waiting = 0
        for arrows in self._arrows.rest() if final else ():
            self._write_arrows(arrows)

    # ---- steps ----

    def _write_steps(self, lane: _Lane, final: bool) -> None:
        steps, phases = lane.pop(STEPS.name), lane.pop(USER_PHASES.name)
        if steps is None:
            self._keep_phases(lane, phases)
            return

        held = ~_is_ready(steps, phases, 0 if final else self._most_held)
        lane.put_back(STEPS.name, steps[held])
        ready = steps[~held]
        if phases is None or not len(ready):
            self._write_rows(lane, ready, None)
            self._keep_phases(lane, phases)
            return

        owner = _owners(ready["step"], phases["step"])
        order = np.argsort(owner, kind="stable")[(owner < 0).sum() :]
        self._write_rows(lane, ready, _UserParts(phases[order], owner[order]))
        self._keep_phases(lane, phases[owner < 0])

    def _keep_phases(self, lane: _Lane, phases: Any) -> None:
        if phases is not None:
            lane.put_back(USER_PHASES.name, phases[-2 * self._most_held :])

    def _write_rows(self, lane: _Lane, rows: Any, user: _UserParts | None) -> None:
        width = len(STEP_PARTS) + 1 + (user.most if user is not None else 0)
        size = max(_CELLS // width, 1)
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            self._write_part(lane, part, user.between(start, start + len(part)) if user is not None else None)

        self.steps += len(rows)

    def _write_part(self, lane: _Lane, rows: Any, user: _UserParts | None) -> None:
        stream = lane.stream
        begin, end = self._bounds(lane, rows)
        bits = unpack_bits(rows["bits"])
        on_device = bits.flags & _DEVICE_FLAG != 0
        lane.began.update(zip(rows["step"][on_device].tolist(), begin[on_device].tolist(), strict=True))

        waiting = waiting_of(rows, grouped=self._is_grouped(stream))
        parts, kinds = step_parts(rows, waiting), [EventKind(name, category) for name, category in STEP_PARTS]
        numbers = np.broadcast_to(np.arange(len(kinds)), parts.shape)
        if user is not None:
            parts, numbers = user.spread(parts, numbers, len(kinds))
            kinds += [EventKind(self._name_of(stream.id, number), "user") for number in user.names]

        flags, which = np.unique(bits.flags & _NAMED, return_inverse=True)
        steps = [EventKind("step", "step", _STEP_NUMBERS, _marks(each)) for each in flags.tolist()]
        kind = np.column_stack([which, numbers + len(steps)])
        numbers_of = np.column_stack([rows["step"], bits.micro_batches])
        bounds = part_bounds(begin, end, parts)
        self._write_spans(stream, tracks.STEPS, [*steps, *kinds], kind, _joined((begin, end), bounds), numbers_of)
        if self._world.get(stream.attempt, 1) > 1:
            self._add_arrivals(stream, rows["step"], waiting >= 0, *bounds)

    def _is_grouped(self, stream: StreamRecord) -> bool:
        return self._group.is_grouped(self._world.get(stream.attempt, 1))

    def _bounds(self, lane: _Lane, rows: Any) -> tuple[Ints, Ints]:
        """Return start and end of steps, without overlap with the step before."""
        end: Ints = self._clocks.from_monotonic(lane.stream.id, rows["t_end_ns"])
        begin = end - rows["total_ns"]
        until = np.maximum.accumulate(np.concatenate([[lane.until_ns], end]))
        lane.until_ns, before = int(until[-1]), until[:-1]
        return np.where((begin < before) & (before <= end), before, begin), end

    def _write_spans(
        self, stream: StreamRecord, lane: int, kinds: list[EventKind], kind: Any, bounds: _Bounds, numbers: Ints
    ) -> None:
        """Write steps, each followed by its parts; empty parts are not drawn."""
        pid, tid = self._tracks.rank(stream, lane)
        starts, ends = bounds
        drawn = ends > starts
        drawn[:, 0] = True
        rows = np.nonzero(drawn)[0]
        self._blocks.write(EventBlock(pid, tid, kinds, kind[drawn], starts[drawn], numbers[rows], ends[drawn]))

    # ---- arrows ----

    def _add_arrivals(self, stream: StreamRecord, steps: Ints, measured: Any, starts: Ints, ends: Ints) -> None:
        """Draw arrows to the waiting inside backward, and to collectives called from Python."""
        self._rank_tracks[stream.rank] = self._tracks.rank(stream, tracks.STEPS)
        before_comm = np.where(measured, starts[:, _COMM - 1], starts[:, _BACKWARD])
        points = (
            (_WAIT, measured, starts[:, _WAIT - 1]),
            (_COMM, ends[:, _COMM] > starts[:, _COMM], before_comm),
        )
        for part, is_point, began in points:
            arrivals = np.column_stack([steps, began, starts[:, part], ends[:, part]])[is_point]
            ranks = self._world[stream.attempt]
            arrows = self._arrows.add_arrivals((stream.attempt, part), stream.rank, arrivals, ranks)
            if arrows is not None:
                self._write_arrows(arrows)

    def _write_arrows(self, arrows: SyncArrows) -> None:
        if not len(arrows.source):
            return

        source, target = (
            np.array([self._rank_tracks[rank] for rank in ranks.tolist()]) for ranks in (arrows.source, arrows.target)
        )
        self._blocks.write_arrows(self._flows + 1, source, target, arrows.from_ns, arrows.to_ns)
        self._flows += len(source)

    # ---- device steps ----

    def _write_device_steps(self, lane: _Lane, final: bool) -> None:
        """Draw device steps, which have no dates, from the start of the CPU's step or the end of the last one."""
        rows = lane.pop(DEVICE_STEPS.name)
        if rows is not None:
            self._write_device_rows(lane, rows, final)

        while len(lane.began) > self._most_held:
            del lane.began[next(iter(lane.began))]

    def _write_device_rows(self, lane: _Lane, rows: Any, final: bool) -> None:
        held = lane.rows.get(STEPS.name)
        early = rows["step"] >= held[0]["step"][0] if held and not final else np.zeros(len(rows), bool)
        lane.put_back(DEVICE_STEPS.name, rows[early][-self._most_held :])
        rows = rows[~early]
        began = np.array([lane.began.pop(step, -1) for step in rows["step"].tolist()], np.int64)
        known = began >= 0  # else its step is lost
        size = _CELLS // (len(DEVICE_PARTS) + 1)
        for start in range(0, int(known.sum()), size):
            chosen = slice(start, start + size)
            self._write_device_part(lane, rows[known][chosen], began[known][chosen])

    def _write_device_part(self, lane: _Lane, rows: Any, began: Ints) -> None:
        total = rows["total_ns"].cumsum()
        before = np.concatenate([[0], total[:-1]])
        starts_at = np.maximum(np.maximum.accumulate(began - before), lane.device_until_ns)
        begin, end = starts_at + before, starts_at + total
        lane.device_until_ns = int(end[-1])
        kinds = [
            EventKind("step", "device", ("step",)),
            *(EventKind(name, category) for name, category in DEVICE_PARTS),
        ]
        waiting = waiting_of(rows, grouped=self._is_grouped(lane.stream))
        kind = np.broadcast_to(np.arange(len(kinds)), (len(rows), len(kinds)))
        bounds = _joined((begin, end), part_bounds(begin, end, device_parts(rows, waiting)))
        self._write_spans(lane.stream, tracks.DEVICE, kinds, kind, bounds, rows["step"][:, None])


@dataclass(frozen=True, slots=True)
class _UserParts:
    """User phases of a block of steps, in the order of the steps."""

    phases: Any
    own: NDArray[np.intp]  # position of the step of each

    @property
    def most(self) -> int:
        """Largest number of phases of a step."""
        return int(np.bincount(self.own).max(initial=0))

    @property
    def names(self) -> list[int]:
        """Numbers of the phases' names."""
        return [int(number) for number in np.unique(self.phases["name_id"])]

    def between(self, start: int, stop: int) -> _UserParts:
        """Return the phases of the steps from position `start` to before `stop`, which become 0 and so on."""
        chosen = slice(*np.searchsorted(self.own, [start, stop]))
        return _UserParts(self.phases[chosen], self.own[chosen] - start)

    def spread(self, parts: Ints, numbers: Any, first: int) -> tuple[Ints, Any]:
        """Return parts and kinds with the phases before the rest of user time; their kinds begin at `first`."""
        column = np.arange(len(self.own)) - np.searchsorted(self.own, self.own)
        ns = np.zeros((len(parts), self.most), np.int64)
        ns[self.own, column] = self.phases["ns"]
        kinds = np.zeros(ns.shape, np.intp)
        kinds[self.own, column] = first + np.searchsorted(self.names, self.phases["name_id"])
        rest = parts.copy()
        rest[:, _USER] -= ns.sum(axis=1)
        return _inserted(rest, ns), _inserted(numbers, kinds)


def _joined(steps: _Bounds, parts: _Bounds) -> _Bounds:
    starts, ends = (np.column_stack(each) for each in zip(steps, parts, strict=True))
    return starts, ends


def _inserted(matrix: Any, columns: Any) -> Any:
    return np.column_stack([matrix[:, :_USER], columns, matrix[:, _USER:]])


def _is_ready(steps: Any, phases: Any, most_held: int) -> NDArray[np.bool_]:
    """Return which steps have all rows of their user phases; at most `most_held` others wait for them."""
    ready: NDArray[np.bool_] = steps["user_ns"] == 0
    if phases is not None and len(phases):
        ready |= steps["step"] < phases["step"][-1]

    held = np.flatnonzero(~ready)
    ready[held[: max(len(held) - most_held, 0)]] = True
    return ready


def _owners(steps: Ints, wanted: Ints) -> NDArray[np.intp]:
    """Return the position in `steps` of each element of `wanted`, -1 for those that are not there."""
    order = np.argsort(steps, kind="stable")
    at = np.minimum(np.searchsorted(steps[order], wanted), len(steps) - 1)
    return np.where(steps[order][at] == wanted, order[at], -1)


def _marks(flags: int) -> dict[str, bool]:
    return {str(flag.name).lower(): True for flag in _NAMED_FLAGS if flags & int(flag)}
