"""What the medium can show: how many columns, which characters, colours or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["ASCII", "UNICODE", "Glyphs", "Viewport"]


@dataclass(frozen=True, slots=True)
class Glyphs:
    """The characters that views are drawn with."""

    bar: str  # a full cell of a bar
    bar_parts: str  # cells filled by 1/n, 2/n, ... of a cell; may be empty
    spark: str  # levels of a sparkline, lowest first
    rule: str
    mark: str  # points at the slowest rank
    lost: str  # stands at a rank that ended badly
    dot: str  # parts remarks on one line
    ellipsis: str


UNICODE = Glyphs(
    bar="█", bar_parts="▏▎▍▌▋▊▉", spark="▁▂▃▄▅▆▇█", rule="─", mark="▸", lost="\u00d7", dot="·", ellipsis="…"
)
ASCII = Glyphs(bar="#", bar_parts="", spark="_.-=*#", rule="-", mark=">", lost="x", dot="-", ellipsis="...")


@dataclass(frozen=True, slots=True)
class Viewport:
    """The room a view has, and the means.

    Args:
        width: columns.
        height: rows; views of fixed height use no more.
        glyphs: the characters to draw with.
        color: whether colours will be seen; without them parts are told apart by their labels alone.
    """

    width: int = 80
    height: int = 24
    glyphs: Glyphs = UNICODE
    color: bool = False

    @classmethod
    def of(cls, console: Console) -> Viewport:
        """Return what `console` can show; characters beyond ASCII only where its encoding has them."""
        glyphs = UNICODE if console.encoding.lower().startswith("utf") else ASCII
        color = console.color_system is not None and not console.no_color
        return cls(console.width, console.height, glyphs, color)
