"""Helper programs of ours: the commands that start them, and their end."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from subprocess import Popen

__all__ = ["end_process", "own_program", "search_working_directory"]


def own_program(module: str, *arguments: str, unbuffered: bool = False) -> list[str]:
    """Return the command that runs a module of ours in a process of its own.

    `-P` keeps the working directory off its path: it is where users have their `queue.py` or `json.py`.
    Processes that load what users name call `search_working_directory`.

    Args:
        module: its name, as for `python -m`.
        unbuffered: what it prints appears at once, in a file too.
    """
    return [sys.executable, "-uP" if unbuffered else "-P", "-m", module, *arguments]


def end_process(process: Popen[Any], timeout_s: float) -> None:
    """Wait for the end of a process that was asked to end; kill it after the timeout."""
    from subprocess import TimeoutExpired

    try:
        process.wait(timeout_s)
    except TimeoutExpired:
        process.kill()
        process.wait()


def search_working_directory() -> None:
    """Let this process find modules of the user, such as a tracker: after all that are installed."""
    with suppress(OSError):  # the folder is gone
        sys.path.append(str(Path.cwd()))
