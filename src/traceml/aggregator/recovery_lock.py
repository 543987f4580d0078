"""Locks of a runs folder: two processes that recover runs in it do so one after the other."""

from __future__ import annotations

import contextlib
import fcntl
import logging
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

from traceml.run_folder import OPEN_FOLDER

__all__ = ["RecoveryLock"]

_log = logging.getLogger("traceml")


class RecoveryLock(StrEnum):
    """Work that one process at a time does; who finishes runs also adopts rows, never the other way round."""

    ADOPT = "adopting.lock"
    """Open the runs of dead ranks: two processes would each make a run of the same rows."""
    FINISH = "finishing.lock"
    """End runs that lost their aggregator: of two processes, the second one would end the same run again."""

    @contextlib.contextmanager
    def held(self, runs_dir: Path) -> Iterator[None]:
        """Hold the lock in this folder. Where there can be none, as on a full disk, nothing is locked."""
        folder = runs_dir / OPEN_FOLDER
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / self.value).open("ab")
        except OSError as error:
            _log.debug("no lock in %s: %s", runs_dir, error)
            yield
            return

        with file:
            with contextlib.suppress(OSError):  # a network file system that cannot lock
                fcntl.flock(file, fcntl.LOCK_EX)

            yield
