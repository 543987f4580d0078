"""Scales from numbers to positions, with round ticks and labels that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

__all__ = ["CHAR", "Scale", "category_scale", "rounded", "text_of", "value_scale"]

CHAR = 6.1
"""Approximate width of a character of a label."""
_LABEL_GAP = 14
_MOST = 1e300  # beyond it, differences overflow


class Scale(msgspec.Struct, frozen=True):
    """An axis from `start` to `end` on the drawing.

    Attributes:
        low, high: the numbers at its ends.
        ticks: (number, label).
    """

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[tuple[float, str], ...]

    def at(self, value: float) -> float:
        """Return the position of a number; one outside is clamped."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    @property
    def step(self) -> float:
        """The width of one category."""
        return abs(self.end - self.start) / (self.high - self.low)


def value_scale(axis: Mapping[str, Any], values: Iterable[float], start: float, end: float, ticks: int = 4) -> Scale:
    """Return the scale of an axis of numbers.

    Args:
        axis: of an ECharts option: min, max, and scale (the axis need not include 0).
        ticks: approximate number of labels.
    """
    finite = [max(min(value, _MOST), -_MOST) for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    if not axis.get("scale"):
        low, high = min(low, 0.0), max(high, 0.0)

    low, high = float(axis.get("min", low)), float(axis.get("max", high))
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # equal within the drawing's resolution
        margin = abs(high) / 10 or 1.0
        low, high = low - margin * bool(axis.get("scale")), high + margin

    step = _round_step((high - low) / ticks)
    first, last = math.floor(low / step) * step, math.ceil(high / step) * step
    low, high = float(axis.get("min", first)), float(axis.get("max", last))
    count = round((last - first) / step) + 1
    marks = [value for value in (first + number * step for number in range(count)) if low <= value <= high]
    return Scale(low, high, start, end, tuple((value, text_of(value, step)) for value in marks))


def category_scale(labels: Sequence[str], start: float, end: float, *, bands: bool, across: bool) -> Scale:
    """Return the scale of an axis of labels, whose numbers are their indices.

    Args:
        bands: whether each category has a band (bars, cells), or a point on the line.
        across: whether the labels are side by side, so that long ones need more space.
    """
    low, high = (-0.5, len(labels) - 0.5) if bands else (0.0, max(len(labels) - 1.0, 1.0))
    room = max((len(label) for label in labels), default=0) * CHAR + _LABEL_GAP if across else _LABEL_GAP
    fitting = max(int(abs(end - start) // room), 1)
    every = max(-(-len(labels) // fitting), 1)
    ticks = tuple((float(index), labels[index]) for index in range(0, len(labels), every))
    return Scale(low, high, start, end, ticks)


def _round_step(step: float) -> float:
    unit = 10.0 ** math.floor(math.log10(step))
    return next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= step * 0.999)


def text_of(value: float, step: float = 0.0) -> str:
    """Return a tick's label: `1,500`, `0.25`, `1e-05`."""
    if value == 0 or abs(value) < abs(step) * 1e-9:
        return "0"

    if abs(value) >= 1e7 or (abs(value) < 1e-3 and not step >= 1e-4):  # labels of an axis in one form
        return f"{value:.3g}"

    digits = max(0, -math.floor(math.log10(step)) + (step / 10 ** math.floor(math.log10(step)) == 2.5)) if step else 3
    return f"{value:,.{digits}f}"


def rounded(value: float) -> str:
    """Return a coordinate in as few digits as needed."""
    return f"{value:.1f}".removesuffix(".0")
