"""A pseudo-terminal with a small emulated screen."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import termios

import pytest
from rich.console import Console

from tests.display.screen import Screen

MARK = b"\x05mark\x05"


class Terminal:
    """A pseudo-terminal: what is written to `file` appears on `screen`."""

    def __init__(self, columns: int, rows: int) -> None:
        self.master, slave = pty.openpty()
        self.file = os.fdopen(slave, "w", encoding="utf-8")
        attributes = termios.tcgetattr(slave)
        attributes[1] &= ~termios.OPOST
        termios.tcsetattr(slave, termios.TCSANOW, attributes)
        self.screen = Screen(columns, rows)
        self.resize(columns, rows)
        self.raw = b""

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def console(self, **options) -> Console:
        return Console(file=self.file, force_terminal=True, color_system=None, legacy_windows=False, **options)

    def read(self, *, show: bool = True) -> bytes:
        """Return what was written since the last time, everything before a mark that is written now; show it."""
        os.write(self.file.fileno(), MARK)
        data = b""
        while not data.endswith(MARK):
            data += os.read(self.master, 65536)

        self.raw += data[: -len(MARK)]
        if show:
            self.screen.feed(data[: -len(MARK)])

        return data[: -len(MARK)]

    def visible_lines(self) -> list[str]:
        """Return the screen's lines as they are now."""
        self.read()
        return self.screen.lines()

    def close(self) -> None:
        self.file.close()
        os.close(self.master)


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    made = Terminal(80, 24)
    yield made
    made.close()
