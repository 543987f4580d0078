"""Staged files: what is left of a file that its rank had begun to log."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgpack
import pytest

from traceml.database.file_contents import Content, LaterBytes, OpenFile, Pixels
from traceml.database.flight.staged_files import STAGED, StagedFile

ROW = {"kind": "image", "name": "sample", "t_ns": 5}


def set_free(monkeypatch: pytest.MonkeyPatch, free_bytes: int) -> None:
    """Let the filesystem have 100 bytes, of which these are free."""
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=free_bytes, f_blocks=100, f_frsize=1))


@pytest.fixture(autouse=True)
def has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's disk may be full by half."""
    set_free(monkeypatch, 100)


def staged(folder: Path, content: Content) -> StagedFile:
    written = StagedFile.write(folder / ".0.row", ROW, content, limit_bytes=100, suffix=".png")
    assert written is not None
    row: dict[str, Any] = msgpack.unpackb((folder / ".0.row").read_bytes())
    assert {key: row[key] for key in ROW} == ROW
    return StagedFile(folder / ".0.row", row[STAGED])


@pytest.mark.parametrize("content", [b"text", b"", Pixels(b"\1\2", "|u1", (1, 2)), Pixels(b"\0", "|b1", (1, 1), True)])
def test_contents_are_read_back(tmp_path: Path, content: Content) -> None:
    """With all that is needed to encode them."""
    left = staged(tmp_path, content)

    assert left.read() == content
    assert left.find() == tmp_path / ".0.staged"
    left.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_the_user_is_named_only(tmp_path: Path) -> None:
    """It is neither copied nor removed."""
    spool, path = tmp_path / "spool", tmp_path / "model.pt"
    spool.mkdir()
    path.write_bytes(b"weights")
    opened = OpenFile.open(path)
    left = staged(spool, opened)
    opened.close()

    assert left.read() == opened._replace(descriptor=None)
    assert left.find() == path
    left.remove()
    assert path.read_bytes() == b"weights"

    path.write_bytes(b"changed")
    assert left.find() is None


def test_contents_that_come_later_are_not_kept(tmp_path: Path) -> None:
    """As those of a tensor that is still being copied from a device."""
    assert StagedFile.write(tmp_path / ".0.row", ROW, LaterBytes(bytes, 0), limit_bytes=100, suffix="") is None
    assert list(tmp_path.iterdir()) == []


def test_half_of_the_memory_for_files_stays_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loader workers share theirs in it. Nothing is left of the one that has no room."""
    set_free(monkeypatch, 51)

    staged(tmp_path, b"x").remove()
    with pytest.raises(OSError, match="more than half"):
        staged(tmp_path, b"xx")
    assert list(tmp_path.iterdir()) == []
