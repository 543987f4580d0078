"""Audit log: what was sent where and when, one line of JSON per batch with something new.

`<run>/trackers/audit.jsonl` is shared by all backends. A batch of values under known names alone is counted with the
next line. The counts are part of the delivery's state, so a death loses none of them.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path

from traceml.run_folder import TRACKERS_FOLDER
from traceml.track.tracker_state import AuditState, TrackerState

__all__ = ["AuditLog"]

_AUDIT_NAME = "audit.jsonl"
_EVERY_S = 60.0
_NAMES_PER_LINE = 1000

_log = logging.getLogger("traceml")


class AuditLog:
    """Writes one backend's lines.

    Args:
        state: the backend's state, with the counts.
    """

    def __init__(self, run_dir: Path, state: TrackerState) -> None:
        self._path = run_dir / TRACKERS_FOLDER / _AUDIT_NAME
        self._state = state
        self._seen: set[str] = set()
        self._new: list[str] = []
        self._written_s = time.monotonic()
        self._has_warned = False

    @property
    def _sent(self) -> AuditState:
        return self._state.resume.setdefault("audit", {})

    def record(self, kind: str, names: Iterable[str], count: int, size: int = 0) -> None:
        """Count something that is about to be sent to the backend.

        Args:
            kind: metrics, params, tags, text, image, histogram, artifact.
            size: bytes of files and texts.
        """
        counts = self._sent.setdefault("counts", {})
        counts[kind] = counts.get(kind, 0) + count
        self._sent["bytes"] = self._sent.get("bytes", 0) + size
        for name in names:
            if name not in self._seen:
                self._seen.add(name)
                self._new.append(name)

    def write(self, masked: dict[str, int], *, force: bool = False) -> bool:
        """Write a line for everything since the last one, if a line is due; return whether one was written.

        Where it cannot be written, the next one counts for it: the tracker has accepted the rows, which must not be
        sent again.

        Args:
            masked: number of masked values of each kind since the process began.
        """
        counts = self._sent.get("counts", {})
        is_plain = not self._new and set(counts) <= {"metrics"}
        if not counts or (is_plain and not force and time.monotonic() - self._written_s < _EVERY_S):
            return False

        line = {
            "time": time.time(), "backend": self._state.backend, "target": self._state.target, "sent": counts,
            "bytes": self._sent.get("bytes", 0), "masked": masked, "names": self._new[:_NAMES_PER_LINE],
            "more_names": max(len(self._new) - _NAMES_PER_LINE, 0), "pid": os.getpid(),
        }  # fmt: skip
        has_written = self._append(json.dumps(line) + "\n")
        if has_written:
            self._state.resume["audit"] = {}
            self._new.clear()
            self._written_s = time.monotonic()

        return has_written

    def _append(self, line: str) -> bool:
        """Append a line; return whether it could be written."""
        try:
            self._path.parent.mkdir(exist_ok=True)
            with self._path.open("a") as file:  # one write, so that lines of several processes do not mix
                file.write(line)
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                _log.warning("%s cannot be written, delivery to %s goes on: %s", self._path, self._state.backend, error)

            return False

        return True
