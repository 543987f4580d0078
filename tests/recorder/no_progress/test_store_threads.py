"""Progress of a rank whose store is asked by others: their asking is none."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from torch import distributed

from tests.eventually import eventually
from traceml.database.flight.flight import FlightFile
from traceml.recorder.no_progress.progress_counters import ProgressCounters
from traceml.recorder.no_progress.store_threads import StoreThreads
from traceml.recorder.user_code import UserCode


@pytest.fixture
def flight(tmp_path: Path) -> Iterator[FlightFile]:
    """A flight file without rows."""
    made = FlightFile.create(tmp_path / "flights", {})
    yield made
    made.close(unlink=True)


@pytest.fixture
def asked() -> Iterator[distributed.TCPStore]:
    """Return a store of this process that a client asks all the time."""
    store = distributed.TCPStore("127.0.0.1", 0, None, is_master=True, timeout=timedelta(seconds=10))
    client = distributed.TCPStore("127.0.0.1", store.port, None, is_master=False, timeout=timedelta(seconds=10))
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
