"""Archives of dead workers' flight files, sent from their host to the run's folder.

An archive also holds the worker's journals (rows beyond its memory) and its spool (files that were not uploaded yet).

Process: the agent of a launch, or `traceml run` on a node whose run is on another one, packs; the launcher or the
aggregator unpacks.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import logging
import os
import re
import shutil
import socket
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from traceml.database.flight.flight_folders import (
    FLIGHT_SUFFIX,
    default_folder,
    disk_folders,
    find_flights,
    spool_folder,
)
from traceml.database.flight.flight_owner import is_alive
from traceml.database.flight.journal import journal_path
from traceml.database.flight.postmortem import FlightSnapshot, flight_identity, read_flight
from traceml.errors import StoreError

__all__ = ["ARCHIVE_LIMIT_BYTES", "FlightArchive", "find_live_flight", "pack_flight", "packed_flight", "unpack_flight"]

# Rings are mostly zeros and compress in a few hundredths of a second.
_LEVEL = 1
ARCHIVE_LIMIT_BYTES = 512 << 20
"""Size of an archive, which is held in memory at both ends. Larger files stay on their host."""
_USERS_BYTES = 32 << 20  # of files of the user; the others stay where they are: compressing them stops the agent
_FLIGHT = "flight"
_NAME = re.compile(r"flight|journal/[a-z_]{1,40}|files/\.?[A-Za-z0-9][A-Za-z0-9.]{0,100}")

_log = logging.getLogger("traceml")


class FlightArchive(NamedTuple):
    """Archive of a dead worker's files, the names in it, and what faulthandler wrote when it crashed."""

    data: bytes
    names: list[str]
    crash_text: str


def pack_flight(pid: int, run_id: str, *, runs_dir: str | None = None) -> bytes | None:
    """Return a dead worker's files as an archive, and remove them; see `packed_flight`."""
    with packed_flight(pid, run_id, runs_dir=runs_dir) as archive:
        return archive.data if archive is not None else None


@contextlib.contextmanager
def packed_flight(pid: int, run_id: str, *, runs_dir: str | None = None) -> Iterator[FlightArchive | None]:
    """Make an archive of a dead worker's files, None if there are none; at the end of the context, remove the files.

    They stay where the body raises an error: the archive has not arrived.

    Args:
        pid: its process id, in its own namespace.
        run_id: the run, as process ids are reused.
        runs_dir: folder for the files of ranks that have no folder in memory.
    """
    image = archive = None
    place = Path(runs_dir) if runs_dir else None
    for path in _flights_of(pid, place):
        if is_alive(path):
            continue

        try:
            image = read_flight(path, place)
            if not _is_of(image.identity, run_id):
                continue

            archive = _packed(image)
            break
        except (StoreError, OSError) as error:
            _log.warning("the last rows of process %d cannot be read: %s", pid, error)

    yield archive
    if image is not None and archive is not None:
        _remove(image, archive.names)


def find_live_flight(pid: int, run_id: str, *, runs_dir: str | None = None) -> Path | None:
    """Return the flight file of a worker that runs; None if it has none yet. Arguments are those of `pack_flight`."""
    flights = _flights_of(pid, Path(runs_dir) if runs_dir else None)
    return next((path for path in flights if is_alive(path) and _is_of(flight_identity(path), run_id)), None)


def unpack_flight(data: bytes, folder: Path, name: str) -> Path:
    """Store a flight file from another host where the aggregator finds it; return its path.

    Args:
        folder: the run's folder for copies; created.

    Raises:
        OSError: it cannot be written.
        ValueError: the bytes are not such an archive.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"{name}{FLIGHT_SUFFIX}"
    draft = path.with_suffix(f".{os.getpid()}")
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
            for member in archive:
                source = archive.extractfile(member) if _NAME.fullmatch(member.name) else None
                if source is None:
                    raise ValueError(f"the flight file of {name} contains an unknown file: {member.name!r:.100}")

                target = draft if member.name == _FLIGHT else _target_path(path.with_suffix(""), member.name)
                target.parent.mkdir(mode=0o700, exist_ok=True)
                with target.open("wb") as file:
                    shutil.copyfileobj(source, file)

        draft.replace(path)  # atomically, and last: the aggregator may read it at any moment
    except (tarfile.TarError, zlib.error, gzip.BadGzipFile, EOFError, KeyError, FileNotFoundError) as error:
        raise ValueError(f"the flight file of {name} was damaged in transit: {error}") from error

    return path


def _flights_of(pid: int, place: Path | None) -> Iterator[Path]:
    for folder in (default_folder(), *disk_folders(place)):
        yield from find_flights(folder, pid=pid)


def _is_of(facts: Mapping[str, Any], run_id: str) -> bool:
    return (facts.get("job"), facts.get("host")) == (run_id, socket.gethostname())


def _packed(image: FlightSnapshot) -> FlightArchive:
    """Return the archive of a flight file and its other files."""
    buffer, taken = io.BytesIO(), []
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=_LEVEL) as archive:
        users_bytes = 0
        for name, path in _members(image):
            if _is_users(name, path):
                with contextlib.suppress(OSError):  # it may change, or vanish, at any time
                    users_bytes += path.stat().st_size
                    if users_bytes <= _USERS_BYTES:
                        data = path.read_bytes()
                        member = tarfile.TarInfo(name)
                        member.size = len(data)
                        archive.addfile(member, io.BytesIO(data))
                        taken.append(name)

                continue

            if buffer.tell() + path.stat().st_size > ARCHIVE_LIMIT_BYTES:
                _log.warning("%s stays on this host: the files of its rank are too large to send", path)
                continue

            archive.add(path, name, recursive=False)
            taken.append(name)

    return FlightArchive(buffer.getvalue(), taken, image.crash_text)


def _remove(image: FlightSnapshot, packed: list[str]) -> None:
    members = dict(_members(image))
    own_files = {name for name, path in members.items() if name.startswith("files/") and not _is_users(name, path)}
    if own_files <= set(packed):
        image.unlink()
        return

    for name in packed:
        path = members.get(name)
        if path is not None and not _is_users(name, path):
            path.unlink(missing_ok=True)


def _is_users(name: str, path: Path) -> bool:
    """Whether a member of the archive is a file of the user, which stays where it is."""
    return name.startswith("files/") and path.name != name.removeprefix("files/")


def _members(image: FlightSnapshot) -> Iterator[tuple[str, Path]]:
    """Yield names in the archive with their files, the most important first; the last ones may be the user's."""
    yield _FLIGHT, image.path
    for table, path in image.journals.items():
        yield f"journal/{table}", path

    for path in sorted(image.spooled_files, key=lambda each: each.stat().st_size):
        yield f"files/{path.name}", path

    for each in image.pending_rows:
        yield f"files/{each.path.name}", each.path
        contents = each.staged.find() if each.staged is not None else None
        if each.staged is not None and contents is not None:
            yield f"files/{each.staged.contents.name}", contents


def _target_path(stem: Path, name: str) -> Path:
    """Return the path of an archived file, given the stem of its flight file."""
    kind, _, rest = name.partition("/")
    return journal_path(stem, rest) if kind == "journal" else spool_folder(stem) / rest
