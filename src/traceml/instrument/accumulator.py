"""The accounts of the open step: which phase the time belongs to, and the row that they become.

Time is exclusive: a phase that ends books its time, and takes it from the phase around it; so the phases and `other`
add up to the step. Hooks do this with the start in a local variable. Only phases of the user may be open when a step
ends; `settle` books those.
"""

from __future__ import annotations

import contextvars
import logging
from _thread import get_ident
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from traceml.clock import monotonic_ns
from traceml.database.schema import MICRO_BATCHES_MASK, PHASE_COLUMNS, STEPS, Phase, Slot, StepFlag, pack_bits
from traceml.instrument.closure_cells import CellField, ClosureCells

if TYPE_CHECKING:
    from traceml.database.flight import FlightFile
__all__ = [
    "ASK",
    "FIRST_USER",
    "NOWHERE",
    "ON_FORWARD",
    "OTHER",
    "StepAccumulator",
    "StepListener",
    "on_training_thread",
]

OTHER = len(Phase)  # the account of time in no phase; never read, as it is what is left of the total
FIRST_USER = OTHER + 1  # user phase k has its time at FIRST_USER + 2k and its entries at FIRST_USER + 2k + 1
_INPUT_WAIT, _FORWARD, _BACKWARD = int(Phase.INPUT_WAIT), int(Phase.FORWARD), int(Phase.BACKWARD)
_OPTIMIZER, _USER = int(Phase.OPTIMIZER), int(Phase.USER)
_STEP_START, _STEP = int(Slot.STEP_START), int(Slot.STEP)
# The columns of every step, and the few of a usual one, whose other columns are 0.
_COLUMNS = ("step", "t_end_ns", "total_ns", *PHASE_COLUMNS, "backward_own_ns", "bits")
_USUAL_COLUMNS = ("step", "t_end_ns", "total_ns", "input_wait_ns", "forward_ns", "backward_ns", "optimizer_ns",
                  "backward_own_ns", "bits")  # fmt: skip
# Plain ints: arithmetic on enum members costs a microsecond.
_NO_LOADER, DEVICE, _CALLBACK = int(StepFlag.NO_LOADER), int(StepFlag.DEVICE), int(StepFlag.CALLBACK)
_NO_LOADER_BITS = pack_bits(0, _NO_LOADER)
UPKEEP_MASK = 63
_log = logging.getLogger("traceml")


# Whether this is the training thread. Reading it costs a tenth of `get_ident`; other threads start without it.
_mine: contextvars.ContextVar[bool] = contextvars.ContextVar("traceml_training_thread", default=False)
on_training_thread = _mine.get


class _Mark:
    """A value of `closes_at` that is no loader."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


NOWHERE = _Mark("NOWHERE")  # nothing closes the step yet
ON_FORWARD = _Mark("ON_FORWARD")  # the next training forward closes it
ASK = _Mark("ASK")  # every forward must say whether it trains


class StepListener(Protocol):
    """Who is told of the rare events of a clock."""

    def first_backward(self) -> bool:
        """The first backward pass begins; return whether a torch optimizer is alive."""

    def new_optimizer(self, optimizer: Any) -> None:
        """An optimizer steps that never stepped before."""

    def upkeep(self, forward_ns: int, backwards: int) -> None:
        """The first step is done, or another 64 are: with how much forward time, and how many backward passes."""


class StepDeviceTimer(Protocol):
    """Measures the device time of the open step: see `device.DeviceTimes`."""

    def mark_own(self) -> None:
        """The last local gradient is there."""

    def cut(self) -> None:
        """The step is cut: what follows may belong elsewhere."""

    def discard(self) -> None:
        """What followed the cut was evaluation."""

    def close(self, step: int) -> bool:
        """The step ends (-1: without a row); return whether a device row will follow."""

    def close_prefix(self, step: int) -> bool:
        """The step ended at the cut; return whether a device row will follow."""

    def drain(self) -> None:
        """Read what is complete, at the end of the run."""


class StepAccumulator:
    """Times of the open step, by phase.

    Everything here happens on the training thread; hooks compare `thread` with their own and stay out otherwise. Fields
    that are `CellField`s are read and written by the hooks directly (see `cells`).

    A step may be cut into segments (see `StepClock`). Fields named `base*`, `micro` and `snap*` tell of what lies
    before the last cut; `backwards`, `batches`, `batch`, `trained`, `evaluated`, `own` and `flags` of what lies after
    it; the accounts run over both.
    """

    thread = CellField()  # the training thread; no thread has the number 0, which switches all hooks off
    current = CellField()  # the phase that time belongs to now
    input_ns = CellField()  # the accounts of the phases that every loop has; all others are in `rare`
    forward_ns = CellField()
    backward_ns = CellField()
    optimizer_ns = CellField()
    rows = CellField()  # rows so far: the number of the open step
    seg_start = CellField()  # where the segment began
    closes_at = CellField()  # the loader whose next request closes the step, or a mark
    attempt = CellField()  # id of the optimizer that made the step's first attempt, 0 before one
    backwards = CellField()
    batches = CellField()
    batch = CellField()  # the first loader that gave a batch in this segment
    first_loader = CellField()  # ... in this step
    dirty = CellField()  # closing this step takes more than writing the four accounts
    detail = CellField()  # backward passes need care: see `StepClock.plan`

    def __init__(self, flight: FlightFile, listener: StepListener, thread: int) -> None:
        hot = ClosureCells(
            tuple(name for kind in type(self).__mro__ for name in vars(kind) if _is_cell(vars(kind)[name]))
        )
        self.cells, self.bind = hot.by_name, hot.bind
        self.listener, self.thread, self.errors = listener, thread, 0
        self.ring = flight.ring("steps")
        self._append_step = self.ring.appender(*_COLUMNS)
        self._append_eval = flight.ring("evals").appender("step", "t_end_ns", "ns", "batches")
        self._append_user = flight.ring("user_phases").appender("step", "name_id", "ns", "count")
        self.open_slots: Any = flight.open_slots  # the flight file's words, or what stands in for them
        self.device: StepDeviceTimer | None = None
        self.group: Any = None  # the default process group once there is one
        self.sequence: Callable[[], int] | None = None  # how many collectives it has issued
        self.extras = False  # there is a device, or a group with other ranks
        self.special = False  # ... or user phases: every step is `dirty`
        self.mean_ns = 0

        self.rows = self.ring.appended
        self.current, self.detail = OTHER, True
        self.zeros = [0] * FIRST_USER
        self.users: list[int] = []  # name ids of user phases, by index
        self.open_user_phases: list[list[Any]] = []  # [phase, the one around it, start], innermost last
        self.eval_ns = self.eval_batches = self.eval_end = 0
        self._clear(0)
        self.open_slots[_STEP] = -1  # no step is open yet
        self.commit = _make_commit(self)

    # ---- phases ----

    @property
    def acc(self) -> list[int]:
        """All accounts, by number: a copy."""
        acc = self.rare.copy()
        acc[_INPUT_WAIT], acc[_FORWARD] = self.input_ns, self.forward_ns
        acc[_BACKWARD], acc[_OPTIMIZER] = self.backward_ns, self.optimizer_ns
        return acc

    @acc.setter
    def acc(self, acc: list[int]) -> None:
        self.input_ns, self.forward_ns = acc[_INPUT_WAIT], acc[_FORWARD]
        self.backward_ns, self.optimizer_ns = acc[_BACKWARD], acc[_OPTIMIZER]
        self.rare = acc

    def add(self, account: int, ns: int) -> None:
        """Add time to any account."""
        if account == _OPTIMIZER:
            self.optimizer_ns += ns
        elif account == _BACKWARD:
            self.backward_ns += ns
        elif account == _FORWARD:
            self.forward_ns += ns
        elif account == _INPUT_WAIT:
            self.input_ns += ns
        elif account != OTHER:
            self.rare[account] += ns
            self.dirty = True

    def is_here(self) -> bool:
        """Whether this is the training thread; the hooks' own check is renewed where a context lost it."""
        if self.thread != get_ident():
            return False

        _mine.set(True)
        return True

    def enter(self, phase: int) -> int:
        """Begin a phase; return the one to go back to, or -1 when it does not count here."""
        previous: int = self.current
        if previous in (_INPUT_WAIT, phase) or self.thread != get_ident():
            return -1

        self.current = phase
        return previous

    def leave(self, phase: int, previous: int, start: int) -> None:
        """End a phase that began at `start`; the time is no longer that of the phase around it."""
        spent = monotonic_ns() - start
        self.add(phase, spent)
        self.add(previous, -spent)
        self.current = previous
        self.open_slots[phase] = 0

    def cancel(self, phase: int, previous: int) -> None:
        """A phase that began was none: its time is that of the phase around it."""
        self.current = previous
        self.open_slots[phase] = 0

    def settle(self, t: int) -> None:
        """Book the time of the user phases that are open at `t`, when a step ends inside them."""
        for entry in self.open_user_phases:
            phase, previous, start = entry
            self.add(phase.account, t - start)
            self.add(previous, start - t)
            entry[2] = t

    # ---- rows ----

    def commit_special(self, t: int) -> None:
        """Close a step that was cut into segments, or has rare or user phases, flags, a group or a device."""
        self.settle(t)
        flags = self.flags | self.base_flags | (_NO_LOADER if self.first_loader is None else 0)
        micro = self.micro + (min(self.backwards, self.batches) if self.batches else self.backwards)
        if self.eval_ns:
            self._flush_evals(self.rows)

        total = self.base + t - self.seg_start
        self.note_total(total)
        if self.device is not None and self.device.close(self.rows):
            flags |= DEVICE

        self.append_step(self.acc, t, total, micro, flags, self.own + self.base_own)
        self._clear(t)
        self.plan()

    def note_total(self, total: int) -> None:
        """Update the moving mean of step times, by which `plan` decides."""
        if self.extras:
            self.mean_ns += (total - self.mean_ns) >> 4

    def plan(self) -> None:
        """Decide what the next step needs; called when it may need more than the usual."""

    def append_step(self, acc: list[int], t: int, total: int, micro: int, flags: int, own: int) -> None:
        """Append a row of the step table, and its rows of the user's phases."""
        n = self.rows
        times = acc[:OTHER]
        times[_USER] = self._append_users(acc) if self.users else 0
        sequence = self.sequence() if self.sequence is not None and self.extras else 0
        own = own if flags & _CALLBACK else -1
        self._append_step(n, t, total, *times, own, pack_bits(micro, flags, sequence))
        self.rows = n + 1
        if not n & UPKEEP_MASK:
            self.listener.upkeep(acc[_FORWARD], micro)

    def use_device(self, device: StepDeviceTimer, slots: Any) -> None:
        """Measure device time too; before any hook is made.

        Args:
            device: who does it.
            slots: what to store open phases into, so that it is told of them.
        """
        self.device, self.open_slots = device, slots
        self.extras = self.special = self.dirty = True

    def stop(self) -> None:
        """Switch all hooks off, for good."""
        self.thread = 0
        self.current = _INPUT_WAIT  # whatever a hook would begin is then part of another phase
        _mine.set(False)

    def fail(self, error: BaseException) -> None:
        """A hook of ours failed: say it once, and switch all of them off. Training goes on."""
        self.errors += 1
        self.stop()
        if self.errors == 1:
            _log.warning("step timing is switched off after an internal error: %r", error, exc_info=error)

    def _clear(self, t: int) -> None:
        """Begin a step at `t` with nothing in it."""
        self.acc = self.zeros.copy()
        self.seg_start = t
        self.closes_at = ASK
        self.attempt = self.backwards = self.batches = self.flags = self.own = 0
        self.batch = self.first_loader = None
        self.trained: Any = None  # a weak reference to a module whose forward was called with gradients
        self.evaluated = False  # one was called without
        self.evaluating = False  # the segment before was evaluation
        self.fused = False  # an optimizer stepped inside backward
        self.attempts: set[int] = set()  # ids of the optimizers that made further attempts
        self._drop_prefix()
        self.dirty = self.special
        self.open_slots[_STEP_START], self.open_slots[_STEP] = t, self.rows

    def _drop_prefix(self) -> None:
        self.snap: list[int] | None = None  # the accounts at the cut
        self.snap_first: Any = None  # `first_loader` then
        self.pending = False  # what lies before the cut has stepped: it may be a whole step
        self.snap_end = self.base = self.base_flags = self.base_own = self.micro = 0

    def _flush_evals(self, step: int) -> None:
        self._append_eval(step, self.eval_end, self.eval_ns, self.eval_batches)
        self.eval_ns = self.eval_batches = 0

    def _append_users(self, acc: list[int]) -> int:
        total = 0
        for index, name_id in enumerate(self.users):
            at = FIRST_USER + 2 * index
            if at + 1 < len(acc) and (acc[at] or acc[at + 1]):
                self._append_user(self.rows, name_id, acc[at], acc[at + 1])
                total += acc[at]

        return total


def _is_cell(value: Any) -> bool:
    return isinstance(value, CellField)


def _make_commit(accounts: StepAccumulator) -> Callable[[int], None]:
    """Return the function that closes the open step at a time: appends its row, begins the next."""
    ring, slots, special, upkeep = accounts.ring, accounts.open_slots, accounts.commit_special, accounts.listener.upkeep
    pack_into = STEPS.partial_struct(*_USUAL_COLUMNS).pack_into
    buffer, offset, mask, row_bytes = ring.buffer, ring.offset, ring.mask, ring.row_bytes
    count, slot = ring.count, ring.slot
    # Cells of the clock.
    input_ns = forward_ns = backward_ns = optimizer_ns = rows = seg_start = attempt = backwards = batches = 0
    dirty = False
    batch: Any = None
    first_loader: Any = None
    closes_at: Any = NOWHERE

    def commit(t: int) -> None:
        nonlocal input_ns, forward_ns, backward_ns, optimizer_ns
        nonlocal rows, seg_start, attempt, backwards, batches, batch, first_loader, closes_at
        if dirty:
            special(t)
            return

        n = rows
        if first_loader is None:
            bits = backwards & MICRO_BATCHES_MASK | _NO_LOADER_BITS
        else:
            bits = min(backwards, batches) & MICRO_BATCHES_MASK
            batch = first_loader = None
            batches = 0

        row = offset + (n & mask) * row_bytes
        total = t - seg_start
        pack_into(buffer, row, n, t, total, input_ns, forward_ns, backward_ns, optimizer_ns, -1, bits)
        count[slot] = rows = n + 1  # the row first, its number afterwards
        seg_start = slots[_STEP_START] = t
        slots[_STEP] = n + 1
        closes_at = NOWHERE
        attempt = 0
        if not n & UPKEEP_MASK:
            upkeep(forward_ns, backwards)

        input_ns = forward_ns = backward_ns = optimizer_ns = backwards = 0

    return accounts.bind(commit)
