"""The live view of a traced launch, and the output that appears above it.

Process: launcher.
"""

from __future__ import annotations

import io
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from traceml.fail_open import is_terminal
from traceml.process_ends import start_without_signals
from traceml.supervise.supervisor import Screen

__all__ = ["MakeScreen", "Output", "ScreenThread", "terminal_screen"]

MakeScreen = Callable[[Path], Screen | None]
"""Makes the live view of the run in a folder, or returns None without a terminal."""


def terminal_screen(run_dir: Path) -> Screen | None:
    """Return the live view in the terminal, None if standard output is not one."""
    if not is_terminal(sys.stdout):
        return None

    from traceml.display.terminal.live_screen import LiveScreen

    return LiveScreen(run_dir)


_MAX_WAITING = 1000  # texts for the live view: then their writers wait
_WAIT_S = 0.05
_CLOSE_S = 10.0


class ScreenThread:
    """Draws a live view in a thread: a terminal that is stopped holds up nothing else.

    Args:
        waiting: texts that are shown above it.
    """

    def __init__(self, screen: Screen, waiting: deque[str]) -> None:
        self._screen, self._waiting = screen, waiting
        self._is_due, self._ends = threading.Event(), False
        self._thread = threading.Thread(target=self._work, name="traceml-screen", daemon=True)
        start_without_signals(self._thread)

    def tick(self) -> None:
        """Show the texts, and redraw if it is time; return at once."""
        self._is_due.set()

    def close(self) -> None:
        """Show the rest, and restore the terminal; give up if that takes long."""
        self._ends = True
        self._is_due.set()
        self._thread.join(_CLOSE_S)

    def _work(self) -> None:
        while not self._ends:
            self._is_due.wait()
            self._is_due.clear()
            self._show()
            self._screen.tick()

        self._show()
        self._screen.close()

    def _show(self) -> None:
        while self._waiting:
            self._screen.write(self._waiting.popleft().encode(errors="replace"))


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
            if (stream := self._stream) is not None:
                stream.write(text)

            return len(text)

        while len(waiting) >= _MAX_WAITING and self.redirected is waiting:
            time.sleep(_WAIT_S)

        waiting.append(text)
        return len(text)

    def flush(self) -> None:
        """Flush, unless text is queued."""
        if self.redirected is None and (stream := self._stream) is not None:
            stream.flush()

    @property
    def _stream(self) -> TextIO | None:
        """Stream of the script now: perhaps of its own class, whose `write` returns None; None in a daemon."""
        stream: TextIO | None = getattr(sys, self._name)
        return stream
