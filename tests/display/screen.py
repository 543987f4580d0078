"""A small terminal emulator: the part of a VT100 that the tests need."""

from __future__ import annotations

import codecs
import re

_SEQUENCE = re.compile(r"\x1b(?:\[(?P<args>[0-?]*)(?P<final>[@-~])|(?P<single>[78DM])|\](?P<title>[^\x07]*)\x07)")


class Screen:
    """Cells, a cursor, a scroll region and the history of lines that scrolled away."""

    def __init__(self, columns: int = 80, rows: int = 24) -> None:
        self.columns, self.rows = columns, rows
        self.cells = [[" "] * columns for _ in range(rows)]
        self.history: list[str] = []
        self.row = self.column = 0
        self.saved = (0, 0, False)
        self.wrap = False  # the next character goes to the next line
        self.bottom = rows
        self.alternate = False
        self.text = ""
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, data: bytes) -> None:
        self.text += self.decoder.decode(data)
        position = 0
        while position < len(self.text):
            char = self.text[position]
            if char != "\x1b":
                self._put(char)
                position += 1
                continue

            match = _SEQUENCE.match(self.text, position)
            if match is None:
                assert len(self.text) - position < 16, f"unknown sequence {self.text[position : position + 16]!r}"
                break

            self._obey(match)
            position = match.end()

        self.text = self.text[position:]

    def lines(self) -> list[str]:
        return ["".join(row).rstrip() for row in self.cells]

    def _put(self, char: str) -> None:
        if char == "\n":
            self.wrap = False
            self.column = 0  # as a terminal with ONLCR
            self._index()
        elif char == "\r":
            self.wrap, self.column = False, 0
        else:
            if self.wrap:
                self.column = 0
                self._index()

            self.cells[self.row][self.column] = char
            self.wrap = self.column == self.columns - 1
            self.column = min(self.column + 1, self.columns - 1)

    def _index(self) -> None:
        if self.row == self.bottom - 1:
            self.history.append("".join(self.cells[0]).rstrip())
            self.cells[: self.bottom] = [*self.cells[1 : self.bottom], [" "] * self.columns]
        else:
            self.row = min(self.row + 1, self.rows - 1)

    def _obey(self, match: re.Match[str]) -> None:
        if single := match["single"]:
            self._single(single)
            return

        if match["title"] is not None:
            return

        args, final = match["args"], match["final"]
        if args.startswith("?"):
            if args == "?1049":
                self.alternate = final == "h"
            return

        numbers = [int(number or 0) for number in args.split(";")]
        wrap, self.wrap = self.wrap, False
        if final == "m":
            self.wrap = wrap
        elif final == "r":
            self.bottom = numbers[1] if len(numbers) > 1 else self.rows
            self.row = self.column = 0
        elif final == "H":
            self.row, self.column = max(numbers[0], 1) - 1, (max(numbers[1], 1) - 1 if len(numbers) > 1 else 0)
        elif final == "A":
            self.row = max(self.row - max(numbers[0], 1), 0)
        elif final == "B":
            limit = self.bottom if self.row < self.bottom else self.rows
            self.row = min(self.row + max(numbers[0], 1), limit - 1)
        elif final == "J":
            self._clear_line()
            for row in range(self.row + 1, self.rows):
                self.cells[row] = [" "] * self.columns
        elif final == "K":
            self.wrap = wrap
            if not wrap:
                self._clear_line()
        else:
            raise AssertionError(f"unknown sequence {match.group()!r}")

    def _single(self, single: str) -> None:
        if single == "7":
            self.saved = (self.row, self.column, self.wrap)
        elif single == "8":
            self.row, self.column, self.wrap = self.saved
        elif single == "D":
            self._index()

    def _clear_line(self) -> None:
        self.cells[self.row][self.column :] = [" "] * (self.columns - self.column)
