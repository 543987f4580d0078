"""Discovery of traces by their content."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from traceml.errors import TraceNotFoundError
from traceml.traces.reader.trace_files import discover, identity

TRACE = json.dumps({"deviceProperties": ["x" * 2000], "traceEvents": [{"ph": "X"}]}).encode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name, data in {
        "b.json": TRACE,
        "a.gz": gzip.compress(TRACE),
        "sub/lines": b' \n{"ph":1}\n',
        "sub/broken.pfw.gz": b"\x00",
        "settings.json": b'{"lr": 0.1}',
        "notes.txt": b"the trace has a ph",
        "cut.gz": b"\x1f\x8b\x08\xff",
        "empty": b"",
        ".hidden/c.json": TRACE,
    }.items():
        (tmp_path / name).write_bytes(data)

    return tmp_path


def test_a_folder_gives_its_traces(folder: Path) -> None:
    """Files are recognized by content, or by dftracer's suffix if unreadable; hidden folders are skipped."""
    names = [str(path.relative_to(folder)) for path in discover(folder)]

    assert names == ["a.gz", "b.json", "sub/broken.pfw.gz", "sub/lines"]


def test_files_patterns_and_folders_in_the_order_named(folder: Path) -> None:
    """Each file is found once, a named one whatever its content."""
    found = discover([folder / "settings.json", f"{folder}/*.json", f"{folder}/sub", str(folder / "sub" / "lines")])

    assert [path.name for path in found] == ["settings.json", "b.json", "broken.pfw.gz", "lines"]


@pytest.mark.parametrize(
    ("name", "why"),
    [("nowhere", "no such file"), ("*.pfw", "a pattern that matches no file"), ("bare", "no file is a trace")],
)
def test_nothing_found_is_an_error(folder: Path, name: str, why: str) -> None:
    """The error names what was looked for."""
    (folder / "bare").mkdir()
    (folder / "bare" / "settings.json").write_text("{}")
    with pytest.raises(TraceNotFoundError, match=why):
        discover(folder / name)

    with pytest.raises(TraceNotFoundError, match="no trace was named"):
        discover([])


def test_an_empty_path_is_not_the_working_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`traceml analyze "$TRACE"` without the variable would report traces that nobody named."""
    monkeypatch.chdir(folder)
    with pytest.raises(TraceNotFoundError, match="the path of a trace is empty"):
        discover(["b.json", ""])


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    """`traceml analyze <(zcat trace.gz)`: the error says what to do."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TraceNotFoundError, match="a pipe"):
        discover(tmp_path / "pipe")


def test_identity_changes_with_the_file(folder: Path) -> None:
    """The identity changes when a file is written to, or replaced by one of the same size and time."""
    path = folder / "b.json"
    first = identity(path)
    assert identity(path) == first

    other = folder / "other"
    other.write_bytes(TRACE)
    os.utime(other, ns=(0, first[3]))
    other.replace(path)
    assert identity(path) != first
