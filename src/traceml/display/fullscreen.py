"""The live view on a screen of its own, for a job that runs elsewhere: drawn until a key ends it."""

from __future__ import annotations

import os
import select
import sys
import termios
import tty
from typing import TYPE_CHECKING, Any

from rich.text import Text

from traceml.display.panel import ansi_bytes, terminal_size
from traceml.renderers.live import MIN_HEIGHT, MIN_WIDTH, live_lines
from traceml.renderers.look import Look

if TYPE_CHECKING:
    from rich.console import Console

    from traceml.renderers.views import LiveView

__all__ = ["FullScreen"]

_ENTER = b"\x1b[?1049h\x1b[?25l"
_LEAVE = b"\x1b[?25h\x1b[?1049l"


class FullScreen:
    """The terminal's second screen while in the `with` block; afterwards everything is as it was.

    Args:
        console: the terminal.
        keys: descriptor that keys are read from; None when there are none to read.
    """

    def __init__(self, console: Console, *, keys: int | None = None) -> None:
        self._console = console
        self._fd = console.file.fileno()
        self._keys = keys if keys is not None else _keyboard()
        self._cooked: list[Any] | None = None

    def __enter__(self) -> FullScreen:
        if self._keys is not None:
            self._cooked = termios.tcgetattr(self._keys)
            tty.setcbreak(self._keys)  # keys come at once and unseen; Ctrl-C stays a signal

        os.write(self._fd, _ENTER)
        return self

    def __exit__(self, *_: object) -> None:
        os.write(self._fd, _LEAVE)
        if self._keys is not None and self._cooked is not None:
            termios.tcsetattr(self._keys, termios.TCSADRAIN, self._cooked)

    def draw(self, view: LiveView, *, footer: str = "") -> None:
        """Draw a view over the whole screen, and a line below it."""
        look = Look.of(self._console)
        columns, rows = terminal_size(self._console)
        if columns < MIN_WIDTH or rows <= MIN_HEIGHT:
            lines = [Text(f"needs {MIN_WIDTH} x {MIN_HEIGHT + 1}"[:columns])][: rows - 1]
        else:
            lines = live_lines(view, Look(columns, rows - 1, look.glyphs, look.color))

        lines.append(Text(f" {footer}"[:columns], style="dim"))
        frame = b"".join(
            b"\x1b[%d;1H" % number + ansi_bytes(self._console, line, columns)
            for number, line in enumerate(lines, start=1)
        )
        below = b"\x1b[%d;1H\x1b[J" % (len(lines) + 1) if len(lines) < rows else b""
        self._write(b"\x1b[?2026h" + frame + below + b"\x1b[?2026l")

    def key(self, timeout_s: float) -> str | None:
        """Return a key that was pressed within the time, or None."""
        ready, _, _ = select.select([] if self._keys is None else [self._keys], [], [], timeout_s)
        if not ready or self._keys is None:
            return None

        pressed = os.read(self._keys, 16)
        if not pressed:  # the keyboard is gone; asking again would return at once for ever
            self._keys = None

        return pressed.decode("ascii", "ignore")[:1] or None

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._fd, rest) :]


def _keyboard() -> int | None:
    return sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
