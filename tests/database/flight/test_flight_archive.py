"""A dead worker's flight file arrives at the launcher with its journals and spooled files."""

from __future__ import annotations

import io
import signal
import tarfile
from pathlib import Path

import pytest

from tests.track.conftest import Script, finish, script  # noqa: F401 - a fixture
from traceml.database.flight.flight_archive import pack_flight, unpack_flight
from traceml.database.flight.flight_folders import FALLBACK_FOLDER
from traceml.database.flight.postmortem import read_flight

LOGGING = """
    import os, pathlib, time, traceml
    traceml.init(on_missing="warn", connect_timeout=0.1)
    for i in range(40_000):
        traceml.log_metric("x", i)
    pathlib.Path("model.bin").write_bytes(b"weights" * 1000)
    traceml.log_artifact("model.bin", "best")
    while not list(pathlib.Path("traceml_runs").glob(".flights/*.files/*.bin")):  # the copy, after its row
        time.sleep(0.01)
    print(os.getpid(), flush=True)
    os.kill(os.getpid(), 9)
"""


def test_journals_and_files_come_along(script: Script, tmp_path: Path) -> None:  # noqa: F811
    """Far more values than memory holds, and a file that was copied: all is in the copy, nothing stays behind."""
    pid = int(finish(script(LOGGING, TRACEML_RUN_ID="far"), -signal.SIGKILL))
    runs_dir = str(tmp_path / "traceml_runs")
    assert pack_flight(pid, "another", runs_dir=runs_dir) is None

    data = pack_flight(pid, "far", runs_dir=runs_dir)

    assert data is not None
    assert pack_flight(pid, "far", runs_dir=runs_dir) is None
    assert list((tmp_path / "traceml_runs" / FALLBACK_FOLDER).iterdir()) == []
    image = read_flight(unpack_flight(data, tmp_path / "copies", "node1.example.org-1-7"))
    assert sum(taken.n for taken in image.read_all("metrics")) == 40_000
    [note] = [each for each in image.pending_rows if each.staged is None]
    (file,) = image.spooled_files
    assert note.row["name"] == "best"
    assert file.read_bytes() == b"weights" * 1000
    image.unlink()
    assert list((tmp_path / "copies").iterdir()) == []


def test_what_was_not_copied_yet_comes_along(script: Script, tmp_path: Path) -> None:  # noqa: F811
    """Contents in memory, and a file of the user, which stays where it is."""
    begun = """
    import os, threading, traceml
    from traceml.database import file_contents
    traceml.init(on_missing="warn", connect_timeout=0.1)
    with open("model-7.bin", "wb") as file:
        file.write(b"weights" * 1000)
    os.symlink("model-7.bin", "model.bin")
    file_contents._chunks_of = lambda *_: threading.Event().wait()  # as one that is very slow
    traceml.log_text("long", "x" * 2_000_000)
    traceml.log_artifact("model.bin")
    print(os.getpid(), flush=True)
    os.kill(os.getpid(), 9)
    """
    pid = int(finish(script(begun, TRACEML_RUN_ID="far"), -signal.SIGKILL))

    data = pack_flight(pid, "far", runs_dir=str(tmp_path / "traceml_runs"))

    assert data is not None
    assert pack_flight(pid, "far", runs_dir=str(tmp_path / "traceml_runs")) is None
    model = tmp_path / "model.bin"
    assert model.read_bytes() == b"weights" * 1000
    model.unlink()  # as on the aggregator's host
    image = read_flight(unpack_flight(data, tmp_path / "copies", "node1.example.org-1-7"))
    staged = {each.row["name"]: each.staged for each in image.pending_rows}
    assert {name: each.read() for name, each in staged.items() if each is not None} == {
        "long.txt": b"x" * 2_000_000,
        "model.bin": b"weights" * 1000,
    }
    image.unlink()
    assert list((tmp_path / "copies").iterdir()) == []


@pytest.mark.parametrize("damage", [b"", b"nonsense", None])
def test_a_damaged_archive_is_reported(script: Script, tmp_path: Path, damage: bytes | None) -> None:  # noqa: F811
    """It is no flight file, and none is left that somebody might take for one."""
    data = damage
    if data is None:
        pid = int(finish(script(LOGGING, TRACEML_RUN_ID="far"), -signal.SIGKILL))
        whole = pack_flight(pid, "far", runs_dir=str(tmp_path / "traceml_runs"))
        assert whole is not None
        data = whole[: len(whole) // 2]

    with pytest.raises(ValueError, match="far-0-1"):
        unpack_flight(data, tmp_path / "copies", "far-0-1")

    assert not list((tmp_path / "copies").glob("*.flight"))


@pytest.mark.parametrize(
    "name",
    ["../planted", "/planted", "files/../../planted", "files/..", "journal/../../planted", "flight/../x", "other"],
)  # fmt: skip
def test_an_archive_cannot_write_elsewhere(tmp_path: Path, name: str) -> None:
    """A name that is none of ours is refused, wherever it leads, and so is a link."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo(name), io.BytesIO())

    with pytest.raises(ValueError, match="unknown file"):
        unpack_flight(buffer.getvalue(), tmp_path / "run" / "copies", "far-0-1")

    assert [path.name for path in tmp_path.rglob("*")] == ["run", "copies"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_an_archive_makes_no_links(tmp_path: Path, kind: bytes) -> None:
    """Nor pipes or folders: they would stand where a later writer expects a file."""
    member, buffer = tarfile.TarInfo("files/model.bin"), io.BytesIO()
    member.type, member.linkname = kind, "/etc/passwd"
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.addfile(member)

    with pytest.raises(ValueError, match="far-0-1"):
        unpack_flight(buffer.getvalue(), tmp_path / "copies", "far-0-1")

    assert list((tmp_path / "copies").iterdir()) == []
