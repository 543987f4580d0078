"""Exceptions that explain a hang: of threads that one has ended, and the one that a thread is handling."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from traceml.inspection.thread_frames import thread_exception
from traceml.recorder.exits import describe

if TYPE_CHECKING:
    from traceml.database.snapshots.rank_snapshot import FrameSnapshot, ThreadSnapshot

__all__ = ["FailedThreads", "handled_exception"]


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
    from traceml.database.snapshots.rank_snapshot import ThreadSnapshot

    text, line = _text_and_line(args.exc_type, args.exc_value)
    name = args.thread.name if args.thread is not None else ""
    return ThreadSnapshot(name=name, line=line, is_daemon=True, exception=text)


def handled_exception(thread: int) -> tuple[str, FrameSnapshot | None]:
    """Return the exception that a thread is handling, in `except` or `finally`, and its line; ("", None) without one.

    The end of an iterator is no error.
    """
    with suppress(Exception):  # a user's exception may be of any kind
        error = thread_exception(thread)
        if error is not None and not isinstance(error, StopIteration | StopAsyncIteration):
            return _text_and_line(type(error), error)

    return "", None


def _text_and_line(kind: type[BaseException], error: BaseException | None) -> tuple[str, FrameSnapshot | None]:
    """Return an exception as `Type: message`, and the line of the user's code that raised it."""
    from traceml.database.snapshots.rank_snapshot import FrameSnapshot

    facts = describe(error)
    name, message = facts.get("exception", kind.__name__), facts.get("message", "")
    line = FrameSnapshot(file=facts.get("file", ""), line=facts.get("line", 0), function=facts.get("function", ""))
    return f"{name}: {message}" if message else name, line if line.file else None
