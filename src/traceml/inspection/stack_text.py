"""Frames in the text that faulthandler writes."""

from __future__ import annotations

import re

from traceml.inspection.user_files import is_import_machinery, is_package_file

__all__ = ["FRAME", "main_first", "main_frames", "other_frames"]

FRAME = re.compile(r'^  File "(?P<file>[^"\n]*)", line (?P<line>\d+) in (?P<function>.*)$', re.MULTILINE)
_CUT = "\n..."  # more threads than it writes


def main_first(text: str) -> str:
    """Return the text with the main thread first; faulthandler writes it last."""
    return "\n\n".join(reversed(text.rstrip("\n").split("\n\n")))


def main_frames(text: str) -> list[tuple[str, int, str]]:
    """Return the main thread's frames as (file, line, function), the innermost first; empty if they are missing.

    Those of the import machinery, and ours, as of what starts a script, are left out.
    """
    if text.rstrip().endswith(_CUT):
        return []

    return _frames(text.rstrip("\n").rpartition("\n\n")[2])


def other_frames(text: str) -> list[list[tuple[str, int, str]]]:
    """Return the frames of each of the other threads, as `main_frames` does."""
    return [_frames(thread) for thread in text.split("\n\n")[:-1]]


def _frames(thread: str) -> list[tuple[str, int, str]]:
    frames = [(found["file"], int(found["line"]), found["function"]) for found in FRAME.finditer(thread)]
    return [frame for frame in frames if not (is_import_machinery(frame[0]) or is_package_file(frame[0]))]
