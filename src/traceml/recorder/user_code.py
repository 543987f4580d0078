"""The user's code, as opposed to the standard library, installed packages, torch and traceml."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

__all__ = ["UserCode", "is_ours", "is_user_file"]

_OURS = f"{Path(__file__).parent.parent}/"
_STANDARD = f"{Path(os.__file__).parent}/"
_MAX_CODES = 4096


def is_ours(path: str) -> bool:
    """Return whether a file belongs to traceml."""
    return path.startswith(_OURS)


def is_user_file(path: str, modules: Any = None) -> bool:
    """Return whether a file of code is the user's; cells of a notebook are.

    Args:
        path: as in a frame or traceback.
        modules: the loaded modules; None: `sys.modules`.
    """
    if path.startswith("<"):
        return path.startswith("<ipython-input-")

    if "/site-packages/" in path or "/dist-packages/" in path or path.startswith((_STANDARD, _OURS)):
        return False

    torch = getattr((sys.modules if modules is None else modules).get("torch"), "__file__", None)
    return not (torch and path.startswith(f"{Path(torch).parent}/"))


class UserCode:
    """Tells frames of the user's code; remembers the answer for each code object.

    A script is the user's wherever it lies.

    Args:
        modules: the loaded modules; None: `sys.modules`.
    """

    def __init__(self, modules: Any = None) -> None:
        self._modules = modules
        self._known: dict[CodeType, bool] = {}

    def contains(self, frame: FrameType) -> bool:
        """Return whether the user wrote the code of a frame."""
        code = frame.f_code
        known = self._known.get(code)
        if known is None:
            if len(self._known) >= _MAX_CODES:  # code that is made anew for each call
                self._known.clear()

            known = self._known[code] = _is_script(frame) or is_user_file(code.co_filename, self._modules)

        return known


def _is_script(frame: FrameType) -> bool:
    values = frame.f_globals
    return values.get("__name__") == "__main__" and values.get("__spec__") is None
