"""Frames of the coroutine in which an event loop's program waits: the thread's own stack ends at `asyncio.run`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import takewhile
from types import FrameType
from typing import Any

from traceml.inspection.thread_frames import stack_frames

__all__ = ["awaiting_frames", "is_event_loop"]

_RUNNERS = {"run_until_complete": "future", "run": "task"}
"""Functions of asyncio that run a task, and their name for it; other event loops are called by the second one."""
_WAITS = {"wait_for": "fut", "_wait": "fs"}
"""The same of those that wait for tasks by a future of their own."""
_FILES = ("/asyncio/base_events.py", "/asyncio/runners.py", "/asyncio/tasks.py")
_MAX_TASKS = 20
_FRAMES, _AWAITED = ("cr_frame", "gi_frame"), ("cr_await", "gi_yieldfrom")


def awaiting_frames(frame: FrameType | None, is_user: Callable[[FrameType], bool]) -> list[FrameType]:
    """Return the frames in which the program of a waiting event loop stands, the innermost first.

    Empty where the thread runs the user's code, or no event loop.

    Args:
        frame: the innermost one of the thread.
        is_user: recognizes the user's code.
    """
    for each in takewhile(lambda each: not is_user(each), stack_frames(frame)):
        name = _RUNNERS.get(each.f_code.co_name) if is_event_loop(each.f_code.co_filename) else None
        if name is not None:
            return list(_frames(each.f_locals.get(name)))[::-1]

    return []


def is_event_loop(file: str) -> bool:
    """Whether a file is one of asyncio's that run tasks."""
    return file.endswith(_FILES)


def _frames(task: Any) -> Iterator[FrameType]:
    """Yield the frames of a task, the outermost first, then those of the task that it waits for."""
    for _ in range(_MAX_TASKS):
        last, awaited = None, task.get_coro() if hasattr(task, "get_coro") else None
        while (frame := _any_of(awaited, _FRAMES)) is not None:
            yield frame
            last, awaited = frame, _any_of(awaited, _AWAITED)

        task = next((each for each in _awaited_tasks(task, last) if not each.done()), None)


def _awaited_tasks(task: Any, frame: FrameType | None) -> Iterable[Any]:
    """Return the tasks that a task waits for, of which some may be done.

    Args:
        frame: its innermost one.
    """
    future = getattr(task, "_fut_waiter", None)
    if frame is not None and is_event_loop(frame.f_code.co_filename) and frame.f_code.co_name in _WAITS:
        tasks = frame.f_locals.get(_WAITS[frame.f_code.co_name], ())
        return [tasks] if hasattr(tasks, "get_coro") else tuple(tasks)

    return getattr(future, "_children", None) or filter(None, [future])


def _any_of(awaitable: Any, names: tuple[str, ...]) -> Any:
    return next((found for name in names if (found := getattr(awaitable, name, None)) is not None), None)
