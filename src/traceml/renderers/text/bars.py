"""Bars, stacked bars and sparklines as styled text of an exact width."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.text import Text

from traceml.formatting import part_words, short_label
from traceml.renderers.text.viewport import Viewport, column_text
from traceml.renderers.views import RankRow

__all__ = ["bar", "mark", "phase_color", "sparkline", "stacked", "stacked_parts"]

_Piece = tuple[str, str, float]  # label, color, share
_COLORS = {
    "input_wait": "yellow",
    "h2d": "magenta",
    "forward": "blue",
    "backward": "cyan",
    "optimizer": "green",
    "comm": "white",
    "checkpoint": "bright_magenta",
    "user": "bright_green",
    "other": "bright_black",
}


_PART_COLORS = {
    "startup": "yellow",
    "steps": "blue",
    "evaluation": "cyan",
    "checkpoint": "bright_magenta",
    "between_epochs": "bright_yellow",
    "idle": "bright_black",
    "restart": "red",
}


def phase_color(phase: str) -> str:
    """Return the color of a phase; the user's own phases share one."""
    return _COLORS.get(phase, "bright_green")


def mark(row: RankRow, viewport: Viewport) -> str:
    """Return the mark before a rank: that it ended badly, that it is the slowest, or a blank."""
    return viewport.glyphs.lost if row.end else viewport.glyphs.mark if row.slowest else " "


def bar(share: float, width: int, viewport: Viewport, *, style: str = "") -> Text:
    """Return a bar of `width` columns, filled by `share` of 0..1; any share above 0 is visible."""
    parts = viewport.glyphs.bar_parts
    steps = len(parts) + 1
    filled = round(min(max(share, 0.0), 1.0) * width * steps)
    if share > 0 and parts:
        filled = max(filled, 1)

    full, rest = divmod(filled, steps)
    drawn = viewport.glyphs.bar * full + (parts[rest - 1] if rest else "")
    return Text(drawn, style=style).append(" " * (width - len(drawn)))


def stacked(shares: Sequence[tuple[str, float]], width: int, viewport: Viewport) -> Text:
    """Return phases side by side in exactly `width` columns, each as wide as its share, labeled where there is space.

    Args:
        shares: (phase, share of 0..1) in drawing order; together at most 1.
        viewport: with colors each phase has its own; without, phases are separated by bars and filled with dots.
    """
    return _stacked([(short_label(phase), phase_color(phase), share) for phase, share in shares], width, viewport)


def stacked_parts(shares: Sequence[tuple[str, float]], width: int, viewport: Viewport) -> Text:
    """Return parts of the run's time side by side, as `stacked` does with phases."""
    parts = [(part_words(part), _PART_COLORS.get(part, "white"), share) for part, share in shares]
    return _stacked(parts, width, viewport)


def _stacked(shares: Sequence[_Piece], width: int, viewport: Viewport) -> Text:
    drawn = Text()
    for (label, color, _), columns in _columns(shares, width):
        if viewport.color:
            drawn.append(_fit(label, columns), style=f"black on {color}")
        else:
            drawn.append("|" + _fit(label, columns - 1, fill="."))

    return drawn.append(" " * (width - drawn.cell_len))


def _columns(shares: Sequence[_Piece], width: int) -> list[tuple[_Piece, int]]:
    """Divide the columns by running sums, so that rounding errors do not add up."""
    divided, done, total = [], 0, 0.0
    for each in shares:
        total += each[2]
        until = min(width, round(total * width))
        if until > done:
            divided.append((each, until - done))
            done = until

    return divided


def _fit(label: str, columns: int, *, fill: str = " ") -> str:
    if columns > cell_len(label):
        shown = f" {label}" if fill == " " else label
    else:
        part = label if columns >= 3 else label[:1]
        shown = column_text(part, min(columns, cell_len(part)))

    return shown + fill * (columns - cell_len(shown))


def sparkline(values: Sequence[float], width: int, viewport: Viewport) -> str:
    """Return the last `width` values as levels between 0 and their largest; right-aligned, exactly `width` columns."""
    shown = [max(0.0, value) for value in values[-width:]]
    levels = viewport.glyphs.spark
    scale = len(levels) / (max(shown, default=0.0) or 1.0)
    return "".join(levels[min(len(levels) - 1, int(value * scale))] for value in shown).rjust(width)
