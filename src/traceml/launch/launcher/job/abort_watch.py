"""End of a traced job that hangs on other hosts, where its setting `on_hang` is `abort`.

The aggregator asks each rank to end, and kills those of its own host that cannot. Ranks of other hosts whose
interpreter is held in C are ended by the launcher.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from traceml.database.snapshots import ABORT
from traceml.database.store.reader import StoreReader
from traceml.errors import StoreError
from traceml.run_folder import STORE_NAME

__all__ = ["AbortWatch"]

_EVERY_S = 2.0
_GRACE_S = 12.0  # the aggregator kills after 10 s


class AbortWatch:
    """Reads a run's store for the decision to end it."""

    def __init__(self, run_dir: Path) -> None:
        self._store = run_dir / STORE_NAME
        self._checked_s = 0.0
        self._aborted_s: float | None = None

    def is_overdue(self) -> bool:
        """Return whether the ranks had enough time to end by themselves; may be called at any rate."""
        now_s = time.monotonic()
        if self._aborted_s is None and now_s - self._checked_s >= _EVERY_S:
            self._checked_s = now_s
            self._aborted_s = now_s if self._is_aborted() else None

        return self._aborted_s is not None and now_s - self._aborted_s >= _GRACE_S

    def _is_aborted(self) -> bool:
        with suppress(StoreError, OSError):  # it is just being made
            if self._store.is_file():
                with StoreReader(self._store) as reader:
                    return reader.last_event(ABORT) is not None

        return False
