"""Draw live.svg and card.svg: run `traceml demo` on a pseudo-terminal and export its screen.

`make pictures` runs it; it needs a machine without other load. The demonstration runs in a folder `demo` of the
temporary folder, with the package beside it, so that the paths in the pictures are short and nobody's own.
"""

from __future__ import annotations

import io
import os
import pty
import re
import shutil
import struct
import sys
import tempfile
from fcntl import ioctl
from itertools import groupby
from pathlib import Path
from termios import TIOCSWINSZ

import pyte
from pyte.screens import Char
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import NIGHT_OWLISH
from rich.text import Text

import traceml

FOLDER = Path(__file__).resolve().parent
COLUMNS, ROWS = 100, 40  # the command of the demonstration breaks after its path
FIRST, LAST = "step  300/400", "step  350/400"  # the live view is drawn between these lines of output
COLORS = {"default": None, "brown": "yellow"}  # pyte's names that rich does not have
FONTS = "ui-monospace, SFMono-Regular, Menlo, DejaVu Sans Mono, monospace"  # instead of one from the network


class DimScreen(pyte.Screen):
    """A screen that keeps the attribute dim, which pyte does not know, as blinking."""

    def select_graphic_rendition(self, *attrs: int) -> None:
        """Apply attributes; with 16 colors a 2 is always dim, never part of a color."""
        super().select_graphic_rendition(*(5 if each == 2 else each for each in attrs))


def main() -> None:
    """Run the demonstration once and write both pictures."""
    os.environ["TERM"] = "xterm"
    os.environ.pop("COLORTERM", None)
    place = Path(tempfile.gettempdir(), "demo")
    place.mkdir()
    try:
        place.joinpath("traceml").symlink_to(Path(traceml.__file__).parent)
        _draw(place)
    finally:
        shutil.rmtree(place)


def _draw(place: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(place)
        os.execv(sys.executable, [sys.executable, "-m", "traceml", "demo"])  # noqa: S606

    ioctl(terminal, TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    screen = DimScreen(COLUMNS, ROWS)
    stream = pyte.ByteStream(screen)
    live: list[Text] = []
    while data := _read(terminal):
        stream.feed(data)
        output = "\n".join(screen.display)
        if FIRST in output and LAST not in output:
            live = _lines(screen)

    os.waitpid(pid, 0)
    card = _lines(screen)
    begin = next(index for index, line in enumerate(card) if line.plain.startswith("accuracy"))
    _write("live.svg", "traceml demo", live)
    _write("card.svg", "traceml demo, at the end", card[begin:])


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the demonstration has ended
        return b""


def _lines(screen: pyte.Screen) -> list[Text]:
    """Return the lines that are not empty, with their styles."""
    lines = []
    for row in range(ROWS):
        cells = [screen.buffer[row][column] for column in range(COLUMNS)]
        parts = [("".join(cell.data for cell in cells), style) for style, cells in groupby(cells, _style)]
        lines.append(Text.assemble(*parts))

    return [line for line in lines if line.plain.strip()]


def _style(cell: Char) -> Style:
    color, background = (COLORS.get(name, name.replace("bright", "bright_")) for name in (cell.fg, cell.bg))
    return Style(color=color, bgcolor=background, bold=cell.bold, dim=cell.blink, reverse=cell.reverse)


def _write(name: str, title: str, lines: list[Text]) -> None:
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), highlight=False)
    for line in lines:
        line.rstrip()
        console.print(line, overflow="crop", no_wrap=True)

    svg = console.export_svg(title=title, theme=NIGHT_OWLISH)
    svg = re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    (FOLDER / name).write_text(svg.replace("Fira Code, monospace", FONTS), encoding="utf-8")


if __name__ == "__main__":
    main()
