"""The live view of a traced launch, and the output that appears above it.

Process: launcher.
"""

from __future__ import annotations

import io
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

from traceml.supervise.supervisor import Screen

__all__ = ["MakeScreen", "Output", "terminal_screen"]

MakeScreen = Callable[[Path], Screen | None]
"""Makes the live view of the run in a folder, or returns None without a terminal."""


def terminal_screen(run_dir: Path) -> Screen | None:
    """Return the live view in the terminal, None if standard output is not one."""
    if not sys.stdout.isatty():
        return None

    from traceml.display.terminal.live_screen import LiveScreen

    return LiveScreen(run_dir)


class Output(io.TextIOBase):
    """A text stream that writes to one of `sys`, or queues text for the thread that draws the live view."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.redirected: deque[str] | None = None

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, text: str, /) -> int:
        """Write or queue text; return the number of characters."""
        waiting = self.redirected
        if waiting is None:
            return int(getattr(sys, self._name).write(text))

        waiting.append(text)
        return len(text)

    def flush(self) -> None:
        """Flush, unless text is queued."""
        if self.redirected is None:
            getattr(sys, self._name).flush()
