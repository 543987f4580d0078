"""Files on their way to the run's folder: what waits is bounded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.eventually import eventually
from traceml.database.file_contents import Content, OpenFile
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
def uploader(tmp_path: Path) -> FileUploader:
    """An uploader whose run's folder is not known yet."""
    return FileUploader((tmp_path / "stem",), lambda _: True, lambda: None, lambda _: None, tmp_path / "staging")


def upload(content: Content) -> FileUpload:
    return FileUpload(0, "artifact", "x", None, 1, content, 100)


def in_thread(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def test_a_call_waits_while_too_much_is_in_memory(
    uploader: FileUploader, copying: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until something is copied; one file alone may be as large as it is."""
    monkeypatch.setattr(uploads, "_HELD_BYTES", 10)
    uploader.add(upload(b"x" * 50))
    uploader.add(upload(lambda: b"later"))  # nothing of it is in memory
    waiting = in_thread(lambda: uploader.add(upload(b"x")))

    waiting.join(0.1)
    assert waiting.is_alive()
    assert uploader.pending == 2

    copying.set()
    waiting.join(60)
    assert not waiting.is_alive()
    eventually(lambda: not uploader.copying)


def test_few_files_of_the_user_are_open(
    uploader: FileUploader, copying: threading.Event, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The others are opened again when they are copied."""
    monkeypatch.setattr(uploads, "_HELD_OPEN", 2)
    begun = []
    for number in range(4):
        path = tmp_path / f"{number}.txt"
        path.write_text(str(number))
        begun.append(upload(OpenFile.open(path)))
        uploader.add(begun[-1])

    opened = [isinstance(each.content, OpenFile) and each.content.descriptor is not None for each in begun]
    assert opened == [True, True, False, False]

    copying.set()
    eventually(lambda: not uploader.copying)
    copies = {path.read_text() for path in (tmp_path / "stem.files").glob("[!.]*")}
    assert copies == {"0", "1", "2", "3"}
    assert not list((tmp_path / "staging").iterdir())
