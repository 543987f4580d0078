"""Network filesystems are recognized, and their stores written without a log that hosts cannot share."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.database.store.store_writers import frame, identity
from traceml.database.store import filesystem, store_file
from traceml.database.store.filesystem import network_filesystem
from traceml.database.store.reader import StoreReader
from traceml.database.store.store import StoreWriter

MOUNTS = r"""
22 28 0:21 / /proc rw,nosuid - proc proc rw
28 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda rw
31 28 0:27 / /home rw,relatime shared:5 master:2 - nfs4 server:/home rw,vers=4.2,addr=10.0.0.1
32 31 0:30 / /home/me/scratch rw - ext4 /dev/nvme0n1 rw
33 28 0:31 / /lustre\040work rw,flock - lustre 10.0.0.2@tcp:/work rw
34 28 0:32 / /data rw - nfs server:/data rw
35 28 0:33 / /data rw - xfs /dev/sdb rw
36 28 0:34 / /over rw - overlay overlay rw,lowerdir=/a - b
"""


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("/home/me/runs/a/store.db", "nfs4"),
        ("/home", "nfs4"),
        ("/homes/me", None),
        ("/home/me/scratch/runs", None),
        ("/lustre work/runs", "lustre"),
        ("/data/runs", None),  # mounted over
        ("/over/x", None),
        ("/var/tmp", None),
    ],
)
def test_filesystem_of_a_path(tmp_path: Path, path: str, wanted: str | None) -> None:
    """The innermost mount decides, the last one of several on one point."""
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    assert network_filesystem(Path(path), mounts) == wanted


def test_unknown_mounts_count_as_local(tmp_path: Path) -> None:
    """Without the kernel's list nothing changes."""
    assert network_filesystem(tmp_path, tmp_path / "missing") is None
    assert network_filesystem(tmp_path) is None


@pytest.fixture
def on_nfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that the kernel's list shows as NFS."""
    mounts = tmp_path / "mountinfo"
    folder = tmp_path / "shared"
    folder.mkdir()
    mounts.write_text(f"28 1 254:1 / / rw - ext4 /dev/vda rw\n31 28 0:27 / {folder.resolve()} rw - nfs4 server:/ rw\n")
    monkeypatch.setattr(store_file, "network_filesystem", lambda path: filesystem.network_filesystem(path, mounts))
    return folder


def test_store_on_a_network_filesystem_has_no_log(on_nfs: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No write-ahead log is left to readers on other hosts; rows are written, followed, merged and summed as ever."""
    path = on_nfs / "store.db"
    with StoreWriter(path) as writer:
        stream = writer.stream(identity(0))
        writer.commit()
        with StoreReader(path) as reader:
            cursor = 0
            for seq in range(0, 500, 5):
                writer.append(stream, "evals", seq, 5, frame(0, seq, 5), seq, seq + 4)
                writer.commit()
                writer.maintain(0.1)
                *_, last = reader.frames("evals", cursor)
                cursor = last.id

            assert not path.with_name("store.db-wal").exists()
            assert reader.stored("evals") == 500
            assert reader.step_sums()[stream].evals.rows == 500
            with closing(sqlite3.connect(path)) as database:
                assert database.execute("PRAGMA journal_mode").fetchone() == ("delete",)

    assert [message for message in caplog.messages if "network filesystem (nfs4)" in message]


def test_store_with_a_log_is_continued_without_one(on_nfs: Path) -> None:
    """A store that a killed writer left with its log, as earlier versions did, loses nothing."""
    path = on_nfs / "store.db"
    with closing(store_file.open_for_writing(path)) as database:
        assert database.execute("PRAGMA journal_mode=WAL").fetchone() == ("wal",)

    with StoreWriter(path) as writer:
        stream = writer.stream(identity(0))
        writer.append(stream, "evals", 0, 5, frame(0, 0, 5), 0, 4)
        writer.commit()
        assert not path.with_name("store.db-wal").exists()
    with StoreReader(path) as reader:
        assert reader.stored("evals") == 5
