"""Summary of a run's rows, for the live view and the report: followed by cursor, bounded in memory.

Of a long run, the report reads exact sums of all steps and the rows of some of them, in blocks spread over the run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traceml.database.schema import (
    DEVICE_STEPS,
    GPU,
    HOST,
    INFO,
    NAMES,
    PACKED,
    PROCESS,
    STEPS,
    TELEMETRY,
    TORCH_MEMORY,
    USER_PHASES,
    Table,
)
from traceml.database.snapshots.rank_snapshot import ABORT, SNAPSHOT, RankSnapshot
from traceml.database.states import RunStatus
from traceml.database.store.reader import Frame, RunEvent, StoreReader, StreamRecord
from traceml.database.store.records import names_of
from traceml.database.store.store_file import last_written_s
from traceml.database.store.summaries import StepSums
from traceml.diagnosis.facts.core_waits import COMPETING_PROCESSES
from traceml.diagnosis.facts.ends import ATTEMPT, END, RankExit, ending_signal_of
from traceml.diagnosis.facts.sampled_lines import SampledLine
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.intake import RowIntake
from traceml.diagnosis.merged_hosts.host_sums import HOST_SUMS, HostSums
from traceml.diagnosis.ruleset import diagnose
from traceml.diagnosis.steps.aligned_steps import AlignedSteps
from traceml.diagnosis.steps.kept_steps import MAX_CELLS, slots_for
from traceml.diagnosis.steps.representatives import HOST_CHOICE, HostChoice
from traceml.runs.rows.metrics import MetricSummary
from traceml.runs.rows.samples import Samples, SampleTotals, rows_for
from traceml.runs.rows.step_ranges import step_ranges
from traceml.runs.rows.step_totals import SetUpSums, StepTotals, step_totals

__all__ = ["MAX_STEP_ROWS", "RunSummaryReader", "read_run_summary"]

MAX_STEP_ROWS = MAX_CELLS
"""Maximum of step rows that are read of a whole run."""
# Of sampled tables with more frames than this, as many are read of each.
_SAMPLE_FRAMES = 2048
# Rows are taken in batches of this size, whatever the number of frames.
_BATCH_BYTES = 4 << 20


class RunSummaryReader:
    """Last attempt of a run, as far as its rows have been read.

    Args:
        slots: steps kept per rank of a run that is followed; see `diagnosis.slots_for`.
    """

    def __init__(self, slots: int = 1) -> None:
        self._slots = slots
        self._cursors: dict[str, int] = {}
        self.attempt = -1
        """Number of the attempt; -1 before a store was read."""
        self.metrics = MetricSummary()
        """Metrics of all attempts."""
        self.run: dict[str, Any] = {}
        self.aggregator: dict[str, Any] = {}
        self.written_s: float | None = None
        """Time of the last write to the store, epoch seconds."""
        self.streams: dict[int, StreamRecord] = {}
        """The streams of the last attempt, by id."""
        self.ranks: dict[int, StreamRecord] = {}
        """Newest stream of each rank."""
        self._aligned: AlignedSteps | None = None
        self._start_over()

    @property
    def state(self) -> str:
        """State of the run, as the aggregator recorded it."""
        return str(self.run.get("state", RunStatus.RUNNING.value))

    @property
    def world_size(self) -> int:
        """Number of ranks; if it is not stored, of those seen."""
        return int(self.run.get("world_size", len(self.ranks) or 1))

    @property
    def grouped(self) -> bool:
        """Whether the ranks may wait for each other."""
        return self.facts_builder.batches.group.is_grouped(max(self.world_size, len(self.ranks)))

    @property
    def names(self) -> dict[int, dict[int, str]]:
        """Texts of each rank by id."""
        return self._intake.names

    def read(self, reader: StoreReader, rows: int = MAX_STEP_ROWS) -> None:
        """Take a whole run; if it has more than `rows` step rows, its exact sums and `rows` rows spread over it."""
        self._read_streams(reader)
        if self.streams and (reader.stored(STEPS.name) > rows or reader.thinned(STEPS.name) > 0):
            self._read_sample(reader, rows)
        else:
            self._intake.resize(_slots(reader.stored(STEPS.name), len(self.ranks)), max(self.ranks, default=0) + 1)
            self._follow_intake()

        self._start_samples(reader)
        self.update(reader)

    def start_at_end(self, reader: StoreReader, rows: int) -> None:
        """Skip all but the last `rows` step rows, and their user phases."""
        self._read_streams(reader)
        self._start_samples(reader)
        if not self.streams or reader.stored(STEPS.name) <= rows:
            return

        each = max(1, rows // len(self.streams))
        self._follow_log(reader, NAMES.name)
        for table in _of_steps(reader):
            newest = reader.last_id()
            read = reader.rows(table.name, self._newest(), last=each)
            self._take(table, {self._rank_of(stream): data for stream, data in _by_stream(read, table)})
            self._cursors[table.name] = newest

    @property
    def cut(self) -> bool:
        """Whether a sample is kept of the run's steps: then the exact sums of all are in `totals`."""
        return self.totals is not None

    def sums_of_hosts(self) -> StepTotals | None:
        """Return the sums of the steps of all ranks, without set-up, by the lowest rank of each host.

        None unless hosts are merged and all of them have sent their sums, which they do when their ranks end.
        """
        hosts = [each for each in self._host_sums.values() if each.steps.count]
        if not hosts or {rank for each in hosts for rank in each.ranks} != set(range(self.world_size)):
            return None

        names = {each.ranks[0]: each.names for each in hosts}
        whole = step_totals({each.ranks[0]: each.steps for each in hosts}, names)
        set_up = {each.ranks[0]: each.set_up for each in hosts if each.set_up.count}
        return whole.without(step_totals(set_up, names)) if set_up else whole

    def update(self, reader: StoreReader) -> bool:
        """Take what arrived since the last call; return whether there was anything."""
        self._read_streams(reader)
        # Names come before the rows that use them, so they are read first.
        taken = [self._follow_log(reader, NAMES.name), self._follow_log(reader, INFO.name)]
        self._follow_snapshots(reader)
        taken += [self._follow(reader, table) for table in self._followed]
        taken.append(self.metrics.update(reader))
        return any(taken)

    def all_aligned(self) -> AlignedSteps:
        """Return all steps that were kept, without those of the set-up."""
        if self._aligned is None:
            self._aligned = self.kept.aligned(last=self.kept.slots)

        return self._aligned

    def diagnose(self, window: AlignedSteps | None = None, state: str | None = None) -> list[Finding]:
        """Return the findings for some steps of this run.

        Args:
            window: by default the newest steps.
            state: of the run, where more is known than its aggregator recorded.
        """
        self.facts_builder.state, self.facts_builder.world_size = state or self.state, self.world_size
        window = self.kept.aligned() if window is None else window
        latest, ends_ns = self.kept.reached(window.missing_ranks), self.kept.end_ns
        return diagnose(window, self.facts_builder.build(latest.tolist(), ends_ns.tolist()))

    def sampled_lines(self) -> tuple[SampledLine, ...]:
        """Return the sampled lines of all ranks, and of their loader workers, as those of a phase `workers`.

        What ranks did after the last step is apart from its phases.
        """
        lines, ends_ns = self.facts_builder.lines, self.kept.end_ns.tolist()
        of_ranks = lines.lines(ends_ns, has_ended=self.state != RunStatus.RUNNING)
        of_workers = lines.of_workers().values()
        return (*of_ranks, *(each for seen in of_workers for each in seen if not each.is_idle))

    def _start_over(self) -> None:
        self._intake = RowIntake(self._slots)
        self._followed = _tables_of(self._intake)
        self.kept, self.facts_builder = self._intake.kept, self._intake.facts_builder
        self._aligned = None
        self.samples = Samples()
        self.sample_totals = SampleTotals()
        self.totals: StepTotals | None = None
        """Exact sums of all steps, where only some are kept."""
        self.step_sums: dict[int, StepSums] = {}
        """The same by stream, as read for `totals`."""
        self.set_up: StepTotals | None = None
        """The sums of the first steps, which include set-up; like `totals`."""
        self._host_sums: dict[str, HostSums] = {}
        self._event_cursors: dict[str, int] = {}
        self.first: dict[int, tuple[int, int]] = {}
        """Step and monotonic end of the first row of each rank."""

    def _read_streams(self, reader: StoreReader) -> None:
        meta = reader.meta()
        self.run, self.aggregator = dict(meta.get("run", {})), dict(meta.get("aggregator", {}))
        self.written_s = last_written_s(reader.path)
        records = reader.streams()
        attempt = max((record.attempt for record in records), default=0)
        if attempt != self.attempt:
            self.attempt = attempt
            self._start_over()
            self.streams, self.ranks = {}, {}

        for record in records:
            if record.attempt == attempt and record.is_rank:  # a child that logs is not a rank
                self._take_stream(record)

        if isinstance(timeout_s := self.run.get("hang_timeout_s"), float):
            self.facts_builder.progress.timeout_s = timeout_s

        self.samples.max_rows = rows_for(len(self.ranks))

    def _take_stream(self, record: StreamRecord) -> None:
        rank = record.rank
        current = self.ranks.get(rank)
        if record.id not in self.streams and current is not None:
            # A second recorder of the same rank: its steps count from 0 again.
            self.kept.clear(rank)
            self.first.pop(rank, None)

        self.streams[record.id] = record
        self.facts_builder.resumes_at = max(self.facts_builder.resumes_at, int(record.facts.get("resumes_at", 0)))
        if current is None or record.id >= current.id:
            self.ranks[rank] = record

        self.facts_builder.host(rank, record.host)
        if record.state != "running" and (current is None or record.id >= current.id):
            self._intake.end(RankExit.of_stream(record))

    def _rank_of(self, stream: int) -> int:
        return self.streams[stream].rank

    def _newest(self) -> Collection[int]:
        return {record.id for record in self.ranks.values()}

    def _read_sample(self, reader: StoreReader, rows: int) -> None:
        """Take the sums of all steps, and the rows of blocks of steps spread over the run."""
        self._follow_log(reader, NAMES.name)
        newest = reader.last_id()
        self.step_sums = found = reader.step_sums()
        sums = {self._rank_of(stream): found[stream] for stream in self._newest() if stream in found}
        if not any(each.count for each in sums.values()):
            return

        self.totals = totals = step_totals(sums, self._intake.names)
        steps = [each.steps.bins for each in sums.values() if each.count]
        first, last = min(int(bins["first_step"].min()) for bins in steps), int(totals.latest.max())
        tables = _of_steps(reader)
        ranges = step_ranges(reader, tables, len(totals.ranks), first, last, rows)
        chosen = np.concatenate([np.arange(begin, end + 1) for begin, end in ranges])
        sampled = self._intake.sample(chosen, int(totals.ranks.max()) + 1)
        self._follow_intake()
        set_up = SetUpSums(first)
        for table in tables:
            for by_rank in self._batches(reader, reader.step_frames(table.name, ranges, self._newest())):
                self._take(table, by_rank)
                set_up.take(table, by_rank)

            self._cursors[table.name] = newest

        self.set_up = set_up.totals(self._intake.names)

        ends = {rank: int(each.steps.bins["end_ns"].max()) for rank, each in sums.items() if each.count}
        sampled.advance(totals.ranks, totals.latest, np.array([ends[rank] for rank in totals.ranks.tolist()]))

    def _follow_intake(self) -> None:
        """Use the intake's kept steps, which were replaced before there were rows."""
        self.kept = self._intake.kept
        for rank, record in self.ranks.items():
            if record.state != "running":
                self.kept.end(rank)

    def _start_samples(self, reader: StoreReader) -> None:
        """Take sampled tables of a long run: exact totals, and rows of frames that are spread over it."""
        newest, streams = reader.last_id(), self._newest()
        for table in self._followed:
            if table in _OF_STEPS or table.name not in reader.tables or not self._is_large(reader, table):
                continue

            if table.name in SampleTotals.tables:
                for stream, sums in reader.table_sums(table.name).items():
                    if stream in streams:
                        self.sample_totals.start(table, self._rank_of(stream), sums)

            each = max(self.samples.max_rows * len(streams) // _SAMPLE_FRAMES, 8)
            for frame in reader.spread_frames(table.name, streams, _SAMPLE_FRAMES, each):
                rank = self._rank_of(frame.stream)
                rows = reader.current_rows(frame)
                self._intake.add(table.name, rank, rows)
                if table in _SAMPLED:
                    self.samples.add(table.name, rank, np.frombuffer(rows, table.dtype))

            self._cursors[table.name] = newest

    def _is_large(self, reader: StoreReader, table: Table) -> bool:
        rows = 2 * self.samples.max_rows * len(self.ranks)
        return reader.frame_count(table.name) > _SAMPLE_FRAMES or reader.stored(table.name) > rows

    def _frames(self, reader: StoreReader, name: str) -> Iterator[Frame]:
        """Yield the frames of a table since the last call, of each rank's newest stream."""
        if name not in reader.tables:
            return  # a store that is older than the table

        newest = self._newest()
        for frame in reader.frames(name, self._cursors.get(name, 0)):
            self._cursors[name] = frame.id
            if frame.stream in newest:
                yield frame

    def _batches(self, reader: StoreReader, frames: Iterable[Frame]) -> Iterator[dict[int, bytes]]:
        """Yield the rows of frames by rank, a bounded number of bytes at a time."""
        parts: dict[int, list[bytes]] = {}
        size = 0
        for frame in frames:
            rows = reader.current_rows(frame)
            parts.setdefault(self._rank_of(frame.stream), []).append(rows)
            size += len(rows)
            if size > _BATCH_BYTES:
                yield {rank: b"".join(of_rank) for rank, of_rank in parts.items()}
                parts, size = {}, 0

        if parts:
            yield {rank: b"".join(of_rank) for rank, of_rank in parts.items()}

    def _follow(self, reader: StoreReader, table: Table) -> bool:
        found = False
        for by_rank in self._batches(reader, self._frames(reader, table.name)):
            self._take(table, by_rank)
            found = True

        return found

    def _take(self, table: Table, by_rank: dict[int, bytes]) -> None:
        is_sampled = table in _SAMPLED
        for rank, data in by_rank.items():
            if table is STEPS and rank not in self.first:
                row = np.frombuffer(data, STEPS.dtype, 1)
                self.first[rank] = int(row["step"][0]), int(row["t_end_ns"][0])
            elif is_sampled:
                self.samples.add(table.name, rank, np.frombuffer(data, table.dtype))

            self._intake.add(table.name, rank, data)

        self._aligned = None
        if is_sampled:
            self._add_totals(table, by_rank)

        self._intake.flush()

    def _add_totals(self, table: Table, by_rank: dict[int, bytes]) -> None:
        rows = np.frombuffer(b"".join(by_rank.values()), table.dtype)
        counts = [len(data) // table.row_bytes for data in by_rank.values()]
        self.sample_totals.take(table, np.repeat(list(by_rank), counts), rows)

    def _follow_snapshots(self, reader: StoreReader) -> None:
        """Take the snapshots that others have made of ranks which could not answer."""
        for event in self._events(reader, SNAPSHOT):
            # A rank that had not connected has no stream.
            if event.data.get("stream") in self.streams or event.data.get("attempt") == self.attempt:
                self.facts_builder.progress.take_snapshot(RankSnapshot.from_row(event.data))

        began = reader.last_event(ATTEMPT)
        for event in self._events(reader, COMPETING_PROCESSES, began):
            self.facts_builder.competing_processes.add(event.data)

        for event in self._events(reader, END, began):
            self.facts_builder.ended_by = ending_signal_of(event.data.get("ended_by"))

        for event in self._events(reader, HOST_CHOICE):
            if event.data.get("attempt") == self.attempt:
                self.kept.representatives.take(HostChoice.from_row(event.data.get("choice")))

        for event in self._events(reader, HOST_SUMS):
            if event.data.get("attempt") == self.attempt:
                self._host_sums[str(event.data.get("host"))] = HostSums.from_row(event.data.get("sums"))

        aborted = reader.last_event(ABORT)
        if aborted is not None and aborted.data.get("attempt") == self.attempt:
            self.facts_builder.progress.was_aborted = True

    def _events(self, reader: StoreReader, kind: str, began: RunEvent | None = None) -> Iterator[RunEvent]:
        """Yield the events of a kind since the last call.

        Args:
            began: the event before which they are of earlier attempts.
        """
        first = 0 if began is None else began.id
        for event in reader.events(max(self._event_cursors.get(kind, 0), first), kind):
            self._event_cursors[kind] = event.id
            yield event

    def _follow_log(self, reader: StoreReader, name: str) -> bool:
        found = False
        for frame in self._frames(reader, name):
            found, rank = True, self._rank_of(frame.stream)
            if name == NAMES.name:
                self._intake.names.setdefault(rank, {}).update(names_of(frame.maps()))
                continue

            for row in frame.maps():
                self.facts_builder.info(rank, row)

        return found


_SAMPLED = (PROCESS, HOST, GPU, TORCH_MEMORY, TELEMETRY)
_OF_STEPS = (STEPS, DEVICE_STEPS, USER_PHASES)


def read_run_summary(reader: StoreReader, max_step_rows: int = MAX_STEP_ROWS) -> RunSummaryReader:
    """Return the summary of a whole run; of a long one with `max_step_rows` step rows that are spread over it."""
    summary = RunSummaryReader()
    summary.read(reader, max_step_rows)
    return summary


def _slots(rows: int, ranks: int) -> int:
    """Return the number of steps per rank that holds a whole run."""
    # Ranks may be uneven: the longest one may have most of the rows.
    slots, wanted = 128, 2 * (rows // max(ranks, 1) + 1)
    while slots < wanted and slots * ranks < 2 * rows:
        slots *= 2

    return max(slots, slots_for(ranks))


def _tables_of(intake: RowIntake) -> tuple[Table, ...]:
    """Return the tables that are read, those of steps first: what the diagnosis needs, and the recorder's counters."""
    wanted = {*intake.tables, TELEMETRY.name} - {table.name for table in _OF_STEPS}
    return *_OF_STEPS, *(table for table in PACKED if table.name in wanted)


def _of_steps(reader: StoreReader) -> list[Table]:
    return [table for table in _OF_STEPS if table.name in reader.tables]


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
