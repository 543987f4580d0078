"""Processes that tests look at."""

from __future__ import annotations

import contextlib

import psutil

__all__ = ["command_of"]


def command_of(process: psutil.Process) -> list[str]:
    """Return the command line of a process; empty if it has ended, as a child of an earlier test may have."""
    with contextlib.suppress(psutil.Error):
        return list(process.cmdline())

    return []
