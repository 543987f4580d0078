"""Bytes of a terminal as keys."""

from __future__ import annotations

import pytest

from traceml.display.terminal.fullscreen import parse_keys


@pytest.mark.parametrize(
    ("data", "keys", "rest"),
    [
        (b"q", ["q"], b""),
        (b"jj\t", ["j", "j", "tab"], b""),
        (b"\x1b", ["escape"], b""),
        (b"\x1b[A\x1bOB\x1b[6~\x1b[5~", ["up", "down", "pagedown", "pageup"], b""),
        (b"\x1b[H\x1b[4~\x1b[Z", ["home", "end", "backtab"], b""),
        (b"\x1b[", [], b"\x1b["),
        (b"r\x1b[6", ["r"], b"\x1b[6"),
        (b"\x1b[1;5A\x1b[200~p", ["p"], b""),
        (b"\x00\xff\xc3\xbc\x01", [], b""),
        (b"\x1b\x1b[A", ["escape", "up"], b""),
    ],
)
def test_keys_have_names(data, keys, rest):
    """Arrows have names, letters are themselves; unknown sequences are dropped, incomplete ones are kept."""
    assert parse_keys(data) == (keys, rest)
