"""Parser from a terminal's bytes to names of keys."""

from __future__ import annotations

import re

__all__ = ["parse_keys"]

_NAMES = {
    b"[A": "up", b"[B": "down", b"[C": "right", b"[D": "left", b"[H": "home", b"[F": "end", b"[1~": "home",
    b"[4~": "end", b"[7~": "home", b"[8~": "end", b"[5~": "pageup", b"[6~": "pagedown", b"[Z": "backtab",
    b"OA": "up", b"OB": "down", b"OC": "right", b"OD": "left", b"OH": "home", b"OF": "end",
}  # fmt: skip
_PLAIN = {"\t": "tab", "\r": "enter", "\n": "enter", "\x1b": "escape", "\x7f": "backspace"}
_SEQUENCE = re.compile(rb"\x1b(\[[0-?]*[ -/]*[@-~]|O[A-Z])")
_PARTIAL = re.compile(rb"\x1b(\[[0-?]*[ -/]*|O)\Z")


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
