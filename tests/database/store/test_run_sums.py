"""Sums and samples of a run, read from its store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.database.store.test_summaries import assert_same, random_rows
from traceml.database.schema import GPU, PROCESS, STEPS, USER_PHASES, Table
from traceml.database.store.reader import StoreReader, StreamIdentity
from traceml.database.store.store import StoreWriter
from traceml.database.store.summaries import StepSums, sum_rows
from traceml.database.store.thinning import sample_blocks

TABLES = (STEPS, USER_PHASES, PROCESS, GPU)
Written = dict[tuple[int, str], NDArray[np.void]]


def identity(rank: int) -> StreamIdentity:
    return StreamIdentity(rank, 0, "here", 100 + rank, 5)


def write_run(path: Path, ranks: int = 3, rows: int = 900, per_frame: int = 10) -> Written:
    """Write a store of many small frames; return the rows by stream and table."""
    written = {(rank + 1, table.name): random_rows(table, rows) for rank in range(ranks) for table in TABLES}
    with StoreWriter(path) as writer:
        for rank in range(ranks):
            writer.stream(identity(rank))
        for first in range(0, rows, per_frame):
            for (stream, table), data in written.items():
                append(writer, stream, table, first, data[first : first + per_frame])
            writer.commit()

    return written


def append(writer: StoreWriter, stream: int, table: str, seq: int, rows: NDArray[np.void]) -> None:
    steps = (int(rows["step"][0]), int(rows["step"][-1])) if "step" in (rows.dtype.names or ()) else (-1, -1)
    writer.append(stream, table, seq, len(rows), rows.tobytes(), *steps)


def assert_sums(reader: StoreReader, written: Written) -> None:
    """Compare the run's sums with those of all rows that were written."""
    steps = reader.step_sums()
    for (stream, table), rows in written.items():
        wanted = sum_rows(table, rows)[0]
        got = getattr(steps[stream], table) if hasattr(StepSums.of({}), table) else reader.table_sums(table)[stream]
        assert_same(got, wanted)


def test_sums_are_those_of_all_rows(tmp_path: Path) -> None:
    """Without a summary the rows themselves are summed, by stream and table."""
    written = write_run(tmp_path / "store.db")
    with StoreReader(tmp_path / "store.db") as reader:
        assert_sums(reader, written)


def test_sums_of_some_streams_are_those_of_all(tmp_path: Path) -> None:
    """Whether they were summed by the writer or not; unknown streams have none."""
    write_run(tmp_path / "store.db", rows=3_000)
    for is_summed in (False, True):
        if is_summed:
            with StoreWriter(tmp_path / "store.db") as writer:
                writer.maintain(60.0, [])

        with StoreReader(tmp_path / "store.db") as reader:
            all_sums, some = reader.step_sums(), reader.step_sums({1, 3, 99})
            assert sorted(some) == [1, 3]
            for stream, sums in some.items():
                assert_same(sums.steps, all_sums[stream].steps)
                assert_same(sums.user_phases, all_sums[stream].user_phases)


def test_rows_of_ranges_of_steps(tmp_path: Path) -> None:
    """Rows of a sample of blocks are those of exactly these steps, on every rank."""
    written = write_run(tmp_path / "store.db")
    ranges = sample_blocks(0, 1_500, 500)
    inside: dict[Table, NDArray[np.bool_]] = {}
    with StoreReader(tmp_path / "store.db") as reader:
        for table in (STEPS, USER_PHASES):
            got = reader.rows(table.name, steps=ranges)
            for stream in (1, 2, 3):
                steps = written[stream, table.name]["step"]
                inside[table] = np.any([(first <= steps) & (steps <= last) for first, last in ranges], axis=0)
                assert got["step"][got["stream"] == stream].tolist() == steps[inside[table]].tolist()

        only = reader.rows("steps", streams={2}, steps=ranges)
        assert set(only["stream"].tolist()) == {2}
        for frame in reader.step_frames("steps", ranges):
            steps = np.frombuffer(frame.data, STEPS.dtype)["step"]
            assert (frame.n, frame.first_step, frame.last_step) == (len(steps), steps[0], steps[-1])

        assert not len(reader.rows("steps", steps=[]))
