"""A pseudo-terminal with a small screen at its other end."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import termios

import pytest
from rich.console import Console

from tests.display.screen import Screen


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

    def look(self) -> list[str]:
        while select.select([self.master], [], [], 0)[0]:
            data = os.read(self.master, 65536)
            self.raw += data
            self.screen.feed(data)

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
