"""Digest of a run's rows, for the live view and the report: followed by cursor, bounded in memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traceml.database.reader import Frame, StoreReader, StreamRecord
from traceml.database.schema import (
    DEVICE_STEPS,
    GPU,
    HOST,
    INFO,
    LIMITS,
    LINES,
    NAMES,
    PROCESS,
    STEPS,
    TELEMETRY,
    TORCH_MEMORY,
    USER_PHASES,
    Table,
)
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.intake import RowIntake
from traceml.diagnosis.job_facts import RankExit
from traceml.diagnosis.ruleset import diagnose
from traceml.diagnosis.step_split import has_group
from traceml.runs.metrics import MetricSummary
from traceml.runs.samples import Samples

__all__ = ["Digest"]

# Maximum of step rows that are read of a whole run: 64 MB as stored.
MAX_STEP_ROWS = 64 * 2**20 // STEPS.row_bytes


class Digest:
    """Last attempt of a run, as far as its rows have been read.

    Args:
        slots: steps kept per rank; see `diagnosis.slots_for`.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._cursors: dict[str, int] = {}
        self._attempt = -1
        self.metrics = MetricSummary()
        """Metrics of all attempts."""
        self.run: dict[str, Any] = {}
        self.aggregator: dict[str, Any] = {}
        self.streams: dict[int, StreamRecord] = {}
        """The streams of the last attempt, by id."""
        self._ranks: dict[int, StreamRecord] = {}
        self.cut = False
        """Whether the first steps of the run were left out, as there are too many."""
        self._start_over()

    @property
    def attempt(self) -> int:
        """Number of the attempt; -1 before a store was read."""
        return self._attempt

    @property
    def ranks(self) -> dict[int, StreamRecord]:
        """Newest stream of each rank."""
        return self._ranks

    @property
    def state(self) -> str:
        """State of the run, as the aggregator recorded it."""
        return str(self.run.get("state", "running"))

    @property
    def world_size(self) -> int:
        """Number of ranks; if it is not stored, of those seen."""
        return int(self.run.get("world_size", len(self.ranks) or 1))

    @property
    def grouped(self) -> bool:
        """Whether the ranks may wait for each other."""
        return has_group(max(self.world_size, len(self.ranks)))

    @property
    def names(self) -> dict[int, dict[int, str]]:
        """Texts of each rank by id."""
        return self._intake.names

    def start_at(self, reader: StoreReader, rows: int = MAX_STEP_ROWS) -> None:
        """Skip all but the last `rows` step rows, and their user phases."""
        self._read_streams(reader)
        if not self.streams or reader.stored(STEPS.name) <= rows:
            return

        self.cut = True
        each = max(1, rows // len(self.streams))
        self._follow_log(reader, NAMES.name)
        streams = self._newest()
        for table in (each for each in (STEPS, DEVICE_STEPS, USER_PHASES) if each.name in reader.tables):
            newest = reader.last_id()
            read = reader.rows(table.name, streams, last=each)
            self._take(table, {self._rank_of(stream): data for stream, data in _by_stream(read, table)})
            self._cursors[table.name] = newest

    def update(self, reader: StoreReader) -> bool:
        """Take what arrived since the last call; return whether there was anything."""
        self._read_streams(reader)
        # Names come before the rows that use them, so they are read first.
        taken = [self._follow_log(reader, NAMES.name), self._follow_log(reader, INFO.name)]
        taken += [self._follow(reader, table) for table in _FOLLOWED]
        taken.append(self.metrics.update(reader))
        return any(taken)

    def diagnose(self, last: int = 200) -> list[Finding]:
        """Return the findings for the newest steps."""
        self.facts.state, self.facts.world_size = self.state, self.world_size
        return diagnose(*self._intake.snapshot(last))

    def _start_over(self) -> None:
        self._intake = RowIntake(self._slots)
        self.window, self.facts = self._intake.window, self._intake.facts
        self.samples = Samples()
        self.first: dict[int, tuple[int, int]] = {}
        """Step and monotonic end of the first row of each rank."""

    def _read_streams(self, reader: StoreReader) -> None:
        meta = reader.meta()
        self.run, self.aggregator = dict(meta.get("run", {})), dict(meta.get("aggregator", {}))
        records = reader.streams()
        attempt = max((record.attempt for record in records), default=0)
        if attempt != self._attempt:
            self._attempt = attempt
            self._start_over()
            self.streams, self._ranks = {}, {}

        for record in records:
            if record.attempt == attempt and not record.facts.get("helps"):  # a child that logs is no rank
                self._take_stream(record)

    def _take_stream(self, record: StreamRecord) -> None:
        rank = record.rank
        current = self._ranks.get(rank)
        if record.id not in self.streams and current is not None:
            # A second recorder of the same rank: its steps count from 0 again.
            self.window.clear(rank)
            self.first.pop(rank, None)

        self.streams[record.id] = record
        if current is None or record.id >= current.id:
            self._ranks[rank] = record

        self.facts.host(rank, record.host)
        if record.state != "running" and (current is None or record.id >= current.id):
            self._intake.end(RankExit.from_facts(rank, record.state, record.facts.get("exit", {}), record.host))

    def _rank_of(self, stream: int) -> int:
        return self.streams[stream].rank

    def _newest(self) -> Collection[int]:
        return {record.id for record in self.ranks.values()}

    def _new_frames(self, reader: StoreReader, name: str) -> list[Frame]:
        """Return the frames of a table since the last call, of each rank's newest stream."""
        if name not in reader.tables:
            return []  # a store that is older than the table

        frames = list(reader.frames(name, self._cursors.get(name, 0)))
        if frames:
            self._cursors[name] = frames[-1].id

        newest = self._newest()
        return [frame for frame in frames if frame.stream in newest]

    def _follow(self, reader: StoreReader, table: Table) -> bool:
        parts: dict[int, list[bytes]] = {}
        for frame in self._new_frames(reader, table.name):
            parts.setdefault(self._rank_of(frame.stream), []).append(frame.data)

        self._take(table, {rank: b"".join(of_rank) for rank, of_rank in parts.items()})
        return bool(parts)

    def _take(self, table: Table, by_rank: dict[int, bytes]) -> None:
        is_sampled = table in _SAMPLED
        for rank, data in by_rank.items():
            if table is STEPS and rank not in self.first:
                row = np.frombuffer(data, STEPS.dtype, 1)
                self.first[rank] = int(row["step"][0]), int(row["t_end_ns"][0])
            elif is_sampled:
                self.samples.add(table.name, rank, np.frombuffer(data, table.dtype))

            self._intake.add(table.name, rank, data)

        self._intake.flush()

    def _follow_log(self, reader: StoreReader, name: str) -> bool:
        frames = self._new_frames(reader, name)
        for frame in frames:
            rank = self._rank_of(frame.stream)
            for row in frame.maps():
                if name == NAMES.name:
                    self._intake.names.setdefault(rank, {})[row["id"]] = row["name"]
                else:
                    self.facts.info(rank, row)

        return bool(frames)


_SAMPLED = (PROCESS, HOST, GPU, TORCH_MEMORY, TELEMETRY)
_FOLLOWED = (STEPS, DEVICE_STEPS, USER_PHASES, LIMITS, LINES, *_SAMPLED)


def _by_stream(rows: NDArray[np.void], table: Table) -> Iterator[tuple[int, bytes]]:
    """Return each stream's rows as they are stored."""
    if not len(rows):
        return

    rows = rows[np.argsort(rows["stream"], kind="stable")]
    plain = np.empty(len(rows), table.dtype)
    for name in table.names:
        plain[name] = rows[name]

    streams, starts = np.unique(rows["stream"], return_index=True)
    for stream, part in zip(streams.tolist(), np.split(plain, starts[1:]), strict=True):
        yield stream, part.tobytes()
