"""Times of the open step by phase.

Time is exclusive: a phase that ends adds its time to its bucket and subtracts it from the enclosing phase. So phases
and `other` add up to the step. Hooks keep the start in a local variable. Only user phases may be open when a step ends;
`account_user_phases` adds their time.
"""

from __future__ import annotations

import contextvars
import logging
from _thread import get_ident
from collections.abc import Callable, Sequence
from typing import Any

from traceml.clock import monotonic_ns
from traceml.database.schema import Phase, Slot
from traceml.fail_open import fail_open

__all__ = [
    "CHECK_FORWARD",
    "FIRST_USER",
    "NOT_READY",
    "NO_ROW",
    "ON_FORWARD",
    "OTHER",
    "Began",
    "PhaseTimer",
    "on_training_thread",
]

OTHER = len(Phase)  # the bucket of time in no phase; never read: it is the rest of the total
FIRST_USER = OTHER + 1  # user phase k: its time is at FIRST_USER + 2k, its count at FIRST_USER + 2k + 1
NO_ROW = 1 << 62  # no run has as many
_USER, _USER_NAME = int(Phase.USER), int(Slot.USER_NAME)
_INPUT_WAIT, _FORWARD, _BACKWARD = int(Phase.INPUT_WAIT), int(Phase.FORWARD), int(Phase.BACKWARD)
_OPTIMIZER = int(Phase.OPTIMIZER)
_log = logging.getLogger("traceml")


# Whether this is the training thread: the clock's token, which is empty once its hooks are off; in other threads it is
# empty too. Reading it costs a third of `get_ident`.
_NO_TOKEN: Sequence[bool] = ()
_training: contextvars.ContextVar[Sequence[bool]] = contextvars.ContextVar("traceml_training", default=_NO_TOKEN)
on_training_thread = _training.get
Began = tuple[int, int]
"""The enclosing phase, and the start of a phase."""


class _Sentinel:
    """A value of `closing_trigger` that is not a loader."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


NOT_READY = _Sentinel("NOT_READY")  # nothing closes the step yet
ON_FORWARD = _Sentinel("ON_FORWARD")  # the next training forward closes it
CHECK_FORWARD = _Sentinel("CHECK_FORWARD")  # each forward must check whether it trains


class PhaseTimer:
    """Times of the open step, by phase.

    It runs on the training thread only; hooks compare `thread` with their own and do nothing on another thread. Hooks
    read and write the fields of this class directly; `clock_implementations` says where they are.

    `enter`, `leave`, `cancel` and what handles open user phases are for hooks in Python: a clock in C has its own.
    """

    thread: int  # the training thread; no thread has the number 0, which switches all hooks off
    current: int  # the phase that time belongs to now
    open_slots: Any  # the flight file's words; a `DeviceMarkingSlots` in steps whose device time is measured
    # Time of the phases present in every loop, in nanoseconds; the other phases are in `rare_times`.
    input_ns: int
    forward_ns: int
    backward_ns: int
    optimizer_ns: int
    rare_times: list[int]
    needs_slow_commit: bool  # closing this step takes all rules: see `DividedStep.commit_slow`
    has_user_phases: bool  # this step has time in user phases

    bind: Callable[..., Callable[..., Any]]  # gives Python functions the fields
    hook: Callable[..., Callable[..., Any]] | None = None  # makes hooks in C; None: hooks are Python functions
    user_phase: Callable[[Any, int, int], Any] | None = None  # makes user phases in C; None: they are in Python
    enter_user: Callable[[Any, int, int], None]  # in Python: begins a user phase, given its bucket and its name's id
    leave_user: Callable[[Any], None]  # in Python: ends one that is open, and those that began inside it

    def __init__(self, open_slots: Any, thread: int) -> None:
        self.open_slots, self.thread, self.errors = open_slots, thread, 0
        self.token = [True]
        self.current = OTHER
        self.zeros = [0] * FIRST_USER  # a bucket each
        self.users: list[int] = []  # name ids of user phases, by index
        self.open_user_phases: list[list[Any]] = []  # in Python: [phase, enclosing phase, start], innermost last

    @property
    def times(self) -> list[int]:
        """Times of all buckets, as a copy; those that are not set are 0."""
        times = self.rare_times.copy()
        times[_INPUT_WAIT], times[_FORWARD] = self.input_ns, self.forward_ns
        times[_BACKWARD], times[_OPTIMIZER] = self.backward_ns, self.optimizer_ns
        return times

    @times.setter
    def times(self, times: list[int]) -> None:
        self.input_ns, self.forward_ns = times[_INPUT_WAIT], times[_FORWARD]
        self.backward_ns, self.optimizer_ns = times[_BACKWARD], times[_OPTIMIZER]
        self.rare_times = times + [0] * (len(self.zeros) - len(times))

    def add(self, bucket: int, ns: int) -> None:
        """Add time to a bucket."""
        if bucket == _OPTIMIZER:
            self.optimizer_ns += ns
        elif bucket == _BACKWARD:
            self.backward_ns += ns
        elif bucket == _FORWARD:
            self.forward_ns += ns
        elif bucket == _INPUT_WAIT:
            self.input_ns += ns
        elif bucket != OTHER:
            self.rare_times[bucket] += ns
            if bucket > OTHER:
                self.has_user_phases = True
            else:
                self.needs_slow_commit = True

    def is_training_thread(self) -> bool:
        """Whether this is the training thread. Also sets `on_training_thread` again where a new context lost it."""
        if self.thread != get_ident():
            return False

        _training.set(self.token)
        return True

    def is_training_context(self) -> bool:
        """Whether this thread runs in a copy of the training thread's context, as with `asyncio.to_thread`."""
        return _training.get() is self.token

    def enter(self, phase: int) -> Began | None:
        """Begin a phase; return a value for `leave`, or None if the phase does not count."""
        try:
            previous: int = self.current
            if previous in (_INPUT_WAIT, phase) or self.thread != get_ident():
                return None

            start = monotonic_ns()
            self.current = phase
            self.open_slots[phase] = start
            return previous, start
        except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
            self.fail(error)
            return None

    def leave(self, phase: int, began: Began) -> None:
        """End a phase; move its time from the enclosing phase."""
        try:
            previous, start = began
            spent = monotonic_ns() - start
            self.add(phase, spent)
            self.add(previous, -spent)
            self.current = previous
            self.open_slots[phase] = 0
        except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
            self.fail(error)

    def cancel(self, phase: int, began: Began) -> None:
        """Undo `enter`: the time stays in the enclosing phase."""
        try:
            self.current = began[0]
            self.open_slots[phase] = 0
        except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
            self.fail(error)

    def interrupt(self, phase: int, began: Began) -> bool:
        """Begin code of the training loop inside a phase, as an optimizer's closure; return whether to `resume` it.

        The phase has its time so far now: a loader may close the step in the closure.
        """
        try:
            if self.current != phase or self.thread != get_ident():
                return False

            self.add(phase, monotonic_ns() - began[1])
            self.current = OTHER
            self.open_slots[phase] = 0
            return True
        except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
            self.fail(error)
            return False

    def resume(self, phase: int, began: Began) -> None:
        """Go on with the phase, whose end will add all time since it began: take off what passed until now."""
        try:
            now = monotonic_ns()
            self.add(phase, began[1] - now)
            self.current = phase
            self.open_slots[phase] = now
        except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
            self.fail(error)

    def account_user_phases(self, t: int) -> None:
        """Add the time until `t` of the open user phases, as a step ends inside them."""
        for entry in self.open_user_phases:
            phase, previous, start = entry
            self.add(phase.bucket, t - start)
            self.add(previous, start - t)
            entry[2] = t

    def pop_user_phase(self, t: int) -> Any:
        """End the innermost open user phase at `t` and return it."""
        phase, previous, start = self.open_user_phases.pop()
        self.add(phase.bucket, t - start)
        self.add(previous, start - t)
        self.current = previous
        return phase

    def end_user_phases(self, t: int) -> None:
        """End all open user phases, whose thread no longer trains."""
        while self.open_user_phases:
            self.pop_user_phase(t)

        self.open_slots[_USER] = self.open_slots[_USER_NAME] = 0

    def stop(self) -> None:
        """Switch all hooks off permanently, in every thread and context."""
        self.thread = 0
        self.current = _INPUT_WAIT  # a hook that begins a phase then finds itself inside another one
        self.token.clear()

    def fail(self, error: Exception) -> None:
        """Switch all hooks off after an error in one of them; log and count it. Training continues."""
        if not self.thread:
            return  # a hook that was running when they were switched off

        self.errors += 1
        self.stop()
        with fail_open(_log, "instrument", "step timing is switched off after an internal error"):
            raise error
