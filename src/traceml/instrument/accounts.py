"""The accounts of the open step: which phase the time belongs to, and the row that they become.

Time is exclusive. One phase is `current`; entering another one closes the account of the first, so the phases and
`other` add up to the step by construction.
"""

from __future__ import annotations

import logging
import mmap
from _thread import get_ident
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from traceml.clock import monotonic_ns
from traceml.database.schema import Phase, StepFlag

if TYPE_CHECKING:
    from traceml.database.flight import FlightFile
    from traceml.instrument.device import DeviceTimes

__all__ = ["FIRST_USER", "NOWHERE", "OTHER", "Accounts", "Listener"]

OTHER = 8  # the account of time in no phase; never read, as it is what is left of the total
FIRST_USER = 9  # user phase k has its time at FIRST_USER + 2k and its entries at FIRST_USER + 2k + 1
_INPUT_WAIT = int(Phase.INPUT_WAIT)
_STEP_START, _STEP = 8, 9  # words of `open_slots`
# Plain ints: arithmetic on enum members costs a microsecond.
_NO_LOADER, _DEVICE, _CALLBACK = int(StepFlag.NO_LOADER), int(StepFlag.DEVICE), int(StepFlag.CALLBACK)
_SAMPLED_MASK = 3  # what costs more than the budget is measured on every 4th step
_SLOW_STEP_NS = 2_000_000  # ... and on every step when they are this long
_UPKEEP_MASK = 63
NOWHERE = False  # `closes_at` when no loader closes the open step; no loader's token equals it
_log = logging.getLogger("traceml")


class Listener(Protocol):
    """Who is told of the rare events of a clock."""

    def first_backward(self) -> bool:
        """The first backward pass begins; return whether a torch optimizer is alive."""

    def new_optimizer(self, optimizer: Any) -> None:
        """An optimizer steps that never stepped before."""

    def step_without_forward(self) -> None:
        """A step closed with a backward pass, but no forward was seen."""

    def upkeep(self) -> None:
        """Another 64 steps are done."""


class Accounts:
    """Accounts of the open step.

    Hooks read and write its fields directly: a method call costs more than what it would do. Everything here happens
    on the training thread; hooks compare `thread` with their own and stay out otherwise.

    A step may be cut into segments (see `StepClock`). Fields named `base*`, `micro` and `snap*` tell of what lies
    before the last cut; `backwards`, `batches`, `batch`, `trained`, `evaluated`, `own` and `flags` of what lies after
    it; `acc` runs over both.
    """

    # The step ring, bound.
    pack_into: Callable[..., None]
    buffer: mmap.mmap | bytearray
    offset: int
    mask: int
    row_bytes: int
    count: memoryview[int]
    slot: int
    rows: int  # rows so far: the number of the open step
    evals: Any
    user_rows: Any
    open_slots: memoryview[int]

    listener: Listener
    thread: int  # the training thread; no thread has the number 0, which switches all hooks off
    errors: int
    device: DeviceTimes | None
    group: Any  # the default process group once there is one
    sequence: Callable[[], int] | None  # how many collectives it has issued
    extras: bool  # there is a device, or a group with other ranks
    detail: bool  # measure in this step what is too dear for each
    mean_ns: int

    current: int  # the phase that time belongs to now
    mark: int  # since when
    acc: list[int]  # ns by account
    zeros: list[int]
    users: list[int]  # name ids of user phases, by index
    depth: int  # nested optimizer steps

    seg_start: int  # where the segment began
    closes_at: Any  # the loader whose next request closes the step
    close_on_forward: bool  # a training forward may close the step, or open the first
    stepped: bool  # an optimizer attempt was made
    trained: bool  # a training forward was seen
    evaluated: bool  # one without gradients, or of a model in eval()
    backwards: int
    batches: int
    batch: Any  # the first loader that gave a batch in this segment
    first_loader: Any  # ... in this step
    flags: int
    own: int  # own backward time

    dirty: bool  # one of the following is not at rest
    attempt: int  # id of the optimizer that made the step's first attempt
    attempts: set[int]  # ids of those that made the others
    evaluating: bool  # the segment before was evaluation
    fused: bool  # an optimizer stepped inside backward
    pending: bool  # what lies before the cut has stepped: it may be a whole step
    snap: list[int] | None  # `acc` at the cut
    snap_end: int  # when that was
    snap_first: Any  # `first_loader` then
    base: int  # total ns before the cut
    base_flags: int
    base_own: int
    micro: int  # micro-batches before the cut

    eval_ns: int
    eval_batches: int
    eval_end: int

    __slots__ = (
        "acc",
        "attempt",
        "attempts",
        "backwards",
        "base",
        "base_flags",
        "base_own",
        "batch",
        "batches",
        "buffer",
        "close_on_forward",
        "closes_at",
        "count",
        "current",
        "depth",
        "detail",
        "device",
        "dirty",
        "errors",
        "eval_batches",
        "eval_end",
        "eval_ns",
        "evals",
        "evaluated",
        "evaluating",
        "extras",
        "first_loader",
        "flags",
        "fused",
        "group",
        "listener",
        "mark",
        "mask",
        "mean_ns",
        "micro",
        "offset",
        "open_slots",
        "own",
        "pack_into",
        "pending",
        "row_bytes",
        "rows",
        "seg_start",
        "sequence",
        "slot",
        "snap",
        "snap_end",
        "snap_first",
        "stepped",
        "thread",
        "trained",
        "user_rows",
        "users",
        "zeros",
    )

    def __init__(self, flight: FlightFile, listener: Listener, thread: int) -> None:
        ring = flight.ring("steps")
        self.pack_into, self.buffer, self.offset = ring.pack_into, ring.buffer, ring.offset
        self.mask, self.row_bytes, self.count, self.slot = ring.mask, ring.row_bytes, ring.count, ring.slot
        self.rows = ring.appended
        self.evals, self.user_rows = flight.ring("evals"), flight.ring("user_phases")
        self.open_slots = flight.open_slots
        self.listener, self.thread, self.errors = listener, thread, 0
        self.device = self.group = self.sequence = None
        self.extras = self.detail = False
        self.mean_ns = 0
        self.zeros = [0] * FIRST_USER
        self.users = []
        self.current, self.mark, self.depth = OTHER, 0, 0
        self.eval_ns = self.eval_batches = self.eval_end = 0
        self._clear(0)
        self._clear_rest()
        self.open_slots[_STEP] = -1  # no step is open yet

    def enter(self, phase: int) -> int:
        """Begin a phase; return what `leave` needs, or -1 when it does not count here."""
        if self.thread != get_ident():
            return -1

        previous = self.current
        if previous == _INPUT_WAIT or previous == phase:  # noqa: SIM109 - a tuple would be built
            return -1

        t = monotonic_ns()
        self.acc[previous] += t - self.mark
        self.mark, self.current = t, phase
        self.open_slots[phase] = t
        if self.device is not None:
            self.device.mark(phase)

        return previous

    def leave(self, phase: int, previous: int) -> None:
        """End a phase that `enter` began."""
        t = monotonic_ns()
        self.acc[self.current] += t - self.mark
        self.mark, self.current = t, previous
        self.open_slots[phase] = 0
        if self.device is not None:
            self.device.mark(previous)

    def switch(self, t: int) -> None:
        """Bring the account of the current phase up to `t`."""
        self.acc[self.current] += t - self.mark
        self.mark = t

    def commit(self, t: int) -> None:
        """Close the open step at `t`: append its row, begin the next."""
        acc = self.acc
        n = self.rows
        total = self.base + t - self.seg_start
        backwards, batches = self.backwards, self.batches
        micro = backwards if not batches or backwards < batches else batches
        flags, own, user, sequence = self.flags, -1, 0, 0
        if self.first_loader is None:
            flags |= _NO_LOADER

        if self.dirty:
            micro += self.micro
            flags |= self.base_flags
            if flags & _CALLBACK:
                own = self.own + self.base_own

        if self.users:
            user = self._write_users(acc)

        if self.extras:
            sequence = self._read_extras(total)
            if self.device is not None and self.device.close(n):
                flags |= _DEVICE

        self.pack_into(
            self.buffer,
            self.offset + (n & self.mask) * self.row_bytes,
            n,
            t,
            total,
            acc[0],
            acc[1],
            acc[2],
            acc[3],
            acc[4],
            acc[5],
            acc[6],
            user,
            own,
            micro & 0xFFFF | flags << 16 | sequence << 32,
        )
        self.count[self.slot] = self.rows = n + 1
        if not acc[2] and backwards:
            self.listener.step_without_forward()

        self._clear(t)
        if self.dirty:
            self._clear_rest()

        if not n & _UPKEEP_MASK:
            self.listener.upkeep()

    def disable_in_child(self) -> None:
        """Stop in a forked child: what it shares with its parent must not be written by it."""
        self.thread = 0
        self.buffer = bytearray(self.offset + self.row_bytes * (self.mask + 1))
        self.count = memoryview(bytearray(8 * (self.slot + 1))).cast("q")
        self.open_slots = memoryview(bytearray(8 * len(self.open_slots))).cast("q")

    def fail(self, error: BaseException) -> None:
        """A hook of ours failed: say it once, and switch all of them off. Training goes on."""
        self.errors += 1
        self.thread = 0
        if self.errors == 1:
            _log.warning("step timing is switched off after an internal error: %r", error, exc_info=error)

    def _clear(self, t: int) -> None:
        self.acc = self.zeros[:]
        self.mark = self.seg_start = t
        self.stepped = self.trained = self.evaluated = self.close_on_forward = False
        self.closes_at = NOWHERE
        self.backwards = self.batches = self.flags = 0
        self.batch = self.first_loader = None
        slots = self.open_slots
        slots[_STEP_START] = t
        slots[_STEP] = self.rows

    def _clear_rest(self) -> None:
        self.attempt = self.own = 0
        self.attempts = set()
        self.evaluating = self.fused = False
        self._drop_prefix()
        self.dirty = False

    def _drop_prefix(self) -> None:
        self.snap = None
        self.snap_first = None
        self.pending = False
        self.snap_end = self.base = self.base_flags = self.base_own = self.micro = 0

    def _flush_evals(self, step: int) -> None:
        self.evals.append(step, self.eval_end, self.eval_ns, self.eval_batches)
        self.eval_ns = self.eval_batches = 0

    def _write_users(self, acc: list[int]) -> int:
        total = 0
        for index, name_id in enumerate(self.users):
            at = FIRST_USER + 2 * index
            if at + 1 < len(acc) and (acc[at] or acc[at + 1]):
                self.user_rows.append(self.rows, name_id, acc[at], acc[at + 1])
                total += acc[at]

        return total

    def _read_extras(self, total: int) -> int:
        """Return the collective sequence number, and decide whether the next step is measured in detail.

        By step number, hence the same steps on all ranks; every step once they are long enough not to notice.
        """
        self.mean_ns += (total - self.mean_ns) >> 4
        self.detail = self.mean_ns > _SLOW_STEP_NS or not (self.rows + 1 & _SAMPLED_MASK)
        return self.sequence() & 0x7FFFFFFF if self.sequence is not None else 0
