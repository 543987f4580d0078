"""Output of a traced launch in a script that has replaced its standard streams."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from traceml.supervise.launch_screen import Output, terminal_screen


class Tee:
    """A stream as scripts write it, to have their output in a file too."""

    def __init__(self) -> None:
        self.written: list[str] = []

    def write(self, text: str) -> None:
        """Keep a text; return nothing."""
        self.written.append(text)

    def flush(self) -> None:
        """Do nothing."""


def test_output_goes_to_what_replaces_standard_output(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is no terminal, and has no number of written characters."""
    tee, output = Tee(), Output("stdout")
    monkeypatch.setattr(sys, "stdout", tee)

    assert [output.write(text) for text in ("a line\n", "another\n")] == [7, 8]
    output.flush()

    assert tee.written == ["a line\n", "another\n"]
    assert terminal_screen(tmp_path) is None


def test_output_of_a_process_without_streams_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon's may be None; that of the other stream is not used."""
    tee, errors = Tee(), Output("stderr")
    monkeypatch.setattr(sys, "stdout", tee)
    monkeypatch.setattr(sys, "stderr", None)

    assert errors.write("a line\n") == 7
    errors.flush()

    assert tee.written == []
