"""Threads that an exception has ended: what waits for their work hangs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from traceml.recorder.exits import describe

if TYPE_CHECKING:
    from traceml.database.snapshots.rank_snapshot import ThreadSnapshot

__all__ = ["FailedThreads"]


class FailedThreads:
    """Notes the threads of this process that end with an exception, by `threading.excepthook`."""

    def __init__(self) -> None:
        self._failed: list[ThreadSnapshot] = []
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
            self._note(args)

        self._previous(args)

    def _note(self, args: Any) -> None:
        from traceml.database.snapshots.rank_snapshot import MAX_THREADS  # a rank without failures does not pay for it

        self._failed = [*self._failed, _snapshot(args)][-MAX_THREADS:]


def _snapshot(args: Any) -> ThreadSnapshot:
    from traceml.database.snapshots.rank_snapshot import FrameSnapshot, ThreadSnapshot

    facts = describe(args.exc_value)
    name, message = facts.get("exception", args.exc_type.__name__), facts.get("message", "")
    line = FrameSnapshot(file=facts.get("file", ""), line=facts.get("line", 0), function=facts.get("function", ""))
    return ThreadSnapshot(
        name=args.thread.name if args.thread is not None else "",
        line=line if line.file else None,
        is_daemon=True,
        exception=f"{name}: {message}" if message else name,
    )
