"""Waiting for tasks without deadlock.

A task that is still queued runs in place of the wait. Where that cannot be, because the wait has a limit, the task has
a timeout, or the stack is deep, a stand-in thread runs what the waiting task needs: one at most per waiting task, for
as long as it waits. What can never end is an error, told at once.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import perf_counter
from typing import TYPE_CHECKING, Any

from traceml.errors import TaskDeadlockError, WaitTimeoutError
from traceml.tasks.handle import TaskHandle
from traceml.tasks.pool import Bell
from traceml.tasks.running import Retire, run
from traceml.tasks.seats import Seat, asleep, current_task, entangled, queued_behind, reaches, seat, waiting
from traceml.tasks.states import FINAL

if TYPE_CHECKING:
    from traceml.tasks.engine import Engine

__all__ = ["await_for", "wait_for", "wait_for_all"]

_DEPTH = 100  # tasks on one stack
_log = logging.getLogger("traceml")


def wait_for(handle: TaskHandle[Any], timeout: float | None) -> None:
    """Return when a task has ended.

    Raises:
        WaitTimeoutError: `timeout` seconds have passed.
        TaskDeadlockError: the task cannot end before the one that waits.
    """
    here = seat()
    if timeout is None and handle._timeout_s is None and not _deep(here):
        try:
            handle._ticket.pop()
        except IndexError:  # it runs, or was taken this moment
            pass
        else:
            _run_here(handle, here)

    if handle._state not in FINAL:  # also where it has returned a coroutine, which goes on elsewhere
        _block(handle, timeout)


def _deep(here: Seat) -> bool:
    """Whether the stack has no room for more tasks."""
    if here.depth == 0:
        return False

    if here.depth >= _DEPTH:
        return True

    try:
        sys._getframe(sys.getrecursionlimit() * 6 // 10)
    except ValueError:
        return False

    return True


def _run_here(handle: TaskHandle[Any], here: Seat) -> None:
    """Run a task, whose ticket is taken, on this thread."""
    ledger, underneath = handle._engine.ledger, here.current
    here.depth += 1
    try:
        with waiting(current_task(), handle):
            run(handle, here, ledger.counts, ledger.slot_of(here), perf_counter(), ledger.records.append)
    finally:
        here.current, here.depth = underneath, here.depth - 1
        ledger.wake_sleepers()


def _block(handle: TaskHandle[Any], timeout: float | None) -> None:
    """Sleep until a task has ended that runs elsewhere, or is left to others."""
    me, bell = current_task(), Bell()
    _refuse_circle(me, handle)
    if not subscribe(handle, bell.ring):
        return

    with waiting(me, handle), _asleep(me):
        handle._engine.ledger.wake_sleepers()  # who waits for all need not wait for one that waits for them
        _refuse_circle(me, handle)  # of two that close a circle at once, one sees the other here
        rung = _sleep(bell, me, timeout)

    if not rung:
        unsubscribe(handle, bell.ring)
        if handle._state not in FINAL:
            raise WaitTimeoutError(f"task {handle.name!r} is still {handle._state} after {timeout:g} s")


def _refuse_circle(me: TaskHandle[Any] | None, handle: TaskHandle[Any]) -> None:
    if me is not None and (me is handle or reaches(handle, me)):
        raise TaskDeadlockError(f"task {me.name!r} waits for {handle.name!r}, which cannot end before {me.name!r} does")

    if handle._engine.loop.runs_here(handle):
        raise TaskDeadlockError(
            f"get() would block the event loop that coroutine {handle.name!r} runs on; use `await handle` there"
        )


def _sleep(bell: Bell, me: TaskHandle[Any] | None, timeout: float | None) -> bool:
    """Sleep until a bell rings; what the task that sleeps waits for runs on a stand-in meanwhile, if nowhere else."""
    if me is not None:
        stand_in(me)

    served = seat().serves
    if served is not None:  # this thread stands in for a task, and does nothing for it while it sleeps
        served._engine.replace_stand_in(served)

    return bell.sleep(-1 if timeout is None else min(max(0.0, timeout), threading.TIMEOUT_MAX))


@contextmanager
def _asleep(me: TaskHandle[Any] | None) -> Iterator[None]:
    """Hold that the thread of a task, and a loop that it may belong to, does nothing else now."""
    if me is None:
        yield
        return

    asleep.add(me)
    try:
        with _occupying_loop(me):
            yield
    finally:
        asleep.discard(me)


def _occupying_loop(me: TaskHandle[Any] | None) -> AbstractContextManager[None]:
    """Hold that nothing else goes on on this thread's event loop, where it has one."""
    loop = seat().loop
    return nullcontext() if loop is None or me is None else loop.blocked_by(me)


def subscribe(handle: TaskHandle[Any], call: Callable[[], object]) -> bool:
    """Have something called when a task ends; False when it has ended, and nothing will be."""
    with handle._engine.ledger.lock:
        if handle._waiters is None:
            handle._waiters = []

        handle._waiters.append(call)

    return handle._state not in FINAL


def unsubscribe(handle: TaskHandle[Any], call: Callable[[], object]) -> None:
    """Call nothing any more."""
    try:
        (handle._waiters or []).remove(call)
    except ValueError:  # it was called
        pass


def stand_in(me: TaskHandle[Any]) -> None:
    """Start a thread that runs what a waiting task needs, when that is queued and no thread does it yet."""
    engine = me._engine
    if queued_behind(me) is None or me in engine.stand_ins:
        return

    thread = threading.Thread(target=_stand_in, args=(me,), name="traceml-stand-in", daemon=True)
    engine.stand_ins.add(me)
    try:
        thread.start()
    except RuntimeError as error:
        engine.stand_ins.discard(me)
        _log.warning("task %r waits without a thread that runs what it needs: %s", me.name, error)


def _stand_in(me: TaskHandle[Any]) -> None:
    here = seat()
    here.serves = me
    try:
        _serve(me, here)
    except Retire:  # the task that it was in has timed out, and another stands in
        return

    me._engine.stand_ins.discard(me)
    stand_in(me)  # for what was queued since


def _serve(me: TaskHandle[Any], here: Seat) -> None:
    while handle := queued_behind(me):
        try:
            handle._ticket.pop()
        except IndexError:  # a worker has taken it
            continue

        ledger = handle._engine.ledger
        run(handle, here, ledger.counts, ledger.slot_of(here), perf_counter(), ledger.records.append)
        here.current = None
        ledger.wake_sleepers()


async def await_for(handle: TaskHandle[Any]) -> None:
    """Wait for a task on an event loop, whichever it is; the loop goes on."""
    me, loop = current_task(), asyncio.get_running_loop()
    if me is not None and (me is handle or reaches(handle, me)):
        raise TaskDeadlockError(f"task {me.name!r} awaits {handle.name!r}, which cannot end before {me.name!r} does")

    ended = asyncio.Event()
    call = _threadsafe(loop, ended)
    if not subscribe(handle, call):
        return

    with waiting(me, handle):
        handle._engine.ledger.wake_sleepers()
        if asleep and queued_behind(handle) is not None:
            for sleeper in tuple(asleep):  # they may be all the workers there are, and wait for this one
                stand_in(sleeper)

        try:
            await ended.wait()
        finally:
            unsubscribe(handle, call)


def _threadsafe(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> Callable[[], object]:
    return lambda: loop.call_soon_threadsafe(event.set)


def wait_for_all(engine: Engine, timeout: float | None) -> None:
    """Return when all tasks of an engine have ended, but for the one that calls and those that wait for it.

    Raises:
        WaitTimeoutError: `timeout` seconds have passed.
        TaskDeadlockError: this is the engine's event loop, on which its coroutines could not go on.
    """
    if engine.loop.is_here():
        raise TaskDeadlockError("wait_all() would block the event loop; await the handles, or asyncio.gather(*handles)")

    me, ends_s = current_task(), None if timeout is None else perf_counter() + timeout
    helps = me is not None and timeout is None and not _deep(seat())
    with waiting(me, engine), _occupying_loop(me):
        engine.ledger.wake_sleepers()
        while left := _outstanding(engine, me):
            if helps and _help(engine):
                continue

            if not _doze(engine, me, ends_s, helps=helps):
                raise WaitTimeoutError(f"{left} task(s) had not ended after {timeout:g} s")


def _outstanding(engine: Engine, me: TaskHandle[Any] | None) -> int:
    """Count the tasks that are still to be waited for."""
    exempt = {one for one in entangled(me) if one._engine is engine}
    reporting = len(engine.ledger.reporting - exempt)
    tally = engine.ledger.tally()
    return tally.running + tally.queued + reporting - sum(one._state not in FINAL for one in exempt)


def _help(engine: Engine) -> bool:
    """Run a queued task on this thread; False when there is none that may."""
    handle = _helpable(engine)
    if handle is None:
        return False

    try:
        handle._ticket.pop()
    except IndexError:  # a worker has taken it
        return True

    _run_here(handle, seat())
    return True


def _helpable(engine: Engine) -> TaskHandle[Any] | None:
    for handle in engine.queued():
        if handle._timeout_s is None:
            return handle

    return None


def _doze(engine: Engine, me: TaskHandle[Any] | None, ends_s: float | None, *, helps: bool) -> bool:
    """Sleep until something ends, or is submitted; False when the time is over."""
    bell, pools = Bell(), engine.pools if me is not None else ()
    parks = [pool.parked for pool in pools]
    for bells in (engine.ledger.sleepers, *parks):
        bells.append(bell)

    try:
        if not _outstanding(engine, me) or (helps and _helpable(engine)):
            return True

        with _asleep(me):
            return _sleep(bell, me, None if ends_s is None else ends_s - perf_counter())
    finally:
        _leave(bell, engine.ledger.sleepers, *parks)
        for pool in pools:
            if pool.queue:
                pool.wake()  # a ring for a new task must not end with the one that leaves


def _leave(bell: Bell, *parks: list[Any]) -> None:
    for bells in parks:
        try:
            bells.remove(bell)
        except ValueError:
            pass
