"""Size and capabilities of an output: columns, rows, characters, colors."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

__all__ = ["ASCII", "UNICODE", "Glyphs", "Viewport", "column_text", "plain_console", "terminal_size"]


@dataclass(frozen=True, slots=True)
class Glyphs:
    """Characters to draw with."""

    bar: str  # a full cell of a bar
    bar_parts: str  # cells filled by 1/n, 2/n, ... of a cell; may be empty
    spark: str  # levels of a sparkline, lowest first
    rule: str
    mark: str  # before the slowest rank
    lost: str  # before a rank that ended badly
    dot: str  # between remarks on one line
    ellipsis: str


UNICODE = Glyphs(
    bar="█", bar_parts="▏▎▍▌▋▊▉", spark="▁▂▃▄▅▆▇█", rule="─", mark="▸", lost="\u00d7", dot="·", ellipsis="…"
)
ASCII = Glyphs(bar="#", bar_parts="", spark="_.-=*#", rule="-", mark=">", lost="x", dot="-", ellipsis="...")


@dataclass(frozen=True, slots=True)
class Viewport:
    """Size of a view, and what the output can show.

    Args:
        height: rows; views of fixed height use no more.
        glyphs: the characters to draw with.
        color: whether colors are shown; without them parts are distinguished by their labels.
    """

    width: int = 80
    height: int = 24
    glyphs: Glyphs = UNICODE
    color: bool = False

    @classmethod
    def of(cls, console: Console) -> Viewport:
        """Return the viewport of a console; ASCII characters where its encoding is not UTF."""
        glyphs = UNICODE if console.encoding.lower().startswith("utf") else ASCII
        color = console.color_system is not None and not console.no_color
        return cls(console.width, console.height, glyphs, color)

    def cut(self, line: Text, most: int = sys.maxsize) -> Text:
        """Return a line that does not wrap, cut to the width, and to at most some columns."""
        line.no_wrap = True
        width = min(self.width, most)
        if line.cell_len > width:
            line.truncate(width - len(self.glyphs.ellipsis))
            line.append(self.glyphs.ellipsis)

        return line


def column_text(text: str, width: int, *, right: bool = False) -> str:
    """Return a text in exactly `width` columns of a terminal, cut or padded; some characters take two, some none.

    Args:
        right: whether the text stands at the right.
    """
    from rich.cells import cell_len, set_cell_size

    missing = width - cell_len(text) if right else 0
    return " " * missing + text if missing > 0 else set_cell_size(text, width)


def terminal_size(console: Console) -> tuple[int, int]:
    """Return (columns, rows) of the console's own terminal; rich would ask the standard streams."""
    try:
        size = os.get_terminal_size(console.file.fileno())
    except OSError:
        return console.width, console.height

    # A terminal without a known size (serial lines, some containers) reports 0.
    return size.columns or console.width, size.lines or console.height


def plain_console(file: IO[str] | None = None, *, stderr: bool = False) -> Console:
    """Return a console without highlighting, whose size is known also where rich's own is wrong."""
    from rich.console import Console, ConsoleDimensions

    console = Console(file=file, stderr=stderr, highlight=False)
    if console.is_dumb_terminal and "COLUMNS" not in os.environ:  # rich takes each one for 80 columns wide
        console.size = ConsoleDimensions(*terminal_size(console))
    elif not console.width:  # COLUMNS=0, for which rich prints nothing
        console.width = shutil.get_terminal_size().columns

    return console
