"""Artifacts in the run's folder, assembled from the chunks that ranks on other hosts send."""

from __future__ import annotations

import os
import re
import zlib
from pathlib import Path
from typing import Any

import msgpack

from traceml.database.file_contents import copy_content
from traceml.database.flight.journal import write_all
from traceml.database.flight.staged_files import StagedFile
from traceml.errors import ProtocolError
from traceml.run_folder import ARTIFACTS

__all__ = ["Artifacts"]

_NAME = re.compile(r"[0-9a-f]{64}(?:\.[A-Za-z0-9]{1,16})?")
_SIZE_LIMIT = 1 << 44


class Artifacts:
    """The files of one run."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / ARTIFACTS

    def take(self, stream: int, rows: list[dict[str, Any]]) -> bytes:
        """Write chunks of files; return the rows without their data, for the store.

        Args:
            rows: `{id, offset, size, data}` each, with `zlib` when the data is compressed.

        Raises:
            ProtocolError: a chunk is invalid.
            OSError: the disk is full, or the folder cannot be written.
        """
        return b"".join(msgpack.packb(self._put(stream, row)) for row in rows)

    def holds(self, path: str) -> bool:
        """Return whether a file of the run is here, by its path in the run's folder."""
        name = path.rpartition("/")[2]
        return _NAME.fullmatch(name) is not None and (self._folder / name).is_file()

    def place(self, path: Path) -> None:
        """Move a file of a dead rank here; a file that is not an artifact stays where it is."""
        if not _NAME.fullmatch(path.name) or path.is_symlink():
            return

        from shutil import move

        self._folder.mkdir(exist_ok=True)
        part = self._folder / f".{path.name}.part"
        move(path, part)
        part.replace(self._folder / path.name)

    def finish(self, staged: StagedFile, kind: str) -> dict[str, Any]:
        """Copy here a file that a dead rank had begun to log; return the facts of its row.

        Raises:
            RefusedFileError: it is not accepted, as the rank would not have.
            OSError: it cannot be read or written.
        """
        self._folder.mkdir(exist_ok=True)
        part = self._folder / f".{staged.contents.name}.part"
        try:
            how = staged.how
            limit_bytes, suffix = how["limit_bytes"], how["suffix"]
            facts = copy_content(staged.read(), part, kind=kind, suffix=suffix, limit_bytes=limit_bytes)
            part.replace(self._folder / facts["path"].rpartition("/")[2])
        except BaseException:
            part.unlink(missing_ok=True)
            raise

        return facts

    def _put(self, stream: int, row: dict[str, Any]) -> dict[str, Any]:
        name, offset, size, data = (row.get(key) for key in ("id", "offset", "size", "data"))
        kept = {"id": name, "offset": offset, "size": size}
        if row.get("error"):
            return kept | {"error": str(row["error"])[:500]}

        if not isinstance(name, str) or not _NAME.fullmatch(name) or not isinstance(data, bytes):
            raise ProtocolError(f"invalid chunk of a file: {str(name)[:80]!r}")
        if type(offset) is not int or type(size) is not int or not 0 <= offset <= size <= _SIZE_LIMIT:
            raise ProtocolError(f"a chunk of file {name} is at {offset!r:.40} of {size!r:.40} bytes")

        data = _unpacked(data, size - offset) if row.get("zlib") else data
        if offset + len(data) > size:
            raise ProtocolError(f"a chunk of file {name} exceeds its {size} bytes")

        self._folder.mkdir(exist_ok=True)
        part = self._folder / f".{stream}-{name}.part"
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            write_all(descriptor, data, offset)
        finally:
            os.close(descriptor)

        if offset + len(data) == size:
            part.replace(self._folder / name)

        return kept | {"bytes": len(data)}


def _unpacked(data: bytes, limit: int) -> bytes:
    unpacker = zlib.decompressobj()
    try:
        unpacked = unpacker.decompress(data, limit + 1)
    except zlib.error as error:
        raise ProtocolError(f"a chunk of a file cannot be decompressed: {error}") from error

    if len(unpacked) > limit:
        raise ProtocolError("a chunk of a file is larger than the file")

    return unpacked
