"""Recover unsent rows, the open step and the open phase of a dead rank from its flight file."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import msgpack

from traceml.aggregator.ingest import Ingest
from traceml.aggregator.streams.stream import Incarnation, RankStream
from traceml.database.file_contents import RefusedFileError
from traceml.database.flight.flight_folders import default_folder, disk_folders, find_flights
from traceml.database.flight.flight_header import FlightState
from traceml.database.flight.flight_owner import SILENCE_S, find_unclaimed, is_alive
from traceml.database.flight.postmortem import FlightSnapshot, flight_identity, may_be_of, read_flight
from traceml.database.flight.staged_files import STAGED, StagedFile
from traceml.database.schema import LOGGED, Phase, Slot
from traceml.errors import StoreError
from traceml.ids import DEFAULT_PROJECT, safe_run_id
from traceml.inspection.crash_stacks import crash_facts
from traceml.run_folder import COPIES_FOLDER
from traceml.transport.hello import check_rank
from traceml.transport.server import RefusedError

__all__ = ["DeadFlight", "appended_rows", "dead_flights", "recover"]

_COMMIT_BYTES = 32 << 20
_USERS_BYTES = 256 << 20  # of files of the user that are copied at once: all other ranks wait meanwhile

_log = logging.getLogger("traceml")


class DeadFlight:
    """A dead rank's flight file and the identity of its writer.

    Raises:
        ValueError: the identity cannot be one.
    """

    def __init__(self, path: Path, image: FlightSnapshot) -> None:
        self.path = path
        self.image = image
        facts = image.identity
        self.job = str(facts.get("job", ""))
        self.rank = int(facts.get("rank", 0))
        self.local_rank = int(facts.get("local_rank", 0))
        self.attempt = int(facts.get("attempt", 0))
        self.is_helper = bool(facts.get("parent"))
        self.is_spawned = bool(facts.get("spawned_by"))
        """Whether its process is a child of one that recorded, too."""
        self.name = str(facts.get("name") or "run")
        self.project = str(facts.get("project") or DEFAULT_PROJECT)
        self.run_id = _usable(str(facts.get("run_id") or ""))
        self.run_dir = Path(str(facts["run_dir"])) if facts.get("run_dir") else None
        """Its run's folder, if it ever learned it."""
        if self.run_dir is not None and safe_run_id(self.run_dir.name) != self.run_dir.name:
            raise ValueError(f"{path} names a folder that cannot be a run's: {str(self.run_dir)!r:.200}")

        self.began_s = image.clock[1] / 1e9 - max(int(facts.get("script_ms") or 0), 0) / 1e3
        """Start of its script, else of its recorder, in epoch seconds."""
        self.folder = _folder_of(facts)
        """Runs folder of its run, else of the rank's settings."""
        self.world_size = int(facts.get("world_size", 1))
        check_rank(self.rank, self.world_size)
        self.incarnation = Incarnation(
            str(facts.get("host", "")),
            str(facts.get("boot_id", "")),
            int(facts.get("pid", 0)),
            int(facts.get("start_ticks", 0)),
            str(facts.get("recorder", "")),
        )

    def may_be_of(self, run_id: str) -> bool:
        """Return whether its rank was of a run, or never learned its run."""
        return may_be_of(self.image.identity, run_id)


def _usable(run_id: str) -> str:
    """Return the folder's name that a rank's run id gives; empty if none: its rows then get an id of our own."""
    try:
        return safe_run_id(run_id)
    except ValueError:
        return ""


def dead_flights(
    job: str | None,
    runs_dir: Path,
    *,
    copies: Path | None = None,
    but: Collection[Path] = (),
    silence_s: float = SILENCE_S,
) -> list[DeadFlight]:
    """Return the flight files that dead ranks of a job left on this host and in a runs folder.

    Args:
        job: its key; None for those of all jobs of the runs folder.
        copies: a folder with copies from other hosts, whose ranks are dead.
        but: files to leave out.
        silence_s: how long a rank on another host must have been silent.
    """
    here = find_unclaimed((default_folder(), *disk_folders(runs_dir)))
    dead = [path for path in here if path not in but and not is_alive(path, silence_s)]
    dead += [path for path in (find_flights(copies) if copies is not None else ()) if path not in but]
    found = []
    for path in dead:
        if _is_elsewhere(flight_identity(path), job, runs_dir):
            continue  # a file is 12 MB, and each aggregator that starts on this host looks here, as each run that ends

        try:
            flight = DeadFlight(path, read_flight(path, runs_dir))
        except (StoreError, ValueError, TypeError) as error:
            if path.exists():  # else another process has just stored it
                level = logging.WARNING if _concerns(path, runs_dir) else logging.DEBUG
                _log.log(level, "cannot use a flight file: %s", error)

            continue

        if (flight.folder == runs_dir) if job is None else (flight.job == job):
            found.append(flight)

    return found


def _is_elsewhere(identity: Mapping[str, Any], job: str | None, runs_dir: Path) -> bool:
    """Whether a rank was of another job, or of another runs folder where all jobs of one are looked for."""
    if job is not None:
        return bool(identity.get("job", job) != job)

    return bool(identity) and _folder_of(identity) != runs_dir


def _concerns(path: Path, runs_dir: Path) -> bool:
    """Whether a file that cannot be read is of this folder; memory has files of all folders and versions."""
    return path.parent != default_folder() or _folder_of(flight_identity(path)) == runs_dir


def _folder_of(identity: Mapping[str, Any]) -> Path:
    """Return the runs folder of a rank's run, else of its settings."""
    run_dir = identity.get("run_dir")
    return Path(str(run_dir)).parent if run_dir else Path(str(identity.get("runs_dir") or ""))


def recover(
    stream: RankStream, ingest: Ingest, runs_dir: Path, image: FlightSnapshot | None = None
) -> FlightSnapshot | None:
    """Store the missing rows of a dead stream from its flight file; return its snapshot, None without a file.

    The file must stay until the rows are committed.
    """
    path = stream.flight_path
    if image is None and path is None:
        return None

    try:
        image = image or read_flight(path, runs_dir)  # type: ignore[arg-type]
    except StoreError as error:
        if path is not None and path.exists():  # a rank whose rows had all arrived removes the file itself
            _log.warning("the last rows of %r are lost: %s", stream, error)

        return None

    missing = 0
    for table in sorted(image.tables, key=lambda name: name != "names"):  # names before the rows that use them
        missing += _take(stream, ingest, table, image)

    for path in image.spooled_files:
        try:
            ingest.artifacts.place(path)
        except OSError as error:
            _log.warning("%s, logged by %r, cannot be moved into the run's folder: %s", path, stream, error)

    missing += _recover_file_rows(stream, ingest, image)
    at_death = _open_at_death(image, stream.names)
    if "at_s" in at_death:
        at_death["at_s"] += stream.clock_shift_ns / 1e9

    stream.exit = {**at_death, **crash_facts(image.crash_text), **stream.exit}
    if missing:
        _log.info("recovered %d rows of %r from %s", missing, stream, image.path)

    return image


def appended_rows(image: FlightSnapshot) -> dict[str, int]:
    """Return the number of rows per table that the rank had appended when it died: missing ones count as lost."""
    return {name: image.counters(name).appended for name in image.tables}


def _take(stream: RankStream, ingest: Ingest, table: str, image: FlightSnapshot) -> int:
    before = stream.next.get(table, 0)
    uncommitted = 0
    try:
        for found in image.read_all(table, before):
            ingest.take(stream, table, found.first, found.n, found.data)
            uncommitted += len(found.data)
            if uncommitted > _COMMIT_BYTES:  # a journal may be larger than memory
                uncommitted = 0
                ingest.commit()
    except (StoreError, ValueError, OSError, RefusedError) as error:  # ProtocolError is a ValueError
        _log.warning("rows of table %r of %r are lost: %s", table, stream, error)

    return stream.next.get(table, 0) - before


def _recover_file_rows(stream: RankStream, ingest: Ingest, image: FlightSnapshot) -> int:
    """Append the rows of files whose rank was killed before it did; files that it had begun to log are copied."""
    said = {_call_of(row) for row in image.all_maps(LOGGED.name)}
    is_copy, users_bytes = image.path.parent.name == COPIES_FOLDER, 0
    recovered = 0
    for pending in sorted(image.pending_rows, key=lambda each: each.staged is not None):  # copied ones are first
        row, call = pending.row, _call_of(pending.row)
        if call in said:
            continue
        if pending.staged is not None:
            users_bytes += pending.staged.users_bytes
            row = _finish(row, pending.staged, ingest, is_there=not is_copy and users_bytes <= _USERS_BYTES)
        elif not ingest.artifacts.holds(str(row.get("path"))):
            continue

        said.add(call)
        ingest.take(stream, LOGGED.name, stream.next.get(LOGGED.name, 0), 1, msgpack.packb(row))
        recovered += 1

    return recovered


def _call_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in ("t_ns", "name", "step", "experiment"))


def _finish(row: dict[str, Any], staged: StagedFile, ingest: Ingest, *, is_there: bool) -> dict[str, Any]:
    """Return the row of a file that a killed rank had begun to log: copied, or refused with the reason.

    Args:
        is_there: whether a file of the user may be read where it is.
    """
    kind = str(row.get("kind"))
    begun = {key: value for key, value in row.items() if key != STAGED}
    try:
        if not is_there and not staged.contents.exists():  # of another host, or too large to copy meanwhile
            raise RefusedFileError(f"log {staged.users_path} again, which is still on its host")

        return begun | ingest.artifacts.finish(staged, kind)
    except Exception as error:  # noqa: BLE001 - what is no image, or a damaged row
        why = f"its process was killed before it was copied: {getattr(error, 'strerror', None) or error}"
        _log.warning("%s %r is not logged: %s", kind, row.get("name"), why)
        return begun | {"kind": "refused", "what": kind, "why": why}


def _open_at_death(image: FlightSnapshot, names: Mapping[int, str]) -> dict[str, Any]:
    """Return the open step and phase, unless the rank had ended its training."""
    facts: dict[str, Any] = {}
    if image.state is FlightState.FINISHED:
        return facts

    facts["at_s"] = image.last_beat_s
    if not image.slot(Slot.EXIT_START):  # an exception has left its loops by then
        facts["in_loop"] = image.slot(Slot.ITERATING) > 0

    if image.slot(Slot.SAVED_IN):
        facts |= {"saved_steps": image.slot(Slot.SAVED), "saved_in": image.slot(Slot.SAVED_IN)}

    phase, since_ns = image.open_phase
    if image.is_evaluating:
        facts["open_phase"] = "evaluation"
    elif phase is not None:
        user = image.open_user_phase or names.get(image.slot(Slot.USER_NAME)) if phase is Phase.USER else None
        facts["open_phase"] = user or phase.name.lower()
    elif image.slot(Slot.EXIT_START):
        facts["open_phase"] = "exit"
    elif image.is_in_step:
        facts["open_phase"] = "other"

    if (line := names.get(image.line_id)) is not None:
        facts["seen"] = line

    if image.is_in_step:
        facts |= {"open_step": image.open_step, "open_since_ns": since_ns}
        if image.step_is_done:
            facts["last_step"] = image.open_step

        if began_ns := image.slot(Slot.STEP_START):
            facts["open_s"] = max(image.slot(Slot.HEARTBEAT) - began_ns, 0) / 1e9

    return facts
