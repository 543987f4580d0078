"""The launcher's `__main__`, as workers see it.

Functions and classes of a script travel by value. They also get a place in the worker's `__main__`, under their names:
there pickle looks them up, so that `torch.save`, `all_gather_object` and multiprocessing can handle what is
made of them. A process that multiprocessing spawns imports the script itself, as it would without a launch.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from traceml.errors import UsageError

__all__ = ["adopt", "described", "install", "refuse_in_spawned", "send_by_value"]

_replaced: list[ModuleType] = []  # its code still runs


def described() -> dict[str, str | None]:
    """Return what `install` needs to know of our `__main__`: `name`, where it was run by `-m`, and `path`."""
    main = sys.modules["__main__"]
    spec, path = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    return {
        "name": None if spec is None else spec.name,
        "path": str(Path(path).absolute()) if isinstance(path, str) else None,
    }


def install(told: Mapping[str, str | None]) -> ModuleType:
    """Make a new `__main__` that stands for the launcher's; return it."""
    main = ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    if name := told.get("name"):
        main.__spec__ = ModuleSpec(name, None)

    path = told.get("path")
    if path is not None and Path(path).is_file():
        main.__file__ = path

    _replaced.append(sys.modules["__main__"])
    sys.modules["__main__"] = sys.modules["__mp_main__"] = main  # the latter is what spawned processes call it
    return main


def adopt(main: ModuleType, found: Any) -> None:
    """Let a function or class that came from the launcher's `__main__` stand in ours."""
    if isinstance(found, FunctionType | type) and found.__module__ == "__main__" and found.__qualname__.isidentifier():
        setattr(main, found.__name__, found)


def send_by_value() -> None:
    """Have the script's functions travel by value also from a process of multiprocessing, where it has another name."""
    main = sys.modules.get("__mp_main__")
    if main is not None and main.__name__ == "__mp_main__":
        import cloudpickle

        cloudpickle.register_pickle_by_value(main)


def refuse_in_spawned() -> None:
    """Complain where a process that multiprocessing has spawned imports the script: it would launch all over again.

    Raises:
        UsageError: it does.
    """
    process = sys.modules.get("multiprocessing.process")
    if process is not None and getattr(process.current_process(), "_inheriting", False):
        raise UsageError(
            "launch was called while a process that multiprocessing has spawned imports this script. "
            "Put the call under `if __name__ == '__main__':`"
        )
