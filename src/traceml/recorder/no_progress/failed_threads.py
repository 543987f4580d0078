"""Threads that an exception has ended: what waits for their work hangs."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from traceml.database.snapshots import MAX_THREADS, FrameSnapshot, ThreadSnapshot
from traceml.recorder.exits import describe

__all__ = ["FailedThreads"]


class FailedThreads:
    """Notes the threads of this process that end with an exception, by `threading.excepthook`."""

    def __init__(self) -> None:
        self._failed: deque[ThreadSnapshot] = deque(maxlen=MAX_THREADS)
        self._previous: Callable[[Any], Any] = threading.excepthook

    def install(self) -> None:
        """Wrap the hook, which is still called."""
        self._previous, threading.excepthook = threading.excepthook, self._hook

    def uninstall(self) -> None:
        """Restore the hook; one that was set since stays, and only calls the previous one."""
        if threading.excepthook == self._hook:
            threading.excepthook = self._previous

    def newest(self) -> tuple[ThreadSnapshot, ...]:
        """Return the last ones, the newest first."""
        return tuple(reversed(self._failed))

    def _hook(self, args: Any) -> None:
        with suppress(Exception):
            self._failed.append(_snapshot(args))

        self._previous(args)


def _snapshot(args: Any) -> ThreadSnapshot:
    facts = describe(args.exc_value)
    name, message = facts.get("exception", args.exc_type.__name__), facts.get("message", "")
    line = FrameSnapshot(file=facts.get("file", ""), line=facts.get("line", 0), function=facts.get("function", ""))
    return ThreadSnapshot(
        name=args.thread.name if args.thread is not None else "",
        line=line if line.file else None,
        is_daemon=True,
        exception=f"{name}: {message}" if message else name,
    )
