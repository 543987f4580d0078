"""Size and capabilities of an output."""

from __future__ import annotations

import os
import termios

import pytest

from traceml.renderers.text.viewport import Viewport, column_text, plain_console


@pytest.mark.parametrize(("columns", "width"), [(None, 40), ("60", 60)])
def test_a_dumb_terminal_has_its_own_width_unless_columns_tells(
    columns: str | None, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A serial line or an editor's shell of 40 columns; rich says 80 for any dumb terminal."""
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
        monkeypatch.setenv("LINES", "20")

    master, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (20, 40))
    with os.fdopen(master, "wb"), os.fdopen(terminal, "w", encoding="utf-8") as file:
        viewport = Viewport.of(plain_console(file))

    assert viewport.width == width


@pytest.mark.parametrize(
    ("width", "left", "right"), [(8, "日本ab  ", "  日本ab"), (6, "日本ab", "日本ab"), (3, "日 ", "日 ")]
)
def test_wide_characters_take_two_columns(width, left, right):
    """A text fills its column exactly; half of a wide character is a blank."""
    assert column_text("日本ab", width) == left
    assert column_text("日本ab", width, right=True) == right
