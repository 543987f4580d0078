"""Ranges of numeric options, checked the same way for every command."""

from __future__ import annotations

import argparse
import math
import re

__all__ = ["PORT", "NumberRange", "node_count"]


class NumberRange:
    """Numbers that an option takes: the `type` of an argparse option, or a note in `Annotated` on a field of options.

    Args:
        minimum: the smallest one; not itself with `above`.
        above: whether numbers must be above `minimum`.
        words: words that the option takes too.
    """

    def __init__(
        self,
        kind: type[int] | type[float] = int,
        minimum: float = 1,
        maximum: float = math.inf,
        above: bool = False,
        words: tuple[str, ...] = (),
    ) -> None:
        self.kind, self.minimum, self.maximum, self.above, self.words = kind, minimum, maximum, above, words

    def __repr__(self) -> str:
        return f"NumberRange({self})"

    def __call__(self, text: str) -> float | str:
        """Return the value of a text, as argparse calls it.

        Raises:
            argparse.ArgumentTypeError: it is not in the range.
        """
        if text in self.words:
            return text

        try:
            value = self.kind(text)
        except ValueError:
            value = math.nan

        if not self.contains(value):
            raise argparse.ArgumentTypeError(f"takes {self}, not {text!r}")

        return value

    def contains(self, value: float) -> bool:
        """Whether a number is in the range; never for one that is not finite."""
        in_range = self.minimum <= value <= self.maximum and not (self.above and value == self.minimum)
        return math.isfinite(value) and in_range

    def __str__(self) -> str:
        what = "a whole number" if self.kind is int else "a number"
        bounds = f"above {self.minimum:g}" if self.above else f"of at least {self.minimum:g}"
        if self.maximum < math.inf:
            bounds = f"from {self.minimum:g} to {self.maximum:g}"

        words = f", or {', '.join(self.words)}" if self.words else ""
        return f"{what} {bounds}{words}"


PORT = NumberRange(minimum=0, maximum=65535)


def node_count(text: str) -> str:
    """Return torchrun's number of nodes, N or MIN:MAX, as argparse calls it.

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2] or match[1]):
        raise argparse.ArgumentTypeError(f"takes a whole number of at least 1, or MIN:MAX, not {text!r}")

    return text
