"""The event loop of a Runtime, on a thread of its own, for tasks that are coroutines."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from time import perf_counter
from typing import Any

from traceml.errors import TaskDeadlockError
from traceml.tasks import execution
from traceml.tasks.task_record import LoopState, TaskEngine, TaskRecord, coroutine_task, thread_state
from traceml.tasks.task_statistics import COMPLETED, FINAL, RUNNING
from traceml.tasks.wait_graph import depends_on

__all__ = ["EventLoop"]


class EventLoop(LoopState):
    """Runs coroutines; its thread is started with the first one.

    Args:
        on_start: called after the start of the thread.
    """

    def __init__(self, engine: TaskEngine, on_start: Callable[[], object]) -> None:
        self._engine, self._on_start = engine, on_start
        super().__init__()

    def reset(self) -> None:
        """Start again without a thread, as a forked child does."""
        super().reset()
        self._lock = threading.RLock()
        self._closing = False

    def submit(self, task: TaskRecord) -> None:
        """Start the task of a coroutine function."""
        self.tasks[task] = None
        try:
            self._call(self._begin, task)
        except BaseException:  # no thread can be started, or Ctrl-C
            self.tasks.pop(task, None)
            raise

    def run_coroutine(self, task: TaskRecord, coroutine: Any, slot: int) -> None:
        """Continue a task whose callable returned a coroutine."""
        self.tasks[task] = None
        blocker = self.blocker
        if blocker is None or not depends_on(blocker, task):
            with self._lock:
                if self.thread is not None and not self.thread.is_alive():
                    self.thread = None  # it was closed, and had no task for the moment

                self._call(self._continue, task, coroutine)

            return

        coroutine.close()
        self.tasks.pop(task, None)
        text = f"coroutine {task.name!r} needs the event loop that {blocker.name!r} blocks to wait for it"
        execution.fail(task, slot, TaskDeadlockError(text))

    def cancel(self, task: TaskRecord) -> bool:
        """Cancel a coroutine in its `await`; False when it is not of this loop, or has ended."""
        if task not in self.tasks or task.state in FINAL:
            return False

        self.interrupt(task)
        return True

    def interrupt(self, task: TaskRecord) -> None:
        """Cancel a coroutine, also one that has timed out."""
        try:
            self._call(self._cancel, task)
        except RuntimeError:  # the loop has ended meanwhile, and the coroutine with it
            pass

    def current(self) -> TaskRecord | None:
        """Return the task whose coroutine has the loop's thread now, between two `await`s."""
        if self.thread is None or not self.thread.is_alive():
            return None

        running = asyncio.current_task(self._loop)
        return next((task for task, one in list(self.tasks.items()) if one is running and one is not None), None)

    def close(self, *, wait: bool) -> None:
        """End the loop after its last task; `wait` for that, unless a task that has timed out blocks it."""
        with self._lock:
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
        with self._lock:
            if self.thread is None:
                self._start()

            self._loop.call_soon_threadsafe(function, *args)

    def _start(self) -> None:
        ready = threading.Event()
        thread = threading.Thread(target=self._work, args=(ready,), name="traceml-loop", daemon=True)
        thread.start()
        self.thread = thread
        ready.wait()
        self._on_start()

    def _work(self, ready: threading.Event) -> None:
        with asyncio.Runner() as runner:
            runner.run(self._serve(ready))

    async def _serve(self, ready: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        thread = thread_state()
        thread.loop = self
        self._slot = self._engine.register(thread)
        ready.set()
        await self._stop.wait()

    def _begin(self, task: TaskRecord) -> None:
        if task.state in FINAL:
            self.tasks.pop(task, None)
            return

        task.started_s = perf_counter()
        task.state = RUNNING
        self._engine.statistics.counts[self._slot] += 1
        if task.timeout_s is not None:
            self._engine.watch(task, None)

        fn, args, kwargs, context = task.fn, task.args, task.kwargs or {}, task.context
        try:
            coroutine = context.run(fn, *args, **kwargs)  # type: ignore[union-attr, arg-type]
        except BaseException as error:  # noqa: BLE001 - it is the task's
            self._end(task, error)
        else:
            self._continue(task, coroutine)

    def _continue(self, task: TaskRecord, coroutine: Any) -> None:
        context = task.context
        if task.state in FINAL or context is None:  # it has timed out
            coroutine.close()
            self._end(task, None)
            return

        context.run(coroutine_task.set, task)
        running = self._loop.create_task(_outcome(coroutine), context=context)
        self.tasks[task] = running
        running.add_done_callback(lambda running: self._done(task, running, coroutine))

    def _done(self, task: TaskRecord, running: asyncio.Task[Any], coroutine: Any) -> None:
        if running.cancelled():
            if hasattr(coroutine, "close"):
                coroutine.close()  # one that was cancelled before its first step would warn

            self._end(task, asyncio.CancelledError())
        else:
            self._end(task, *running.result())

    def _end(self, task: TaskRecord, error: BaseException | None, result: Any = None) -> None:
        self.tasks.pop(task, None)
        self._stop_when_empty()
        if isinstance(error, asyncio.CancelledError):
            execution.cancel(task, self._slot)
        elif error is not None:
            execution.fail(task, self._slot, error)
        else:
            execution.end(task, self._slot, COMPLETED, result)

    def _cancel(self, task: TaskRecord) -> None:
        running = self.tasks.get(task)
        if running is not None:
            running.cancel()


async def _outcome(awaitable: Any) -> tuple[BaseException | None, Any]:
    """Return a coroutine's error instead of raising it: asyncio would end the loop on SystemExit."""
    try:
        return None, await awaitable
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # noqa: BLE001 - it is the task's, and raised where it is waited for
        return error, None
