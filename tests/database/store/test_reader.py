"""The store's readers: cursors without gaps, totals, and clear words about damage."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen

import msgpack
import numpy as np
import pytest

from tests.database.store.store_writers import STREAMS, erase_newest_frames, frame
from traceml.database.schema import EVALS, STEPS
from traceml.database.store import store_file
from traceml.database.store.reader import StoreReader, StreamIdentity
from traceml.database.store.records import names_of
from traceml.database.store.store import StoreWriter
from traceml.errors import StoreError

Start = Callable[..., "Popen[str]"]


def make_store(path: Path, *, ranks: int = 2, frames: int = 4, rows: int = 10) -> Path:
    with StoreWriter(path) as writer:
        streams = [writer.stream(StreamIdentity(rank, 0, "h", rank, 1)) for rank in range(ranks)]
        for seq in range(0, frames * rows, rows):
            for rank, stream in enumerate(streams):
                writer.append(stream, "evals", seq, rows, frame(rank, seq, rows))
            writer.commit()
    return path


def rewrite(path: Path, statement: str, *values: object) -> None:
    database = sqlite3.connect(path)
    with database:
        database.execute(statement, values)
    database.close()


def test_follows_a_writer_in_another_process_without_gaps(program: Start, tmp_path: Path) -> None:
    """While another process commits, a cursor sees every frame once, and each stream's in the order of seq."""
    path = tmp_path / "store.db"
    process = program("store.store_writers", path, 4, 1200, 40)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.readline()
    expected = dict.fromkeys(range(1, STREAMS + 1), 0)
    cursor = polls_with_news = 0

    with StoreReader(path) as reader:
        draining = threading.Thread(target=process.stdout.read)
        draining.start()
        let_go = False
        while min(expected.values()) < 1200:
            running = process.poll() is None
            before = cursor
            for got in reader.frames("evals", after_id=cursor):
                assert got.seq == expected[got.stream]
                assert got.data == frame(got.stream - 1, got.seq, got.n)
                expected[got.stream] += got.n
                cursor = got.id
            polls_with_news += cursor > before
            if cursor and not let_go:
                let_go = True
                process.stdin.write("go on\n")
                process.stdin.flush()

            assert running or cursor > before, "the writer has ended and rows are missing"

        assert reader.stored("evals") == 1200 * STREAMS
        assert reader.lost("evals") == 0
        draining.join()

    assert polls_with_news > 1


def test_cursor_gives_only_what_is_new(tmp_path: Path) -> None:
    """After the last frame seen there is nothing, until something comes; limits and streams narrow it."""
    reader = StoreReader(make_store(tmp_path / "store.db"))
    everything = list(reader.frames("evals"))

    assert [got.id for got in everything] == list(range(1, 9))
    assert list(reader.frames("evals", after_id=8)) == []
    assert [got.id for got in reader.frames("evals", after_id=2, limit=3)] == [3, 4, 5]
    assert [got.seq for got in reader.frames("evals", stream=2)] == [0, 10, 20, 30]
    assert list(reader.frames("steps")) == []
    assert reader.last_id() == 8
    reader.close()


def test_many_frames_are_read_in_batches(tmp_path: Path) -> None:
    """More frames than one batch holds come complete and in order."""
    reader = StoreReader(make_store(tmp_path / "store.db", ranks=1, frames=600, rows=1))

    assert [got.seq for got in reader.frames("evals")] == list(range(600))
    assert [got.seq for got in reader.frames("evals", limit=300)] == list(range(300))
    reader.close()


def test_rows_are_an_array_with_the_stream_in_front(tmp_path: Path) -> None:
    """numpy gets the table's columns and whose row it is."""
    reader = StoreReader(make_store(tmp_path / "store.db"))

    rows = reader.rows("evals")

    assert rows.dtype.names == ("stream", "step", "t_end_ns", "ns", "batches", "input_wait_ns", "forward_ns")
    assert len(rows) == 80
    second = rows[rows["stream"] == 2]
    assert second["step"].tolist() == list(range(40))
    assert (second["t_end_ns"] == np.arange(40) * 3).all()
    assert set(reader.rows("evals", streams=[2])["stream"]) == {2}
    assert len(reader.rows("gpu")) == 0
    assert reader.rows("gpu", last=5).dtype.names == reader.rows("gpu").dtype.names
    reader.close()


def test_last_rows_are_those_of_each_stream(tmp_path: Path) -> None:
    """`last` counts per stream, also when one has stopped long before the other."""
    path = make_store(tmp_path / "store.db", ranks=2, frames=2)
    with StoreWriter(path) as writer:
        for seq in range(20, 220, 10):
            writer.append(2, "evals", seq, 10, frame(1, seq, 10))
            writer.commit()

    with StoreReader(path) as reader:
        rows = reader.rows("evals", last=15)
        assert rows[rows["stream"] == 1]["step"].tolist() == list(range(5, 20))
        assert rows[rows["stream"] == 2]["step"].tolist() == list(range(205, 220))
        assert reader.rows("evals", streams=[1], last=1000)["step"].tolist() == list(range(20))


def test_facts_events_and_maps_come_back(tmp_path: Path) -> None:
    """Meta facts are overwritten, events are numbered, logs keep their order."""
    path = tmp_path / "store.db"
    with StoreWriter(path) as writer:
        stream = writer.stream(StreamIdentity(0, 0, "h", 1, 1))
        writer.put_meta("name", "first")
        writer.put_meta("name", "second")
        writer.put_meta("nested", {"hosts": ["a", "b"], 1: 2})
        for number in range(3):
            writer.event("verdict", {"number": number})
        writer.event("lost", {"rank": 1})
        writer.append(stream, "info", 0, 2, msgpack.packb({"kind": "a"}) + msgpack.packb({"kind": "b"}))
        writer.commit()

        with StoreReader(path) as reader:
            assert reader.meta() == {"name": "second", "nested": {"hosts": ["a", "b"], 1: 2}}
            assert [event.data["number"] for event in reader.events(kind="verdict")] == [0, 1, 2]
            assert [event.kind for event in reader.events(after=3)] == ["lost"]
            last = reader.last_event("verdict")
            assert last is not None
            assert last.data == {"number": 2}
            assert reader.last_event("nothing") is None
            assert [row["kind"] for number, row in reader.log_rows("info") if number == stream] == ["a", "b"]


def test_totals_follow_a_growing_store(tmp_path: Path) -> None:
    """Counting again takes only what came since, and stays exact."""
    path = tmp_path / "store.db"
    with StoreWriter(path) as writer, StoreReader(path) as reader:
        stream = writer.stream(StreamIdentity(0, 0, "h", 1, 1))
        for seq in (0, 10, 30):
            writer.append(stream, "evals", seq, 10, frame(0, seq, 10))
            writer.commit()
            assert reader.stored("evals") + reader.lost("evals") == seq + 10

        assert reader.lost("evals") == 10


@pytest.mark.process
def test_reads_a_store_on_read_only_media(tiny_disk: Callable[[int], Path]) -> None:
    """A finished run is read where nothing at all can be written."""
    disk = tiny_disk(4 * 1024 * 1024)
    path = make_store(disk / "store.db")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)

    with StoreReader(path) as reader:
        assert reader.stored("evals") == 80
        assert reader.rows("evals", last=1)["step"].tolist() == [39, 39]


def test_missing_store_is_reported(tmp_path: Path) -> None:
    """The path that was looked at is named."""
    with pytest.raises(StoreError, match=r"no run's store at .*store\.db"):
        StoreReader(tmp_path / "store.db")


@pytest.mark.parametrize("open_store", [StoreReader, StoreWriter])
def test_file_that_is_no_database_is_reported(tmp_path: Path, open_store: Callable[[Path], object]) -> None:
    """Garbage under the store's name is damage, with what to do."""
    path = tmp_path / "store.db"
    path.write_bytes(b"this is not a database" * 1000)

    with pytest.raises(StoreError, match=r"not a database.*move it away"):
        open_store(path)


@pytest.mark.parametrize("open_store", [StoreReader, StoreWriter])
def test_database_of_someone_else_is_reported(tmp_path: Path, open_store: Callable[[Path], object]) -> None:
    """Another program's database is neither read nor written."""
    path = tmp_path / "store.db"
    rewrite(path, "CREATE TABLE theirs (a)")

    with pytest.raises(StoreError, match="not a traceml store"):
        open_store(path)


def test_an_empty_file_is_named_so(tmp_path):
    """As a full disk or a copy that was cut off leaves it."""
    path = tmp_path / "store.db"
    path.touch()

    with pytest.raises(StoreError, match="is an empty file: its content was lost"):
        StoreReader(path)


@pytest.mark.parametrize("open_store", [StoreReader, StoreWriter])
@pytest.mark.parametrize(("version", "which"), [(2, "the older"), (4, "a newer")])
def test_store_of_another_version_is_reported(
    tmp_path: Path, open_store: Callable[[Path], object], version: int, which: str
) -> None:
    """The text says which traceml to use."""
    path = make_store(tmp_path / "store.db")
    rewrite(path, f"PRAGMA user_version={version}")

    with pytest.raises(StoreError, match=f"has format {version}, this traceml reads 3. Use {which} traceml"):
        open_store(path)


@pytest.mark.parametrize("open_store", [StoreReader, StoreWriter])
@pytest.mark.parametrize(
    "statement",
    [
        "CREATE VIEW more AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i FROM n) SELECT i FROM n",
        "CREATE TRIGGER again AFTER INSERT ON events BEGIN DELETE FROM frames; END",
    ],
)  # fmt: skip
def test_store_with_a_program_in_it_is_refused(
    tmp_path: Path, open_store: Callable[[Path], object], statement: str
) -> None:
    """A view could make a reader wait for ever, and a trigger acts when the store is written."""
    path = make_store(tmp_path / "store.db")
    rewrite(path, statement)

    with pytest.raises(StoreError, match=r"has the (view 'more'|trigger 'again').*move it away"):
        open_store(path)


def test_value_of_gigabytes_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told before memory is taken for it."""
    monkeypatch.setattr(store_file, "_MAX_VALUE_BYTES", 1 << 20)
    path = make_store(tmp_path / "store.db")
    rewrite(path, "INSERT INTO meta VALUES ('large', zeroblob(?))", 2 << 20)

    with StoreReader(path) as reader, pytest.raises(StoreError, match="too big"):
        reader.meta()


def test_store_of_other_columns_is_not_continued_but_read(tmp_path: Path) -> None:
    """Rows are read by the columns they were written with; new ones of other columns do not go beside them."""
    path = make_store(tmp_path / "store.db")
    layout = [["was", "q"], ["then", "q"], ["there", "q"], ["so", "d"], ["and", "q"], ["on", "q"]]
    rewrite(path, "UPDATE tables SET layout = ? WHERE name = 'evals'", msgpack.packb(layout))

    with pytest.raises(StoreError, match="other columns than this version of traceml writes"):
        StoreWriter(path)
    with StoreReader(path) as reader:
        assert reader.rows("evals").dtype.names == ("stream", "was", "then", "there", "so", "and", "on")


def test_rows_of_other_columns_have_those_of_this_version(tmp_path: Path) -> None:
    """A column that the store lacks is -1, which means not known, and one that this version lacks is left out."""
    path = make_store(tmp_path / "store.db", ranks=1, frames=1)
    first, second, *rest = EVALS.layout
    assert all(code == "q" for _, code in EVALS.layout)
    with StoreReader(path) as reader:
        (frame,) = reader.frames("evals")
        assert reader.current_rows(frame) == frame.data

    rewrite(path, "UPDATE tables SET layout = ? WHERE name = 'evals'", msgpack.packb([first, ["was", "q"], *rest]))
    with StoreReader(path) as reader:
        rows = np.frombuffer(reader.current_rows(frame), EVALS.dtype)

    before = np.frombuffer(frame.data, EVALS.dtype)
    assert (rows[second[0]] == -1).all()
    assert all((rows[name] == before[name]).all() for name, _ in (first, *rest))


def test_truncated_store_is_reported(tmp_path: Path) -> None:
    """A store cut off in a copy gives an error with what to do, never fewer rows."""
    path = make_store(tmp_path / "store.db", frames=300, rows=50)
    whole = path.stat().st_size
    cut = tmp_path / "cut" / "store.db"
    cut.parent.mkdir()
    shutil.copy(path, cut)
    with cut.open("r+b") as file:
        file.truncate(whole // 2 // 32768 * 32768)

    def read() -> None:
        with StoreReader(cut) as reader:
            list(reader.frames("evals"))

    with pytest.raises(StoreError, match="move it away"):
        read()


def test_damaged_frame_is_reported(tmp_path: Path) -> None:
    """A frame that does not decompress, or to another size, is damage and not data."""
    path = make_store(tmp_path / "store.db", ranks=1, frames=2)
    rewrite(path, "UPDATE frames SET data = x'00112233' WHERE id = 1")
    rewrite(path, "UPDATE frames SET n = 11 WHERE id = 2")

    with StoreReader(path) as reader:
        with pytest.raises(StoreError, match="frame 1 of evals"):
            reader.rows("evals")
        with pytest.raises(StoreError, match="frame 2 of evals has 480 bytes for 11 rows"):
            list(reader.frames("evals", after_id=1))


@pytest.mark.parametrize("layout", [b"\x91\x5a", b"\x81\x01\x02", b"\xc1", b""])
def test_damaged_layout_is_reported(tmp_path: Path, layout: bytes) -> None:
    """A store that does not say what its rows look like cannot be read."""
    path = make_store(tmp_path / "store.db", ranks=1, frames=1)
    rewrite(path, "UPDATE tables SET layout = ? WHERE name = 'evals'", layout)

    with pytest.raises(StoreError, match=r"store\.db is damaged: the layout"):
        StoreReader(path)


@pytest.mark.parametrize("data", [b"\xc1", b"", b"\x81\x80\x01", b"\xa1\xff", b"\xa1a"])
def test_damaged_facts_are_reported(tmp_path: Path, data: bytes) -> None:
    """Damage to facts of streams and to events is an error too."""
    path = make_store(tmp_path / "store.db", ranks=1, frames=1)
    with StoreWriter(path) as writer:
        writer.event("verdict", {"kind": "HEALTHY"})

    rewrite(path, "UPDATE streams SET facts = ?", data)
    rewrite(path, "UPDATE events SET data = ?", data)
    with StoreReader(path) as reader:
        for read in (reader.streams, reader.events, lambda: reader.last_event("verdict")):
            with pytest.raises(StoreError, match=r"is damaged: (stream|event) 1"):
                read()


def test_frames_of_no_table_are_left_out(tmp_path: Path) -> None:
    """A damaged number, of a table or of rows, hides its own frame."""
    path = make_store(tmp_path / "store.db", ranks=1, frames=3)
    rewrite(path, "UPDATE frames SET tbl = 99 WHERE id = 1")
    rewrite(path, "UPDATE frames SET n = 'ten' WHERE id = 3")

    with StoreReader(path) as reader:
        assert reader.stored("evals") == 10


def test_damaged_text_is_reported(tmp_path: Path) -> None:
    """Text that is not Unicode is an error."""
    path = make_store(tmp_path / "store.db", ranks=1, frames=1)
    rewrite(path, "UPDATE tables SET name = CAST(x'edff' AS TEXT) WHERE name = 'evals'")

    with pytest.raises(StoreError, match=r"store\.db.* The file is damaged"):
        StoreReader(path)


@pytest.mark.parametrize("data", [b"\xc1", b"\x5a", b"\x80\x93\x01\x02\x03"], ids=["nothing", "number", "list"])
def test_damaged_log_is_reported(tmp_path: Path, data: bytes) -> None:
    """A log frame that cannot be unpacked, or holds no maps, is damage."""
    path = tmp_path / "store.db"
    with StoreWriter(path) as writer:
        stream = writer.stream(StreamIdentity(0, 0, "h", 1, 1))
        writer.append(stream, "info", 0, 1, data)

    with StoreReader(path) as reader, pytest.raises(StoreError, match="frame 1 of info is damaged"):
        reader.log_rows("info")


def test_wrong_questions_are_reported(tmp_path: Path) -> None:
    """Unknown tables, logs asked for as arrays, and a closed store give a StoreError each."""
    reader = StoreReader(make_store(tmp_path / "store.db"))

    assert set(reader.tables) >= {STEPS.name, "names"}
    with pytest.raises(StoreError, match="no table 'sandwiches'"):
        list(reader.frames("sandwiches"))
    with pytest.raises(StoreError, match="has maps, not columns"):
        reader.rows("names")
    reader.close()
    with pytest.raises(StoreError, match="closed"):
        reader.meta()


def test_damaged_frames_are_left_out_where_that_is_wanted(tmp_path):
    """With somebody to tell, a damaged frame costs its own rows; without, it is an error as before."""
    path = make_store(tmp_path / "store.db")
    rewrite(path, "UPDATE frames SET data = x'0102' WHERE id IN (3, 8)")
    reported: list[str] = []
    with StoreReader(path, on_damage=reported.append) as reader:
        assert [frame.id for frame in reader.frames("evals")] == [1, 2, 4, 5, 6, 7]
        assert [frame.id for frame in reader.frames_of(("evals",), 2)] == [4, 5, 6, 7]
        assert reader.frames_of(("evals",), 7) == []
        assert [frame.id for frame in reader.frames_of(("evals",), 2, limit=1)] == [4]

    assert {text.split(":")[0] for text in reported} == {"frame 3 of evals", "frame 8 of evals"}
    with StoreReader(path) as reader, pytest.raises(StoreError, match="frame 3 of evals"):
        reader.frames_of(("evals",))


def test_store_that_lost_its_end_is_damaged(tmp_path: Path) -> None:
    """Frames of which a copied file has only zeros are no endless list of frames."""
    path = make_store(tmp_path / "store.db")
    erase_newest_frames(path)
    reported: list[str] = []
    with StoreReader(path, on_damage=reported.append) as reader:
        reader.stored("evals")
    assert "not in order" in reported[0]
    with StoreReader(path) as reader, pytest.raises(StoreError, match="is damaged"):
        reader.stored("evals")


def test_layouts_are_those_of_the_store(tmp_path):
    """A packed table has a layout, a log has none, and an unknown name is an error."""
    with StoreReader(make_store(tmp_path / "store.db")) as reader:
        assert reader.dtype("steps") == STEPS.dtype
        assert reader.dtype("names") is None
        with pytest.raises(StoreError, match="no table 'nothing'"):
            reader.dtype("nothing")


def test_salvage_asks_for_many_frames_at_once(tmp_path: Path) -> None:
    """A statement for each number took seconds; only around a damaged page it asks for fewer."""
    path = make_store(tmp_path / "store.db", frames=300)
    with StoreReader(path) as reader:
        statements: list[str] = []
        reader._database.set_trace_callback(statements.append)
        assert sum(map(len, reader._salvaged_ids(0).values())) == 600
        whole = len(statements)

    erase_newest_frames(path)
    with StoreReader(path) as reader:
        statements.clear()
        reader._database.set_trace_callback(statements.append)
        left = reader._salvaged_ids(0)["evals"]

    assert whole < 10
    assert left == list(range(1, len(left) + 1))
    assert 0 < len(left) < 600
    assert len(statements) < 3 * (600 - len(left)) + 50


def test_rows_that_are_no_names_are_left_out() -> None:
    rows = [{"id": 1, "name": "loss"}, {"id": "2", "name": "lr"}, {"id": 3}, {"name": "accuracy"}]
    assert list(names_of(rows)) == [(1, "loss")]
