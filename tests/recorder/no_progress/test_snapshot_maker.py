"""Other threads of a rank that run the user's code."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from traceml.database.flight.flight import FlightFile
from traceml.database.snapshots.rank_snapshot import RankSnapshot, ThreadSnapshot
from traceml.recorder.no_progress import snapshot_maker
from traceml.recorder.no_progress.snapshot_maker import SnapshotMaker, other_threads
from traceml.recorder.user_code import UserCode

NO_THREAD = 1  # identifiers of threads are addresses


class Upload:
    """A thread that waits in code of the user."""

    def __init__(self) -> None:
        self.ready, self.done = threading.Event(), threading.Event()

    def wait(self) -> None:
        self.ready.set()
        self.done.wait()


@contextmanager
def uploading(name: str, *, daemon: bool) -> Iterator[None]:
    upload = Upload()
    thread = threading.Thread(target=upload.wait, name=name, daemon=daemon)
    thread.start()
    upload.ready.wait()
    try:
        yield
    finally:
        upload.done.set()
        thread.join()


def snapshots() -> list[ThreadSnapshot]:
    """Return what the recorder's thread sees."""
    training = threading.get_ident()
    with ThreadPoolExecutor(1) as recorder:
        return list(recorder.submit(other_threads, training, UserCode()).result())


def test_a_thread_is_reported_with_its_line_of_user_code() -> None:
    """And those first that the interpreter waits for at its end."""
    with uploading("prefetch", daemon=True), uploading("upload", daemon=False):
        found = [snapshot for snapshot in snapshots() if snapshot.name in ("prefetch", "upload")]

    assert [(snapshot.name, snapshot.is_daemon) for snapshot in found] == [("upload", False), ("prefetch", True)]
    assert found[0].line is not None
    assert (found[0].line.function, found[0].line.is_user) == ("Upload.wait", True)
    assert found[0].line.file == __file__


def test_a_thread_without_user_code_is_reported_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter waits for it, and its name is what is known; before, it may be any library's."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait, name="prefetcher")
    thread.start()
    try:
        before = [snapshot.name for snapshot in snapshots()]
        monkeypatch.setattr(threading.main_thread(), "is_alive", lambda: False)
        found = [snapshot for snapshot in snapshots() if snapshot.name == "prefetcher"]
    finally:
        done.set()
        thread.join()

    assert "prefetcher" not in before
    assert found == [ThreadSnapshot(name="prefetcher")]


def test_a_librarys_thread_in_a_collective_is_reported() -> None:
    """As that of an asynchronous checkpoint, which may use the training's process group."""
    upload = Upload()
    file = "/venv/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py"
    called: dict[str, Any] = {"upload": upload}
    exec(compile("def gather_object():\n    upload.ready.set()\n    upload.done.wait()", file, "exec"), called)
    thread = threading.Thread(target=called["gather_object"], name="checkpoint")
    thread.start()
    upload.ready.wait()
    try:
        (found,) = [each for each in snapshots() if each.name == "checkpoint"]
    finally:
        upload.done.set()
        thread.join()

    assert found.collective == "gather_object"


def test_a_thread_that_a_library_started_is_reported_without_a_name() -> None:
    """As those of torch.distributed.rpc, which Python's list of threads lacks."""
    upload = Upload()
    _thread.start_new_thread(upload.wait, ())
    upload.ready.wait()
    try:
        (found,) = [each for each in snapshots() if each.line is not None and each.line.function == "Upload.wait"]
    finally:
        upload.done.set()

    assert (found.name, found.is_daemon) == ("", True)


def made(folder: Path, thread: Callable[[], int] = threading.get_ident) -> RankSnapshot:
    """Return a snapshot of this process after 7 s without progress."""
    flight = FlightFile.create(folder, {}, capacities={"steps": 64})
    maker = SnapshotMaker(
        flight,
        rank=lambda: 3,
        thread=thread,
        user=UserCode(),
        is_evaluating=lambda: False,
        data=lambda: None,
        groups=tuple,
        workers=lambda _quiet_s, _awaited: (),
        failed_threads=tuple,
    )
    try:
        return maker.make(7.0, has_output=False)
    finally:
        flight.close(unlink=True)


def test_a_training_thread_that_has_ended_leaves_the_main_thread(tmp_path: Path) -> None:
    """The one that started it may wait for it forever, and is no thread beside it."""
    snapshot = made(tmp_path, lambda: NO_THREAD)

    assert snapshot.frames
    assert snapshot.user_line is not None
    assert "MainThread" not in [thread.name for thread in snapshot.threads]


def test_a_part_that_cannot_be_read_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It depends on private attributes of libraries; without the snapshot no hang of the job would be seen."""

    def fail(*_: object, **__: object) -> None:
        raise AttributeError("pid")

    for name in ("awaited_lock", "dead_sender", "open_transfer", "awaited_loader"):
        monkeypatch.setattr(snapshot_maker, name, fail)

    snapshot = made(tmp_path)

    assert (snapshot.rank, snapshot.quiet_s, snapshot.blocker, snapshot.groups) == (3, 7.0, None, ())
    assert snapshot.user_line is not None


def test_the_training_thread_and_idle_pools_are_not_reported() -> None:
    """A pool's thread without work runs none of the user's code."""
    with ThreadPoolExecutor(1, thread_name_prefix="idle") as pool:
        pool.submit(int).result()
        names = {snapshot.name for snapshot in snapshots()}

    assert not any(name.startswith("idle") for name in names)
    assert threading.current_thread().name not in names
