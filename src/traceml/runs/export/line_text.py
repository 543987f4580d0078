"""Text of many lines from arrays: a line is one of a few templates, with its own values in the gaps (`GAP`).

The lines are rows of a matrix of words of four bytes. Shorter texts are padded with NUL, which is deleted in the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["GAP", "fill_lines"]

GAP = b"\0"
"""Place of a value in a template."""
Words = NDArray[np.uint32]
_BASE = np.uint64(10_000)  # four digits are looked up at once
_MINUS = np.frombuffer(b"-\0\0\0", np.uint32)


def _table(of_zero: bytes) -> Words:
    """Return the four digits of 0 to 9,999: first as the beginning of a number, then inside one."""
    texts = [of_zero, *(b"%d" % number for number in range(1, 10_000)), *(b"%04d" % number for number in range(10_000))]
    return np.array(texts, "S4").view(np.uint32)


_LAST, _OTHERS = _table(b"0"), _table(b"")


def fill_lines(templates: Sequence[bytes], kind: NDArray[np.intp], values: Sequence[NDArray[Any]]) -> bytes:
    """Return the lines, one after the other.

    Args:
        templates: the constant text of lines. A template with fewer gaps than values has the first values only.
        kind: number of the template of each line.
        values: arrays with an integer or a text (as bytes) for each line; texts have no NUL.
    """
    pieces = [template.split(GAP) for template in templates]
    layout, filled, width = [], [], 0
    for number in range(len(values) + 1):
        if number:
            has_gap = np.array([number < len(each) for each in pieces])[kind]
            value = values[number - 1]
            words = _digits(value) if value.dtype.kind == "i" else list(_padded(value.astype("S")).T)
            filled += [(width + place, word * has_gap) for place, word in enumerate(words)]
            layout.append(np.zeros((len(pieces), len(words)), np.uint32))
            width += len(words)

        constants = np.array([each[number] if number < len(each) else b"" for each in pieces], "S")
        layout.append(_padded(constants))
        width += layout[-1].shape[1]

    lines = np.concatenate(layout, axis=1)[kind]
    for place, word in filled:
        lines[:, place] = word

    return lines.tobytes().translate(None, b"\0")


def _padded(texts: NDArray[np.bytes_]) -> Words:
    size = -(-texts.dtype.itemsize // 4)
    return texts.astype(f"S{4 * size}").view(np.uint32).reshape(len(texts), size)


def _digits(numbers: NDArray[np.integer[Any]]) -> list[Words]:
    rest = np.abs(numbers.astype(np.int64)).view(np.uint64)
    words: list[Words] = []
    while not words or rest.any():
        number, rest = rest, rest // _BASE
        words.insert(0, (_OTHERS if words else _LAST)[(number - rest * _BASE + (rest > 0) * _BASE).view(np.intp)])

    is_negative = numbers < 0
    return [is_negative * _MINUS, *words] if is_negative.any() else words
