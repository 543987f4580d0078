"""ResultCache kept from one process to the next: a query that was asked of unchanged files is not computed again.

An entry holds the files' identities (inode, size, time of modification) and counts only while they are the same. A
cache that cannot be read or written is gone without.
"""

from __future__ import annotations

import json
import logging
import os
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from traceml.traces.reader.trace_files import identity

__all__ = ["ResultCache", "cache_folder"]

_LOG = logging.getLogger("traceml")
_VERSION = 1  # of what is stored: raised when answers change their form or meaning
_MAX_ENTRIES = 256
_MAX_ENTRY_BYTES = 16 * 1024 * 1024
# A file that was written to this shortly before could change once more without a new time of modification.
_SETTLED_NS = 50_000_000


def cache_folder() -> Path:
    """Return the folder of cached answers: TRACEML_CACHE_DIR, or `traceml` in the user's cache folder."""
    named = os.environ.get("TRACEML_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - a home may be absent
    return Path(named or Path(base, "traceml"), "traces")


class ResultCache:
    """The cached answer to one query about some files.

    Make it before the files are read: what they were then is what an answer is about.

    Args:
        files: the files, as `discover` gave them.
        key: the query: everything that the answer depends on besides the files.
    """

    def __init__(self, files: Sequence[Path], key: str) -> None:
        self._files = [str(file.resolve()) for file in files]
        self._key = f"{_VERSION}\n{key}"
        self._asked_ns = time.time_ns()
        try:
            self._identities = [list(identity(file)) for file in files]
        except OSError:
            self._identities = []

        query = "\n".join([*self._files, self._key]).encode("utf-8", "surrogateescape")
        self._path = cache_folder() / f"{zlib.crc32(query):08x}{zlib.adler32(query):08x}.json"

    def load(self) -> Any | None:
        """Return the answer, None when there is none for the files as they are now."""
        try:
            entry = json.loads(self._path.read_bytes())
            known = (entry["files"], entry["key"], entry["identities"]) == (self._files, self._key, self._identities)
            return entry["answer"] if known and self._identities else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            _LOG.debug("cannot use the cached answer %s: %s", self._path, error)
            return None

    def store(self, answer: Any) -> None:
        """Keep an answer (anything that JSON can hold) for the next process."""
        if not self._settled():
            return

        entry = {"files": self._files, "key": self._key, "identities": self._identities, "answer": answer}
        data = json.dumps(entry, separators=(",", ":")).encode()
        if len(data) > _MAX_ENTRY_BYTES:
            return

        beside = self._path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            beside.write_bytes(data)
            beside.replace(self._path)
            _drop_oldest(self._path.parent)
        except OSError as error:
            _LOG.debug("cannot keep an answer in %s: %s", self._path.parent, error)
            _remove(beside)

    def _settled(self) -> bool:
        """Tell whether the files are what they were, and any later change would show."""
        try:
            now = [list(identity(Path(file))) for file in self._files]
        except OSError:
            return False

        newest_ns = max((known[3] for known in now), default=0)
        return bool(now) and now == self._identities and newest_ns < self._asked_ns - _SETTLED_NS


def _drop_oldest(folder: Path) -> None:
    entries = list(folder.iterdir())
    if len(entries) <= _MAX_ENTRIES:
        return

    entries.sort(key=lambda entry: entry.stat().st_mtime_ns)
    for entry in entries[: len(entries) - _MAX_ENTRIES]:
        _remove(entry)


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError:
        pass  # it was never there, or another process removed it, or nobody can
