"""The two implementations of the clock: its hot fields in C, where the extension is built, or in closure cells.

All rules are in `StepClock`. An implementation holds the fields that hooks use, and closes usual steps; the hooks in C
or in Python are at the functions that they time. Both give the same rows.
"""

from __future__ import annotations

from _thread import get_ident
from collections.abc import Callable
from functools import cache
from types import CellType, FunctionType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from traceml.clock import monotonic_ns
from traceml.database.schema import MICRO_BATCHES_MASK, STEPS, Phase, Slot, StepFlag, pack_bits
from traceml.instrument.divided_step import MAINTENANCE_MASK, StepListener
from traceml.instrument.native.extension import extension
from traceml.instrument.phase_timer import (
    CHECK_FORWARD,
    NOT_READY,
    ON_FORWARD,
    on_training_thread,
)
from traceml.instrument.step_clock import StepClock

if TYPE_CHECKING:
    from traceml.database.flight.flight import FlightFile

__all__ = ["CellClock", "new_clock"]

_INPUT_WAIT, _USER = int(Phase.INPUT_WAIT), int(Phase.USER)
_STEP_START, _STEP, _USER_NAME = int(Slot.STEP_START), int(Slot.STEP), int(Slot.USER_NAME)
_NO_LOADER_BITS = pack_bits(0, int(StepFlag.NO_LOADER))
_SEQUENCE_UNIT, _SEQUENCE_MASK = pack_bits(0, 0, 1), pack_bits(0, 0, -1)
# Columns of a usual step, whose other columns are 0.
_USUAL_COLUMNS = ("step", "t_end_ns", "total_ns", "input_wait_ns", "forward_ns", "backward_ns", "optimizer_ns",
                  "user_ns", "backward_own_ns", "elements", "samples", "bits")  # fmt: skip
# Fields that hooks in Python use in each step.
_CELLS = (
    "thread", "current", "open_slots", "input_ns", "forward_ns", "backward_ns", "optimizer_ns", "rows", "before",
    "part_start", "closing_trigger", "step_call", "backwards", "batches", "input_shape", "input_samples",
    "input_elements", "samples", "elements", "loss_mask", "slow_row", "sequence", "batch", "first_loader",
    "needs_slow_commit", "has_user_phases", "needs_slow_backward", "last_optimizer", "usual_trigger", "usual_loader",
)  # fmt: skip
F = TypeVar("F", bound=Callable[..., Any])


class CellField:
    """Attribute of the clock that is stored in a cell."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, clock: Any, owner: type[Any]) -> Any:
        return self if clock is None else clock.cells[self._name].cell_contents

    def __set__(self, clock: Any, value: Any) -> None:
        clock.cells[self._name].cell_contents = value


def new_clock(flight: FlightFile, listener: StepListener, *, thread: int | None = None) -> StepClock:
    """Return a clock in C if the extension can be used, else one in Python.

    Args:
        thread: number of the training thread; None: this thread.
    """
    native = extension()
    clock_type = CellClock if native is None else _native_type(native)
    return clock_type(flight, listener, thread=thread)


@cache
def _native_type(native: Any) -> type[StepClock]:
    class NativeClock(native.HotFields, StepClock):  # type: ignore[misc]
        """A clock whose hot fields are in C."""

        hook = native.Hook
        user_phase = native.UserPhase

        def __init__(self, flight: FlightFile, listener: StepListener, *, thread: int | None = None) -> None:
            super().__init__(flight, listener, thread=thread)
            ring = self.ring
            self.connect(
                self.open_slots,
                (ring.buffer, ring.offset, ring.mask, ring.count, ring.slot),
                (MICRO_BATCHES_MASK, _NO_LOADER_BITS, MAINTENANCE_MASK, _SEQUENCE_UNIT, _SEQUENCE_MASK),
                (NOT_READY, ON_FORWARD, CHECK_FORWARD),
                on_training_thread,
            )

    return NativeClock


class CellClock(StepClock):
    """A clock whose hot fields are closure cells: the fastest storage that hooks in Python can share.

    Measured on the training loop with the least work per step: fields in cells cost 2 us per step less than attributes
    of an object, with the same logic. So a hook is a nested function whose enclosing function declares the fields it
    uses as local variables; `bind` replaces them by the clock's cells. All other code sees ordinary attributes.
    """

    def __init__(self, flight: FlightFile, listener: StepListener, *, thread: int | None = None) -> None:
        self.cells = {name: CellType(0) for name in _CELLS}
        super().__init__(flight, listener, thread=thread)
        self.commit = _make_commit(self)

    def bind(self, function: F, /) -> F:
        """Return a copy of `function` whose free variables named like hot fields are the shared cells."""
        raw = cast("FunctionType", function)
        names, closure = raw.__code__.co_freevars, raw.__closure__ or ()
        shared = tuple(self.cells.get(name, own) for name, own in zip(names, closure, strict=True))
        bound = FunctionType(raw.__code__, raw.__globals__, raw.__name__, raw.__defaults__, shared)
        bound.__kwdefaults__, bound.__doc__, bound.__qualname__ = raw.__kwdefaults__, raw.__doc__, raw.__qualname__
        return cast("F", bound)

    def enter_user(self, phase: Any, bucket: int, name_id: int) -> None:
        """Begin a user phase."""
        try:
            previous = self.current
            if previous == _INPUT_WAIT or self.thread != get_ident():
                return

            t = monotonic_ns()
            self.open_user_phases.append([phase, previous, t])
            self.current = bucket
            self.rare_times[bucket + 1] += 1
            self.has_user_phases = True
            self.open_slots[_USER_NAME] = name_id
            self.open_slots[_USER] = t
        except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
            self.fail(error)

    def leave_user(self, phase: Any) -> None:
        """End a user phase that is open, and those that began inside it. In a wait none has begun."""
        try:
            stack = self.open_user_phases
            is_ignored = self.current == _INPUT_WAIT or self.thread != get_ident()
            if is_ignored or not any(entry[0] is phase for entry in stack):
                return

            t = monotonic_ns()
            while self.pop_user_phase(t) is not phase:  # phases of generators and coroutines may end in any order
                pass

            self.open_slots[_USER_NAME] = stack[-1][0].name_id if stack else 0
            self.open_slots[_USER] = stack[-1][2] if stack else 0
        except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
            self.fail(error)


for _name in _CELLS:
    setattr(CellClock, _name, CellField(_name))


def _make_commit(clock: CellClock) -> Callable[[int], None]:
    """Return the function that closes the open step at a given time: it appends the row and begins the next step."""
    ring = clock.ring
    commit_slow, append_user_phases, maintain = clock.commit_slow, clock.append_user_phases, clock.listener.maintain
    pack_into = STEPS.partial_struct(*_USUAL_COLUMNS).pack_into
    buffer, offset, mask, row_bytes = ring.buffer, ring.offset, ring.mask, ring.row_bytes
    count, slot = ring.count, ring.slot
    open_user_phases = clock.open_user_phases
    # Cells of the clock.
    input_ns = forward_ns = backward_ns = optimizer_ns = rows = before = part_start = 0
    step_call = backwards = batches = samples = elements = slow_row = 0
    needs_slow_commit = has_user_phases = False
    open_slots: Any = None
    batch: Any = None
    first_loader: Any = None
    closing_trigger: Any = NOT_READY
    sequence: Any = None

    def commit(t: int) -> None:
        nonlocal input_ns, forward_ns, backward_ns, optimizer_ns
        nonlocal rows, part_start, step_call, backwards, batches, batch
        nonlocal first_loader, closing_trigger, samples, elements, has_user_phases
        if needs_slow_commit or rows >= slow_row or open_user_phases or backwards > batches > 0:
            commit_slow(t)
            return

        issued = 0 if sequence is None else sequence() * _SEQUENCE_UNIT & _SEQUENCE_MASK
        user_ns = append_user_phases() if has_user_phases else 0
        n = rows
        if first_loader is None:
            bits = backwards & MICRO_BATCHES_MASK | _NO_LOADER_BITS
        else:
            bits = min(backwards, batches) & MICRO_BATCHES_MASK
            batch = first_loader = None
            batches = 0

        row = offset + (n & mask) * row_bytes
        total = t - part_start
        step = n + before
        times = input_ns, forward_ns, backward_ns, optimizer_ns, user_ns
        pack_into(buffer, row, step, t, total, *times, -1, elements, samples, bits | issued)
        count[slot] = rows = n + 1  # the row first, the counter afterwards
        part_start = open_slots[_STEP_START] = t
        open_slots[_STEP] = rows + before
        closing_trigger = NOT_READY
        step_call = 0
        if not n & MAINTENANCE_MASK:
            maintain(forward_ns, backwards)

        has_user_phases = False
        input_ns = forward_ns = backward_ns = optimizer_ns = backwards = samples = elements = 0

    return clock.bind(commit)
