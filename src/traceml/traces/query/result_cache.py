"""Cache of results across processes: a query about unchanged files is not computed again.

An entry contains the files' identities (inode, size, times of modification and of change) and is valid only while they
are the same. A cache that cannot be read or written is ignored.
"""

from __future__ import annotations

import json
import logging
import os
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from traceml.traces.reader.trace_files import identity
from traceml.trusted_files import cache_home, replace_file

__all__ = ["ResultCache", "cache_folder"]

_LOG = logging.getLogger("traceml")
_VERSION = 7  # format of the entries: raised when results change their format or meaning
_MAX_ENTRIES = 256
_MAX_ENTRY_BYTES = 16 * 1024 * 1024
# A file that was written within this time could change again without a new time of modification.
_SETTLED_NS = 50_000_000


def cache_folder() -> Path:
    """Return the folder of cached results: TRACEML_CACHE_DIR, or `traceml` in the user's cache folder."""
    named = os.environ.get("TRACEML_CACHE_DIR")
    return Path(named or cache_home() / "traceml", "traces")


class ResultCache:
    """Cached result of one query about some files.

    Create it before the files are read: the result belongs to their identities at that time.

    Args:
        key: the query: everything the result depends on other than the files.
    """

    def __init__(self, files: Sequence[Path], key: str) -> None:
        self._files = [str(file.resolve()) for file in files]
        self._key = "\n".join([str(_VERSION), key, *map(str, files)])  # results contain the paths as given
        self._created_ns = time.time_ns()
        try:
            self._identities = [list(identity(file)) for file in files]
        except OSError:
            self._identities = []

        query = "\n".join([*self._files, self._key]).encode("utf-8", "surrogateescape")
        self._path = cache_folder() / f"{zlib.crc32(query):08x}{zlib.adler32(query):08x}.json"

    def load(self) -> Any | None:
        """Return the result; None when there is none for the current files."""
        try:
            entry = json.loads(self._path.read_bytes())
            known = (entry["files"], entry["key"], entry["identities"]) == (self._files, self._key, self._identities)
            return entry["answer"] if known and self._identities else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            _LOG.debug("cannot use the cached result %s: %s", self._path, error)
            return None

    def store(self, result: Any) -> None:
        """Keep a result (plain JSON data) for the next process."""
        if not self._settled():
            return

        entry = {"files": self._files, "key": self._key, "identities": self._identities, "answer": result}
        data = json.dumps(entry, separators=(",", ":")).encode()
        if len(data) > _MAX_ENTRY_BYTES:
            return

        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            replace_file(self._path, data)
            _drop_oldest(self._path.parent)
        except OSError as error:
            _LOG.debug("cannot keep a result in %s: %s", self._path.parent, error)

    def _settled(self) -> bool:
        """Return whether the files are unchanged, and a later change would be visible."""
        try:
            now = [list(identity(Path(file))) for file in self._files]
        except OSError:
            return False

        newest_ns = max((known[3] for known in now), default=0)
        return bool(now) and now == self._identities and newest_ns < self._created_ns - _SETTLED_NS


def _drop_oldest(folder: Path) -> None:
    entries = list(folder.iterdir())
    if len(entries) <= _MAX_ENTRIES:
        return

    entries.sort(key=lambda entry: entry.stat().st_mtime_ns)
    for entry in entries[: len(entries) - _MAX_ENTRIES]:
        with suppress(OSError):  # another process removed it, or it cannot be removed
            entry.unlink()
