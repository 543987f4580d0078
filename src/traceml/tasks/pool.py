"""A pool of threads that take tickets from one queue.

`parked` holds whom a new ticket can wake: bells of workers that sleep and, below them, places that no thread has been
started for yet. While it is empty, all are busy, and submitting a task is one append.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import Any, Protocol

from traceml.tasks.handle import TaskHandle
from traceml.tasks.ledger import Ledger
from traceml.tasks.running import Retire, fail, run
from traceml.tasks.seats import Seat, sit
from traceml.tasks.states import RUNNING

__all__ = ["Bell", "Pool"]

_log = logging.getLogger("traceml")


class _Wakeable(Protocol):
    def ring(self) -> None: ...


class Bell:
    """Wakes one thread once; ringing again does nothing."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def ring(self) -> None:
        """Wake the thread that sleeps, or the next that wants to."""
        try:
            self._lock.release()
        except RuntimeError:  # somebody else has rung already
            pass

    def sleep(self, timeout_s: float = -1) -> bool:
        """Sleep until the bell rings; False when the time is over first."""
        return self._lock.acquire(timeout=timeout_s)


class _Place:
    """Room for a worker; a thread is started when there is work for it."""

    __slots__ = ("index", "pool")

    def __init__(self, pool: Pool, index: int) -> None:
        self.pool, self.index = pool, index

    def ring(self) -> None:
        self.pool.start(self)


class Pool:
    """Threads for the tasks of one kind.

    Args:
        name: what the threads are called.
        size: how many of them there are at most, beside those stuck in tasks that have timed out.
        first: the number of the first worker.
        ledger: where its tasks are counted.
        on_start: called with each thread that is started.
    """

    def __init__(self, name: str, size: int, first: int, ledger: Ledger, on_start: Callable[[], object]) -> None:
        self.name, self.size, self.first, self.ledger, self.on_start = name, size, first, ledger, on_start
        self.queue: deque[list[TaskHandle[Any]]] = deque()
        self.closed = False
        self.reset()

    def reset(self) -> None:
        """Begin again without threads, as a forked child does."""
        self.queue.clear()
        self.workers: dict[int, Seat] = {}
        self.threads: list[threading.Thread] = []
        self.parked: list[_Wakeable] = [_Place(self, self.first + i) for i in reversed(range(self.size))]

    def put(self, ticket: list[TaskHandle[Any]]) -> None:
        """Queue a ticket, and wake a worker for it."""
        self.queue.append(ticket)
        self.wake()

    def wake(self) -> None:
        """Wake somebody who sleeps, or start a thread; where all are busy there is nobody to wake."""
        try:
            one = self.parked.pop()
        except IndexError:
            return

        one.ring()

    def start(self, place: _Place) -> None:
        """Start the thread of a place.

        Raises:
            RuntimeError: the system gives no thread, and the pool has none that could do the work instead.
        """
        thread = threading.Thread(
            target=self._work, args=(place,), name=f"traceml-{self.name}-{place.index}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:
            self.parked.insert(0, place)
            if not self.threads:
                raise

            _log.warning("the pool %s stays at %d threads: %s", self.name, len(self.threads), error)
        else:
            self.threads.append(thread)
            self.on_start()

    def replace(self, here: Seat) -> None:
        """Give the place of a worker that is stuck to a new thread."""
        self.parked.insert(0, _Place(self, here.index))
        if self.queue:
            self.wake()

    def peek(self) -> TaskHandle[Any] | None:
        """Return the first task in the queue that nobody has taken."""
        while True:
            try:
                ticket = self.queue[0]
            except IndexError:
                return None

            for handle in ticket:
                return handle

            try:
                self.queue.remove([])  # the first of those that were taken by others
            except ValueError:
                pass

    def take(self) -> TaskHandle[Any] | None:
        """Take the first task from the queue, to run it."""
        while True:
            try:
                ticket = self.queue.popleft()
            except IndexError:
                return None

            try:
                return ticket.pop()
            except IndexError:
                continue

    def close(self) -> None:
        """Let workers end as soon as the queue is empty."""
        self.closed = True
        parked, self.parked[:] = self.parked.copy(), []
        for one in parked:
            if isinstance(one, Bell):
                one.ring()

    def _work(self, place: _Place) -> None:
        here = sit(Seat(self, place.index))
        self.workers[here.ident] = here
        try:
            while not self._ends(here):
                pass
        finally:
            self.workers.pop(here.ident, None)
            self._drop(threading.current_thread())
            here.current = None
            self.ledger.wake_sleepers()

    def _ends(self, here: Seat) -> bool:
        """Work until there is nothing left to do; False when what is raised is no end, as MemoryError is not."""
        try:
            self._loop(here)
        except Retire:  # another has taken its place
            pass
        except BaseException as error:  # noqa: BLE001 - a task without an end would be waited for for ever
            _log.exception("a worker of the pool %s failed beside its task", self.name)
            handle = here.current
            if handle is not None and handle._state is RUNNING:
                fail(handle, self.ledger.slot_of(here), error)

            return False

        return True

    def _drop(self, thread: threading.Thread) -> None:
        try:
            self.threads.remove(thread)
        except ValueError:  # a fork came between
            pass

    def _loop(self, here: Seat) -> None:
        take, queue, ledger, bell = self.queue.popleft, self.queue, self.ledger, Bell()
        slot = ledger.slot_of(here)
        counts, record = ledger.counts, ledger.records.append
        now = perf_counter()
        while True:
            try:
                handle = take().pop()
            except IndexError:  # the queue is empty, or another has taken the handle from its ticket
                if queue:
                    continue
            else:
                now = run(handle, here, counts, slot, now, record)
                continue

            handle = here.current = None  # type: ignore[assignment]  # a sleeping worker keeps no result alive
            if not self._park(here, bell):
                return

            now = perf_counter()

    def _park(self, here: Seat, bell: Bell) -> bool:
        """Sleep until there is work; False when there will be none."""
        self.parked.append(bell)
        self.ledger.wake_sleepers()
        if self.closed or here.ident not in self.workers:  # closed, or this is the child of a fork
            return bool(self.queue)

        if self.queue:
            self._unpark(bell)
        else:
            bell.sleep()

        return True

    def _unpark(self, bell: Bell) -> None:
        try:
            self.parked.remove(bell)
        except ValueError:
            bell.sleep()  # it is being rung: the ring must not be left for the next time
