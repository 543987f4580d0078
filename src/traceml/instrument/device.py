"""Device time per phase: events on the training's stream, read once they are complete, without synchronizing.

The CPU only launches work on an accelerator, so CPU time says little about it. Each change of phase on the CPU records
an event, which the stream reaches after all work launched on it before. The time between two events belongs to the
phase that began at the first one: exclusive, as on the CPU, and in the same order.

All events of a step are on one stream, that of its backward passes. So when an event is complete, all before it are,
and times of parallel streams are never added up. A phase that begins while another stream or device is current has no
device time. See docs/decisions/0014-only-the-end-of-a-step-is-asked.md.
"""

from __future__ import annotations

import functools
import logging
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

from traceml.clock import monotonic_ns
from traceml.database.flight.row_rings import Ring
from traceml.database.schema import DEVICE_PHASES, DEVICE_STEPS, PHASE_COLUMNS, Phase
from traceml.fail_open import fail_open
from traceml.instrument.phase_timer import OTHER
from traceml.instrument.step_clock import StepClock

__all__ = ["CudaDevice", "DeviceMarkingSlots", "DeviceTimes", "built_devices", "level_of"]

F = TypeVar("F", bound=Callable[..., Any])
_BACKWARD = int(Phase.BACKWARD)
_WAITING = -1  # after the last local gradient: backward that waits for other ranks
_OWN = -2  # backward until that gradient, where it was measured
_PHASES = tuple(int(phase) for phase in DEVICE_PHASES)
_MARKED = frozenset((*_PHASES, _WAITING))
# Where backward runs, or else forward: a graph that is replayed holds both, and its time is forward.
_SHOWS_HOME = frozenset((_BACKWARD, int(Phase.FORWARD)))
# The phase of each column of a device row after its total.
_SOURCES = tuple(PHASE_COLUMNS.index(name) if name in PHASE_COLUMNS else _OWN for name in DEVICE_STEPS.names[2:])
_MAX_PENDING_STEPS = 64
_MAX_MARKS = 4096
_READ_PER_STEP = 2
_LOST = "the device time of a step is lost"
_log = logging.getLogger("traceml")


class _TrainingStream(NamedTuple):
    key: tuple[int, int]
    stream: Any
    pool: list[Any]  # free events of its device


Marks = list[tuple[Any, int]]


class _PendingStep(NamedTuple):
    step: int
    marks: Marks
    end: Any
    is_shared: bool  # the end is also the start of the next step
    pool: list[Any]


def level_of(error: Exception) -> int:
    """Return the level at which to log an error of a call to the device.

    After a kernel of the script has failed, as by an index that is too large, every call does. The script sees it, too:
    ours would only hide its traceback.
    """
    return logging.DEBUG if str(error).startswith(("CUDA error", "HIP error")) else logging.WARNING


class DeviceMarkingSlots:
    """Open-phase words of the flight file that also mark each change of phase on the device.

    Hooks store into them at each change of phase, after they have set the clock's `current`. In steps whose device
    time is not measured, hooks store into the mapping directly and this class costs nothing.
    """

    __slots__ = ("_clock", "_mark", "_slots")

    def __init__(self, clock: StepClock, slots: Any, mark: Callable[[int, bool], None]) -> None:
        self._clock, self._slots, self._mark = clock, slots, mark

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, index: int) -> int:
        return int(self._slots[index])

    def __setitem__(self, index: int, value: int) -> None:
        self._slots[index] = value
        if index < OTHER:  # the slot of a phase
            self._mark(self._clock.current, value != 0)


def _at_end_of_part(method: F) -> F:
    """Return a method of `DeviceTimes` after which the hooks mark, or no longer do.

    On an error it drops the open step's measurement and returns False.
    """

    @functools.wraps(method)
    def call(self: DeviceTimes, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except Exception as error:  # noqa: BLE001 - fail open
            self.fail(error)
            return False
        finally:
            self.follow()

    return cast("F", call)


class DeviceTimes:
    """Events of the open step, and of closed ones that the device has not finished.

    No method raises: a step that cannot be marked or read has no device row, the failure is counted, and the next step
    is measured again.

    Attributes:
        marks: events of the open step, each with the phase that begins there; empty if it is not measured.

    Args:
        clock: decides by `is_detailed` which steps are measured.
        device: creates events, and knows the current stream.
    """

    def __init__(self, clock: StepClock, ring: Ring, device: CudaDevice) -> None:
        self._clock, self._ring, self._device = clock, ring, device
        self._slots = clock.open_slots
        self._marking_slots = DeviceMarkingSlots(clock, self._slots, self.mark)
        self._pools: dict[int, list[Any]] = {}  # by device
        self._home: _TrainingStream | None = None
        self._next_home: _TrainingStream | None = None  # where this step ran instead, see `_SHOWS_HOME`
        self.marks: Marks = []
        self._cut: int | None = None  # number of marks before the cut
        self._is_whole = True  # the marks begin with the step, not at a cut in it
        self._pending: deque[_PendingStep] = deque()
        self._open_ns = 0  # time that marks of the open step have taken on the host
        self._cost_ns: deque[int] = deque(maxlen=31)  # the same of steps that were measured, with their ends
        self._row, self._apart = 0, 1  # row of the last step that was measured, and its distance from the one before

    def follow(self) -> None:
        """Let the hooks mark each change of phase if the open step is measured."""
        self._clock.open_slots = self._marking_slots if self.marks else self._slots

    def mark(self, phase: int, begins: bool) -> None:
        """Mark a change of phase, if the step is measured.

        Args:
            phase: the phase that time belongs to from now on.
            begins: whether it begins here; else an inner phase has ended.
        """
        marks = self.marks
        if not marks:
            return

        try:
            start = monotonic_ns()
            if phase not in _MARKED:
                phase = OTHER  # these phases launch no work

            if phase == marks[-1][1]:
                return

            if len(marks) >= _MAX_MARKS or self._device.is_capturing():
                self._drop(marks)
            elif not begins or phase == OTHER or self._training().key == self._device.current():
                marks.append((self._recorded(), phase))
            elif phase in _SHOWS_HOME:
                self._next_home = self._here()

            self._open_ns += monotonic_ns() - start
        except Exception as error:  # noqa: BLE001 - fail open
            self.fail(error)

    def mark_own(self) -> None:
        """Mark the last local gradient; the autograd engine calls it on any of its threads."""
        if self.marks and self.marks[-1][1] == _BACKWARD:
            self.mark(_WAITING, False)

    @_at_end_of_part
    def cut(self) -> None:
        """Mark a cut: what follows may belong to another step."""
        starts = not self.marks and self._clock.is_detailed(self._clock.step + 1)
        if not (self.marks or starts) or self._device.is_capturing():
            return

        phase = OTHER if starts else self.marks[-1][1]
        self._cut, self._is_whole = len(self.marks), self._is_whole and not starts
        self.marks.append((self._recorded(), phase))

    @_at_end_of_part
    def discard(self) -> None:
        """Drop the measurement of this step: what followed the cut was evaluation."""
        self._drop(self.marks)

    @_at_end_of_part
    def close(self, step: int) -> bool:
        """End the step (-1: without a row) and begin the next; return whether a device row will follow."""
        start = monotonic_ns()
        marks, is_whole = self.marks, self._is_whole and step >= 0
        detailed = self._clock.is_detailed(step + 1)
        self._begin([])
        if not (marks or detailed):
            return False

        if self._device.is_capturing():
            self._drop(marks)
            return False

        measured = self._may_end(marks, is_whole=is_whole)
        if not (measured or detailed):
            return False

        end = self._recorded()
        if measured:
            self._pending.append(_PendingStep(step, marks, end, detailed, self._training().pool))

        if detailed:
            # The end of one step is the start of the next: both share the event, and the later one returns it.
            self.marks.append((end, OTHER))

        self._record_cost(start, measured=measured)
        return measured

    @_at_end_of_part
    def close_prefix(self, step: int) -> bool:
        """End the step at the cut, where the next one began; return whether a device row will follow."""
        start = monotonic_ns()
        if self._cut is None:
            self._drop(self.marks)
            return False

        marks, rest, is_whole = self.marks[: self._cut], self.marks[self._cut :], self._is_whole
        self._begin(rest)
        if self._device.is_capturing():
            self._drop(rest)
            return False

        home, detailed = self._training(), self._clock.is_detailed(step + 1)
        measured = self._may_end(marks, is_whole=is_whole)
        if measured:
            self._pending.append(_PendingStep(step, marks, rest[0][0], detailed, home.pool))

        if not detailed or self._home is not home:
            self._drop(rest, home)

        self._record_cost(start, measured=measured)
        return measured

    def _record_cost(self, start: int, *, measured: bool) -> None:
        """Note what a measured step has cost, its end since `start` included."""
        if measured:
            row = self._clock.rows
            self._cost_ns.append(self._open_ns + monotonic_ns() - start)
            self._row, self._apart = row, max(row - self._row, 1)
            ordered = sorted(self._cost_ns)
            self._clock.detailed.cost_ns = ordered[(len(ordered) - 1) // 2]

        self._open_ns = 0

    def _may_end(self, marks: Marks, *, is_whole: bool) -> bool:
        """Return whether a step with these marks can be measured; drop them if not."""
        self._read()
        moved, self._next_home = self._next_home, None
        # Training that has moved to another stream: the step in which it did is not measured.
        moves = moved is not None and all(phase != _BACKWARD for _, phase in marks)
        measured = bool(marks) and is_whole and not moves and len(self._pending) < _MAX_PENDING_STEPS
        if not measured:
            self._drop(marks)

        if moves:
            self._home = moved

        return measured

    @property
    def ns_per_step(self) -> int:
        """Cost of measuring on the host in ns, per step: the median of the last steps that had it, spread over all."""
        return self._clock.detailed.cost_ns // self._apart

    def drain(self) -> None:
        """Read all complete steps, at the end of the run."""
        self._read(len(self._pending))

    def fail(self, error: Exception) -> None:
        """Drop the measurement of the open step, and its events, one of which has failed; log and count it."""
        self._begin([])
        with fail_open(_log, "instrument", _LOST, once=True, level=level_of(error)):
            raise error

    def _begin(self, marks: Marks) -> None:
        self.marks, self._cut, self._is_whole = marks, None, True

    # ---- streams ----

    def _here(self) -> _TrainingStream:
        key = self._device.current()
        return _TrainingStream(key, self._device.stream(), self._pools.setdefault(key[0], []))

    def _training(self) -> _TrainingStream:
        if self._home is None:
            self._home = self._here()

        return self._home

    # ---- events ----

    def _read(self, limit: int = _READ_PER_STEP) -> None:
        for _ in range(limit):
            if not self._pending or not self._has_read(self._pending[0]):
                return

            self._pending.popleft()

    def _has_read(self, pending: _PendingStep) -> bool:
        """Append the row of a step; return False if the device has not finished it. One that fails counts as read."""
        try:
            if not self._device.query(pending.end):
                return False

            self._ring.append(pending.step, *self._durations(pending.marks, pending.end))
            pending.pool.extend(event for event, _ in pending.marks)
            if not pending.is_shared:
                pending.pool.append(pending.end)
        except Exception as error:
            with fail_open(_log, "instrument", _LOST, once=True, level=level_of(error)):
                raise

        return True

    def _recorded(self) -> Any:
        home = self._training()
        event = home.pool.pop() if home.pool else self._device.event()
        self._device.record(event, home.stream)
        return event

    def _durations(self, marks: Marks, end: Any) -> list[int]:
        """Return the columns of a device row after `step`: the total and the phases, in ns."""
        elapsed_ms, spent = self._device.elapsed_ms, dict.fromkeys((*_PHASES, _WAITING, OTHER), 0)
        for (event, phase), (after, _) in zip(marks, [*marks[1:], (end, OTHER)], strict=True):
            spent[phase] += round(elapsed_ms(event, after) * 1e6)

        total = sum(spent.values())
        spent[_OWN] = spent[_BACKWARD] if any(phase == _WAITING for _, phase in marks) else -1
        spent[_BACKWARD] += spent[_WAITING]
        return [total, *(spent[phase] for phase in _SOURCES)]

    def _drop(self, marks: Marks, home: _TrainingStream | None = None) -> None:
        """Drop marks of a stream; None: the training's now."""
        # The first mark may also be the end of a pending step: leave it to the garbage collector.
        (home or self._training()).pool.extend(event for event, _ in marks[1:])
        marks.clear()
        self._cut, self._is_whole = None, True


class CudaDevice:
    """torch.cuda, also on ROCm. Before the script has initialized it, only `is_initialized` may be called."""

    def __init__(self) -> None:
        import torch

        # Whether the script uses CUDA. It asks no driver: that would break later forks and `CUDA_VISIBLE_DEVICES`.
        self.is_initialized: Callable[[], bool] = torch.cuda.is_initialized
        self._event: Callable[..., Any] = torch.cuda.Event
        self.stream: Callable[[], Any] = torch.cuda.current_stream
        # Private, so optional: the methods in C of events, and functions that take a tenth of the time.
        base: Any = getattr(torch._C, "_CudaEventBase", None)
        event: Any = base if hasattr(base, "record") else torch.cuda.Event
        self.record: Callable[[Any, Any], None] = event.record
        self.query: Callable[[Any], bool] = event.query
        self.elapsed_ms: Callable[[Any, Any], float] = event.elapsed_time
        public = torch.cuda.is_current_stream_capturing
        # While a graph is captured, no event may be recorded or asked.
        self.is_capturing: Callable[[], bool] = getattr(torch._C, "_cuda_isCurrentStreamCapturing", public)
        self._index: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
        self._handle: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)

    def current(self) -> tuple[int, int]:
        """Index of the current device, and handle of its current stream."""
        index = self._index()
        return index, self.stream().cuda_stream if self._handle is None else self._handle(index)

    def event(self) -> Any:
        """Create an event. It belongs to the device on which it is first recorded."""
        return self._event(enable_timing=True)


def built_devices() -> frozenset[str]:
    """Return the types of accelerators that this torch supports. It asks no driver whether there are any."""
    import torch

    own = torch._C._get_privateuse1_backend_name()
    built = {
        "cuda": torch.backends.cuda.is_built(),  # also ROCm
        "mps": torch.backends.mps.is_built(),
        "xpu": bool(getattr(torch._C, "_has_xpu", False)),
        "hpu": hasattr(torch, "hpu"),
        own: own != "privateuseone",
    }
    return frozenset(name for name, is_built in built.items() if is_built)
