"""Runtimes at the ends of a process: its exit, and its forked children."""

from __future__ import annotations

import os
import sys
import threading
import weakref

from traceml.tasks.engine import Engine
from traceml.tasks.seats import forget_waits
from traceml.tasks.waiting import wait_for_all

__all__ = ["add"]

_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def add(engine: Engine) -> None:
    """Look after an engine."""
    _engines.add(engine)


def _before_exit() -> None:
    """Let tasks end before the interpreter does; not after Ctrl-C, and not those whose cancelling was asked for."""
    if getattr(sys, "last_type", None) is KeyboardInterrupt:
        return

    for engine in list(_engines):
        if not engine.abandoned:
            wait_for_all(engine, None)
            engine.close(wait=True)


def _after_fork() -> None:
    for engine in list(_engines):
        engine.after_fork()

    forget_waits()


os.register_at_fork(after_in_child=_after_fork)
# Earlier than atexit, while threads can still be started; concurrent.futures ends its pools here too.
threading._register_atexit(_before_exit)  # type: ignore[attr-defined]
