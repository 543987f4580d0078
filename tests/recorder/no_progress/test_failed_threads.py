"""Threads that an exception has ended."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from traceml.database.snapshots.rank_snapshot import FrameSnapshot
from traceml.recorder.no_progress.failed_threads import FailedThreads, handled_exception

Printed = list[type[BaseException]]


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> Printed:
    kinds: Printed = []
    monkeypatch.setattr(threading, "excepthook", lambda args: kinds.append(args.exc_type))
    return kinds


@pytest.fixture
def failed(printed: Printed) -> Iterator[FailedThreads]:
    _ = printed
    threads = FailedThreads()
    threads.install()
    yield threads
    threads.uninstall()


def feed() -> None:
    raise ValueError("no data")


def run(name: str, target: object) -> None:
    thread = threading.Thread(target=target, name=name)  # type: ignore[arg-type]
    thread.start()
    thread.join()


def test_a_thread_that_fails_is_noted_with_its_line(failed: FailedThreads, printed: Printed) -> None:
    """The newest first; one that ends by itself is not. The hook before is still called."""
    run("feeder", feed)
    run("ends well", lambda: None)
    run("leaves", lambda: sys.exit(3))

    leaves, feeder = failed.newest()
    assert (feeder.name, feeder.exception) == ("feeder", "ValueError: no data")
    assert feeder.line is not None
    assert (feeder.line.file, feeder.line.function) == (__file__, "feed")
    assert (leaves.name, leaves.exception) == ("leaves", "SystemExit")
    assert printed == [ValueError, SystemExit]


def test_the_hook_is_restored_unless_it_was_wrapped_since(printed: Printed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook of another library stays in place."""
    before, threads = threading.excepthook, FailedThreads()
    threads.install()
    threads.uninstall()
    assert threading.excepthook is before

    threads.install()
    ours = threading.excepthook
    monkeypatch.setattr(threading, "excepthook", lambda args: ours(args))
    threads.uninstall()
    run("feeder", feed)

    assert printed == [ValueError]
    assert [thread.name for thread in threads.newest()] == ["feeder"]


def handled() -> tuple[str, FrameSnapshot | None]:
    """Return what another thread sees of this one."""
    training = threading.get_ident()
    with ThreadPoolExecutor(1) as recorder:
        return recorder.submit(handled_exception, training).result()


def test_the_exception_that_a_thread_handles_is_seen() -> None:
    """In `except` and in `finally`, with its line; not before, not after, and not the end of an iterator."""
    assert handled() == ("", None)
    seen = []
    try:
        try:
            feed()
        finally:
            seen.append(handled())
    except ValueError:
        seen.append(handled())

    for text, line in seen:
        assert text == "ValueError: no data"
        assert line is not None
        assert (line.file, line.function) == (__file__, "feed")

    assert len(seen) == 2
    assert handled() == ("", None)
    try:
        next(iter(()))
    except StopIteration:
        assert handled() == ("", None)
