"""What the rows of a run come to: followed by cursor, bounded in memory, the same for a live view and the report."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traceml.database.reader import Frame, StoreReader, StreamRecord
from traceml.database.schema import (
    DEVICE_STEPS,
    GPU,
    HOST,
    INFO,
    NAMES,
    PROCESS,
    STEPS,
    TELEMETRY,
    TORCH_MEMORY,
    USER_PHASES,
    Table,
)
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.job_facts import JobFactsBuilder, RankExit
from traceml.diagnosis.phases import has_group
from traceml.diagnosis.ruleset import diagnose
from traceml.diagnosis.window import StepWindow
from traceml.runs.metric_summary import MetricSummary
from traceml.runs.samples import Samples

__all__ = ["Digest"]

# Step rows of a whole run that are looked at: 64 MB as they are stored.
MAX_STEP_ROWS = 64 * 2**20 // STEPS.row_bytes


class Digest:
    """A run's last attempt, as far as its rows have been read.

    Args:
        slots: steps kept per rank; see `diagnosis.slots_for`.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._cursors: dict[str, int] = {}
        self._attempt = -1
        self.metrics = MetricSummary()
        """What was logged, of all attempts."""
        self.run: dict[str, Any] = {}
        self.aggregator: dict[str, Any] = {}
        self.streams: dict[int, StreamRecord] = {}
        """The streams of the last attempt, by id."""
        self._ranks: dict[int, StreamRecord] = {}
        self.cut = False
        """Whether the first steps of the run were left out, because there are too many."""
        self._start_over()

    @property
    def attempt(self) -> int:
        """Which attempt the rows are of; -1 before any store was read."""
        return self._attempt

    @property
    def ranks(self) -> dict[int, StreamRecord]:
        """The newest stream of each rank."""
        return self._ranks

    @property
    def state(self) -> str:
        """The run's state as the aggregator noted it."""
        return str(self.run.get("state", "running"))

    @property
    def world_size(self) -> int:
        """Ranks of the run; those seen where the store does not tell."""
        return int(self.run.get("world_size", len(self.ranks) or 1))

    @property
    def grouped(self) -> bool:
        """Whether the ranks may wait for each other."""
        return has_group(max(self.world_size, len(self.ranks)))

    def start_at(self, reader: StoreReader, rows: int = MAX_STEP_ROWS) -> None:
        """Skip all but the last `rows` step rows (and the user phases that go with them)."""
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
            self._take(table, self._ranks_of(read["stream"]), _without_stream(read, table))
            self._cursors[table.name] = newest

    def update(self, reader: StoreReader) -> bool:
        """Take in what came since the last call; return whether there was anything."""
        self._read_streams(reader)
        # Names come before the rows that use them, so they are read first.
        taken = [self._follow_log(reader, NAMES.name), self._follow_log(reader, INFO.name)]
        taken += [self._follow(reader, table) for table in _FOLLOWED]
        taken.append(self.metrics.update(reader))
        return any(taken)

    def diagnose(self, last: int = 200) -> list[Finding]:
        """Return the findings on the newest steps."""
        facts = self.facts
        facts.state = self.state
        facts.world_size = self.world_size
        return diagnose(self.window.aligned(last=last), facts.build(self.window.latest.tolist()))

    def _start_over(self) -> None:
        self.window = StepWindow(self._slots)
        self.samples = Samples()
        self.facts = JobFactsBuilder()
        self.first: dict[int, tuple[int, int]] = {}
        """Per rank its first row's step and monotonic end."""
        self._names: dict[int, dict[int, str]] = {}

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
            self.facts.exit(RankExit.of(rank, record.state, record.facts.get("exit", {}), record.host))
            self.window.end(rank)

    def _rank_of(self, stream: int) -> int:
        return self.streams[stream].rank

    def _ranks_of(self, streams: NDArray[np.int64]) -> NDArray[np.int64]:
        ids, back = np.unique(streams, return_inverse=True)
        return np.array([self._rank_of(stream) for stream in ids.tolist()], np.int64)[back]

    def _newest(self) -> Collection[int]:
        return {record.id for record in self.ranks.values()}

    def _follow(self, reader: StoreReader, table: Table) -> bool:
        if table.name not in reader.tables:
            return False  # written before there was such a table

        frames = list(reader.frames(table.name, self._cursors.get(table.name, 0)))
        if not frames:
            return False

        self._cursors[table.name] = frames[-1].id
        newest = self._newest()
        frames = [frame for frame in frames if frame.stream in newest]
        streams = np.repeat([frame.stream for frame in frames], [frame.n for frame in frames]).astype(np.int64)
        rows = np.frombuffer(b"".join(frame.data for frame in frames), table.dtype)
        self._take(table, self._ranks_of(streams), rows)
        return True

    def _take(self, table: Table, indices: NDArray[np.int64], rows: NDArray[np.void]) -> None:
        if not len(rows):
            return

        if table is STEPS:
            self._note_first(indices, rows)
            self.window.scatter(indices, rows)
        elif table is DEVICE_STEPS:
            self.window.scatter_device(indices, rows)
        else:
            for rank in np.unique(indices).tolist():
                self._take_of_rank(table, rank, rows[indices == rank])

    def _take_of_rank(self, table: Table, rank: int, rows: NDArray[np.void]) -> None:
        if table is USER_PHASES:
            self.window.scatter_user(rank, rows, self._names.get(rank, {}))
            return

        if table is PROCESS:
            self.facts.process_rows(rank, rows)
        elif table is HOST:
            self.facts.host_rows(rank, rows)

        self.samples.add(table.name, rank, rows)

    def _note_first(self, indices: NDArray[np.int64], rows: NDArray[np.void]) -> None:
        ranks, at = np.unique(indices, return_index=True)
        for rank, first in zip(ranks.tolist(), at.tolist(), strict=True):
            self.first.setdefault(rank, (int(rows["step"][first]), int(rows["t_end_ns"][first])))

    def _follow_log(self, reader: StoreReader, name: str) -> bool:
        frames = list(reader.frames(name, self._cursors.get(name, 0)))
        if not frames:
            return False

        self._cursors[name] = frames[-1].id
        newest = self._newest()
        for rank, row in self._maps(frame for frame in frames if frame.stream in newest):
            if name == NAMES.name:
                self._names.setdefault(rank, {})[row["id"]] = row["name"]
            else:
                self.facts.info(rank, row)

        return True

    def _maps(self, frames: Iterable[Frame]) -> Iterable[tuple[int, dict[str, Any]]]:
        return ((self._rank_of(frame.stream), row) for frame in frames for row in frame.maps())


_FOLLOWED = (STEPS, DEVICE_STEPS, USER_PHASES, PROCESS, HOST, GPU, TORCH_MEMORY, TELEMETRY)


def _without_stream(rows: NDArray[np.void], table: Table) -> NDArray[np.void]:
    plain = np.empty(len(rows), table.dtype)
    for column in table.columns:
        plain[column.name] = rows[column.name]

    return plain
