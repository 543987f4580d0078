"""The live view at the bottom of a terminal, while a script prints above it.

The view is below the terminal's scroll region, so the script's bytes reach the terminal unchanged: partial lines,
carriage returns of progress bars, colors and cursor movements work as usual, and lines that scroll away stay in the
terminal's history. The cursor stays where the script left it: a view is drawn in one write that saves the cursor,
draws, and restores it.
"""

from __future__ import annotations

import atexit
import os
import re
import select
from typing import TYPE_CHECKING

from traceml.renderers.text.live_panel import MIN_HEIGHT, MIN_WIDTH, live_lines, panel_height
from traceml.renderers.text.viewport import Viewport, terminal_size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from traceml.renderers.views import RunView

__all__ = ["BottomPanel", "ansi_bytes"]

_SCRIPT_ROWS = 5  # always left to the script; a smaller terminal has no view
_MAX_UNFINISHED_DRAWS = 4

# DECSC and DECRC save position, colors and a pending wrap; ?2026 makes a draw one frame in terminals that support it.
_SAVE, _RESTORE = b"\x1b7", b"\x1b8"
_BEGIN, _END = b"\x1b[?2026h" + _SAVE, _RESTORE + b"\x1b[?2026l"
_FULL_REGION = b"\x1b[r"
_CLEAR_BELOW = b"\x1b[J"

# A write may end within an escape sequence or a character, which the next one completes: nothing may come between.
_UNFINISHED = re.compile(rb"\x1b(?:[ -/]*|\[[0-?]*[ -/]*|[\]PX^_][^\x07\x1b]*\x1b?)\Z")
_UNFINISHED_TEXT = re.compile(rb"(?:[\xc2-\xf4]|[\xe0-\xf4][\x80-\xbf]|[\xf0-\xf4][\x80-\xbf]{2})\Z")


class BottomPanel:
    """Shows a view below the output of a script; without a terminal it only passes the output on.

    Args:
        console: the terminal; its size, encoding and colors decide how views look.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._fd = console.file.fileno()
        self._can_draw = console.is_terminal and not console.is_dumb_terminal
        self._reserved = 0  # rows of the panel
        self._size = (0, 0)
        self._tail = b""
        self._postponed = 0
        self._lines: list[Text] = []
        self._lost = False

    @property
    def visible(self) -> bool:
        """Whether a view is on the screen."""
        return self._reserved > 0

    def update(self, view: RunView) -> None:
        """Draw a view if the script is not within an escape sequence."""
        if not self._can_draw or self._lost:
            return

        if self._is_unfinished() and self._postponed < _MAX_UNFINISHED_DRAWS:
            self._postponed += 1
            return

        self._postponed = 0
        self._show(view)

    def write(self, data: bytes) -> None:
        """Pass on output of the script, unchanged."""
        if self.visible and terminal_size(self._console) != self._size and not self._is_unfinished():
            # Terminals drop the scroll region when they are resized; without it the script would scroll the view away.
            self._redraw()

        self._tail = (self._tail + data)[-64:]
        self._send(data)

    def close(self) -> None:
        """Remove the view and leave the cursor at the start of a line; may be called again."""
        atexit.unregister(self.close)
        if not self.visible:
            return

        self._send(_release(self._reserved))
        self._reserved = 0
        # There is no way to ask whether the script ended its last line: a row of blanks wraps exactly when it did not.
        columns, _ = terminal_size(self._console)
        self._send(b"\x1b[0m" + b" " * (columns - 1) + b"\r\x1b[K")

    def __enter__(self) -> BottomPanel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _show(self, view: RunView) -> None:
        columns, rows = terminal_size(self._console)
        height = panel_height(max(len(view.ranks), view.report.run.world_size), rows - _SCRIPT_ROWS)
        if columns < MIN_WIDTH or rows < MIN_HEIGHT + _SCRIPT_ROWS:
            self._lines = []
            self._hide()
            return

        viewport = Viewport.of(self._console)
        self._lines = live_lines(view, Viewport(columns, height, viewport.glyphs, viewport.color))
        self._redraw()

    def _redraw(self) -> None:
        size = terminal_size(self._console)
        columns, rows = size
        if columns < MIN_WIDTH or rows < len(self._lines) + _SCRIPT_ROWS:
            self._hide()  # the next view adapts to the size
            return

        frame = b""
        if size != self._size or self._reserved != len(self._lines):
            # Resizing may have moved the cursor onto a row of the old panel: text right of it is not the script's.
            moved = b"\x1b[K" if self._reserved and size != self._size else b""
            frame = moved + _release(self._reserved) + _reserve(len(self._lines))
            self._reserved = len(self._lines)
            self._size = size
            atexit.register(self.close)

        try:
            frame += self._frame(rows)
        except OSError:  # rich flushes the stream: the terminal was closed
            self._lost = True
            return

        self._send(frame)

    def _frame(self, rows: int) -> bytes:
        """Return the bytes that draw the panel; they set the region too, since a script may reset the terminal."""
        top = rows - self._reserved
        drawn = [_BEGIN, b"\x1b[1;%dr" % top, b"\x1b[0m"]
        for number, line in enumerate(self._lines, start=top + 1):
            drawn.append(b"\x1b[%d;1H" % number + ansi_bytes(self._console, line, self._size[0]))

        return b"".join((*drawn, _END))

    def _hide(self) -> None:
        if self.visible:
            self._send(_release(self._reserved))
            self._reserved = 0

    def _is_unfinished(self) -> bool:
        return bool(_UNFINISHED.search(self._tail) or _UNFINISHED_TEXT.search(self._tail))

    def _send(self, data: bytes) -> None:
        """Write everything; after the first error the terminal is not written to again."""
        rest = memoryview(data)
        while rest and not self._lost:
            try:
                rest = rest[os.write(self._fd, rest) :]
            except BlockingIOError:
                select.select([], [self._fd], [], 1.0)
            except OSError:
                self._lost = True


def ansi_bytes(console: Console, line: Text, width: int) -> bytes:
    """Return a line padded to `width` as bytes for the console's terminal, in its encoding and colors.

    It is padded with blanks: clearing to the end of a full line would erase its last character in some terminals.
    """
    with console.capture() as capture:
        console.print(line, end="", soft_wrap=True, highlight=False)

    filled = capture.get() + "\x1b[0m" + " " * (width - line.cell_len)
    return filled.encode(console.encoding, "replace")


def _reserve(height: int) -> bytes:
    """Return the bytes that free `height` rows below the cursor: scroll up as needed, keep the column."""
    return b"\x1bD" * height + b"\x1b[%dA" % height


def _release(height: int) -> bytes:
    """Return the bytes that release the panel's rows: scroll the whole screen again, clear below the cursor."""
    if not height:
        return b""

    return _SAVE + _FULL_REGION + _RESTORE + _SAVE + b"\x1b[B\r" + _CLEAR_BELOW + _RESTORE
