"""Exit and fork handlers of a process with Runtimes."""

from __future__ import annotations

import os
import sys
import threading
import weakref

from traceml.tasks.engine import Engine
from traceml.tasks.wait_graph import forget_waits
from traceml.tasks.waiting import forget_compensation, wait_for_all
from traceml.tasks.waker import idle_waiters

__all__ = ["register"]

_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def register(engine: Engine) -> None:
    """Handle the exit and the forks of this process for an engine."""
    _engines.add(engine)


def _before_exit() -> None:
    """Wait for tasks before the interpreter ends; not after Ctrl-C, and not after `shutdown(cancel=True)`."""
    if getattr(sys, "last_type", None) is KeyboardInterrupt:
        return

    for engine in list(_engines):
        if not engine.discarded:
            wait_for_all(engine, None)
            engine.close(wait=True)


def _after_fork() -> None:
    for engine in list(_engines):
        engine.after_fork()

    forget_waits()
    forget_compensation()
    idle_waiters.clear()


os.register_at_fork(after_in_child=_after_fork)
# Earlier than atexit, while threads can still be started; concurrent.futures ends its pools here too.
threading._register_atexit(_before_exit)  # type: ignore[attr-defined]
