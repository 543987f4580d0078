"""Threads of this process in which torch's store answers, though the training does nothing.

The TCPStore of torch.distributed is in a thread of one rank. The others ask it again and again while they wait for a
rank, and so do the heartbeats of NCCL.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

__all__ = ["StoreThreads"]

_TASKS = Path("/proc/self/task")
_NAME = "pt_tcpstore"
_LOOKS = 3  # a thread gets its name when it runs for the first time


class StoreThreads:
    """Finds them again when the threads of the process change; for one thread."""

    def __init__(self) -> None:
        self._known: list[str] = []
        self._looks = 0
        self._found: list[str] = []

    def __call__(self) -> list[str]:
        """Return the kernel's numbers of these threads; none where the system does not name threads."""
        tasks: list[str] = []
        with suppress(OSError):
            tasks = os.listdir(_TASKS)  # noqa: PTH208 - names alone

        if tasks != self._known:
            self._known, self._looks = tasks, 0

        if self._looks < _LOOKS:
            self._looks += 1
            self._found = [task for task in tasks if _name(task).startswith(_NAME)]

        return self._found


def _name(task: str) -> str:
    with suppress(OSError):
        return (_TASKS / task / "comm").read_text("utf-8", "replace")

    return ""
