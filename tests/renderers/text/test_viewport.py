"""Size and capabilities of an output."""

from __future__ import annotations

import os
import termios

import pytest
from rich.console import Console

from traceml.renderers.text.viewport import Viewport


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_a_dumb_terminal_has_its_own_width(term, monkeypatch):
    """A serial line or an editor's shell of 40 columns; rich says 80 for any dumb terminal."""
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("LINES", "20")
    master, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (20, 40))
    with os.fdopen(master, "wb"), os.fdopen(terminal, "w", encoding="utf-8") as file:
        viewport = Viewport.of(Console(file=file))

    assert (viewport.width, viewport.height) == (40, 20)
