"""Folders of flight files, and of the files on disk that belong to them.

A flight file is in memory where there is room. Its journals, and files that wait for upload, are on disk: in the runs
folder, else in the temporary folder. All have the flight file's name without its suffix, the stem, which is unique.

Process: rank, aggregator, and the agent of a launch.
"""

from __future__ import annotations

import os
from pathlib import Path

from traceml.trusted_files import check_trusted_folder

__all__ = [
    "FALLBACK_FOLDER",
    "FLIGHT_SUFFIX",
    "PENDING_SUFFIX",
    "default_folder",
    "disk_folders",
    "find_flights",
    "pending_row_path",
    "spool_folder",
]

FLIGHT_SUFFIX = ".flight"
# In the runs folder: flight files of ranks without room in memory, and journals.
FALLBACK_FOLDER = ".flights"
PENDING_SUFFIX = ".row"


def default_folder() -> Path:
    """Return the memory-backed folder of this user's flight files on this host."""
    return Path(f"/dev/shm/traceml-{os.geteuid()}")  # noqa: S108 - ownership and mode are checked before use


def disk_folders(runs_dir: Path | None) -> tuple[Path, ...]:
    """Return the folders on disk, in the order of writing."""
    temporary = Path(os.environ.get("TMPDIR") or "/tmp", f"traceml-{os.geteuid()}")  # noqa: S108 - see default_folder
    return (*([runs_dir.absolute() / FALLBACK_FOLDER] if runs_dir is not None else []), temporary.absolute())


def find_flights(folder: Path, *, pid: int | None = None) -> list[Path]:
    """Return the flight files in a folder by name, of one process when `pid` is given.

    A folder in which another user could have planted them has none.
    """
    try:
        check_trusted_folder(folder)
    except OSError:
        return []

    pattern = f"{pid}-*{FLIGHT_SUFFIX}" if pid is not None else f"*{FLIGHT_SUFFIX}"
    return sorted(folder.glob(pattern))


def spool_folder(stem: Path) -> Path:
    """Return the folder of files that wait for upload, by the path stem of their rank's journals."""
    return stem.with_name(f"{stem.name}.files")


def pending_row_path(folder: Path, number: int) -> Path:
    """Return the path of a row that is appended after the upload of its file from this folder."""
    return folder / f".{number}{PENDING_SUFFIX}"
