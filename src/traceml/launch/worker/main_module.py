"""The worker's `__main__`, which stands for the launcher's.

Functions and classes of a script travel by value. They also become attributes of the worker's `__main__`: pickle looks
them up there, so that `torch.save`, `all_gather_object` and multiprocessing can handle their instances. A process that
multiprocessing spawns imports the script itself, as it does without a launch.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

__all__ = ["install", "register"]

_replaced: list[ModuleType] = []  # keeps the former `__main__` alive: its code still runs


def install(description: Mapping[str, str | None]) -> ModuleType:
    """Replace this process's `__main__` by an empty one that stands for the launcher's; return it."""
    main = ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    if name := description.get("name"):
        main.__spec__ = ModuleSpec(name, None)

    path = description.get("path")
    if path is not None and Path(path).is_file():
        main.__file__ = path

    _replaced.append(sys.modules["__main__"])
    sys.modules["__main__"] = sys.modules["__mp_main__"] = main  # the latter is its name in spawned processes
    return main


def register(main: ModuleType, made: Any) -> None:
    """Add a function or class that came from the launcher's `__main__` to `main`."""
    if isinstance(made, FunctionType | type) and made.__module__ == "__main__" and made.__qualname__.isidentifier():
        setattr(main, made.__name__, made)
