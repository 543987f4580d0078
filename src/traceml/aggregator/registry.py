"""Which runs there are: finds the run of a newcomer, in memory or on disk, or begins one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from traceml import ids
from traceml.aggregator.active_run import ActiveRun
from traceml.aggregator.recovery import DeadFlight, dead_flights
from traceml.aggregator.streams import Incarnation, Stream
from traceml.database.flight import FALLBACK_FOLDER
from traceml.database.store_file import STORE_NAME
from traceml.errors import StoreError
from traceml.ids import new_run_id
from traceml.transport.hello import Hello
from traceml.transport.server import RefusedError

__all__ = ["Registry", "prepare_runs_dir", "safe_run_id"]

# In the runs folder: one small file per run that is not over, from which an aggregator that comes after learns its
# folder. Named by the job key's hash, as a key may hold anything.
_OPEN = ".open"
_REMEMBERED = 100

_log = logging.getLogger("traceml")


def safe_run_id(text: str) -> str:
    """Return a run id as the user gave it, without what cannot be in a folder's name.

    Raises:
        RefusedError: nothing is left of it.
    """
    try:
        return ids.safe_run_id(text)
    except ValueError as error:
        raise RefusedError(str(error)) from error


def prepare_runs_dir(runs_dir: Path) -> None:
    """Make the runs folder and see that it can be written.

    Raises:
        StoreError: it cannot; the text says why and what to do.
    """
    probe = runs_dir / f".probe-{os.getpid()}"
    try:
        runs_dir.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return  # space can be made while we run; rows wait in the ranks until then

        raise StoreError(
            f"cannot write the runs folder {runs_dir}: {error.strerror}. "
            "Choose another one by --runs-dir or TRACEML_RUNS_DIR."
        ) from error


class Registry:
    """The runs of one aggregator.

    Args:
        runs_dir: folder of the runs.
    """

    def __init__(self, runs_dir: Path) -> None:
        self.runs_dir = runs_dir.absolute()
        self._runs: list[ActiveRun] = []
        self._by_key: dict[str, ActiveRun] = {}

    @property
    def open_runs(self) -> list[ActiveRun]:
        """The runs that are not over."""
        return [run for run in self._runs if not run.ended]

    def find(self, text: str) -> ActiveRun | None:
        """Return a run by job key or id; without a text the newest one."""
        if not text:
            return self._runs[-1] if self._runs else None

        found = self._by_key.get(text)
        return found or next((run for run in reversed(self._runs) if run.id == text), None)

    def known(self, hello: Hello) -> tuple[ActiveRun, Stream] | None:
        """Return the run and stream of a recorder that was here before, in this aggregator's life or an earlier one."""
        who, key = Incarnation.of(hello), _key(hello)
        for run in reversed(self._runs):
            stream = run.stream_of(who, hello.rank)
            if stream is not None and (run.key == key or run.key.startswith(f"{key}#")):
                return run, stream

        left = self._resume(hello)
        stream = left.stream_of(who, hello.rank) if left is not None else None
        return (left, stream) if left is not None and stream is not None else None

    def place(self, hello: Hello) -> tuple[ActiveRun, int]:
        """Return the run and the attempt which a newcomer belongs to; a new run when no other will do.

        Raises:
            RefusedError: its run cannot be made; the text says why.
        """
        if hello.parent and (run := self._run_of_parent(hello)) is not None:
            return run, run.attempt_for(hello) or 0

        other = self._by_key.get(_key(hello))
        if other is not None:
            attempt = other.attempt_for(hello)
            if attempt is not None:
                return other, attempt

        taken = other is not None and (bool(hello.run_id) or not other.ended)
        run_id = new_run_id(hello.name or "run") if taken or not hello.run_id else safe_run_id(hello.run_id)
        # While the run of that key goes on, this one is found by its recorder alone.
        key = f"{_key(hello)}#{run_id}" if taken else _key(hello)
        run = self.begin(run_id, key, named=bool(hello.run_id) and not taken)
        if taken and other is not None and other.is_followed_by(hello):
            self._by_key[_key(hello)] = run  # the job's other ranks come to its next training as well

        return run, run.attempt_for(hello) or hello.attempt

    def _run_of_parent(self, hello: Hello) -> ActiveRun | None:
        """Return the run of the process that a forked child only logs for."""
        runs = (run for run in reversed(self._runs) if run.key.split("#")[0] == _key(hello))
        return next((run for run in runs if any(each.who.recorder == hello.parent for each in run.streams)), None)

    def begin(self, run_id: str, key: str, *, named: bool, is_new: bool = True) -> ActiveRun:
        """Open a run's folder, new or left by an earlier aggregator.

        Args:
            run_id: the folder's name.
            key: the job key by which its ranks find it.
            named: whether the user chose its id.
            is_new: whether a job begins or goes on with it: then `latest` means it from now on.

        Raises:
            RefusedError: it cannot be made or written.
        """
        # Marked first: killed at any moment from here on, an aggregator leaves a folder that the next one finds.
        was_marked = _read_marker(_marker(self.runs_dir, key)) is not None
        self._mark(key, run_id, named=named)
        try:
            run = ActiveRun(self.runs_dir / run_id, key, named=named)
        except StoreError as error:
            if not was_marked:  # else it may be the mark of an aggregator that lives
                self._unmark(key)

            raise RefusedError(str(error), retry=_passes(error)) from error

        self._runs.append(run)
        self._by_key[key] = run
        if is_new or not (self.runs_dir / "latest").exists():
            self._point_latest_at(run)

        return run

    def over(self, run: ActiveRun) -> None:
        """Note that a run has been closed."""
        self._unmark(run.key)
        for old in [each for each in self._runs if each.ended][:-_REMEMBERED]:
            self._runs.remove(old)
            self._by_key = {key: each for key, each in self._by_key.items() if each is not old}

    def discard(self, run: ActiveRun) -> None:
        """Remove a run to which no rank has come: an aggregator that was killed may leave one."""
        self.over(run)
        self._runs.remove(run)
        self._by_key.pop(run.key, None)
        run.remove()

    def reopened(self, run: ActiveRun) -> None:
        """Note that a closed run goes on."""
        self._mark(run.key, run.id, named=run.named)

    def adopt_orphans(self) -> None:
        """Take up the runs that an aggregator which is gone has left open here."""
        for marker in sorted((self.runs_dir / _OPEN).glob("*.json")):
            left = _read_marker(marker)
            if left is None or left["job"] in self._by_key:
                continue

            try:
                self.begin(left["run"], left["job"], named=bool(left.get("named")), is_new=False)
            except RefusedError as error:  # another aggregator is at it, or the folder is gone bad
                _log.info("not taking up run %s: %s", left["run"], error)

    def adopt_flights(self) -> list[ActiveRun]:
        """Take up what dead ranks have logged here and nobody has stored: their aggregator was gone, or never there.

        Returns:
            the runs that got something; they are open.
        """
        adopted: dict[ActiveRun, None] = {}
        if not self._left_here():
            return []

        with self._adopting():
            for found in self._left_here():
                run = self._run_of(found)
                if run is not None and found.path not in run.recovered:
                    run.adopt(found)
                    adopted[run] = None

        return list(adopted)

    def _left_here(self) -> list[DeadFlight]:
        """Return the flights of dead ranks with something logged whose run is, or would have been, in this folder."""
        return [
            found
            for found in dead_flights(None, self.runs_dir / FALLBACK_FOLDER)
            if found.image.holds_user_rows
            and (found.run_dir.parent if found.run_dir is not None else found.runs_dir) == self.runs_dir
        ]

    @contextlib.contextmanager
    def _adopting(self) -> Iterator[None]:
        """Be the only one that takes up flights here: two would each make a run of the same rows."""
        try:
            folder = self.runs_dir / _OPEN
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / "adopting.lock").open("ab")
        except OSError as error:  # a full disk, say: what is left behind waits for better times
            _log.debug("no lock in %s: %s", self.runs_dir, error)
            yield
            return

        with file:
            with contextlib.suppress(OSError):  # a network file system that cannot lock
                fcntl.flock(file, fcntl.LOCK_EX)

            yield

    def _run_of(self, found: DeadFlight) -> ActiveRun | None:
        """Return the run that a dead rank's rows belong to, opened; None when it is somebody else's or was removed."""
        known = self._by_key.get(found.job)
        if known is not None:
            return known

        run_id = self._run_id_of(found)
        if run_id is None:
            return None

        try:
            return self.begin(run_id, found.job, named=bool(found.run_id), is_new=False)
        except RefusedError as error:  # another aggregator is at it
            _log.info("not taking up %s: %s", found.path, error)
            return None

    def _run_id_of(self, found: DeadFlight) -> str | None:
        left = _read_marker(_marker(self.runs_dir, found.job))
        if found.run_dir is not None:
            return found.run_dir.name if found.run_dir.exists() else None  # somebody has removed the run
        if left is not None and left["job"] == found.job:
            return left["run"]
        if not found.path.exists():  # somebody has just finished with it
            return None

        return safe_run_id(found.run_id) if found.run_id else new_run_id(found.name)

    def _resume(self, hello: Hello) -> ActiveRun | None:
        """Take up a newcomer's run from disk, if an earlier aggregator has left it there."""
        key = _key(hello)
        if key in self._by_key:
            return None

        if hello.run_id:
            run_id = safe_run_id(hello.run_id)
            if not (self.runs_dir / run_id / STORE_NAME).exists():
                return None
        else:
            left = _read_marker(_marker(self.runs_dir, key))
            if left is None or left["job"] != key:
                return None

            run_id = left["run"]

        return self.begin(run_id, key, named=bool(hello.run_id))

    def _mark(self, key: str, run_id: str, *, named: bool) -> None:
        marker = _marker(self.runs_dir, key)
        draft = marker.with_suffix(f".{os.getpid()}")
        try:
            marker.parent.mkdir(exist_ok=True)
            draft.write_text(json.dumps({"job": key, "run": run_id, "named": named}))
            draft.replace(marker)
        except OSError as error:
            _log.warning("run %s could not be found again after a restart of the aggregator: %s", run_id, error)
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)

    def _unmark(self, key: str) -> None:
        with contextlib.suppress(OSError):  # at worst the next aggregator looks at a run that is over
            _marker(self.runs_dir, key).unlink(missing_ok=True)

    def _point_latest_at(self, run: ActiveRun) -> None:
        latest = self.runs_dir / "latest"
        draft = self.runs_dir / f".latest-{os.getpid()}"
        try:
            draft.unlink(missing_ok=True)
            draft.symlink_to(run.id)
            draft.replace(latest)
        except OSError as error:
            _log.warning("%s does not point at run %s: %s", latest, run.id, error)


def _key(hello: Hello) -> str:
    return hello.run_id or hello.run


def _passes(error: StoreError) -> bool:
    cause = error.__cause__
    full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
    return full or "full" in str(cause)


def _marker(runs_dir: Path, key: str) -> Path:
    return runs_dir / _OPEN / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _read_marker(path: Path) -> dict[str, str] | None:
    try:
        left = json.loads(path.read_text())
        return left if isinstance(left.get("job"), str) and safe_run_id(left["run"]) == left["run"] else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RefusedError) as error:
        _log.warning("ignoring %s: %r", path, error)
        return None
