"""Contents of logged files: copied under a name made of them, within a limit, and only as they were logged."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from traceml.database.file_contents import OpenFile, RefusedFileError, copy_content


def copied(content: bytes | OpenFile, part: Path, suffix: str = ".pt", limit_bytes: int = 100) -> dict[str, object]:
    return copy_content(content, part, kind="artifact", suffix=suffix, limit_bytes=limit_bytes)


@pytest.mark.parametrize(("suffix", "kept"), [(".pt", ".pt"), ("", ""), (".tar gz", ""), (".." + "x" * 40, "")])
def test_a_file_is_named_after_what_it_contains(tmp_path: Path, suffix: str, kept: str) -> None:
    """An unusual suffix is left out: the name is part of a path on other hosts."""
    sha256 = hashlib.sha256(b"weights").hexdigest()

    facts = copied(b"weights", tmp_path / "part", suffix)

    assert facts == {"path": f"artifacts/{sha256}{kept}", "size": 7, "sha256": sha256}
    assert (tmp_path / "part").read_bytes() == b"weights"


def test_more_than_the_limit_is_refused(tmp_path: Path) -> None:
    """By the name of the setting."""
    with pytest.raises(RefusedFileError, match=r"more than 6 bytes \(max_artifact_bytes\)"):
        copied(b"weights", tmp_path / "part", limit_bytes=6)


def test_an_open_file_may_be_removed(tmp_path: Path) -> None:
    """Its descriptor leads to it."""
    path = tmp_path / "model.pt"
    path.write_bytes(b"weights")
    opened = OpenFile.open(path)
    path.unlink()

    assert copied(opened, tmp_path / "part")["size"] == 7
    assert copied(opened, tmp_path / "part")["size"] == 7  # as after a try that failed
    opened.close()


def test_a_closed_file_is_opened_again_if_it_is_the_same(tmp_path: Path) -> None:
    """Another one of that name, or a changed one, is not taken for it."""
    path = tmp_path / "model.pt"
    path.write_bytes(b"weights")
    opened = OpenFile.open(path)
    opened.close()
    closed = opened._replace(descriptor=None)
    assert closed.is_unchanged
    assert copied(closed, tmp_path / "part")["size"] == 7

    path.write_bytes(b"other weights")

    assert not closed.is_unchanged
    with pytest.raises(RefusedFileError, match="was changed before it was copied"):
        copied(closed, tmp_path / "part")
    path.unlink()
    assert not closed.is_unchanged
    with pytest.raises(FileNotFoundError):
        copied(closed, tmp_path / "part")
    targets = [os.path.realpath(each) for each in Path("/proc/self/fd").iterdir()]
    assert not [each for each in targets if each.startswith(str(tmp_path))]
