"""The event loop of a Runtime, on a thread of its own, for tasks that are coroutines."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from traceml.errors import TaskCancelledError, TaskDeadlockError
from traceml.tasks import running
from traceml.tasks.handle import TaskHandle
from traceml.tasks.ledger import Ledger
from traceml.tasks.seats import coroutine_task, reaches, seat
from traceml.tasks.states import FINAL, RUNNING

__all__ = ["Loop"]


class Loop:
    """Runs coroutines; its thread is started with the first one.

    Args:
        ledger: where its tasks are counted.
        on_start: called when the thread is started.
    """

    def __init__(self, ledger: Ledger, on_start: Callable[[], object]) -> None:
        self.ledger, self.on_start = ledger, on_start
        self.lock = threading.RLock()
        self.reset()

    def reset(self) -> None:
        """Begin again without a thread, as a forked child does."""
        self.thread: threading.Thread | None = None
        self.tasks: dict[TaskHandle[Any], asyncio.Task[Any] | None] = {}
        self.blocked: TaskHandle[Any] | None = None  # the task that keeps the thread from all others
        self._closing = False

    def submit(self, handle: TaskHandle[Any]) -> None:
        """Let a coroutine function's task begin on the loop."""
        self.tasks[handle] = None
        try:
            self._call(self._begin, handle)
        except RuntimeError:  # no thread can be started
            self.tasks.pop(handle, None)
            raise

    def adopt(self, handle: TaskHandle[Any], coroutine: Any, slot: int) -> float:
        """Take over a task whose callable returned a coroutine; it runs already."""
        self.tasks[handle] = None
        if self.blocked is not None and reaches(self.blocked, handle):
            coroutine.close()
            self.tasks.pop(handle, None)
            text = f"coroutine {handle.name!r} needs the event loop that {self.blocked.name!r} blocks to wait for it"
            return running.fail(handle, slot, TaskDeadlockError(text))

        self._call(self._go_on, handle, coroutine)
        return perf_counter()

    def cancel(self, handle: TaskHandle[Any]) -> bool:
        """Cancel a coroutine where it awaits; False when it is not of this loop, or has ended."""
        if handle not in self.tasks or handle._state in FINAL:
            return False

        self.interrupt(handle)
        return True

    def interrupt(self, handle: TaskHandle[Any]) -> None:
        """Cancel a coroutine whose time is over."""
        try:
            self._call(self._cancel, handle)
        except RuntimeError:  # the loop has ended meanwhile, and the coroutine with it
            pass

    def is_here(self) -> bool:
        """Whether this is the loop's thread."""
        return threading.current_thread() is self.thread

    def runs_here(self, handle: TaskHandle[Any]) -> bool:
        """Whether a task is a coroutine that needs this very thread."""
        return handle in self.tasks and self.is_here()

    @contextmanager
    def blocked_by(self, task: TaskHandle[Any]) -> Iterator[None]:
        """Hold that a task blocks the loop's thread, which calls this."""
        before, self.blocked = self.blocked, task
        try:
            yield
        finally:
            self.blocked = before

    def blockers(self, handle: TaskHandle[Any]) -> tuple[TaskHandle[Any], ...]:
        """Return the task that keeps a coroutine from going on by blocking the thread."""
        blocked = self.blocked
        return (blocked,) if blocked is not None and handle in self.tasks and blocked is not handle else ()

    def close(self, *, wait: bool) -> None:
        """End the loop after its last task; `wait` for that, unless a task blocks it beyond its time."""
        with self.lock:
            thread, self._closing = self.thread, True

        if thread is None or not thread.is_alive():
            return

        self._call(self._stop_when_empty)
        if wait and not self.tasks and not self.is_here():
            thread.join()

    def _stop_when_empty(self) -> None:
        if self._closing and not self.tasks:
            self._stop.set()

    def _call(self, function: Any, *args: Any) -> None:
        with self.lock:
            if self.thread is None:
                self._start()

            self._loop.call_soon_threadsafe(function, *args)

    def _start(self) -> None:
        ready = threading.Event()
        thread = threading.Thread(target=self._work, args=(ready,), name="traceml-loop", daemon=True)
        thread.start()
        self.thread = thread
        ready.wait()
        self.on_start()

    def _work(self, ready: threading.Event) -> None:
        with asyncio.Runner() as runner:
            runner.run(self._serve(ready))

    async def _serve(self, ready: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        here = seat()
        here.loop = self
        self._slot = self.ledger.slot_of(here)
        ready.set()
        await self._stop.wait()

    def _begin(self, handle: TaskHandle[Any]) -> None:
        if handle._state in FINAL:
            self.tasks.pop(handle, None)
            return

        handle._started_s = perf_counter()
        handle._state = RUNNING
        self.ledger.counts[self._slot] += 1
        if handle._timeout_s is not None:
            handle._engine.watchdog.watch(handle, None)

        fn, args, kwargs, context = handle._fn, handle._args, handle._kwargs or {}, handle._context
        try:
            coroutine = context.run(fn, *args, **kwargs)  # type: ignore[union-attr, arg-type]
        except BaseException as error:  # noqa: BLE001 - it is the task's
            self._end(handle, error)
        else:
            self._go_on(handle, coroutine)

    def _go_on(self, handle: TaskHandle[Any], coroutine: Any) -> None:
        context = handle._context
        if handle._state in FINAL or context is None:  # its time was over before
            coroutine.close()
            self._end(handle, None)
            return

        context.run(coroutine_task.set, handle)
        task = self._loop.create_task(_outcome(coroutine), context=context)
        self.tasks[handle] = task
        task.add_done_callback(lambda task: self._done(handle, task, coroutine))

    def _done(self, handle: TaskHandle[Any], task: asyncio.Task[Any], coroutine: Any) -> None:
        if task.cancelled():
            if hasattr(coroutine, "close"):
                coroutine.close()  # it may have been cancelled before its first step, and would warn

            self._end(handle, asyncio.CancelledError())
        else:
            self._end(handle, *task.result())

    def _end(self, handle: TaskHandle[Any], error: BaseException | None, result: Any = None) -> None:
        self.tasks.pop(handle, None)
        self._stop_when_empty()
        if isinstance(error, asyncio.CancelledError):
            running.cancelled(handle, self._slot, TaskCancelledError(f"coroutine {handle.name!r} was cancelled"))
        elif error is not None:
            running.fail(handle, self._slot, error)
        else:
            running.finish(handle, self._slot, result)

    def _cancel(self, handle: TaskHandle[Any]) -> None:
        task = self.tasks.get(handle)
        if task is not None:
            task.cancel()


async def _outcome(awaitable: Any) -> tuple[BaseException | None, Any]:
    """Return what a coroutine raises instead of raising it: asyncio would end the loop for SystemExit."""
    try:
        return None, await awaitable
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # noqa: BLE001 - it is the task's, and raised where it is waited for
        return error, None
