"""Full-screen view of a job that another process runs, and its keys."""

from __future__ import annotations

import os
import re
import select
import sys
import termios
import time
import tty
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from traceml.display.terminal.bottom_panel import ansi_bytes
from traceml.renderers.text.live_panel import MIN_HEIGHT, MIN_WIDTH, live_lines
from traceml.renderers.text.viewport import Viewport, terminal_size

if TYPE_CHECKING:
    from rich.console import Console

    from traceml.renderers.views import RunView

__all__ = ["FullScreen", "parse_keys"]

_ENTER = b"\x1b[?1049h\x1b[?25l"
_LEAVE = b"\x1b[?25h\x1b[?1049l"
_SIZE_CHECK_S = 0.2  # interval between checks of the window's size
_ESCAPE_S = 0.1
_NAMES = {
    b"[A": "up", b"[B": "down", b"[C": "right", b"[D": "left", b"[H": "home", b"[F": "end", b"[1~": "home",
    b"[4~": "end", b"[7~": "home", b"[8~": "end", b"[5~": "pageup", b"[6~": "pagedown", b"[Z": "backtab",
    b"OA": "up", b"OB": "down", b"OC": "right", b"OD": "left", b"OH": "home", b"OF": "end",
}  # fmt: skip
_PLAIN = {"\t": "tab", "\r": "enter", "\n": "enter", "\x1b": "escape", "\x7f": "backspace"}
_SEQUENCE = re.compile(rb"\x1b(\[[0-?]*[ -/]*[@-~]|O[A-Z])")
_PARTIAL = re.compile(rb"\x1b(\[[0-?]*[ -/]*|O)\Z")


class FullScreen:
    """The terminal's alternate screen during the `with` block; the normal one is restored after it.

    Args:
        keys: descriptor that keys are read from; standard input where left out and it is a terminal.
    """

    def __init__(self, console: Console, *, keys: int | None = None) -> None:
        self._console = console
        self._fd = console.file.fileno()
        self._keys = keys if keys is not None else _keyboard()
        self._saved_mode: list[Any] | None = None
        self._pressed: deque[str] = deque()
        self._partial = b""  # an incomplete key sequence
        self._size = (0, 0)

    def __enter__(self) -> FullScreen:
        if self._keys is not None:
            self._saved_mode = termios.tcgetattr(self._keys)
            tty.setcbreak(self._keys)  # keys arrive at once, without echo; Ctrl-C stays a signal

        os.write(self._fd, _ENTER)
        return self

    def __exit__(self, *_: object) -> None:
        os.write(self._fd, _LEAVE)
        if self._keys is not None and self._saved_mode is not None:
            termios.tcsetattr(self._keys, termios.TCSADRAIN, self._saved_mode)

    def draw(self, view: RunView, *, footer: str = "") -> None:
        """Draw the live view over the whole screen, with a line below it."""
        self.show(lambda viewport: live_lines(view, viewport), footer=footer, least=MIN_HEIGHT)

    def show(self, lines: Callable[[Viewport], Sequence[Text]], *, footer: str = "", least: int = 1) -> None:
        """Draw lines over the whole screen, with one below them.

        Args:
            lines: makes the lines for a viewport.
            footer: the line below; of its parts, three spaces apart, the first ones that fit are shown.
            least: smallest useful number of rows.
        """
        columns, rows = self._size = terminal_size(self._console)
        if columns < MIN_WIDTH or rows <= least:
            drawn = [Text(f"needs {MIN_WIDTH} x {least + 1}"[:columns])][: rows - 1]
        else:
            drawn = list(lines(self.viewport))

        drawn.append(Text(f" {_whole_parts(footer, columns - 1)}", style="dim"))
        frame = b"".join(
            b"\x1b[%d;1H" % number + ansi_bytes(self._console, line, columns)
            for number, line in enumerate(drawn, start=1)
        )
        below = b"\x1b[%d;1H\x1b[J" % (len(drawn) + 1) if len(drawn) < rows else b""
        self._write(b"\x1b[?2026h" + frame + below + b"\x1b[?2026l")

    @property
    def viewport(self) -> Viewport:
        """The viewport of the lines."""
        viewport = Viewport.of(self._console)
        columns, rows = terminal_size(self._console)
        return Viewport(columns, rows - 1, viewport.glyphs, viewport.color)

    def key(self, timeout_s: float) -> str | None:
        """Return the name of a key pressed within the time, `resize` when the window's size changed, or None."""
        deadline_s = time.monotonic() + timeout_s
        while not self._pressed:
            left_s = deadline_s - time.monotonic()
            if terminal_size(self._console) != self._size and self._size != (0, 0):
                self._size = terminal_size(self._console)
                return "resize"

            if not self._read(min(max(left_s, 0.0), _SIZE_CHECK_S)) and left_s <= 0:
                return None

        return self._pressed.popleft()

    def _read(self, timeout_s: float) -> bool:
        ready, _, _ = select.select([] if self._keys is None else [self._keys], [], [], timeout_s)
        if not ready or self._keys is None:
            return False

        data = self._partial + os.read(self._keys, 64)
        if data == self._partial:  # end of input; select would return at once forever
            self._keys = None
            return False

        # Over a slow line the rest of an escape sequence may arrive a moment later.
        while data.endswith((b"\x1b", b"\x1b[", b"\x1bO")) and select.select([self._keys], [], [], _ESCAPE_S)[0]:
            data += os.read(self._keys, 64)

        keys, self._partial = parse_keys(data)
        self._pressed += keys
        return True

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._fd, rest) :]


def _keyboard() -> int | None:
    return sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None


def _whole_parts(footer: str, columns: int) -> str:
    parts = footer.split("   ")
    while len(parts) > 1 and len("   ".join(parts)) > columns:
        parts.pop()

    return "   ".join(parts)[:columns]


def parse_keys(data: bytes) -> tuple[list[str], bytes]:
    """Return the pressed keys, and the bytes of a key that continues in the next read.

    A letter is itself; other keys have names: up, pagedown, tab, escape, … Unknown sequences are left out. A lone
    escape at the end is the Escape key: the caller waits a moment for the rest of a sequence.
    """
    keys: list[str] = []
    while data:
        if match := _SEQUENCE.match(data):
            keys += [_NAMES[match[1]]] if match[1] in _NAMES else []
            data = data[match.end() :]
        elif _PARTIAL.match(data):
            break
        else:
            char = chr(data[0])
            keys += [_PLAIN.get(char, char)] if char in _PLAIN or 32 <= data[0] < 127 else []
            data = data[1:]

    return keys, data
