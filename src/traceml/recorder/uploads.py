"""The way of files into the run's folder: copied by a thread of ours, or sent in pieces where the folder is elsewhere.

A file is copied to a spool first, under a name made of its contents. Where the rank can reach the run's folder it is
moved there; else the aggregator gets it as rows of `blobs`. Its row in `logged` follows when it has arrived, so whoever
reads that row finds the file. Without any aggregator the spool stays beside the flight file, for whoever recovers that.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import logging
import os
import queue
import re
import shutil
import stat
import threading
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgpack

from traceml.clock import boot_id
from traceml.database.postmortem import ARTIFACTS, pending_row_path, spool_folder
from traceml.database.rings import RowSlice
from traceml.database.schema import BLOBS
from traceml.fail_open import fail_open

__all__ = ["BlobTable", "FileUpload", "FileUploader", "RefusedFileError"]

_log = logging.getLogger("traceml")

_COPY_BYTES = 4 << 20
_PIECE_BYTES = 1 << 20
_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,16}")


class RefusedFileError(Exception):
    """A file or an image that is not taken; the text says why."""


@dataclass(slots=True)
class FileUpload:
    """One file to be taken.

    Attributes:
        experiment: number of the experiment that it belongs to.
        kind: `artifact` or `image`.
        name: what the user calls it.
        step, t_ns: of the call.
        source: an open descriptor, or what returns the bytes; called on the thread, where it may take its time.
        limit_bytes: larger ones are refused.
        suffix: of the file's name.
        facts: what else the row says.
        note: where the row is kept meanwhile, beside the file in the spool.
    """

    experiment: int
    kind: str
    name: str
    step: int | None
    t_ns: int
    source: int | Callable[[], bytes]
    limit_bytes: int
    suffix: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    note: Path | None = None

    def close(self) -> None:
        """Close the descriptor."""
        if isinstance(self.source, int):
            os.close(self.source)


class BlobTable:
    """Files as rows of pieces, for an aggregator whose folder is elsewhere; the spool is their memory."""

    name = BLOBS.name

    def __init__(self) -> None:
        self.appended = self.sent = self.dropped = 0
        self._acked = 0
        self._files: deque[tuple[int, int, Path, int]] = deque()  # (first row, rows, path, bytes)
        self._ends: dict[str, int] = {}  # of each file, by its name, which is made of its contents

    @property
    def acked(self) -> int:
        """Rows below this number have arrived."""
        return self._acked

    @acked.setter
    def acked(self, seq: int) -> None:
        self._acked = seq
        while self._files and self._files[0][0] + self._files[0][1] <= seq:
            self._files.popleft()[2].unlink(missing_ok=True)

    def add(self, path: Path, size: int) -> int:
        """Append a file's pieces, unless the same file is here; return the number of the row after its last."""
        known = self._ends.get(path.name)
        if known is not None:
            if known <= self._acked:  # it has arrived and is gone from the spool: this is another copy
                path.unlink(missing_ok=True)

            return known

        pieces = max(1, -(-size // _PIECE_BYTES))
        self._files.append((self.appended, pieces, path, size))
        self.appended += pieces
        self._ends[path.name] = self.appended
        return self.appended

    def take(self, cursor: int, limit: int = 1) -> RowSlice:  # noqa: ARG002 - one piece is enough for a frame
        """Return the next piece at or after a cursor."""
        for first, n, path, size in list(self._files):
            if cursor < first + n:
                number = max(cursor, first)
                return RowSlice(number, 1, _piece(path, (number - first) * _PIECE_BYTES, size))

        return RowSlice(max(cursor, self.appended), 0, b"")


class FileUploader:
    """Takes files on a thread of its own, begun with the first.

    Args:
        stems: where the spool may lie: the flight file's stems, as journals have.
        append: appends a row to `logged`.
        on_work: called when something happened that the recorder's thread should look at.
    """

    def __init__(
        self, stems: tuple[Path, ...], append: Callable[[dict[str, Any]], object], on_work: Callable[[], None]
    ) -> None:
        self.blobs = BlobTable()
        self.moved_bytes = 0
        """How much was copied so far: grows while there is progress."""
        self._stems, self._append, self._on_work = stems, append, on_work
        self._queue: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._unfinished = 0
        self._notes = itertools.count()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._spool: Path | None = None
        self._artifacts: Path | None = None
        self._elsewhere = False
        self._spooled: deque[tuple[Path, FileUpload, dict[str, Any]]] = deque()
        self._sent: deque[tuple[int, FileUpload, dict[str, Any]]] = deque()

    @property
    def pending(self) -> int:
        """How many files are under way."""
        return self._unfinished

    @property
    def copying(self) -> int:
        """How many of them are not in the spool yet."""
        return self._unfinished - len(self._spooled) - len(self._sent)

    @property
    def progress(self) -> int:
        """A number that grows while files get on."""
        return self.moved_bytes + self.blobs.acked + self.blobs.sent - self._unfinished

    def connected(self, welcome: Mapping[str, Any]) -> None:
        """Learn where the run's folder is; it is used when the very same folder is found here."""
        self._artifacts = _reachable(welcome)
        self._elsewhere = self._artifacts is None
        self._on_work()

    def add(self, job: FileUpload) -> None:
        """Take a file; returns at once."""
        with self._lock:
            self._unfinished += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="traceml-files", daemon=True)
                self._thread.start()

        self._queue.put(lambda: self._take(job))

    def refuse(self, job: FileUpload, why: str) -> None:
        """Say that a file is not taken: in the run, and to the user."""
        _log.warning("%s %r is not logged: %s", job.kind, job.name, why)
        self._append(_row("refused", job) | {"what": job.kind, "why": why})

    def turn(self) -> None:
        """See to files that wait for a connection or for their pieces' arrival; on the recorder's thread."""
        while self._spooled and (self._artifacts is not None or self._elsewhere):
            self._queue.put(partial(self._deliver, *self._spooled.popleft()))

        while self._sent and self._sent[0][0] <= self.blobs.acked:
            _, job, facts = self._sent.popleft()
            self._finish(job, facts)

    def leave(self) -> None:
        """Append the rows of what could not be brought anywhere: it lies in the spool, for whoever recovers that."""
        for _, job, facts in [*self._spooled, *self._sent]:
            self._finish(job, facts)

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

    def _take(self, job: FileUpload) -> None:
        try:
            path, facts = self._copy(job)
        except RefusedFileError as error:
            self._drop(job, str(error))
        except OSError as error:
            self._drop(job, f"it cannot be copied: {error.strerror or error}")
        except Exception as error:  # noqa: BLE001 - what makes an image of a user's object may raise anything
            self._drop(job, f"{type(error).__name__}: {error}")
        else:
            self._deliver(path, job, facts)
        finally:
            job.close()

    def _drop(self, job: FileUpload, why: str) -> None:
        self.refuse(job, why)
        if job.note is not None:
            job.note.unlink(missing_ok=True)

        self._count_down()

    def _copy(self, job: FileUpload) -> tuple[Path, dict[str, Any]]:
        """Copy a file into the spool, under the name of its contents."""
        folder = self._folder()
        part = folder / f".{threading.get_ident()}.part"
        digest, size = hashlib.sha256(), 0
        try:
            with part.open("wb") as file:
                for data in _pieces_of(job.source):
                    size += len(data)
                    if size > job.limit_bytes:
                        raise RefusedFileError(f"it has more than {job.limit_bytes} bytes (max_{job.kind}_bytes)")

                    digest.update(data)
                    file.write(data)
                    self.moved_bytes += len(data)

            name = f"{digest.hexdigest()}{job.suffix if _SUFFIX.fullmatch(job.suffix) else ''}"
            facts = {"path": f"{ARTIFACTS}/{name}", "size": size, "sha256": digest.hexdigest()} | job.facts
            # Its row follows when the file has arrived; if we are killed before, who recovers the file finds it here.
            job.note = pending_row_path(folder, next(self._notes))
            job.note.write_bytes(msgpack.packb(_row(job.kind, job) | facts))
            part.rename(folder / name)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

        return folder / name, facts

    def _folder(self) -> Path:
        """Return the spool, made where that is possible."""
        if self._spool is not None:
            return self._spool

        refused: OSError | None = None
        for stem in self._stems:
            folder = spool_folder(stem)
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                refused = refused or error
                continue

            self._spool = folder
            return folder

        raise refused or OSError(errno.ENOENT, "there is no folder for its copy")

    def _deliver(self, path: Path, job: FileUpload, facts: dict[str, Any]) -> None:
        """Bring a spooled file to the run's folder, or let it wait until it is known where that is."""
        if self._artifacts is not None:
            try:
                self._artifacts.mkdir(exist_ok=True)
                _move(path, self._artifacts / path.name)
            except OSError as error:
                self._drop(job, f"it cannot be brought into the run's folder: {error.strerror or error}")
            else:
                self._finish(job, facts)
        elif self._elsewhere:
            self._sent.append((self.blobs.add(path, facts["size"]), job, facts))
        else:
            self._spooled.append((path, job, facts))

    def _finish(self, job: FileUpload, facts: dict[str, Any]) -> None:
        self._append(_row(job.kind, job) | facts)
        if job.note is not None:
            job.note.unlink(missing_ok=True)

        self._count_down()

    def _count_down(self) -> None:
        with self._lock:
            self._unfinished -= 1


def _row(kind: str, job: FileUpload) -> dict[str, Any]:
    row = {"kind": kind, "t_ns": job.t_ns, "experiment": job.experiment, "name": job.name}
    return row if job.step is None else row | {"step": job.step}


def _pieces_of(source: int | Callable[[], bytes]) -> Any:
    if callable(source):
        yield source()
        return

    while data := os.read(source, _COPY_BYTES):
        yield data


def _move(path: Path, target: Path) -> None:
    """Move a file, also to another filesystem; at every moment the target is whole or not there."""
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
    """Return the run's artifacts folder, if what the aggregator writes to is the same folder here."""
    told, run_dir = welcome.get("run_dir_id"), welcome.get("run_dir")
    if not run_dir or not isinstance(told, list | tuple):
        return None

    with contextlib.suppress(OSError):
        status = Path(run_dir).stat()
        same = list(told) == [boot_id(), status.st_dev, status.st_ino]
        if same and stat.S_ISDIR(status.st_mode) and os.access(run_dir, os.W_OK | os.X_OK):
            return Path(run_dir, ARTIFACTS)

    return None


def _piece(path: Path, offset: int, size: int) -> bytes:
    """Return one row of `blobs`, compressed where that gains a tenth."""
    row: dict[str, Any] = {"id": path.name, "offset": offset, "size": size}
    try:
        with path.open("rb") as file:
            data = os.pread(file.fileno(), _PIECE_BYTES, offset)
    except OSError as error:
        return bytes(msgpack.packb(row | {"error": str(error)}))

    packed = zlib.compress(data, 1)
    if len(packed) < 0.9 * len(data):
        return bytes(msgpack.packb(row | {"data": packed, "zlib": True}))

    return bytes(msgpack.packb(row | {"data": data}))
