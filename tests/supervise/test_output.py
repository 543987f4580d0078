"""Output of a script goes to its original target, and a copy to the run's folder."""

from __future__ import annotations

import logging
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked import client as forked
from traceml.supervise.output import OutputCopy
from traceml.supervise.processes import ScriptPipe

SCRIPT = """
import sys
print(sys.stdout.isatty(), sys.stderr.isatty())
print("one")
print("to stderr", file=sys.stderr)
print("last", end="")
"""


def run_with_page(folder: Path, **streams: int) -> subprocess.CompletedProcess[bytes]:
    """Run SCRIPT under `traceml run --live web`."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "traceml", "run", "--live", "web", "--runs-dir", str(folder / "runs"), str(script)]
    return forked.run(command, imports="aggregator", forks=True, check=True, timeout=240, **streams)


def kept(folder: Path) -> bytes:
    """Return what was kept of the newest run's output."""
    return (folder / "runs" / "latest" / "logs" / "output.log").read_bytes()


def test_a_pipe_stays_a_pipe_and_what_goes_through_is_kept(tmp_path: Path) -> None:
    """With the page, and standard output a pipe, both streams arrive as they were written."""
    ended = run_with_page(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    assert ended.stdout == kept(tmp_path) == b"False False\none\nlast"
    assert b"to stderr\n" in ended.stderr


def test_a_terminal_stays_a_terminal(tmp_path: Path) -> None:
    """On a terminal the script sees one, and what it says of errors is kept, too."""
    ours, theirs = pty.openpty()
    try:
        run_with_page(tmp_path, stdout=theirs, stderr=theirs)
    finally:
        os.close(theirs)
        os.close(ours)

    assert kept(tmp_path).splitlines() == [b"True True", b"one", b"to stderr", b"last"]


def test_no_more_is_kept_than_there_is_room_for(tmp_path: Path) -> None:
    """A script that prints without end fills no disk, and the file says so."""
    copy = OutputCopy(tmp_path / "logs" / "output.log", most_bytes=10)
    for part in (b"12345", b"67890", b"abc", b"def"):
        copy.write(part)

    copy.close()
    assert (tmp_path / "logs" / "output.log").read_bytes() == b"1234567890\n[traceml keeps no more of this output]\n"


def test_a_full_disk_costs_the_copy_alone(caplog: pytest.LogCaptureFixture) -> None:
    """It is said once, and writing goes on without."""
    copy = OutputCopy(Path("/dev/full"))
    with caplog.at_level(logging.WARNING, "traceml"):
        copy.write(b"text")
        copy.write(b"text")

    assert [record.message for record in caplog.records] == [
        "the script's output is not kept in the run's folder: [Errno 28] No space left on device"
    ]


def test_a_pipe_tells_nothing_from_the_end() -> None:
    """Empty while a writer is there, None when the last has gone."""
    pipe = ScriptPipe()
    assert pipe.read() == b""
    os.write(pipe.slave, b"x")
    pipe.close_slave()

    assert [pipe.read(), pipe.read()] == [b"x", None]
    pipe.close()
