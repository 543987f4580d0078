"""Targets of generated input: a strategy for the input, and a check that must hold for each."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from traceml.errors import TraceMLError

__all__ = ["DAMAGE", "JSON_VALUES", "PACKABLE", "TEXTS", "Damage", "Target", "refusal"]

_WORDS = [0, 1, -1, 7, 255, 1 << 20, 1 << 31, 1 << 40, (1 << 62) - 1, 1 << 62, (1 << 63) - 1, -(1 << 63)]
_EDIT_KINDS = ["cut", "put", "put", "word", "insert", "remove", "repeat"]


@dataclass(frozen=True)
class Target:
    """A part that reads input from outside.

    Attributes:
        name: its name.
        inputs: strategy for its input.
        check: takes an input and an empty folder; raises where a property does not hold.
        examples: number of inputs in the tests.
        starts: whether the check may start a process.
    """

    name: str
    inputs: SearchStrategy[Any]
    check: Callable[[Any, Path], object]
    examples: int = 25
    starts: bool = False

    def run(self, value: Any) -> None:
        """Check one input."""
        with tempfile.TemporaryDirectory() as folder:
            self.check(value, Path(folder))


@dataclass(frozen=True)
class Damage:
    """Changes of bytes: (kind, position, bytes, number), of any length; positions wrap around."""

    edits: tuple[tuple[str, int, bytes, int], ...]

    def of(self, good: bytes) -> bytes:
        """Return bytes with the changes."""
        data = bytearray(good)
        for kind, position, piece, number in self.edits:
            at = position % (len(data) + 1)
            if kind == "cut":
                del data[at:]
            elif kind == "put":
                data[at : at + len(piece)] = piece
            elif kind == "word":
                at -= at % 8
                data[at : at + 8] = number.to_bytes(8, "little", signed=True)
            elif kind == "insert":
                data[at:at] = piece
            elif kind == "remove":
                del data[at : at + len(piece) * 16]
            else:
                data[at:at] = data[at : at + len(piece) * 16]

        return bytes(data)

    def first_change(self, good: bytes) -> int:
        """Return the offset of the first byte that differs; the length where none does."""
        data = self.of(good)
        pairs = enumerate(zip(data, good, strict=False))
        return next((at for at, (now, before) in pairs if now != before), min(len(data), len(good)))


_POSITIONS = st.one_of(st.integers(0, 256), st.integers(0, 1 << 14), st.integers(0, 1 << 22))
_EDITS = st.tuples(
    st.sampled_from(_EDIT_KINDS), _POSITIONS, st.binary(min_size=1, max_size=12), st.sampled_from(_WORDS)
)
DAMAGE = st.lists(_EDITS, min_size=1, max_size=4).map(lambda edits: Damage(tuple(edits)))
"""Damage of a file or of a stream of bytes."""

TEXTS = st.one_of(
    st.text(max_size=30),
    st.sampled_from(["", " ", "nan", "-inf", "1e999", "9" * 5000, "²", "~nobody-here/x", "[", "{", "[" * 3000, "\x00"]),
)
"""Texts as people and programs write them by mistake."""

_SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.just(10**400), st.floats(), TEXTS, st.binary(max_size=8)
)
JSON_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8,
)
"""Values of any type."""


PACKABLE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.text(max_size=10),
    st.binary(max_size=10),
    st.lists(st.integers(0, 3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(0, 3), max_size=2),
)
"""Values that msgpack packs."""


def refusal(call: Callable[[], object]) -> TraceMLError | None:
    """Call; return the error of ours that it raised, None without one. Any other error is a defect."""
    refused: TraceMLError | None = None
    try:
        call()
    except TraceMLError as error:
        refused = error

    assert refused is None or str(refused).strip(), f"{refused!r} has no words"
    return refused
