"""Upload of files to the run's folder: copied by a thread, or sent in chunks where the folder is on another host.

A file is copied to a spool first, under a name made of its contents. Where the rank can reach the run's folder it is
moved there; else the aggregator gets it as rows of `blobs`. Its row in `logged` follows when it has arrived, so that
readers of the row find the file. Without an aggregator the spool stays next to the flight file, to be recovered later.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import logging
import os
import queue
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from traceml.database.flight.flight_folders import pending_row_path, spool_folder
from traceml.database.flight.row_rings import pack_map
from traceml.fail_open import fail_open
from traceml.fork_gate import fork_gate
from traceml.recorder.sending.blob_table import BlobTable
from traceml.run_folder import ARTIFACTS
from traceml.transport.folder_aggregator import folder_id
from traceml.trusted_files import make_trusted_folder

__all__ = ["FileUpload", "FileUploader", "RefusedFileError"]

_log = logging.getLogger("traceml")

_COPY_BYTES = 4 << 20
_POLL_S = 0.01
_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,16}")


class RefusedFileError(Exception):
    """A file or an image that is not accepted; the text says why."""


@dataclass(slots=True)
class FileUpload:
    """One file to upload."""

    experiment: int
    kind: str  # `artifact` or `image`
    name: str
    step: int | None
    t_ns: int
    # an open descriptor, or a function that returns the bytes; called on the upload thread
    source: int | Callable[[], bytes]
    limit_bytes: int  # larger ones are refused
    suffix: str = ""
    facts: dict[str, Any] = field(default_factory=dict)  # other fields of its row
    note: Path | None = None  # copy of the row next to the file in the spool, until the file has arrived

    def close(self) -> None:
        """Close the descriptor."""
        if isinstance(self.source, int):
            os.close(self.source)


class FileUploader:
    """Uploader of files on a thread of its own, which starts with the first file.

    Args:
        stems: candidate places of the spool: the flight file's stems, as for journals.
        append: appends a row to `logged`.
        on_work: called when there is work for the recorder's thread.
        on_spool: called with the folder in which the spool was created.
    """

    def __init__(
        self,
        stems: tuple[Path, ...],
        append: Callable[[dict[str, Any]], object],
        on_work: Callable[[], None],
        on_spool: Callable[[Path], object],
    ) -> None:
        self.blobs = BlobTable()
        self.moved_bytes = 0
        """Bytes copied so far: grows while there is progress."""
        self._stems, self._append, self._on_work, self._on_spool = stems, append, on_work, on_spool
        self._queue: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.pending = 0
        """Number of files that have not arrived."""
        self._notes = itertools.count()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._spool: Path | None = None
        self._artifacts: Path | None = None
        self._elsewhere = False
        self._spooled: deque[tuple[Path, FileUpload, dict[str, Any]]] = deque()
        self._sent: deque[tuple[int, FileUpload, dict[str, Any]]] = deque()

    @property
    def copying(self) -> int:
        """Number of them that are not in the spool yet."""
        return self.pending - len(self._spooled) - len(self._sent)

    @property
    def progress(self) -> int:
        """A number that grows while files make progress."""
        return self.moved_bytes + self.blobs.acked + self.blobs.sent - self.pending

    def connected(self, welcome: Mapping[str, Any]) -> None:
        """Read the run's folder from the welcome; it is used if the same folder is found here."""
        self._artifacts = _reachable(welcome)
        self._elsewhere = self._artifacts is None
        self._on_work()

    def add(self, upload: FileUpload) -> None:
        """Queue a file; returns at once."""
        with self._lock:
            self.pending += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="traceml-files", daemon=True)
                self._thread.start()

        self._queue.put(lambda: self._take(upload))

    def refuse(self, upload: FileUpload, why: str) -> None:
        """Report a refused file, to the run and to the user."""
        _log.warning("%s %r is not logged: %s", upload.kind, upload.name, why)
        self._append(_row("refused", upload) | {"what": upload.kind, "why": why})

    def poll(self) -> None:
        """Advance files that wait for a connection or for their chunks' arrival; on the recorder's thread."""
        while self._spooled and (self._artifacts is not None or self._elsewhere):
            self._queue.put(partial(self._deliver, *self._spooled.popleft()))

        while self._sent and self._sent[0][0] <= self.blobs.acked:
            _, upload, facts = self._sent.popleft()
            self._finish(upload, facts)

    def wait(
        self, advance: Callable[[], bool], *, timeout_s: float, stuck_s: float
    ) -> Literal["done", "stopped", "stuck"]:
        """Wait until all files have arrived.

        Args:
            advance: called every 10 ms; returns False to stop the wait.
            stuck_s: longest wait without progress.

        Returns:
            `stuck` after `stuck_s`, `stopped` by `advance` or after `timeout_s`, else `done`.
        """
        seen, since_s = self.progress, time.monotonic()
        deadline_s = since_s + timeout_s
        while self.pending:
            if time.monotonic() > deadline_s or not advance():
                return "stopped" if self.pending else "done"

            with fork_gate.opened():
                time.sleep(_POLL_S)

            if self.progress != seen:
                seen, since_s = self.progress, time.monotonic()
            elif time.monotonic() - since_s > stuck_s:
                return "stuck"

        return "done"

    def leave(self) -> None:
        """Append the rows of files that did not arrive: they stay in the spool, which is recovered later."""
        for _, upload, facts in [*self._spooled, *self._sent]:
            self._finish(upload, facts)

    def close(self, *, unlink: bool) -> None:
        """Remove the spool when everything has arrived."""
        if unlink and self._spool is not None:
            shutil.rmtree(self._spool, ignore_errors=True)

    # --- on the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            work = self._queue.get()
            with fail_open(_log, "recorder", "a file could not be logged"):
                work()

            self._on_work()

    def _take(self, upload: FileUpload) -> None:
        try:
            path, facts = self._copy(upload)
        except RefusedFileError as error:
            self._drop(upload, str(error))
        except OSError as error:
            self._drop(upload, f"it cannot be copied: {error.strerror or error}")
        except Exception as error:  # noqa: BLE001 - converting a user's object to an image may raise anything
            self._drop(upload, f"{type(error).__name__}: {error}")
        else:
            self._deliver(path, upload, facts)
        finally:
            upload.close()

    def _drop(self, upload: FileUpload, why: str) -> None:
        self.refuse(upload, why)
        if upload.note is not None:
            upload.note.unlink(missing_ok=True)

        self._count_down()

    def _copy(self, upload: FileUpload) -> tuple[Path, dict[str, Any]]:
        """Copy a file into the spool, under the name of its contents."""
        folder = self._folder()
        part = folder / f".{threading.get_ident()}.part"
        with fork_gate:
            digest, size = hashlib.sha256(), 0

        try:
            with part.open("wb") as file:
                for data in _chunks_of(upload.source):
                    size += len(data)
                    if size > upload.limit_bytes:
                        raise RefusedFileError(f"it has more than {upload.limit_bytes} bytes (max_{upload.kind}_bytes)")

                    digest.update(data)
                    file.write(data)
                    self.moved_bytes += len(data)

            name = f"{digest.hexdigest()}{upload.suffix if _SUFFIX.fullmatch(upload.suffix) else ''}"
            facts = {"path": f"{ARTIFACTS}/{name}", "size": size, "sha256": digest.hexdigest()} | upload.facts
            # Its row follows when the file has arrived; after a crash before that, recovery reads it from here.
            upload.note = pending_row_path(folder, next(self._notes))
            upload.note.write_bytes(pack_map(_row(upload.kind, upload) | facts))
            part.rename(folder / name)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

        return folder / name, facts

    def _folder(self) -> Path:
        """Return the spool; create it in the first place where that is possible."""
        if self._spool is not None:
            return self._spool

        refused: OSError | None = None
        for stem in self._stems:
            folder = spool_folder(stem)
            try:
                make_trusted_folder(stem.parent)
                make_trusted_folder(folder, private=True)
            except OSError as error:
                refused = refused or error
                continue

            self._spool = folder
            self._on_spool(stem.parent)
            return folder

        raise refused or OSError(errno.ENOENT, "there is no folder for its copy")

    def _deliver(self, path: Path, upload: FileUpload, facts: dict[str, Any]) -> None:
        """Move a spooled file to the run's folder, or keep it until the folder is known."""
        if self._artifacts is not None:
            try:
                self._artifacts.mkdir(exist_ok=True)
                _move(path, self._artifacts / path.name)
            except OSError as error:
                self._drop(upload, f"it cannot be moved into the run's folder: {error.strerror or error}")
            else:
                self._finish(upload, facts)
        elif self._elsewhere:
            self._sent.append((self.blobs.add(path, facts["size"]), upload, facts))
        else:
            self._spooled.append((path, upload, facts))

    def _finish(self, upload: FileUpload, facts: dict[str, Any]) -> None:
        self._append(_row(upload.kind, upload) | facts)
        if upload.note is not None:
            upload.note.unlink(missing_ok=True)

        self._count_down()

    def _count_down(self) -> None:
        with self._lock:
            self.pending -= 1


def _row(kind: str, upload: FileUpload) -> dict[str, Any]:
    row = {"kind": kind, "t_ns": upload.t_ns, "experiment": upload.experiment, "name": upload.name}
    return row if upload.step is None else row | {"step": upload.step}


def _chunks_of(source: int | Callable[[], bytes]) -> Any:
    if callable(source):
        yield source()
        return

    while data := os.read(source, _COPY_BYTES):
        yield data


def _move(path: Path, target: Path) -> None:
    """Move a file, also to another filesystem; the target is complete or absent at every moment."""
    if target.exists():  # the same contents, logged before under another name
        path.unlink(missing_ok=True)
        return

    try:
        path.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise

        part = target.with_name(f".{target.name}.part")
        shutil.copyfile(path, part)
        part.replace(target)
        path.unlink(missing_ok=True)


def _reachable(welcome: Mapping[str, Any]) -> Path | None:
    """Return the run's artifacts folder, if this host sees the same folder as the aggregator."""
    identity, run_dir = welcome.get("run_dir_id"), welcome.get("run_dir")
    if not run_dir or not isinstance(identity, list | tuple):
        return None

    is_same = list(identity) == folder_id(Path(run_dir)) != []
    return Path(run_dir, ARTIFACTS) if is_same and os.access(run_dir, os.W_OK | os.X_OK) else None
