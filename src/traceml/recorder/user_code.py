"""Frames of the user's code: asks `inspection.user_files` once per file; a script always is the user's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

from traceml.inspection.thread_frames import running_line, stack_frames
from traceml.inspection.user_files import is_starter, is_user_file

__all__ = ["UserCode", "user_line"]

_MAX_FILES = 4096
_MAX_DEPTH = 200


class UserCode:
    """Recognizes frames of the user's code; remembers the answer for each file.

    A script is the user's wherever it lies.
    """

    def __init__(self, modules: Any = None) -> None:
        self._modules = modules
        self._known: dict[str, bool] = {}  # not by code object, whose hash is recomputed from all its constants

    def contains(self, frame: FrameType) -> bool:
        """Return whether the user wrote the code of a frame."""
        path = frame.f_code.co_filename
        known = self._known.get(path)
        if known is None:
            if len(self._known) >= _MAX_FILES:  # code that is created for each call
                self._known.clear()

            known = self._known[path] = is_user_file(path, self._modules)

        return known or _is_script(frame)


def user_line(frame: FrameType | None, is_user: Callable[[FrameType], bool]) -> tuple[CodeType | None, int]:
    """Return the code and line of the innermost frame of the user's code; None, 0 if there is none."""
    for each in stack_frames(frame, _MAX_DEPTH):
        if is_user(each):
            return each.f_code, running_line(each)

    return None, 0


def _is_script(frame: FrameType) -> bool:
    """Return whether a frame is of the script, and not of our program that runs it, which was `__main__` before."""
    values, main = frame.f_globals, sys.modules.get("__main__")
    is_main = main is not None and values is vars(main) and values.get("__spec__") is None
    return is_main and not is_starter(frame.f_code.co_filename)
