"""The store's writer: each row once, whatever happens to it or to the disk."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import resource
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen, run

import pytest

from tests.database.store.store_writers import STREAMS, frame, row
from traceml.database.store import store_file
from traceml.database.store.reader import StoreReader, StreamIdentity
from traceml.database.store.store import StoreWriter, merge_wal
from traceml.database.store.store_file import last_written_s
from traceml.errors import StoreBusyError, StoreError

Start = Callable[..., "Popen[str]"]
KIB = 1024
WHO = StreamIdentity(0, 0, "here", 100, 5)


def seqs(path: Path, stream: int, table: str = "evals") -> list[int]:
    with StoreReader(path) as reader:
        return [number for each in reader.frames(table, stream=stream) for number in range(each.seq, each.seq + each.n)]


def fill_up(filler: Path) -> None:
    with filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    """Committed rows are read back byte for byte, with their steps."""
    with StoreWriter(tmp_path / "store.db") as writer:
        stream = writer.stream(WHO, world_size=2)
        writer.append(stream, "evals", 0, 5, frame(0, 0, 5), 10, 14)
        assert writer.commit() == {(stream, "evals"): 5}

        with StoreReader(tmp_path / "store.db") as reader:
            (got,) = reader.frames("evals")
            assert (got.stream, got.table, got.seq, got.n) == (stream, "evals", 0, 5)
            assert (got.first_step, got.last_step) == (10, 14)
            assert got.data == frame(0, 0, 5)


def test_frames_of_one_tick_become_one(tmp_path: Path) -> None:
    """Consecutive frames of a table between two commits are stored together, with the steps of both ends."""
    with StoreWriter(tmp_path / "store.db") as writer:
        stream = writer.stream(WHO)
        for seq in range(0, 30, 10):
            writer.append(stream, "evals", seq, 10, frame(0, seq, 10), seq, seq + 9)
        writer.commit()

        with StoreReader(tmp_path / "store.db") as reader:
            (got,) = reader.frames("evals")
            assert (got.seq, got.n, got.first_step, got.last_step) == (0, 30, 0, 29)
            assert got.data == frame(0, 0, 30)


def test_rows_that_never_came_are_counted_exactly(tmp_path: Path) -> None:
    """Gaps are known per stream and table, live, after a reopening, and to readers."""
    path = tmp_path / "store.db"
    with StoreWriter(path) as writer:
        first, second = writer.stream(WHO), writer.stream(WHO._replace(rank=1))
        writer.append(first, "evals", 7, 3, frame(0, 7, 3))
        writer.commit()
        writer.append(first, "evals", 20, 1, frame(0, 20, 1))
        writer.append(second, "evals", 0, 2, frame(1, 0, 2))
        writer.commit()
        with StoreReader(path) as reader:
            assert reader.lost("evals", first) == 17
            assert reader.lost("evals", second) == 0

    with StoreWriter(path) as writer, StoreReader(path) as reader:
        assert writer.next_seq(first, "evals") == 21
        assert (reader.stored("evals"), reader.lost("evals")) == (6, 17)
        assert (reader.stored("evals", first), reader.lost("evals", first)) == (4, 17)
        assert reader.lost("evals", second) == 0


def test_rows_lost_at_the_end_are_counted_when_the_rank_reported_its_total(tmp_path: Path) -> None:
    """A rank whose last rows never came is not thought complete, even when nothing of a table came."""
    with StoreWriter(tmp_path / "store.db") as writer:
        stream = writer.stream(WHO)
        writer.append(stream, "evals", 0, 2, frame(0, 0, 2))
        writer.update_stream(stream, appended={"evals": 12, "gpu": 4})
        writer.commit()

        with StoreReader(tmp_path / "store.db") as reader:
            assert reader.lost("evals") == 10
            assert reader.lost("gpu") == 4
            assert reader.lost("steps") == 0
            assert (reader.lost(("evals", "gpu", "steps")), reader.stored(("evals", "gpu"))) == (14, 2)


def test_a_rank_that_comes_back_is_the_same_stream(tmp_path: Path) -> None:
    """One incarnation of a rank has one id, also after the store was reopened; another incarnation has another."""
    path = tmp_path / "store.db"
    with StoreWriter(path) as writer:
        stream = writer.stream(WHO, local_rank=0)
        assert writer.stream(WHO) == stream
        restarted = writer.stream(WHO._replace(attempt=1, pid=101))
        second_recorder = writer.stream(WHO._replace(recorder="2"))
        writer.update_stream(stream, state="killed")
        assert len({stream, restarted, second_recorder}) == 3

    with StoreWriter(path) as writer:
        assert writer.stream(WHO) == stream
        assert writer.stream(WHO._replace(attempt=1, pid=101)) == restarted
        assert writer.stream(WHO._replace(recorder="2")) == second_recorder
        assert writer.stream(WHO._replace(rank=1)) not in (stream, restarted, second_recorder)

    with StoreReader(path) as reader:
        first, *_ = reader.streams()
        assert (first.identity, first.facts) == (WHO, {"local_rank": 0, "state": "killed"})
        assert first.state == "killed"


def test_a_reader_sees_what_became_of_a_stream(tmp_path: Path) -> None:
    """New facts are decoded, those that stayed are not again."""
    with StoreWriter(tmp_path / "store.db") as writer:
        first, second = writer.stream(WHO), writer.stream(WHO._replace(rank=1))
        writer.commit()
        with StoreReader(tmp_path / "store.db") as reader:
            before = reader.streams()
            writer.update_stream(second, state="killed")
            writer.commit()
            after = reader.streams()

    assert [(record.id, record.state) for record in after] == [(first, "running"), (second, "killed")]
    assert after[0] is before[0]


def test_nothing_to_write_writes_nothing(tmp_path: Path) -> None:
    """A tick without news costs no transaction."""
    with StoreWriter(tmp_path / "store.db") as writer:
        sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
        assert writer.commit() == {}
        assert {path.name: path.stat().st_size for path in tmp_path.iterdir()} == sizes


def test_next_seq_counts_what_waits_and_a_reader_does_not_see_it(tmp_path: Path) -> None:
    """Buffered rows are expected no more, but not readable before their commit."""
    with StoreWriter(tmp_path / "store.db") as writer, StoreReader(tmp_path / "store.db") as reader:
        stream = writer.stream(WHO)
        writer.append(stream, "evals", 0, 3, frame(0, 0, 3))

        assert writer.next_seq(stream, "evals") == 3
        assert reader.stored("evals") == 0

        writer.commit()
        assert reader.stored("evals") == 3


def test_second_writer_is_refused(tmp_path: Path) -> None:
    """Two aggregators on one store would both number its rows: the second is refused until the first has closed it."""
    first = StoreWriter(tmp_path / "store.db")

    with pytest.raises(StoreError, match="another aggregator is writing"):
        StoreWriter(tmp_path / "store.db")

    first.close()
    first.close()
    StoreWriter(tmp_path / "store.db").close()


def test_second_writer_is_refused_where_folders_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS locks only what is open for writing: two writers there gave their streams the same numbers."""
    flock = fcntl.flock

    def of_nfs(descriptor: int, operation: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")

        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", of_nfs)
    with StoreWriter(tmp_path / "store.db"), pytest.raises(StoreBusyError):
        StoreWriter(tmp_path / "store.db")

    StoreWriter(tmp_path / "store.db").close()


def test_pages_are_large_and_the_log_is_write_ahead(tmp_path: Path) -> None:
    """Frames over a kilobyte fit into a page, and a reader never blocks the writer."""
    with StoreWriter(tmp_path / "store.db"), sqlite3.connect(tmp_path / "store.db") as database:
        assert database.execute("PRAGMA page_size").fetchone() == (32768,)
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    database.close()


def test_kill_9_of_the_writer_keeps_every_row_once(program: Start, tmp_path: Path) -> None:
    """Killed at random moments and reopened: what was acknowledged is there, nothing is there twice, no gap."""
    path = tmp_path / "store.db"
    moments = random.Random(11)
    acked = 0
    for _ in range(8):
        process = program("store.store_writers", path, 5, 10**9)
        assert process.stdout is not None
        word, number = process.stdout.readline().split()
        assert word == "OPEN"
        assert int(number) >= acked
        commits = moments.randint(1, 25)
        for _ in range(commits):
            acked = int(process.stdout.readline().split()[1])
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
        process.wait()
        acked = max([acked, *map(int, rest[1::2])])

    with StoreWriter(path) as writer:
        reached = writer.next_seq(1, "evals")
        assert reached >= acked > 0
        for stream in range(1, STREAMS + 1):
            assert writer.next_seq(stream, "evals") == reached

    for stream in range(1, STREAMS + 1):
        assert seqs(path, stream) == list(range(reached))
        assert seqs(path, stream, "info") == list(range(reached // 5))
    with StoreReader(path) as reader:
        assert reader.lost("evals") == 0
        for got in reader.rows("evals").tolist():
            assert got[1:] == row(got[0] - 1, got[1])
        for sums in reader.step_sums().values():
            assert sums.evals.rows == reached
            assert sums.evals.bins["batches"].sum() == 7 * sum(range(reached))


@pytest.mark.process
def test_full_disk_keeps_the_rows_until_there_is_room(tiny_disk: Callable[[int], Path]) -> None:
    """A commit that finds no room says which folder, keeps everything, and succeeds once there is room again."""
    folder = tiny_disk(2 * KIB * KIB)
    writer = StoreWriter(folder / "store.db")
    stream = writer.stream(WHO)
    filler = folder / "filler"
    with pytest.raises(OSError, match="No space left"):
        fill_up(filler)

    for seq in range(0, 200, 10):
        writer.append(stream, "evals", seq, 10, frame(0, seq, 10))
        with pytest.raises(StoreError, match=r"store\.db: .*full.*Free some space on the disk of") as caught:
            writer.commit()
        assert str(folder) in str(caught.value)

    assert writer.next_seq(stream, "evals") == 200
    with StoreReader(folder / "store.db") as reader:
        assert reader.stored("evals") == 0

    filler.unlink()
    assert writer.commit() == {(stream, "evals"): 200}
    writer.close()
    assert seqs(folder / "store.db", stream) == list(range(200))


def test_limit_on_file_sizes_keeps_the_rows_too(tmp_path: Path) -> None:
    """The same where files may not grow; the store is whole all the time."""
    path = tmp_path / "store.db"
    writer = StoreWriter(path)
    stream = writer.stream(WHO)
    writer.append(stream, "evals", 0, 10, frame(0, 0, 10))
    writer.commit()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.with_name("store.db-wal").stat().st_size, hard))
    try:
        writer.append(stream, "evals", 10, 10, frame(0, 10, 10))
        with pytest.raises(StoreError, match="unwritten rows are kept"):
            writer.commit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    writer.append(stream, "evals", 20, 10, frame(0, 20, 10))
    writer.commit()
    writer.close()
    assert seqs(path, stream) == list(range(30))


@pytest.mark.process
def test_disk_that_is_full_from_the_start_is_reported(tiny_disk: Callable[[int], Path]) -> None:
    """A store that cannot be made leaves nothing half made, and can be made when there is room."""
    folder = tiny_disk(64 * KIB)

    with pytest.raises(StoreError, match="cannot create the run's store") as caught:
        StoreWriter(folder / "store.db")

    assert str(folder) in str(caught.value)
    assert list(folder.iterdir()) == []


def test_folder_that_is_a_file_is_reported(tmp_path: Path) -> None:
    """A run folder that cannot be made is named."""
    (tmp_path / "taken").write_text("")

    with pytest.raises(StoreError, match="taken"):
        StoreWriter(tmp_path / "taken" / "store.db")


def test_what_a_writer_that_was_killed_left_half_made_is_removed(tmp_path: Path) -> None:
    """The next writer of the folder, which holds its lock, clears it."""
    for suffix in ("", "-wal", "-shm"):
        (tmp_path / f"store.db.new-999999{suffix}").write_bytes(b"half")

    StoreWriter(tmp_path / "store.db").close()

    assert [path.name for path in tmp_path.iterdir()] == ["store.db"]


def test_merging_the_log_of_a_killed_writer_leaves_the_time_of_its_last_write(tmp_path: Path) -> None:
    """A run that nobody has ended has ended then, not when somebody merges the log: perhaps the next day."""
    with StoreWriter(tmp_path / "live" / "store.db") as writer:
        writer.put_meta("a", 1)
        writer.commit()
        shutil.copytree(tmp_path / "live", tmp_path / "left")

    store, then_s = tmp_path / "left" / "store.db", 1_000_000.0
    for path in store.parent.iterdir():
        os.utime(path, (then_s, then_s))

    merge_wal(store)

    assert not store.with_name("store.db-wal").exists()
    assert last_written_s(store) == then_s


@pytest.mark.process
def test_a_limit_of_the_size_of_files_is_named(tmp_path: Path) -> None:
    """SQLite only says `disk I/O error`; there is space on the disk."""
    code = (
        "import resource, signal, sys\nfrom pathlib import Path\n"
        "from traceml.database.store.store import StoreWriter\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "StoreWriter(Path(sys.argv[1]))\n"
    )
    done = run([sys.executable, "-c", code, str(tmp_path / "store.db")], capture_output=True, text=True, check=False)

    assert "Files may have 1 KiB here (ulimit -f): raise the limit" in done.stderr


def test_a_filesystem_that_maps_no_files_gets_no_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """SQLite could not map the index of its write-ahead log, and says `disk I/O error` at each access."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(store_file.mmap, "mmap", refuse)
    with StoreWriter(tmp_path / "store.db") as writer:
        writer.put_meta("run", {"id": "a"})
        writer.commit()

    assert "is on a filesystem that maps no files" in caplog.text
    assert not list(tmp_path.glob("store.db-wal"))
    with StoreReader(tmp_path / "store.db") as reader:
        assert reader.meta()["run"] == {"id": "a"}


def test_a_filesystem_that_locks_no_files_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite says that the new file is locked, of which no other program knows."""

    def build(_path: Path) -> None:
        raise sqlite3.OperationalError("database is locked")

    monkeypatch.setattr(store_file, "_build", build)
    with pytest.raises(StoreError, match="cannot lock files: choose a runs_dir on another one") as error:
        StoreWriter(tmp_path / "store.db")

    assert "Another program" not in str(error.value)
