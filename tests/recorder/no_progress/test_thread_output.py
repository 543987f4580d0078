"""What the training thread and other threads write: a little of these is no progress."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from torch import distributed

from tests.eventually import eventually
from traceml.database.flight.flight import FlightFile
from traceml.recorder.no_progress.progress_counters import ProgressCounters
from traceml.recorder.no_progress.thread_output import StoreThreads, ThreadOutput
from traceml.recorder.user_code import UserCode


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
        assert self._done.wait(240)
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


@pytest.fixture
def flight(tmp_path: Path) -> Iterator[FlightFile]:
    """A flight file without rows."""
    made = FlightFile.create(tmp_path / "flights", {})
    yield made
    made.close(unlink=True)


@pytest.fixture
def asked() -> Iterator[distributed.TCPStore]:
    """Return a store of this process that a client asks all the time."""
    store = distributed.TCPStore("127.0.0.1", 0, None, is_master=True, timeout=timedelta(seconds=240))
    client = distributed.TCPStore("127.0.0.1", store.port, None, is_master=False, timeout=timedelta(seconds=240))
    client.set("key", "value")
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.wait(0.001):
            client.get("key")

    thread = threading.Thread(target=ask)
    thread.start()
    yield store
    is_over.set()
    thread.join()


def test_the_store_is_found(asked: distributed.TCPStore) -> None:
    """By the name of its thread."""
    found = eventually(StoreThreads(), "the thread to have its name")
    assert str(threading.get_native_id()) not in found


def test_answers_of_the_store_are_no_progress(asked: distributed.TCPStore, flight: FlightFile, tmp_path: Path) -> None:
    """The store answers in a thread of this process; what another thread writes is progress."""
    asked.get("key")
    stands = threading.Event()
    main = threading.Thread(target=stands.wait)
    main.start()
    counters = ProgressCounters(flight, lambda: main.ident or 0, UserCode(), lambda: (), lambda: None)
    moved = list(iter(counters.moved, False))

    time.sleep(0.3)
    assert not counters.moved(), moved

    thread = threading.Thread(target=_write, args=(tmp_path / "checkpoint", stands))
    thread.start()
    assert eventually(counters.moved, "the written bytes to be seen")
    stands.set()
    thread.join()
    main.join()


def _write(path: Path, stands: threading.Event) -> None:
    path.write_bytes(bytes(1_000_000))
    stands.wait()
