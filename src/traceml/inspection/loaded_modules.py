"""Modules that this process has imported, and what multiprocessing's says of it; nothing is imported for that.

A module is in `sys.modules` before its code has run: while another thread imports it, its functions are missing.
"""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["imports_main_again", "loaded_module", "multiprocessing_parent"]


def loaded_module(name: str) -> Any:
    """Return a module whose import has ended; None for another."""
    module = sys.modules.get(name)
    return None if getattr(getattr(module, "__spec__", None), "_initializing", False) else module


def multiprocessing_parent() -> int | None:
    """Return the pid of the process that started this one through `multiprocessing`; None for another start."""
    process = loaded_module("multiprocessing.process")
    parent = None if process is None else process.parent_process()
    return None if parent is None else parent.pid


def imports_main_again() -> bool:
    """Whether this is a spawned child that only imports the main script again, to find the function it has to run.

    `multiprocessing` marks that moment; a data-loader worker whose script calls `init` without a guard must not become
    a second rank.
    """
    process = loaded_module("multiprocessing.process")
    return process is not None and bool(getattr(process.current_process(), "_inheriting", False))
