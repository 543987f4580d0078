"""Maintenance of a store: sums stay exact and readers miss nothing, whatever is merged, thinned, killed or resent."""

from __future__ import annotations

import contextlib
import random
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.database.store.test_run_sums import Written, append, assert_sums, identity
from tests.database.store.test_summaries import random_rows
from traceml.database.schema import METRICS, PROCESS, STEPS, TABLES, Table
from traceml.database.store import compaction
from traceml.database.store.compaction import FANOUT
from traceml.database.store.reader import StoreReader
from traceml.database.store.store import StoreWriter
from traceml.database.store.thinning import sample_blocks
from traceml.database.store.unframed_rows import FRAME_WAIT_S
from traceml.errors import StoreError

ENOUGH_S = 1.0
# Of a run that is thinned.
RANKS, ROWS, LIMIT_BYTES = 2, 20_000, 1_250_000
HOUR_S = 3600.0
FIRST_ROW = np.zeros(1, STEPS.dtype)


def kill(writer: StoreWriter) -> None:
    """Leave a store as a writer that is killed between two transactions leaves it."""
    writer._database.close()
    writer._unlock()


def frame_count(reader: StoreReader, table: str) -> int:
    return sum(1 for _ in reader.frames(table))


class Follower:
    """A reader with a cursor that reads a few frames now and then."""

    def __init__(self, path: Path) -> None:
        self.reader = StoreReader(path)
        self.cursor = 0
        self.rows: dict[int, list[bytes]] = defaultdict(list)

    def read(self, table: Table, frames: int | None) -> None:
        for frame in self.reader.frames(table.name, self.cursor, limit=frames):
            size = table.row_bytes
            assert len(frame.data) == frame.n * size
            self.rows[frame.stream] += [frame.data[at : at + size] for at in range(0, len(frame.data), size)]
            if "step" in table.names:
                steps = np.frombuffer(frame.data, table.dtype)["step"]
                assert (frame.first_step, frame.last_step) == (steps[0], steps[-1])

            self.cursor = frame.id


@pytest.mark.parametrize("is_large", [False, True])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 6))])
def test_exact_through_kills_gaps_and_merges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, is_large: bool
) -> None:
    """Sums, counts and every follower agree with what was written, at any moment; also where rows are held."""
    if is_large:
        monkeypatch.setattr(compaction, "_MAX_TAILS", 2)

    chance = random.Random(seed)
    path = tmp_path / "store.db"
    ranks = 3
    all_rows = {rank: random_rows(STEPS, 40_000) for rank in range(1, ranks + 1)}
    taken: dict[int, list[NDArray[np.void]]] = {rank: [] for rank in all_rows}
    at = dict.fromkeys(all_rows, 0)
    writer = StoreWriter(path)
    streams = [writer.stream(identity(rank)) for rank in range(ranks)]
    writer.commit()
    followers = [Follower(path) for _ in range(3)]
    for now_s in range(400):
        for rank in streams:
            lost = chance.randint(1, 5) if chance.random() < 0.05 else 0
            at[rank] += lost
            n = chance.choice([1, 1, 1, 3, 20, 300])
            new = all_rows[rank][at[rank] : at[rank] + n]
            append(writer, rank, "steps", at[rank], new)
            taken[rank].append(new)
            at[rank] += n

        writer.commit(now_s)
        if chance.random() < 0.6:
            cursors = chance.choice([(), (), (0,), (50, 900)])
            writer.maintain(chance.choice([0.0, 0.001, 0.05]), cursors=cursors, now_s=now_s)
        if chance.random() < 0.03:
            kill(writer)
            writer = StoreWriter(path)
        if chance.random() < 0.3:
            chance.choice(followers).read(STEPS, chance.choice([1, 7, None]))

    assert writer._maintenance.compaction.is_merging_off == is_large
    writer.commit(frames_of_all=True)
    written = {(rank, "steps"): np.concatenate(parts) for rank, parts in taken.items()}
    with StoreReader(path) as reader:
        assert_sums(reader, written)
        for follower in followers:
            follower.read(STEPS, None)
            for rank in streams:
                assert b"".join(follower.rows[rank]) == written[rank, "steps"].tobytes()
                assert follower.reader.stored("steps", rank) == len(written[rank, "steps"])
                assert follower.reader.lost("steps", rank) == at[rank] - len(written[rank, "steps"])

        while writer.maintain(ENOUGH_S):
            pass

        assert_sums(reader, written)
        for rank in streams:
            rows = reader.rows("steps", {rank})
            assert rows["step"].tolist() == written[rank, "steps"]["step"].tolist()

    writer.close()


def test_small_frames_become_few_large_ones(tmp_path: Path) -> None:
    """One row a second becomes frames of thousands of rows, level by level, at a fraction of the size."""
    path = tmp_path / "store.db"
    rows = random_rows(PROCESS, 5_000)
    with StoreWriter(path) as writer:
        stream = writer.stream(identity(0))
        for seq in range(len(rows)):
            append(writer, stream, "process", seq, rows[seq : seq + 1])
            writer.commit()
            writer.maintain(ENOUGH_S)

        with StoreReader(path) as reader:
            sizes = [frame.n for frame in reader.frames("process")]
            assert len(sizes) < 100
            assert max(sizes) == FANOUT**2
            assert reader.rows("process")["t_ns"].tolist() == rows["t_ns"].tolist()
            assert reader.stored("process") == 5_000


def test_delivery_reads_each_row_once(tmp_path: Path) -> None:
    """A process that starts anew at a saved cursor, at any moment, gets each row once, however late it is."""
    path = tmp_path / "store.db"
    chance = random.Random(5)
    rows = {(rank, table): random_rows(TABLES[table], 3_000) for rank in (1, 2, 3) for table in ("steps", "metrics")}
    got: dict[tuple[int, str], list[bytes]] = defaultdict(list)
    cursor = 0

    def deliver(batches: int) -> None:
        nonlocal cursor
        with StoreReader(path) as reader:
            for _ in range(batches):
                for frame in reader.frames_of(("steps", "metrics"), cursor, chance.randint(1, 64)):
                    got[frame.stream, frame.table].append(frame.data)
                    cursor = frame.id

    with StoreWriter(path) as writer:
        for rank in range(3):
            writer.stream(identity(rank))
        for second, seq in enumerate(range(0, 3_000, 3)):
            now_s = 10.0 * second  # after an hour steps are merged ahead of the cursor too, but never across it
            for (stream, table), data in rows.items():
                append(writer, stream, table, seq, data[seq : seq + 3])
            writer.commit(now_s)
            writer.maintain(ENOUGH_S, cursors=(cursor,), now_s=now_s)
            if chance.random() < 0.03:
                deliver(chance.randint(1, 20))

        deliver(1_000)
        with StoreReader(path) as reader:
            assert len(list(reader.frames("steps"))) < 600
            assert len(list(reader.frames("metrics"))) == 3_000  # trackers know values by frame and row

    for key, data in rows.items():
        assert b"".join(got[key]) == data.tobytes()


def test_values_are_not_moved_past_texts(tmp_path: Path) -> None:
    """Values and texts, of whatever process, stay in the order in which they were stored, though values are merged."""
    path = tmp_path / "store.db"
    with StoreWriter(path) as writer:
        stream, other = writer.stream(identity(0)), writer.stream(identity(1))
        values = random_rows(METRICS, 500)
        for seq in range(len(values)):
            append(writer, stream, "metrics", seq, values[seq : seq + 1])
            append(writer, other, "metrics", seq, values[seq : seq + 1])
            writer.commit()
            if seq in (130, 330):
                writer.append(stream, "logged", seq // 200, 1, b"\x80")
                writer.commit()

            writer.maintain(ENOUGH_S)

        with StoreReader(path) as reader:
            text_ids = [frame.id for frame in reader.frames("logged")]
            for frame in reader.frames("metrics"):
                for text_id, before in zip(text_ids, (131, 331), strict=True):
                    assert (frame.id < text_id) == (frame.seq + frame.n <= before)

            counts = {number: sum(1 for _ in reader.frames("metrics", stream=number)) for number in (stream, other)}
            assert max(counts.values()) < 200
            assert reader.stored("metrics") == 1_000


def test_nothing_is_merged_ahead_of_a_delivery(tmp_path: Path) -> None:
    """What a delivery has not read stays as it is, so that it reads the same batch again; steps only for an hour."""
    path = tmp_path / "store.db"
    with StoreWriter(path) as writer:
        stream = writer.stream(identity(0))
        rows = {table: random_rows(TABLES[table], 600) for table in ("steps", "metrics")}

        def write(seq: int, now_s: float) -> None:
            for table, data in rows.items():
                append(writer, stream, table, seq, data[seq : seq + 1])
            writer.commit(now_s)
            writer.maintain(ENOUGH_S, cursors=(100,), now_s=now_s)

        with StoreReader(path) as reader:
            for seq in range(400):
                write(seq, seq)
            for table in rows:
                assert [frame.n for frame in reader.frames(table) if frame.id > 100] == [1] * 350

            for seq in range(400, 600):
                write(seq, seq + 2 * HOUR_S)
            assert_sums(reader, {(stream, "steps"): rows["steps"]})
            assert [frame.n for frame in reader.frames("metrics")] == [1] * 600
            assert sum(1 for frame in reader.frames("steps") if frame.id > 100) < 250


@pytest.fixture
def large_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoreWriter]:
    """A store of ten ranks that counts as one of a large job."""
    monkeypatch.setattr(compaction, "_MAX_TAILS", 8)
    with StoreWriter(tmp_path / "store.db") as writer:
        for rank in range(10):
            append(writer, writer.stream(identity(rank)), "steps", 0, FIRST_ROW)

        writer.commit(0.0)
        yield writer


def test_rows_of_very_many_processes_become_frames_together(large_store: StoreWriter) -> None:
    """Each row is stored at once, and read some seconds later, with others; the sums are exact at any moment."""
    rows = random_rows(STEPS, 301)
    with StoreReader(large_store.path) as reader:
        for seq in range(1, 301):
            for stream in range(1, 11):
                append(large_store, stream, "steps", seq, rows[seq : seq + 1])

            assert large_store.commit(float(seq)) == {(stream, "steps"): seq + 1 for stream in range(1, 11)}
            large_store.maintain(ENOUGH_S, now_s=float(seq))
            assert seq - FRAME_WAIT_S <= reader.stored("steps", 3) <= seq + 1

        assert frame_count(reader, "steps") <= 10 * (300 // FRAME_WAIT_S + 2)
        large_store.commit(301.0, frames_of_all=True)
        assert reader.rows("steps", {3})["step"][1:].tolist() == rows["step"][1:301].tolist()
        assert large_store._database.execute("SELECT count(*) FROM spool").fetchone() == (0,)


def test_rows_that_are_no_frames_yet_outlive_the_writer(large_store: StoreWriter) -> None:
    """The next writer finds what was acknowledged, and knows the next numbers."""
    rows = random_rows(STEPS, 5)
    append(large_store, 1, "steps", 1, rows[1:])
    large_store.commit(1.0)
    kill(large_store)

    with StoreWriter(large_store.path) as second:
        assert second.next_seq(1, "steps") == 5
    with StoreReader(large_store.path) as reader:
        assert reader.rows("steps", {1})["step"][1:].tolist() == rows["step"][1:].tolist()


def test_rows_of_an_idle_job_are_read_too(large_store: StoreWriter) -> None:
    """The last rows of a job that hangs become frames without any that follow."""
    append(large_store, 1, "steps", 1, random_rows(STEPS, 2)[1:])
    large_store.commit(1.0)
    large_store.commit(1.0 + 2 * FRAME_WAIT_S)
    with StoreReader(large_store.path) as reader:
        assert reader.stored("steps", 1) == 2


def test_old_rows_of_very_many_processes_are_thinned(large_store: StoreWriter) -> None:
    """Frames of which nothing is left are gone, and their rows are counted and summed all the same."""
    rows = random_rows(STEPS, 10_000)
    rows["step"] = np.arange(len(rows))
    with StoreReader(large_store.path) as reader:
        for seq in range(1, len(rows), 20):
            for stream in range(1, 11):
                append(large_store, stream, "steps", seq, rows[seq : seq + 20])

            large_store.commit(float(seq))
            large_store.maintain(ENOUGH_S, limit_bytes=500_000, now_s=float(seq))
            if seq % 1000 == 1:
                assert reader.lost("steps") == 0

        large_store.commit(2e4, frames_of_all=True)
        assert large_store._maintenance.compaction.is_merging_off
        assert frame_count(reader, "steps") < 2_500
        assert (reader.stored("steps"), reader.lost("steps")) == (100_000, 0)
        assert reader.thinned("steps") == reader.stored("steps") - len(reader.rows("steps")) > 50_000
        assert_sums(reader, {(stream, "steps"): np.concatenate([FIRST_ROW, rows[1:]]) for stream in range(1, 11)})

    kill(large_store)
    with StoreWriter(large_store.path) as second, StoreReader(large_store.path) as reader:
        assert second.next_seq(1, "steps") == 10_000
        assert reader.stored("steps") == 100_000


def test_damaged_frame_stays_and_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A frame that cannot be read is not summed away: whoever needs the sums is told, and the rest goes on."""
    path = tmp_path / "store.db"
    rows = random_rows(STEPS, 300)
    with StoreWriter(path) as writer:
        streams = [writer.stream(identity(rank)) for rank in range(2)]
        for seq in range(300):
            for stream in streams:
                append(writer, stream, "steps", seq, rows[seq : seq + 1])
            writer.commit()
            if seq == 100:
                with closing(sqlite3.connect(path)) as database, database:
                    database.execute("UPDATE frames SET data = x'00' WHERE id = 199")
            writer.maintain(ENOUGH_S)

        (warning,) = caplog.messages
        assert f"damage in the run's store {path}: frame 199 of steps" in warning
        with StoreReader(path) as reader, pytest.raises(StoreError, match="frame 199 of steps"):
            reader.step_sums()
        with StoreReader(path, on_damage=str) as reader:
            assert len(list(reader.frames("steps", stream=2))) < 150


@pytest.mark.process
def test_upkeep_starts_over_after_a_full_disk(tiny_disk: Callable[[int], Path]) -> None:
    """A merge that finds no room changes nothing; when there is room again the sums are exact."""
    folder = tiny_disk(96 << 20)
    path = folder / "store.db"
    rows = random_rows(STEPS, 400)
    with StoreWriter(path) as writer:
        stream = writer.stream(identity(0))
        for seq in range(200):
            append(writer, stream, "steps", seq, rows[seq : seq + 1])
            writer.commit(0.0)

        filler = folder / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 16))

        with pytest.raises(StoreError, match="full"):
            writer.maintain(ENOUGH_S, now_s=0.0)

        filler.unlink()
        assert not writer.maintain(ENOUGH_S, now_s=1.0)  # it waits for a while
        for seq in range(200, 400):
            append(writer, stream, "steps", seq, rows[seq : seq + 1])
            writer.commit(100.0)
            writer.maintain(ENOUGH_S, now_s=100.0)

        with StoreReader(path) as reader:
            assert_sums(reader, {(stream, "steps"): rows})
            assert len(list(reader.frames("steps"))) < 100


@pytest.fixture(scope="module")
def thinned_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("thinned")


@pytest.fixture(scope="module")
def thinned(thinned_folder: Path) -> Written:
    """Write a run that needs several times its limit, as fast as two rows per frame; tests only read it."""
    rows = {(rank, table.name): random_rows(table, ROWS) for rank in (1, 2) for table in (STEPS, PROCESS)}
    for (_, table), data in rows.items():
        column = "step" if table == "steps" else "t_ns"
        data[column] = np.arange(ROWS) * (1 if table == "steps" else 10**9)

    with StoreWriter(thinned_folder / "store.db") as writer:
        streams = [writer.stream(identity(rank)) for rank in range(RANKS)]
        assert streams == [1, 2]
        for seq in range(0, ROWS, 20):
            for (stream, table), data in rows.items():
                append(writer, stream, table, seq, data[seq : seq + 20])
            writer.commit(float(seq))
            writer.maintain(ENOUGH_S, limit_bytes=LIMIT_BYTES, now_s=float(seq))
            if seq == ROWS // 2:
                kill(writer)
                writer = StoreWriter(thinned_folder / "store.db")

    return rows


class TestThinning:
    """Old rows of a long run are thinned to blocks spread over it."""

    def test_space_is_bounded_and_sums_are_exact(self, thinned_folder: Path, thinned: Written) -> None:
        """The rows that are left take no more than the limit; sums and counts are those of all rows."""
        with closing(sqlite3.connect(thinned_folder / "store.db")) as database:
            size, count = database.execute("SELECT sum(length(data)), count(*) FROM frames").fetchone()
        assert size <= LIMIT_BYTES * 1.05
        assert count < 1_000
        with StoreReader(thinned_folder / "store.db") as reader:
            assert_sums(reader, thinned)
            assert (reader.stored("steps"), reader.lost("steps")) == (2 * ROWS, 0)
            assert reader.thinned("steps") == 2 * ROWS - len(reader.rows("steps"))

    def test_the_same_blocks_of_steps_are_left_on_all_ranks(self, thinned_folder: Path, thinned: Written) -> None:
        """What is left is complete blocks, spread over the run, aligned over ranks; the newest rows are all there."""
        with StoreReader(thinned_folder / "store.db") as reader:
            left = [reader.rows("steps", {rank}) for rank in (1, 2)]
            sample = sample_blocks(0, ROWS - 1, 640)
            aligned = [reader.rows("steps", {rank}, steps=sample) for rank in (1, 2)]

        for rank, rows in zip((1, 2), left, strict=True):
            whole = thinned[rank, "steps"][rows["step"]]
            assert all((rows[name] == whole[name]).all() for name in STEPS.names)
            assert rows["step"][-2_000:].tolist() == list(range(ROWS - 2_000, ROWS))
            old = rows["step"][rows["step"] < ROWS // 2]
            assert set(np.unique(old // 64, return_counts=True)[1].tolist()) == {64}
            assert np.diff(old).max() < ROWS // 8

        assert len(aligned[0]) == len(aligned[1]) == 640
        assert aligned[0]["step"].tolist() == aligned[1]["step"].tolist()

    def test_samples_are_left_over_the_whole_run(self, thinned_folder: Path, thinned: Written) -> None:
        """Samples of a process keep the whole run too, and the newest ones completely."""
        del thinned
        with StoreReader(thinned_folder / "store.db") as reader:
            seconds = reader.rows("process", {1})["t_ns"] // 10**9
            assert seconds[-1_000:].tolist() == list(range(ROWS - 1_000, ROWS))
            assert np.diff(seconds).max() < ROWS // 50
            assert seconds[0] < ROWS // 50


def test_rows_of_a_delivery_that_stands_still_stay_for_a_day(tmp_path: Path) -> None:
    """What a tracker has not received is thinned only when it is a day old."""
    rows = random_rows(STEPS, 6_000)
    path = tmp_path / "store.db"

    def left(seconds_per_frame: float) -> int:
        path.unlink(missing_ok=True)
        with StoreWriter(path) as writer:
            stream = writer.stream(identity(0))
            for frame, seq in enumerate(range(0, len(rows), 20)):
                append(writer, stream, "steps", seq, rows[seq : seq + 20])
                writer.commit(frame * seconds_per_frame)
                writer.maintain(ENOUGH_S, (0,), 50_000, frame * seconds_per_frame)
        with StoreReader(path) as reader:
            assert reader.stored("steps") == len(rows)
            return len(reader.rows("steps"))

    assert left(200.0) == len(rows)  # 17 hours
    assert left(600.0) < len(rows)  # 50 hours
