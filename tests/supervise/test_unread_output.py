"""Full pipes at the end of a job: they are emptied, and only then."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.eventually import eventually
from tests.forked import client as forked
from traceml.supervise.output import UnreadOutput


class Pipe:
    """A pipe that nobody reads."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self._poll = select.poll()
        self._poll.register(self.writer, select.POLLOUT)

    @property
    def is_full(self) -> bool:
        return not self._poll.poll(0)

    def fill(self) -> bytes:
        """Write until it is full; return what was written."""
        size = 0
        while not self.is_full:
            size += os.write(self.writer, b"x" * 4096)

        return b"x" * size

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.close()


def test_a_full_pipe_is_read_when_the_job_ends(pipe: Pipe) -> None:
    """Again and again, as its writer goes on; and what was read is kept."""
    written, ending, kept = pipe.fill(), threading.Event(), bytearray()
    with UnreadOutput([pipe.writer], ending.is_set, kept.extend, full_for_s=0.02):
        ending.set()
        os.write(pipe.writer, b"the end" * 10_000)  # it returns when that has been read, or is in the pipe
        eventually(lambda: not pipe.is_full, "room in the pipe")

    assert bytes(kept).startswith(written)
    assert not set(bytes(kept)) - set(b"xthe end")


def test_a_slow_reader_loses_nothing_before_the_end(pipe: Pipe) -> None:
    """As long as the job is not ending, its reader may take any time."""
    asked, kept = threading.Semaphore(0), bytearray()

    def is_ending() -> bool:
        asked.release()
        return False

    written = pipe.fill()
    with UnreadOutput([pipe.writer], is_ending, kept.extend, full_for_s=0.01):
        for _ in range(5):
            assert asked.acquire(timeout=240)

    assert not kept
    assert os.read(pipe.reader, 1 << 20) == written


def test_a_pipe_with_room_is_left_to_its_reader(pipe: Pipe) -> None:
    """And so is what is no pipe. The other pipe, which is full, tells that both have been looked at."""
    full, kept = Pipe(), bytearray()
    os.write(pipe.writer, b"verdict")
    full.fill()
    with open(os.devnull, "w") as nowhere:
        files = [pipe.writer, nowhere.fileno(), full.writer]
        with UnreadOutput(files, lambda: True, kept.extend, full_for_s=0.01):
            eventually(lambda: not full.is_full, "room in the full pipe")

    full.close()
    assert b"verdict" not in kept
    assert os.read(pipe.reader, 100) == b"verdict"


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.timeout(300)
def test_a_job_with_unread_output_ends_when_it_is_asked_to(tmp_path: Path, pipe: Pipe, ranks: int) -> None:
    """Python cannot print its traceback, nor torchrun its log: after 10 s the command reads it for them."""
    (tmp_path / "train.py").write_text("import sys\nwhile True:\n    print('x' * 500, file=sys.stderr)\n")
    many = ["--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, "-m", "traceml", "run", *many, "--runs-dir", "runs", "train.py"]
    options = {"cwd": tmp_path, "stderr": pipe.writer, "start_new_session": True}
    with forked.Popen(command, imports="torch" if many else "aggregator", forks=True, **options) as job:
        try:
            eventually(lambda: pipe.is_full, "a full pipe", timeout_s=120)
            os.killpg(job.pid, signal.SIGINT)
            status = job.wait(240)
        finally:
            job.kill()

    assert status == 128 + signal.SIGINT
    log = tmp_path / "runs" / "latest" / "logs" / "unread.log"
    unread = log.read_bytes() if log.exists() else b""  # the last page of a full pipe may have room for all of it
    assert b"KeyboardInterrupt" in unread + os.read(pipe.reader, 1 << 20)
