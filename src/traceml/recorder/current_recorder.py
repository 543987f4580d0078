"""Recorder of this process, and the listeners for its start and its change."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from traceml.instrument import Instrumentation
    from traceml.recorder.recorder import Recorder

__all__ = ["current_recorder", "is_enabled", "notify_change", "notify_start", "on_change", "on_start", "state"]


class ProcessState:
    """Recorder of this process.

    Attributes:
        recorder: the newest recorder, running or stopped; None before the first one.
        instrumentation: hooks of the running recorder; None while nothing is traced.
        parent: in a forked child, the recorder of the process that it was forked from.
        starter: identifier of the thread that is starting the recorder; None while none does.
    """

    __slots__ = ("instrumentation", "parent", "recorder", "starter")

    def __init__(self) -> None:
        self.recorder: Recorder | None = None
        self.instrumentation: Instrumentation | None = None
        self.parent: Recorder | None = None
        self.starter: int | None = None


state = ProcessState()
_start_listeners: list[Callable[[Recorder], None]] = []
_change_listeners: list[Callable[[bool], None]] = []


def current_recorder() -> Recorder | None:
    """Return the recorder of this process, running or stopped; None before the first one."""
    return state.recorder


def is_enabled() -> bool:
    """Whether this process is being traced.

    Examples:
        >>> if traceml.is_enabled():
        ...     print("this process is traced")
        this process is traced
    """
    return state.recorder is not None and state.recorder.enabled


def on_start(listener: Callable[[Recorder], None]) -> None:
    """Call `listener` with each recorder that has started from now on; a second registration changes nothing."""
    if listener not in _start_listeners:
        _start_listeners.append(listener)


def on_change(listener: Callable[[bool], None]) -> None:
    """Call `listener` when the recorder of this process is replaced or stops; with True in a forked child."""
    if listener not in _change_listeners:
        _change_listeners.append(listener)


def notify_start(recorder: Recorder) -> None:
    """Call the start listeners."""
    for listener in _start_listeners:
        listener(recorder)


def notify_change(*, forked: bool = False) -> None:
    """Call the change listeners."""
    for listener in _change_listeners:
        listener(forked)
