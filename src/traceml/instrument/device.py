"""Device time per phase: events on the device's stream, read once they are complete, without synchronizing.

The CPU only launches work on an accelerator, so CPU time says little about it. Each change of phase on the CPU records
an event, which the device reaches after all work launched before it. The time between two events belongs to the phase
that began at the first one: exclusive, as on the CPU, and in the same order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from traceml.database.rings import Ring
from traceml.database.schema import DEVICE_PHASES, DEVICE_STEPS, PHASE_COLUMNS, Phase
from traceml.instrument.accumulator import OTHER
from traceml.instrument.step_clock import StepClock

__all__ = ["DeviceEvent", "DeviceMarkingSlots", "DeviceTimes", "cuda_events"]

_BACKWARD = int(Phase.BACKWARD)
_WAITING = -1  # after the last local gradient: backward that waits for other ranks
_OWN = -2  # backward until that gradient, where it was measured
_PHASES = tuple(int(phase) for phase in DEVICE_PHASES)
_MARKED = frozenset((*_PHASES, _WAITING))
# The phase of each column of a device row after its total.
_SOURCES = tuple(PHASE_COLUMNS.index(name) if name in PHASE_COLUMNS else _OWN for name in DEVICE_STEPS.names[2:])
_MAX_PENDING_STEPS = 64
_MAX_MARKS = 4096
_READ_PER_STEP = 2


class DeviceEvent(Protocol):
    """The part of `torch.cuda.Event` that is used."""

    def record(self) -> None:
        """Put the event on the current stream."""

    def query(self) -> bool:
        """Whether the device has reached it."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from this event to another one; both must be complete."""


Marks = list[tuple[Any, int]]


class DeviceMarkingSlots:
    """Open-phase words of the flight file that also mark each change of phase on the device.

    Hooks store into them at each change of phase, after they have set the clock's `current`. Without a device, hooks
    store into the mapping directly and this class costs nothing.
    """

    __slots__ = ("_clock", "_device", "_slots")

    def __init__(self, clock: StepClock, device: DeviceTimes) -> None:
        self._clock, self._device, self._slots = clock, device, clock.open_slots

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, index: int) -> int:
        return int(self._slots[index])

    def __setitem__(self, index: int, value: int) -> None:
        self._slots[index] = value
        if index < OTHER:  # the slot of a phase
            self._device.mark(self._clock.current)


class DeviceTimes:
    """Events of the open step, and of closed ones that the device has not finished.

    Args:
        clock: decides by `is_detailed` which steps are measured.
        ring: the ring for the rows.
        make_event: creates an event; called when the pool is empty.
        is_capturing: whether the current stream captures a graph; then no event may be recorded.
    """

    def __init__(
        self, clock: StepClock, ring: Ring, make_event: Callable[[], DeviceEvent], is_capturing: Callable[[], bool]
    ) -> None:
        self._clock, self._ring = clock, ring
        self._make_event, self._is_capturing = make_event, is_capturing
        self._pool: list[DeviceEvent] = []
        self._marks: Marks = []
        self._cut = 0  # number of marks before the cut
        self._pending: deque[tuple[int, Marks, DeviceEvent, bool]] = deque()

    def mark(self, phase: int) -> None:
        """Mark a change of phase."""
        marks = self._marks
        if not marks:
            return  # this step is not measured

        if phase not in _MARKED:
            phase = OTHER  # these phases launch no work

        if phase == marks[-1][1]:
            return

        if len(marks) >= _MAX_MARKS or self._is_capturing():
            self._drop(marks)
            return

        marks.append((self._recorded(), phase))

    def mark_own(self) -> None:
        """Mark the last local gradient; the autograd engine calls it on any of its threads."""
        if self._marks and self._marks[-1][1] == _BACKWARD:
            self.mark(_WAITING)

    def cut(self) -> None:
        """Mark a cut: what follows may belong to another step."""
        if self._marks and not self._is_capturing():
            self._cut = len(self._marks)
            self._marks.append((self._recorded(), self._marks[-1][1]))

    def discard(self) -> None:
        """Drop the measurement of this step: what followed the cut was evaluation."""
        self._drop(self._marks)

    def close(self, step: int) -> bool:
        """End the step (-1: without a row) and begin the next; return whether a device row will follow."""
        marks, self._marks, self._cut = self._marks, [], 0
        if self._is_capturing():
            self._drop(marks)
            return False

        self._read()
        measured = bool(marks) and step >= 0 and len(self._pending) < _MAX_PENDING_STEPS
        detailed = self._clock.is_detailed(step + 1)
        end = self._recorded() if measured or detailed else None
        shared = detailed and end is not None
        if measured and end is not None:
            self._pending.append((step, marks, end, shared))
        else:
            self._drop(marks)

        if shared:
            # The end of one step is the start of the next: both share the event, and the later one returns it.
            self._marks.append((end, OTHER))

        return measured

    def close_prefix(self, step: int) -> bool:
        """End the step at the cut, where the next one began; return whether a device row will follow."""
        if not self._cut:
            self._drop(self._marks)
            return False

        marks, rest = self._marks[: self._cut], self._marks[self._cut :]
        self._marks, self._cut = rest, 0
        if len(self._pending) >= _MAX_PENDING_STEPS:
            self._pool.extend(event for event, _ in marks[1:])
            return False

        self._pending.append((step, marks, rest[0][0], True))
        return True

    def drain(self) -> None:
        """Read all complete steps, at the end of the run."""
        self._read(len(self._pending))

    def _read(self, limit: int = _READ_PER_STEP) -> None:
        for _ in range(limit):
            if not self._pending or not self._pending[0][2].query():
                return

            step, marks, end, shared = self._pending.popleft()
            self._ring.append(step, *_durations(marks, end))
            self._pool.extend(event for event, _ in marks)
            if not shared:
                self._pool.append(end)

    def _recorded(self) -> DeviceEvent:
        event = self._pool.pop() if self._pool else self._make_event()
        event.record()
        return event

    def _drop(self, marks: Marks) -> None:
        # The first mark may also be the end of a pending step: leave it to the garbage collector.
        self._pool.extend(event for event, _ in marks[1:])
        marks.clear()
        self._cut = 0


def _durations(marks: Marks, end: DeviceEvent) -> list[int]:
    """Return the columns of a device row after `step`: the total and the phases, in ns."""
    spent = dict.fromkeys((*_PHASES, _WAITING, OTHER), 0)
    for (event, phase), (after, _) in zip(marks, [*marks[1:], (end, OTHER)], strict=True):
        spent[phase] += round(event.elapsed_time(after) * 1e6)

    spent[_OWN] = spent[_BACKWARD] if any(phase == _WAITING for _, phase in marks) else -1
    spent[_BACKWARD] += spent[_WAITING]
    total = round(marks[0][0].elapsed_time(end) * 1e6)
    return [total, *(spent[phase] for phase in _SOURCES)]


def cuda_events() -> tuple[Callable[[], DeviceEvent], Callable[[], bool]] | None:
    """Return functions that create a CUDA event and detect graph capture; None without a CUDA device."""
    import torch

    if not torch.cuda.is_available():
        return None

    return lambda: torch.cuda.Event(enable_timing=True), torch.cuda.is_current_stream_capturing
