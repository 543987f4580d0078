"""Frames of other threads, read without a crash of the interpreter.

Before Python 3.12 any allocation may start a collection, also the one that makes a frame's object. Where the collector
then calls Python code (`gc.callbacks`, finalizers), the GIL passes to the thread whose frame it is; the
frame ends, and the object refers to freed memory: the process crashes later (python/cpython#106883). So no collection
begins while frames are read.
"""

from __future__ import annotations

import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import takewhile
from types import FrameType
from typing import Any

from traceml.gc_pause import gc_pause

__all__ = [
    "awaiting_frames",
    "is_event_loop",
    "number_of",
    "running_line",
    "stack_frames",
    "thread_exception",
    "thread_frame",
    "thread_frames",
    "thread_number",
    "thread_stack",
]

_pause = gc_pause if sys.version_info < (3, 12) else nullcontext()
_MAX_DEPTH = 1000
_WALKS = 10
_YIELDS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


def thread_frame(ident: int) -> FrameType | None:
    """Return the frame that a thread runs; None if there is none. `f_back` is safe down to a depth of 1,000."""
    with _pause:
        frame = sys._current_frames().get(ident)
        _make_objects(frame)

    return frame


def thread_stack(ident: int, most: int = _MAX_DEPTH) -> list[FrameType]:
    """Return a thread's frames at one moment, the innermost first.

    Whoever walks `f_back` once the thread has gone on finds no caller of a generator that has yielded meanwhile. The
    thread may continue during this walk too, which is then done again.
    """
    with _pause:
        for _ in range(_WALKS):
            frames = list(stack_frames(sys._current_frames().get(ident), most))
            if not frames or not _is_suspended(frames[-1]):
                break

    return frames


def _is_suspended(frame: FrameType) -> bool:
    """Whether a generator or a coroutine has yielded: one that runs has a caller."""
    return bool(frame.f_code.co_flags & _YIELDS) and frame.f_back is None


def thread_frames() -> dict[int, FrameType]:
    """Return the frames that all threads run, by identifier."""
    with _pause:
        frames = sys._current_frames()
        for frame in frames.values():
            _make_objects(frame)

    return frames


def thread_exception(ident: int) -> BaseException | None:
    """Return the exception that a thread handles, in `except` or `finally`; None if there is none."""
    with _pause:
        found: Any = sys._current_exceptions().get(ident)

    error: BaseException | None = found[1] if isinstance(found, tuple) else found  # a tuple before Python 3.12
    return error


def _make_objects(frame: FrameType | None) -> None:
    """Make the objects of a stack, which whoever walks it later finds there."""
    for _ in stack_frames(frame):
        pass


def stack_frames(frame: FrameType | None, most: int = _MAX_DEPTH) -> Iterator[FrameType]:
    """Yield a frame and those that called it, the innermost first."""
    for _ in range(most):
        if frame is None:
            return

        yield frame
        frame = frame.f_back


def running_line(frame: FrameType) -> int:
    """Return the line that a frame runs; at an instruction without one, as a jump to a loop's begin, that before it."""
    line: int | None = frame.f_lineno
    if line is not None:
        return line

    line, at = frame.f_code.co_firstlineno, frame.f_lasti
    for start, _, of_instruction in frame.f_code.co_lines():
        if start > at:
            break

        line = of_instruction or line

    return line


def thread_number(ident: int) -> int:
    """Return the kernel's number of a thread by Python's; 0 if it is not known."""
    return next((number_of(thread) for thread in threading.enumerate() if thread.ident == ident), 0)


def number_of(thread: threading.Thread) -> int:
    """Return the kernel's number of a thread; 0 if it is not known."""
    return os.getpid() if thread is threading.main_thread() else thread.native_id or 0


_RUNNERS = {"run_until_complete": "future", "run": "task"}
"""Functions of asyncio that run a task, and their name for it; other event loops are called by the second one."""
_WAITS = {"wait_for": "fut", "_wait": "fs"}
"""The same of those that wait for tasks by a future of their own."""
_FILES = ("/asyncio/base_events.py", "/asyncio/runners.py", "/asyncio/tasks.py")
_MAX_TASKS = 20
_FRAMES, _AWAITED = ("cr_frame", "gi_frame"), ("cr_await", "gi_yieldfrom")


def awaiting_frames(
    frame: FrameType | None, is_user: Callable[[FrameType], bool], *, of_any: bool = True
) -> list[FrameType]:
    """Return the frames in which the program of a waiting event loop stands, the innermost first.

    Empty where the thread runs the user's code, or no event loop.

    Args:
        frame: the innermost one of the thread.
        is_user: recognizes the user's code.
        of_any: whether the first of several tasks is followed that are awaited together; else none of them is.
    """
    with _pause:
        for each in takewhile(lambda each: not is_user(each), stack_frames(frame)):
            name = _RUNNERS.get(each.f_code.co_name) if is_event_loop(each.f_code.co_filename) else None
            if name is not None:
                return list(_frames(each.f_locals.get(name), of_any))[::-1]

    return []


def is_event_loop(file: str) -> bool:
    """Whether a file is one of asyncio's that run tasks."""
    return file.endswith(_FILES)


def _frames(task: Any, of_any: bool) -> Iterator[FrameType]:
    """Yield the frames of a task, the outermost first, then those of the task that it waits for."""
    for _ in range(_MAX_TASKS):
        last, awaited = None, task.get_coro() if hasattr(task, "get_coro") else None
        while (frame := _any_of(awaited, _FRAMES)) is not None:
            yield frame
            last, awaited = frame, _any_of(awaited, _AWAITED)

        waiting = [each for each in _awaited_tasks(task, last) if not each.done()]
        task = waiting[0] if waiting and (of_any or len(waiting) == 1) else None


def _awaited_tasks(task: Any, frame: FrameType | None) -> Iterable[Any]:
    """Return the tasks that a task waits for, of which some may be done."""
    future = getattr(task, "_fut_waiter", None)
    if frame is not None and is_event_loop(frame.f_code.co_filename) and frame.f_code.co_name in _WAITS:
        tasks = frame.f_locals.get(_WAITS[frame.f_code.co_name], ())
        return [tasks] if hasattr(tasks, "get_coro") else tuple(tasks)

    return getattr(future, "_children", None) or filter(None, [future])


def _any_of(awaitable: Any, names: tuple[str, ...]) -> Any:
    return next((found for name in names if (found := getattr(awaitable, name, None)) is not None), None)
