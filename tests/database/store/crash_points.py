"""A store whose writer is killed at any point: a recorded writer, and the store as it would be after a part of it."""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import msgpack
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.database.store.file_recorder import FileEvent, FileRecorder, ReplayedFiles
from traceml.database.schema import STEPS
from traceml.database.store import compaction, store_file
from traceml.database.store.reader import StoreReader, StreamIdentity
from traceml.database.store.store import StoreWriter
from traceml.run_folder import STORE_NAME

__all__ = ["MODES", "CrashPoint", "RecordedWriter", "check_crash", "crash_points", "recorded"]

RANKS = 3
_LIMIT_BYTES = 400_000  # above it, old rows are thinned
_LARGE = 4096

MODES = ("log", "held", "network")
"""With a write-ahead log; with rows that wait for their frames, as in a large job; on a network filesystem."""


@dataclass(frozen=True)
class RecordedWriter:
    """What a writer did to its files.

    Attributes:
        mode: of `MODES`.
        events: in order; a mark has the number of acknowledged steps of each rank.
    """

    mode: str
    events: list[FileEvent]


@dataclass(frozen=True)
class CrashPoint:
    """A place at which the writer is killed: after so many events, and so many bytes of the next one."""

    events: int
    most_bytes: int


def recorded(mode: str, folder: Path, seed: int, commits: int = 60) -> RecordedWriter:
    """Record a writer of steps and of a log that is started four times, sums, merges, thins and checkpoints.

    Raises:
        OSError: see `FileRecorder`.
    """
    chance = random.Random(seed)
    recorder = FileRecorder(folder)
    at = [0] * RANKS
    with recorder.recording(), pytest.MonkeyPatch.context() as patch:
        _set(mode, patch)
        for session in range(4):
            with StoreWriter(folder / STORE_NAME) as writer:
                _write_rows(writer, recorder, at, chance, session, commits // 4)

    return RecordedWriter(mode, recorder.events)


def crash_points(writer: RecordedWriter, count: int, seed: int) -> Iterator[CrashPoint]:
    """Yield places at which the writer is killed, half of them in the middle of a write."""
    chance = random.Random(seed)
    places = sorted(chance.randrange(len(writer.events)) for _ in range(count))
    for place in places:
        event = writer.events[place]
        is_torn = event.kind == "write" and chance.random() < 0.5
        yield CrashPoint(place, chance.randrange(len(event.data)) if is_torn else 0)


def check_crash(writer: RecordedWriter, point: CrashPoint, files: ReplayedFiles, folder: Path) -> None:
    """Open the store as it is after a kill: every acknowledged row is there, and it can be continued.

    Args:
        writer: what was recorded.
        point: the place of the kill.
        files: the files after its events.
        folder: an empty folder.
    """
    torn = ReplayedFiles({name: bytearray(data) for name, data in files.files.items()})
    if point.most_bytes:
        torn.apply(writer.events[point.events], point.most_bytes)

    torn.write(folder)
    marks = (event.data for event in reversed(writer.events[: point.events]) if event.kind == "mark")
    acked = next(marks, [0] * RANKS)
    path = folder / STORE_NAME
    if path.exists() and writer.mode == "log":  # held rows, and a network's transaction, are the next writer's to show
        _check_rows(path, acked)

    with pytest.MonkeyPatch.context() as patch:
        _set(writer.mode, patch)
        with StoreWriter(path) as again:
            streams = [again.stream(_identity(rank)) for rank in range(RANKS)]
            found = [again.next_seq(stream, "steps") for stream in streams]
            assert all(have >= wanted for have, wanted in zip(found, acked, strict=True)), (found, acked)
            for stream, first in zip(streams, found, strict=True):
                _append(again, stream, first, 5)

            again.commit()
            again.maintain(0.01)

    _check_rows(path, [have + 5 for have in found])


def points_with_files(
    writer: RecordedWriter, points: Iterator[CrashPoint]
) -> Iterator[tuple[CrashPoint, ReplayedFiles]]:
    """Yield points, which are in order, with the files after their events."""
    files, done = ReplayedFiles(), 0
    for point in points:
        for event in writer.events[done : point.events]:
            files.apply(event)

        done = point.events
        yield point, files


def check_points(writer: RecordedWriter, count: int, seed: int, folder: Path) -> int:
    """Check so many points; return how many."""
    checked = 0
    for point, files in points_with_files(writer, crash_points(writer, count, seed)):
        place = folder / "crashed"
        place.mkdir()
        try:
            check_crash(writer, point, files, place)
        except BaseException as error:
            error.add_note(f"{writer.mode}: killed at {point} of {len(writer.events)} events")
            raise

        shutil.rmtree(place)
        checked += 1

    return checked


def _set(mode: str, patch: pytest.MonkeyPatch) -> None:
    if mode == "held":
        patch.setattr(compaction, "_MAX_TAILS", 2)
    elif mode == "network":
        patch.setattr(store_file, "network_filesystem", lambda _path: "nfs")


def _identity(rank: int) -> StreamIdentity:
    return StreamIdentity(rank, 0, "here", 100 + rank, 5)


def _rows(first: int, n: int) -> NDArray[np.void]:
    """Return the steps with these numbers, which are the same for all ranks."""
    rows = np.zeros(n, STEPS.dtype)
    rows["step"] = np.arange(first, first + n)
    for column, name in enumerate(name for name in STEPS.dtype.names or () if name != "step"):
        rows[name] = (rows["step"] * 7919 + column * 104_729) % 1_000_003

    return rows


def _append(writer: StoreWriter, stream: int, first: int, n: int) -> None:
    writer.append(stream, "steps", first, n, _rows(first, n).tobytes(), first, first + n - 1)


def _write_rows(
    writer: StoreWriter, recorder: FileRecorder, at: list[int], chance: random.Random, session: int, commits: int
) -> None:
    streams = [writer.stream(_identity(rank), session=session) for rank in range(RANKS)]
    writer.put_meta("run", {"session": session})
    for number in range(commits):
        for rank, stream in enumerate(streams):
            n = chance.choice([1, 1, 3, 40, 300])
            _append(writer, stream, at[rank], n)
            at[rank] += n

        writer.append(streams[0], "info", writer.next_seq(streams[0], "info"), 1, msgpack.packb({"number": number}))
        writer.event("tick", {"number": number})
        now_s = (session * commits + number) * 20.0
        writer.commit(now_s)
        recorder.mark(list(at))
        writer.maintain(0.05, limit_bytes=_LIMIT_BYTES, now_s=now_s)
        if number % 6 == 5:
            _checkpoint(writer.path)


def _checkpoint(path: Path) -> None:
    """Merge the write-ahead log into the file, as SQLite does by itself when it has grown."""
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA wal_checkpoint(PASSIVE)")


def _check_rows(path: Path, least: list[int]) -> None:
    """Check that a store has these many rows of each rank at least, and that no reader fails."""
    damaged: list[str] = []
    with StoreReader(path, damaged.append) as reader:
        reader.meta(), reader.events(), reader.log_rows("info")
        streams = {record.rank: record.id for record in reader.streams()}
        assert set(streams) >= {rank for rank, rows in enumerate(least) if rows}
        sums = reader.table_sums("steps")
        for rank, stream in streams.items():
            stored = reader.stored("steps", stream)
            assert stored >= least[rank], f"rank {rank} has {stored} rows, {least[rank]} were acknowledged"
            assert reader.lost("steps", stream) == 0
            if stored:
                assert sums[stream].rows == stored

        rows = reader.rows("steps")
        for record in reader.streams():
            mine = rows[rows["stream"] == record.id]
            expected = _rows(0, int(mine["step"][-1]) + 1 if len(mine) else 0)[mine["step"]]
            assert all((mine[name] == expected[name]).all() for name in STEPS.dtype.names or ())
            assert len(np.unique(mine["step"])) == len(mine), "a row is there twice"

    assert damaged == []
