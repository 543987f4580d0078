"""Flight files of dead workers, on their way from the agent's host to the run's folder, with what belongs to them.

That is what a worker had no room for in memory (its journals) and the files that it was about to hand over (its spool).
All travels as one archive, under names that both sides know.
"""

from __future__ import annotations

import io
import logging
import os
import re
import shutil
import socket
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from traceml.database.flight import FALLBACK_FOLDER, default_folder
from traceml.database.journal import journal_path
from traceml.database.postmortem import FLIGHT_SUFFIX, FlightSnapshot, find_flights, is_alive, read_flight, spool_folder
from traceml.errors import StoreError

__all__ = ["keep_copy", "left_by"]

# Rings that are mostly zeros become small, in a few hundredths of a second.
_LEVEL = 1
# The archive is held in memory at both ends. What is beyond stays on its host.
_LIMIT_BYTES = 512 << 20
_FLIGHT = "flight"
_NAME = re.compile(r"flight|journal/[a-z_]{1,40}|files/\.?[A-Za-z0-9][A-Za-z0-9.]{0,100}")

_log = logging.getLogger("traceml")


def left_by(pid: int, run_id: str, *, runs_dir: str | None = None) -> bytes | None:
    """Take what a dead worker of this host left, as an archive; None when it left nothing. It is removed here.

    Args:
        pid: its process id, as it saw itself.
        run_id: the run: pids are used again.
        runs_dir: where ranks without a folder in memory put their file.
    """
    folders = [default_folder(), *([Path(runs_dir) / FALLBACK_FOLDER] if runs_dir else [])]
    for path in (path for folder in folders for path in find_flights(folder, pid=pid)):
        if is_alive(path):
            continue

        try:
            image = read_flight(path)
            facts = image.identity
            if (facts.get("job"), facts.get("host")) != (run_id, socket.gethostname()):
                continue

            return _packed(image)
        except (StoreError, OSError) as error:
            _log.warning("the last rows of process %d cannot be read: %s", pid, error)

    return None


def keep_copy(data: bytes, folder: Path, name: str) -> Path:
    """Put a flight file that came from another host where the aggregator finds it; return its path.

    Args:
        data: as `left_by` gave it.
        folder: where copies of this run are kept; made.
        name: what tells it from the others.

    Raises:
        OSError: it cannot be written.
        ValueError: these bytes are not what `left_by` gives.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"{name}{FLIGHT_SUFFIX}"
    draft = path.with_suffix(f".{os.getpid()}")
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
            for member in archive:
                source = archive.extractfile(member) if _NAME.fullmatch(member.name) else None
                if source is None:
                    raise ValueError(f"the flight file of {name} came with something unknown: {member.name!r:.100}")

                target = draft if member.name == _FLIGHT else _place(path.with_suffix(""), member.name)
                target.parent.mkdir(mode=0o700, exist_ok=True)
                with target.open("wb") as file:
                    shutil.copyfileobj(source, file)

        draft.replace(path)  # whole at every moment, and after all that belongs to it: the aggregator may look now
    except (tarfile.TarError, zlib.error, EOFError, FileNotFoundError) as error:
        raise ValueError(f"the flight file of {name} was damaged on its way: {error}") from error

    return path


def _packed(image: FlightSnapshot) -> bytes:
    """Return the archive of a flight file and of what belongs to it, and remove them."""
    buffer, taken = io.BytesIO(), []
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=_LEVEL) as archive:
        for name, path in _members(image):
            if buffer.tell() + path.stat().st_size > _LIMIT_BYTES:
                _log.warning("%s stays on this host: what its rank left is too much to send", path)
                continue

            archive.add(path, name, recursive=False)
            taken.append(path)

    for path in taken:
        path.unlink(missing_ok=True)

    if set(image.spooled_files) <= set(taken):
        image.unlink()

    return buffer.getvalue()


def _members(image: FlightSnapshot) -> Iterator[tuple[str, Path]]:
    """Yield names in the archive with what is to be put there, what matters most first."""
    yield _FLIGHT, image.path
    for table, path in image.journals.items():
        yield f"journal/{table}", path

    for path in sorted(image.spooled_files, key=lambda each: each.stat().st_size):
        yield f"files/{path.name}", path

    for path in image.pending_row_paths:
        yield f"files/{path.name}", path


def _place(stem: Path, name: str) -> Path:
    """Return where something belongs, by the stem of the flight file that it came with."""
    kind, _, rest = name.partition("/")
    return journal_path(stem, rest) if kind == "journal" else spool_folder(stem) / rest
