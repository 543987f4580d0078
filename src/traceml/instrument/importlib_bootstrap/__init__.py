"""Wrappers of torch functions that `warnings` and `logging` skip when they look for the caller.

`warnings.warn(..., stacklevel=2)` names the line of the caller, which would be one of ours. Python does not count
frames whose file name contains both `importlib` and `_bootstrap` (also in `logging`), as the path of this folder does.
So the code of such functions is named by a path through this folder, which leads to their file.

Runs in the rank. Imports nothing of traceml.
"""

from __future__ import annotations

import os
from types import CodeType
from typing import Any, TypeVar

__all__ = ["uncounted"]

F = TypeVar("F")


def uncounted(function: F) -> F:
    """Make warnings skip a function, and the functions that it defines, when they look for the caller."""
    code: Any = getattr(function, "__code__", None)
    if isinstance(code, CodeType):
        function.__code__ = _renamed(code)  # type: ignore[attr-defined]

    return function


# By its code, as in tracebacks: a package in a zip file is named as where it was compiled.
_FOLDER = os.path.dirname(uncounted.__code__.co_filename)  # noqa: PTH120 - it may be no path of this host


def _renamed(code: CodeType) -> CodeType:
    if code.co_filename.startswith(_FOLDER):
        return code

    constants = tuple(_renamed(each) if isinstance(each, CodeType) else each for each in code.co_consts)
    path = os.path.relpath(code.co_filename, _FOLDER)
    return code.replace(co_consts=constants, co_filename=f"{_FOLDER}/{path}")
