"""Files on their way to the run's folder: what waits is bounded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.eventually import eventually
from traceml.database.file_contents import Content, LaterBytes, OpenFile
from traceml.recorder.sending import uploads
from traceml.recorder.sending.uploads import FileUpload, FileUploader


@pytest.fixture
def copying(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Hold each copy until the event is set."""
    go, copy = threading.Event(), uploads.copy_content

    def copy_later(*arguments: Any, **options: Any) -> dict[str, Any]:
        assert go.wait(60)
        return copy(*arguments, **options)

    monkeypatch.setattr(uploads, "copy_content", copy_later)
    yield go
    go.set()


@pytest.fixture
def uploader(tmp_path: Path) -> Iterator[FileUploader]:
    """An uploader whose run's folder is not known yet."""
    made = FileUploader((tmp_path / "stem",), lambda _: True, lambda: None, lambda _: None, tmp_path / "staging")
    yield made
    made.close(unlink=True)
    if made._thread is not None:
        made._thread.join(60)


def upload(content: Content) -> FileUpload:
    return FileUpload(0, "artifact", "x", None, 1, content, 100)


def in_thread(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def is_copied(uploader: FileUploader) -> bool:
    uploader.poll()
    return not uploader.copying


def test_a_call_waits_while_too_much_is_in_memory(
    uploader: FileUploader, copying: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until something is copied; one file alone may be as large as it is."""
    monkeypatch.setattr(uploads, "_HELD_BYTES", 10)
    first = upload(b"x" * 50)
    uploader.add(first)
    uploader.add(upload(b""))
    waiting = in_thread(lambda: uploader.add(upload(LaterBytes(lambda: b"later", 5))))

    waiting.join(0.1)
    assert waiting.is_alive()
    assert uploader.pending == 2

    copying.set()
    waiting.join(60)
    assert not waiting.is_alive()
    eventually(lambda: is_copied(uploader))
    assert first.content == b""  # while it waits for an aggregator, its copy on disk is enough


def test_few_files_of_the_user_are_open(
    uploader: FileUploader, copying: threading.Event, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A call waits for some of them; each may be removed when its call has returned."""
    monkeypatch.setattr(uploads, "_HELD_FILES", 2)

    def add(number: int) -> None:
        path = tmp_path / f"{number}.txt"
        path.write_text(str(number))
        uploader.add(upload(OpenFile.open(path)))
        path.unlink()

    add(0)
    add(1)
    waiting = in_thread(lambda: [add(2), add(3)])
    waiting.join(0.1)
    assert waiting.is_alive()

    copying.set()
    waiting.join(60)
    eventually(lambda: is_copied(uploader))
    assert {path.read_text() for path in (tmp_path / "stem.files").glob("[!.]*")} == {"0", "1", "2", "3"}
    assert not list((tmp_path / "staging").iterdir())


def test_a_copy_that_never_ends_holds_nobody_up_twice(
    uploader: FileUploader,
    copying: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As on a filesystem that does not answer. When it does again, files are taken again."""
    monkeypatch.setattr(uploads, "_HELD_BYTES", 10)
    monkeypatch.setattr(uploads, "_FULL_S", 0.01)
    uploader.add(upload(b"x" * 50))
    uploader.add(upload(b"second"))
    monkeypatch.setattr(uploads, "_FULL_S", 1e6)
    uploader.add(upload(b"third"))

    assert [record.getMessage() for record in caplog.records] == [
        f"artifact 'x' is not logged: the files before it could not be copied for {seconds} s" for seconds in (0, 10**6)
    ]
    copying.set()
    eventually(lambda: is_copied(uploader))
    uploader.add(upload(b"fourth"))
    eventually(lambda: is_copied(uploader))
    assert uploader.pending == 2


def test_its_thread_ends_with_it(uploader: FileUploader) -> None:
    """A process may have one recorder after the other."""
    uploader.add(upload(b"x"))
    thread = uploader._thread
    assert thread is not None

    uploader.close(unlink=True)

    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.parametrize("name", ["caf\udce9", "\ud800"])
def test_a_name_that_is_no_text_ends_nothing(uploader: FileUploader, name: str) -> None:
    """A file name of another encoding is as Python reads it."""
    uploader.add(FileUpload(0, "artifact", name, None, 1, b"x", 100))

    eventually(lambda: is_copied(uploader))
    assert uploader.pending == 1


def test_where_no_thread_starts_a_file_is_refused(
    uploader: FileUploader, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The script continues, and so does the next file, once a thread can be started."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        uploader.add(upload(b"x"))
    uploader.add(upload(b"y"))

    eventually(lambda: is_copied(uploader))
    assert [record.getMessage() for record in caplog.records] == [
        "artifact 'x' is not logged: it cannot be copied: can't start new thread"
    ]
