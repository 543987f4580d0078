"""The Runtime that a process has when nobody made one."""

from __future__ import annotations

import os
import threading

from traceml.errors import UsageError
from traceml.tasks.runtime import Runtime

__all__ = ["get_default_runtime", "has_default_runtime", "set_default_runtime"]

_lock = threading.RLock()
_default: Runtime | None = None


def get_default_runtime() -> Runtime:
    """Return the Runtime of this process; made at the first call, and again after it was shut down."""
    with _lock:
        if _default is None or _default._engine.closed:
            set_default_runtime(Runtime())

        assert _default is not None
        return _default


def set_default_runtime(runtime: Runtime | None) -> Runtime | None:
    """Make a Runtime that of the process; None: the next call of `get_default_runtime` makes one.

    Returns:
        the one that it was before; it is not shut down.

    Raises:
        UsageError: it is no Runtime.
    """
    global _default
    if runtime is not None and not isinstance(runtime, Runtime):
        raise UsageError(f"set_default_runtime() takes a Runtime or None, not {type(runtime).__name__}")

    with _lock:
        before, _default = _default, runtime
        return before


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # another thread of the parent may have held it


os.register_at_fork(after_in_child=_after_fork)


def has_default_runtime() -> bool:
    """Whether the process has one already."""
    return _default is not None
