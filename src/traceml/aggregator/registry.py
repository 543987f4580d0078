"""Registry of runs: finds the run of a new rank, in memory or on disk, or begins one."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import socket
from pathlib import Path

from traceml import ids
from traceml.aggregator.active_run import ActiveRun
from traceml.aggregator.recovery import DeadFlight, dead_flights
from traceml.aggregator.recovery_lock import RecoveryLock
from traceml.aggregator.streams.stream import Incarnation, RankStream
from traceml.database.flight.flight_owner import SILENCE_S
from traceml.errors import StoreBusyError, StoreError
from traceml.ids import new_run_id
from traceml.run_folder import OPEN_FOLDER, STORE_NAME, unwritable_text
from traceml.transport.folder_aggregator import create_runs_dir, serving_hosts
from traceml.transport.hello import Hello
from traceml.transport.server import RefusedError
from traceml.trusted_files import replace_file, replace_link

__all__ = ["Registry", "prepare_runs_dir", "safe_run_id"]

# Runs that are over are remembered for a rank that comes back: this many runs, and this many ranks in all of them.
_REMEMBERED, _REMEMBERED_STREAMS = 100, 20_000

_log = logging.getLogger("traceml")


def safe_run_id(text: str) -> str:
    """Return a user's run id without the characters that a folder's name cannot have.

    Raises:
        RefusedError: nothing is left of it.
    """
    try:
        return ids.safe_run_id(text)
    except ValueError as error:
        raise RefusedError(str(error)) from error


def prepare_runs_dir(runs_dir: Path) -> None:
    """Create the runs folder and check that it can be written.

    Raises:
        StoreError: it cannot; the text says why and what to do.
    """
    probe = runs_dir / f".probe-{os.getpid()}"
    try:
        create_runs_dir(runs_dir)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return  # space may be freed later; rows wait in the ranks until then

        raise StoreError(
            f"{unwritable_text(runs_dir, 'the runs folder', error)}. "
            "Choose another one with --runs-dir or TRACEML_RUNS_DIR."
        ) from error


class Registry:
    """The runs of one aggregator."""

    def __init__(self, runs_dir: Path, retention_gb: float | None = None) -> None:
        self.runs_dir = runs_dir.absolute()
        self._retention_gb = retention_gb
        self._runs: list[ActiveRun] = []
        self._by_key: dict[str, ActiveRun] = {}
        # Job key -> the id under which its run could not be created; the newest ones.
        self._not_begun: dict[str, str] = {}
        self.not_recovered: dict[Path, str] = {}
        """Flight files of dead ranks whose run cannot be opened, with the reason."""

    @property
    def runs(self) -> list[ActiveRun]:
        """Runs that are open, and the newest of those that are over."""
        return list(self._runs)

    @property
    def open_runs(self) -> list[ActiveRun]:
        """Runs that are not over."""
        return [run for run in self._runs if not run.ended]

    def find(self, text: str) -> ActiveRun | None:
        """Return a run by job key or id; without a text the newest one."""
        if not text:
            return self._runs[-1] if self._runs else None

        found = self._by_key.get(text)
        return found or next((run for run in reversed(self._runs) if run.id == text), None)

    def find_stream(self, hello: Hello) -> tuple[ActiveRun, RankStream] | None:
        """Return the run and stream of a recorder that was connected before, to this aggregator or an earlier one."""
        incarnation, key = Incarnation.from_hello(hello), _key(hello)
        for run in reversed(self._runs):
            stream = run.stream_of(incarnation, hello.rank)
            if stream is not None and (run.key == key or run.key.startswith(f"{key}#")):
                return run, stream

        left = self._resume(hello)
        stream = left.stream_of(incarnation, hello.rank) if left is not None else None
        return (left, stream) if left is not None and stream is not None else None

    def assign(self, hello: Hello) -> tuple[ActiveRun, int]:
        """Return the run and the attempt that a new rank belongs to; a new run where no open one fits.

        Raises:
            RefusedError: its run cannot be created; the text says why.
        """
        if hello.parent and (run := self._run_of_parent(hello)) is not None:
            return run, run.admission.attempt_for(hello) or 0

        other = self._by_key.get(_key(hello))
        if other is not None:
            attempt = other.admission.attempt_for(hello)
            if attempt is not None:
                return other, attempt

        taken = other is not None and (bool(hello.run_id) or not other.ended)
        run_id = self._new_id(hello) if taken or not hello.run_id else safe_run_id(hello.run_id)
        # While the run of that key continues, this one is found by its recorder alone.
        key = f"{_key(hello)}#{run_id}" if taken else _key(hello)
        self._expect(_key(hello), run_id)
        run = self._begin_or_part(run_id, key, named=bool(hello.run_id) and not taken)
        del self._not_begun[_key(hello)]
        if taken and other is not None and other.admission.starts_next_run(hello):
            self._by_key[_key(hello)] = run  # the job's other ranks join its next training too

        return run, run.admission.attempt_for(hello) or hello.attempt

    def _new_id(self, hello: Hello) -> str:
        """Return the id of a new run: a job that comes again after it was refused leaves no second folder."""
        return self._not_begun.get(_key(hello)) or new_run_id(hello.name or "run", self.runs_dir)

    def _expect(self, key: str, run_id: str) -> None:
        """Note the id of a run that may be refused; of jobs that never come again only the newest are remembered."""
        self._not_begun.pop(key, None)
        self._not_begun[key] = run_id
        while len(self._not_begun) > _REMEMBERED:
            del self._not_begun[next(iter(self._not_begun))]

    def _run_of_parent(self, hello: Hello) -> ActiveRun | None:
        """Return the run of a forked child's parent process."""
        runs = (run for run in reversed(self._runs) if run.key.split("#")[0] == _key(hello))
        return next(
            (run for run in runs if any(each.incarnation.recorder == hello.parent for each in run.streams)), None
        )

    def begin(self, run_id: str, key: str, *, named: bool, is_new: bool = True) -> ActiveRun:
        """Open a run's folder, new or left by an earlier aggregator.

        Args:
            is_new: whether a job starts or continues it: then `latest` points at it.

        Raises:
            RefusedError: it cannot be created or written.
        """
        # Marked first: if this aggregator is killed at any moment from here on, the next one finds the folder.
        was_marked = _read_marker(_marker(self.runs_dir, key)) is not None
        unmarked = self._mark(key, run_id, named=named)
        try:
            run = ActiveRun(self.runs_dir / run_id, key, named=named, retention_gb=self._retention_gb)
        except StoreError as error:
            if not was_marked:  # else it may be the mark of a live aggregator
                self._unmark(key)

            raise RefusedError(str(error), retry=_is_temporary(error)) from error

        _warn_of_unmarked(run_id, unmarked)
        self._runs.append(run)
        self._by_key[key] = run
        if is_new or not (self.runs_dir / "latest").exists():
            self._point_latest_at(run)

        return run

    def _begin_or_part(self, run_id: str, key: str, *, named: bool) -> ActiveRun:
        """Open a run, or that of this host's ranks alone if the aggregator of another host writes the store.

        Hosts that share a runs folder, but were given no common aggregator, have one each: the second would refuse all
        its ranks, whose rows then end with this host's memory.

        Raises:
            RefusedError: it cannot be created or written.
        """
        try:
            return self.begin(run_id, key, named=named)
        except RefusedError as error:
            hosts = serving_hosts(self.runs_dir) if isinstance(error.__cause__, StoreBusyError) else []
            if not hosts:
                raise

        part_id = safe_run_id(f"{run_id}-{socket.gethostname()}")
        run = self.begin(part_id, f"{key}#{part_id}", named=named, is_new=False)
        self._by_key[key] = run
        _log.warning(
            "run %s is stored by the aggregator of another host (%s): the ranks of this host are a run of their own, "
            "%s. To get one run, use `traceml launch`, or set TRACEML_HOST to a host with `traceml serve --host "
            "0.0.0.0`",
            run_id,
            ", ".join(hosts),
            part_id,
        )
        return run

    def mark_ended(self, run: ActiveRun) -> None:
        """Record that a run has been closed."""
        self._unmark(run.key)
        ended = [each for each in self._runs if each.ended]
        streams = sum(len(each.streams) for each in ended)
        while len(ended) > _REMEMBERED or (streams > _REMEMBERED_STREAMS and len(ended) > 1):
            old = ended.pop(0)
            streams -= len(old.streams)
            self._runs.remove(old)
            self._by_key = {key: each for key, each in self._by_key.items() if each is not old}

    def discard(self, run: ActiveRun) -> None:
        """Remove a run without ranks: an aggregator that was killed may leave one."""
        self.mark_ended(run)
        self._runs.remove(run)
        self._by_key.pop(run.key, None)
        run.remove()

    def mark_open(self, run: ActiveRun) -> None:
        """Record that a closed run continues."""
        _warn_of_unmarked(run.id, self._mark(run.key, run.id, named=run.named))

    def resume_unfinished_runs(self) -> None:
        """Open the runs that an earlier aggregator has left open here."""
        for marker in sorted((self.runs_dir / OPEN_FOLDER).glob("*.json")):
            left = _read_marker(marker)
            if left is None or left["job"] in self._by_key:
                continue

            if not (self.runs_dir / left["run"]).exists():  # it was removed: it does not come back
                self._unmark(left["job"])
                continue

            try:
                self.begin(left["run"], left["job"], named=bool(left.get("named")), is_new=False)
            except RefusedError as error:  # another aggregator has it open, or the folder is damaged
                _log.log(_level_of(error), "run %s is not resumed: %s", left["run"], error)

    def recover_flights(self, silence_s: float | None = None, *, left_in: Path | None = None) -> list[ActiveRun]:
        """Store what dead ranks left that had no aggregator: logged rows, and the steps of runs without a store.

        Args:
            silence_s: all jobs have ended, so ranks on other hosts that were silent for so long are dead, and their
                steps are stored too.
            left_in: the runs folder of these ranks, where it is another one, which cannot be written. A run that is
                there is continued if it was copied here.

        Returns:
            the runs that got rows; they are open.
        """
        adopted: dict[ActiveRun, None] = {}
        if not self.has_dead_flights(silence_s, left_in=left_in):
            return []

        with RecoveryLock.ADOPT.held(self.runs_dir):
            for flight in self._dead_flights(silence_s, left_in):
                run = self._run_of(flight)
                if run is not None and flight.path not in run.recovered:
                    run.recover_flight(flight)
                    adopted[run] = None

        return list(adopted)

    def has_dead_flights(self, silence_s: float | None = None, *, left_in: Path | None = None) -> bool:
        """Return whether `recover_flights` finds something to store."""
        return bool(self._dead_flights(silence_s, left_in))

    def _dead_flights(self, silence_s: float | None, left_in: Path | None) -> list[DeadFlight]:
        """Return the flight files to recover of dead ranks whose run is, or would have been, in this folder."""
        folder = self.runs_dir if left_in is None else left_in.absolute()
        return [
            flight
            for flight in dead_flights(None, folder, silence_s=SILENCE_S if silence_s is None else silence_s)
            if flight.image.holds_user_rows
            or silence_s is not None
            or self._has_no_store(flight)
            or (left_in is not None and self._is_whole(flight))
        ]

    def _is_whole(self, flight: DeadFlight) -> bool:
        """Whether the earlier rows of a rank, if there are any, are in this folder."""
        return flight.run_dir is None or (self.runs_dir / flight.run_dir.name).exists()

    def _has_no_store(self, flight: DeadFlight) -> bool:
        """Whether a launcher made the folder of the rank's run, where no store could be created: on a full disk."""
        if not flight.run_id:
            return False

        folder = self.runs_dir / flight.run_id
        return folder.is_dir() and not (folder / STORE_NAME).exists()

    def _run_of(self, flight: DeadFlight) -> ActiveRun | None:
        """Open and return the run of a dead rank; None when another process has it open, or it was removed."""
        known = self._by_key.get(flight.job)
        if known is not None:
            return known

        run_id = self._run_id_of(flight)
        if run_id is None:
            return None

        try:
            return self.begin(run_id, flight.job, named=bool(flight.run_id), is_new=False)
        except RefusedError as error:
            _log.log(_level_of(error), "%s is not recovered: %s", flight.path, error)
            if not isinstance(error.__cause__, StoreBusyError):  # else the aggregator that has it open does it
                self.not_recovered[flight.path] = str(error)

            return None

    def _run_id_of(self, flight: DeadFlight) -> str | None:
        left = _read_marker(_marker(self.runs_dir, flight.job))
        if flight.run_dir is not None:
            if not self._is_whole(flight) and flight.run_dir.exists():
                self.not_recovered[flight.path] = f"its run is {flight.run_dir}: copy that into {self.runs_dir} first"

            return flight.run_dir.name if self._is_whole(flight) else None  # or the run was removed
        if left is not None and left["job"] == flight.job:
            return left["run"]
        if not flight.path.exists():  # another process has just stored it
            return None

        return flight.run_id or new_run_id(flight.name, self.runs_dir)

    def _resume(self, hello: Hello) -> ActiveRun | None:
        """Open a new rank's run from disk, if an earlier aggregator has left it there."""
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

        return self._begin_or_part(run_id, key, named=bool(hello.run_id))

    def _mark(self, key: str, run_id: str, *, named: bool) -> OSError | None:
        """Note an open run for the next aggregator; return why that failed."""
        marker = _marker(self.runs_dir, key)
        try:
            marker.parent.mkdir(exist_ok=True)
            replace_file(marker, json.dumps({"job": key, "run": run_id, "named": named}).encode())
        except OSError as error:
            return error

        return None

    def _unmark(self, key: str) -> None:
        with contextlib.suppress(OSError):  # at worst the next aggregator checks a run that is over
            _marker(self.runs_dir, key).unlink(missing_ok=True)

    def _point_latest_at(self, run: ActiveRun) -> None:
        latest = self.runs_dir / "latest"
        try:
            replace_link(latest, run.id)
        except OSError as error:
            why = "it is a folder of its own" if latest.is_dir() and not latest.is_symlink() else error
            _log.warning("%s does not point at run %s: %s", latest, run.id, why)


def _key(hello: Hello) -> str:
    return hello.run_id or hello.run


def _is_temporary(error: StoreError) -> bool:
    cause = error.__cause__
    full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
    return full or any(words in str(cause) for words in ("full", "disk I/O"))


def _level_of(error: RefusedError) -> int:
    """Return the level at which a run that stays closed is logged: one of a live aggregator is as it should be."""
    return logging.DEBUG if isinstance(error.__cause__, StoreBusyError) else logging.INFO


def _warn_of_unmarked(run_id: str, error: OSError | None) -> None:
    if error is not None:
        _log.warning("run %s will not be found after a restart of the aggregator: %s", run_id, error)


def _marker(runs_dir: Path, key: str) -> Path:
    # A job key may hold any characters.
    return runs_dir / OPEN_FOLDER / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _read_marker(path: Path) -> dict[str, str] | None:
    try:
        left = json.loads(path.read_text())
        return left if isinstance(left.get("job"), str) and safe_run_id(left["run"]) == left["run"] else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RefusedError) as error:
        _log.warning("ignoring %s: %r", path, error)
        return None
