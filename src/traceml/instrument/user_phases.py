"""User phases, and steps bounded by `trace_step()`."""

from __future__ import annotations

import functools
import inspect
import threading
from _thread import get_ident
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, TypeVar

from traceml.database.flight.journaled_tables import NameTable
from traceml.instrument.phase_timer import FIRST_USER
from traceml.instrument.step_clock import StepClock

__all__ = ["StepBlock", "UserPhase", "UserPhases", "traced"]

F = TypeVar("F", bound=Callable[..., Any])
_MAX_NAMES = 256
_MORE = "(more phases)"


class UserPhase:
    """A named phase, of a clock in Python. One object serves all uses of the name, also nested ones."""

    __slots__ = ("_clock", "bucket", "name_id")

    def __init__(self, clock: StepClock, bucket: int, name_id: int) -> None:
        self._clock, self.bucket, self.name_id = clock, bucket, name_id

    def __enter__(self) -> UserPhase:
        self._clock.enter_user(self, self.bucket, self.name_id)
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._clock.leave_user(self)


class UserPhases(dict[str, UserPhase]):
    """User phases of a clock by name; all names after the first 256 share one phase."""

    def __init__(self, clock: StepClock, names: NameTable) -> None:
        super().__init__()
        self._clock, self._names = clock, names
        self._lock = threading.Lock()

    def __missing__(self, name: Any) -> UserPhase:
        name = str(name)
        if len(self) >= _MAX_NAMES and name != _MORE:
            return self[_MORE]

        clock = self._clock
        with self._lock:
            if name in self:
                return self[name]

            name_id = self._names.id_of(name)
            if name_id is None:  # no room for its name
                name_id = -1

            bucket = FIRST_USER + 2 * len(clock.users)
            # In this order: the training thread may close a step meanwhile, and copies `zeros`.
            clock.zeros.extend((0, 0))
            clock.rare_times.extend((0, 0))
            clock.users.append(name_id)
            phase = self[name] = (clock.user_phase or UserPhase)(clock, bucket, name_id)
            return phase


class StepBlock:
    """Context manager of `trace_step()`: one training step."""

    __slots__ = ("_clock", "_counts")

    def __init__(self, clock: StepClock) -> None:
        self._clock = clock
        self._counts = False

    def __enter__(self) -> StepBlock:
        clock = self._clock
        try:
            # In a block of another thread it is inside that one's step, or of a second training.
            if clock.is_training_thread() or (not clock.blocks and clock.claim_thread()):
                self._counts = True
                clock.begin_block()
        except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
            clock.fail(error)

        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        clock = self._clock
        if not self._counts:
            return

        self._counts = False
        try:
            is_here = clock.thread == get_ident() or clock.claim_thread()  # it may have moved, and come back
            clock.end_block(failed=error_type is not None or not is_here)
        except Exception as failure:  # noqa: BLE001 - fail open: the clock counts and logs it
            clock.fail(failure)


def traced(function: F, phase: Callable[[], AbstractContextManager[Any]]) -> F:
    """Return `function` with each call timed as a user phase.

    Coroutine and generator functions keep their kind: they are in the phase while they run, not while suspended.

    Args:
        phase: returns the phase; called at each call of the function.
    """
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def in_coroutine(*args: Any, **kwargs: Any) -> Any:
            return await _PhasedCoroutine(function(*args, **kwargs), phase)

        return in_coroutine  # type: ignore[return-value]

    if inspect.isasyncgenfunction(function):
        return function  # each item is awaited separately: there is no single call to time

    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def in_generator(*args: Any, **kwargs: Any) -> Any:
            return (yield from _drive(function(*args, **kwargs), phase))

        return in_generator  # type: ignore[return-value]

    @functools.wraps(function)
    def in_call(*args: Any, **kwargs: Any) -> Any:
        with phase():
            return function(*args, **kwargs)

    return in_call  # type: ignore[return-value]


class _PhasedCoroutine:
    """Awaitable that runs a coroutine, in the phase only while it runs."""

    __slots__ = ("_coroutine", "_phase")

    def __init__(self, coroutine: Any, phase: Callable[[], AbstractContextManager[Any]]) -> None:
        self._coroutine, self._phase = coroutine, phase

    def __await__(self) -> Any:
        return _drive(self._coroutine, self._phase)


def _drive(inner: Any, phase: Callable[[], AbstractContextManager[Any]]) -> Any:
    """Run a generator or coroutine like `yield from`, in the phase between suspensions."""
    resume, value = inner.send, None
    while True:
        try:
            with phase():
                item = resume(value)
        except StopIteration as stop:
            return stop.value

        try:
            resume, value = inner.send, (yield item)
        except GeneratorExit:
            inner.close()
            raise
        except BaseException as error:  # noqa: BLE001 - passed to the inner one, as `yield from` does
            resume, value = inner.throw, error
