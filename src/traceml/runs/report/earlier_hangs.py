"""Time for which attempts before the last one had hung when they were ended."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from traceml.database.schema import INFO, PROCESS, STEPS
from traceml.database.snapshots.rank_snapshot import SNAPSHOT, RankSnapshot
from traceml.database.states import RunStatus
from traceml.database.store.reader import StoreReader, StreamRecord
from traceml.diagnosis.facts.job_facts_builder import JobFactsBuilder
from traceml.diagnosis.hangs.hang_detection import detect_hang
from traceml.runs.report.restarts import attempts_of, newest_exits

__all__ = ["earlier_hangs_s"]

_STEPS, _SAMPLES = 64, 2  # last rows of each rank that are read


def earlier_hangs_s(reader: StoreReader) -> dict[int, float]:
    """Return for how many seconds attempts before the last one made no progress when they were ended, by attempt."""
    *earlier, _ = attempts_of(reader).values() or [[]]
    if not earlier:
        return {}

    world_size = int(reader.meta().get("run", {}).get("world_size", 1))
    attempts = [_EndedAttempt(reader, streams, world_size) for streams in earlier]
    by_stream = {number: attempt for attempt in attempts for number in attempt.rank_of}
    for number, row in reader.log_rows(INFO.name):
        if (attempt := by_stream.get(number)) is not None:
            attempt.facts_builder.info(attempt.rank_of[number], row)

    for event in reader.events(kind=SNAPSHOT):
        for attempt in attempts:
            if event.data.get("stream") in attempt.rank_of or event.data.get("attempt") == attempt.number:
                attempt.facts_builder.progress.take_snapshot(RankSnapshot.from_row(event.data))

    return {attempt.number: attempt.hung_s() for attempt in attempts}


class _EndedAttempt:
    """Rows of an attempt that show whether it had hung when it was ended.

    Args:
        streams: of the ranks of the attempt.

    Attributes:
        rank_of: stream -> rank, of the newest process of each rank.
    """

    def __init__(self, reader: StoreReader, streams: Sequence[StreamRecord], world_size: int) -> None:
        newest = {stream.rank: stream for stream in streams}
        self.number = streams[0].attempt
        self.rank_of = {stream.id: rank for rank, stream in newest.items()}
        self.facts_builder = JobFactsBuilder(world_size)
        self.facts_builder.state = RunStatus.FAILED.value
        for rank, stream in newest.items():
            self.facts_builder.host(rank, stream.host)

        for ended in newest_exits(streams):
            self.facts_builder.exit(ended)

        samples = self._rows(reader, PROCESS.name, _SAMPLES)
        for number, rank in self.rank_of.items():
            self.facts_builder.process_rows(rank, samples[samples["stream"] == number])

        self._steps = self._rows(reader, STEPS.name, _STEPS)
        ranks = np.array([self.rank_of[number] for number in self._steps["stream"].tolist()], np.int64)
        self.facts_builder.progress.steps(ranks, self._steps)

    def hung_s(self) -> float:
        """Return the time for which it had made no progress when it was ended, in seconds; 0 if it had not hung."""
        p99_s = float(np.quantile(self._steps["total_ns"], 0.99)) / 1e9 if len(self._steps) else 0.0
        found = detect_hang(self.facts_builder.build(), p99_s)
        return 0.0 if found is None else found.quiet_s

    def _rows(self, reader: StoreReader, table: str, last: int) -> NDArray[np.void]:
        """Return the last rows of each rank, by rank."""
        rows = reader.rows(table, list(self.rank_of), last=last)
        return rows[np.argsort(rows["stream"], kind="stable")]
