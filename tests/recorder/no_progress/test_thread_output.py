"""What the training thread and other threads write: a little of these is no progress."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from traceml.recorder.no_progress.thread_output import ThreadOutput


class Writer:
    """A thread that writes when it is told to."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._size, self._told, self._done, self._over = 0, threading.Event(), threading.Event(), False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def number(self) -> int:
        return self._thread.native_id or 0

    def write(self, size: int) -> None:
        self._size = size
        self._told.set()
        assert self._done.wait(30)
        self._done.clear()

    def end(self) -> None:
        self._over = True
        self._told.set()
        self._thread.join()

    def _run(self) -> None:
        while self._told.wait() and not self._over:
            self._told.clear()
            os.write(self._file, bytes(self._size))
            self._done.set()


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Callable[[], Writer]]:
    """Return what starts a thread that writes to a file."""
    file = os.open(tmp_path / "written", os.O_WRONLY | os.O_CREAT)
    started: list[Writer] = []

    def start() -> Writer:
        started.append(Writer(file))
        return started[-1]

    yield start
    for each in started:
        each.end()

    os.close(file)


def test_each_byte_of_the_training_thread_counts(writer: Callable[[], Writer]) -> None:
    """Its output shows that it goes on."""
    training = writer()
    output = ThreadOutput(lambda: training.number)
    before = output.progress_bytes()
    training.write(1)

    assert output.progress_bytes() == before + 1
    assert not output.is_some


def test_a_little_of_another_thread_is_told_and_does_not_count(writer: Callable[[], Writer]) -> None:
    """A thread that reports that it lives does so while the training hangs, too."""
    training, reporter = writer(), writer()
    output = ThreadOutput(lambda: training.number)
    before = output.progress_bytes()
    assert not output.is_some

    reporter.write(80)
    assert output.progress_bytes() == before
    assert output.is_some

    output.forget()
    output.progress_bytes()
    assert not output.is_some


def test_much_of_another_thread_counts(writer: Callable[[], Writer]) -> None:
    """A thread may save a checkpoint, in parts."""
    training, saver = writer(), writer()
    output = ThreadOutput(lambda: training.number)
    before = output.progress_bytes()
    for _ in range(4):
        saver.write(50_000)
        output.progress_bytes()

    assert output.progress_bytes() >= before + 100_000


def test_a_little_now_and_then_never_counts(writer: Callable[[], Writer], monkeypatch: pytest.MonkeyPatch) -> None:
    """However much it is in the end."""
    now_s = [0]
    monkeypatch.setattr("traceml.recorder.no_progress.thread_output.monotonic_ns", lambda: now_s[0] * 10**9)
    training, reporter = writer(), writer()
    output = ThreadOutput(lambda: training.number)
    before = output.progress_bytes()
    for _ in range(30):
        now_s[0] += 2
        reporter.write(8_000)
        assert output.progress_bytes() == before
