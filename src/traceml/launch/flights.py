"""Flight files of dead workers, on their way from the agent's host to the run's folder."""

from __future__ import annotations

import logging
import os
import socket
import zlib
from pathlib import Path

from traceml.database.flight import FALLBACK_FOLDER, default_folder, find_flights, is_alive, read_flight
from traceml.database.image import FLIGHT_SUFFIX
from traceml.errors import StoreError

__all__ = ["keep_copy", "left_by"]

# Rings that are mostly zeros become small, in a few hundredths of a second.
_LEVEL = 1

_log = logging.getLogger("traceml")


def left_by(pid: int, run_id: str, *, runs_dir: str | None = None) -> bytes | None:
    """Take what a dead worker of this host left, compressed; None when it left nothing. The file is removed.

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
            facts = read_flight(path).identity
            if (facts.get("job"), facts.get("host")) != (run_id, socket.gethostname()):
                continue

            data = path.read_bytes()
            path.unlink(missing_ok=True)
        except (StoreError, OSError) as error:
            _log.warning("the last rows of process %d cannot be read: %s", pid, error)
            continue

        return zlib.compress(data, _LEVEL)

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
    try:
        whole = zlib.decompress(data)
    except zlib.error as error:
        raise ValueError(f"the flight file of {name} was damaged on its way: {error}") from error

    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"{name}{FLIGHT_SUFFIX}"
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_bytes(whole)
    draft.replace(path)  # whole at every moment: the aggregator may look now
    return path
