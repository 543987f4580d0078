"""Upload of files to the run's folder: copied by a thread, or sent in chunks where the folder is on another host.

A file is staged by the call, in memory: after a kill, the aggregator copies it. The thread copies it to a spool, under
a name made of its contents. Where the rank can reach the run's folder it is
moved there; else the aggregator gets it as rows of `blobs`. Its row in `logged` follows when it has arrived, so that
readers of the row find the file. Without an aggregator the spool stays next to the flight file, to be recovered later.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import queue
import shutil
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from traceml.clock import own_time as time
from traceml.database.file_contents import Content, OpenFile, RefusedFileError, copy_content, size_of
from traceml.database.flight.flight_folders import pending_row_path, spool_folder
from traceml.database.flight.row_rings import pack_map
from traceml.database.flight.staged_files import StagedFile
from traceml.fail_open import fail_open
from traceml.fork_gate import fork_gate
from traceml.process_ends import start_without_signals
from traceml.recorder.sending.blob_table import BlobTable
from traceml.run_folder import ARTIFACTS
from traceml.transport.folder_aggregator import folder_id
from traceml.trusted_files import make_trusted_folder

__all__ = ["FileUpload", "FileUploader"]

_log = logging.getLogger("traceml")

_POLL_S = 0.01
_HELD_BYTES = 128 << 20  # of contents that wait in memory; a call beyond that waits until some are copied
_HELD_FILES = 64  # of the user, held open: a process may have a thousand, and the script needs its own
_FULL_S = 60.0


@dataclass(slots=True)
class FileUpload:
    """One file to upload."""

    experiment: int
    kind: str  # `artifact` or `image`
    name: str
    step: int | None
    t_ns: int
    content: Content
    limit_bytes: int  # larger ones are refused
    suffix: str = ""
    staged: StagedFile | None = None
    note: Path | None = None  # copy of the row next to the file in the spool, until the file has arrived

    @property
    def held(self) -> _WaitingSize:
        """Amount that its contents take until they are copied."""
        return _WaitingSize(files=1) if isinstance(self.content, OpenFile) else _WaitingSize(size_of(self.content))

    def release(self) -> None:
        """Close an open file, and forget the contents, which are copied or refused."""
        if isinstance(self.content, OpenFile):
            self.content.close()

        self.content = b""
        if self.staged is not None:
            self.staged.remove()


class _WaitingSize(NamedTuple):
    """Amount that waits to be copied."""

    bytes_: int = 0
    files: int = 0

    def plus(self, other: _WaitingSize, sign: int = 1) -> _WaitingSize:
        """Return the sum, or the difference."""
        return _WaitingSize(self.bytes_ + sign * other.bytes_, self.files + sign * other.files)

    def leaves_room(self, other: _WaitingSize) -> bool:
        """Whether more can wait beside this; one alone may be as large as it is."""
        fits = self.bytes_ + other.bytes_ <= _HELD_BYTES or not (self.bytes_ and other.bytes_)
        return fits and self.files + other.files <= _HELD_FILES


class FileUploader:
    """Uploader of files on a thread of its own, which starts with the first file.

    Args:
        stems: candidate places of the spool: the flight file's stems, as for journals.
        staging: folder in memory for files that are not copied yet; None where there is none.
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
        staging: Path | None = None,
    ) -> None:
        self.blobs = BlobTable()
        self.moved_bytes = 0
        """Bytes copied so far: grows while there is progress."""
        self._stems, self._append, self._on_work, self._on_spool = stems, append, on_work, on_spool
        self._staging, self._stages = staging, False
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.pending = 0
        """Number of files that have not arrived."""
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None
        self._room = threading.Condition()  # of a lock that a signal handler may take again
        self._held = _WaitingSize()
        self._is_stuck = False
        self.left = 0
        """Number of files that were not copied when the recorder ended."""
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
        """Queue a file; returns at once, unless very much waits already. Refuses it if nothing of that is copied."""
        held = upload.held
        try:
            has_room = self._await_room(held)
        except OSError as error:  # no thread can be started
            self._refuse(upload, f"it cannot be copied: {error}")
            return

        if not has_room:
            self._refuse(upload, f"the files before it could not be copied for {_FULL_S:.0f} s")
            return

        self._stage(upload)
        self._queue.put(lambda: self._take(upload, held))

    def _await_room(self, held: _WaitingSize) -> bool:
        """Wait until there is room for a file, and count it; return False if there is none.

        Raises:
            OSError: there is no thread to make room.
        """
        with self._room:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="traceml-files", daemon=True)
                start_without_signals(thread)
                self._thread = thread

            timeout_s = 0.0 if self._is_stuck else _FULL_S
            self._is_stuck = not self._room.wait_for(lambda: self._held.leaves_room(held), timeout_s)
            if not self._is_stuck:
                self._held = self._held.plus(held)
                self.pending += 1

            return not self._is_stuck

    def _refuse(self, upload: FileUpload, why: str) -> None:
        self.refuse(upload, why)
        upload.release()

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
        self.left = self.copying
        for _, upload, facts in [*self._spooled, *self._sent]:
            self._finish(upload, facts)

    def close(self, *, unlink: bool) -> None:
        """End the thread, and remove the spool when everything has arrived."""
        self._queue.put(None)
        for folder in (self._spool, self._staging):
            if unlink and folder is not None:
                shutil.rmtree(folder, ignore_errors=True)

    def _stage(self, upload: FileUpload) -> None:
        """Keep in memory what a kill would lose, if there is room."""
        if self._staging is None:
            return

        try:
            if not self._stages:
                make_trusted_folder(self._staging, private=True)
                self._stages = True

            path = pending_row_path(self._staging, next(self._numbers))
            how: dict[str, Any] = {"limit_bytes": upload.limit_bytes, "suffix": upload.suffix}
            upload.staged = StagedFile.write(path, _row(upload.kind, upload), upload.content, **how)
        except Exception as error:  # noqa: BLE001 - the script must not fail for it
            _log.debug("%s %r is not staged: %r", upload.kind, upload.name, error)

    # --- on the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            with fail_open(_log, "recorder", "a file could not be logged"):
                work()

            self._on_work()

    def _take(self, upload: FileUpload, held: _WaitingSize) -> None:
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

        upload.release()
        with self._room:
            self._held = self._held.plus(held, -1)
            self._is_stuck = False
            self._room.notify_all()

    def _drop(self, upload: FileUpload, why: str) -> None:
        self.refuse(upload, why)
        self._settle(upload)

    def _copy(self, upload: FileUpload) -> tuple[Path, dict[str, Any]]:
        """Copy a file into the spool, under the name of its contents."""
        folder = self._folder()
        part = folder / f".{threading.get_ident()}.part"
        try:
            facts = copy_content(
                upload.content, part,
                kind=upload.kind, suffix=upload.suffix, limit_bytes=upload.limit_bytes, on_copied=self._note_copied,
            )  # fmt: skip
            # Its row follows when the file has arrived; after a crash before that, recovery reads it from here.
            upload.note = pending_row_path(folder, next(self._numbers))
            upload.note.write_bytes(pack_map(_row(upload.kind, upload) | facts))
            path = folder / facts["path"].rpartition("/")[2]
            part.rename(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

        return path, facts

    def _note_copied(self, size_bytes: int) -> None:
        self.moved_bytes += size_bytes

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
        self._settle(upload)

    def _settle(self, upload: FileUpload) -> None:
        if upload.note is not None:
            upload.note.unlink(missing_ok=True)

        with self._room:
            self.pending -= 1


def _row(kind: str, upload: FileUpload) -> dict[str, Any]:
    row = {"kind": kind, "t_ns": upload.t_ns, "experiment": upload.experiment, "name": upload.name}
    return row if upload.step is None else row | {"step": upload.step}


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
