"""Times of the open step by phase, and the row they become.

Time is exclusive: a phase that ends adds its time to its bucket and subtracts it from the enclosing phase. So phases
and `other` add up to the step. Hooks keep the start in a local variable. Only user phases may be open when a step ends;
`account_user_phases` adds their time.
"""

from __future__ import annotations

import contextvars
import logging
from _thread import get_ident
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from traceml.clock import monotonic_ns
from traceml.database.schema import PHASE_COLUMNS, Phase, Slot, StepFlag, pack_bits
from traceml.fail_open import fail_open

if TYPE_CHECKING:
    from traceml.database.flight.flight import FlightFile
    from traceml.instrument.values.reductions import ReductionCounter
__all__ = [
    "CHECK_FORWARD",
    "FIRST_USER",
    "MAINTENANCE_MASK",
    "NOT_READY",
    "NO_ROW",
    "ON_FORWARD",
    "OTHER",
    "Began",
    "PhaseTimer",
    "StepListener",
    "on_training_thread",
]

OTHER = len(Phase)  # the bucket of time in no phase; never read: it is the rest of the total
FIRST_USER = OTHER + 1  # user phase k: its time is at FIRST_USER + 2k, its count at FIRST_USER + 2k + 1
_MEASURED_FIRST = 16
NO_ROW = 1 << 62  # no run has as many
_INPUT_WAIT, _FORWARD, _BACKWARD = int(Phase.INPUT_WAIT), int(Phase.FORWARD), int(Phase.BACKWARD)
_OPTIMIZER, _USER = int(Phase.OPTIMIZER), int(Phase.USER)
_STEP_START, _STEP = int(Slot.STEP_START), int(Slot.STEP)
_COLUMNS = ("step", "t_end_ns", "total_ns", *PHASE_COLUMNS, "backward_own_ns", "elements", "samples", "bits")
# Plain ints: arithmetic on enum members costs a microsecond.
_NO_LOADER, _DEVICE, _CALLBACK = int(StepFlag.NO_LOADER), int(StepFlag.DEVICE), int(StepFlag.CALLBACK)
_EPOCH = int(StepFlag.EPOCH)
MAINTENANCE_MASK = 63
_log = logging.getLogger("traceml")


# Whether this is the training thread: the clock's token, which is empty once its hooks are off; in other threads it is
# empty too. Reading it costs a third of `get_ident`.
_NO_TOKEN: Sequence[bool] = ()
_training: contextvars.ContextVar[Sequence[bool]] = contextvars.ContextVar("traceml_training", default=_NO_TOKEN)
on_training_thread = _training.get
Function = TypeVar("Function", bound=Callable[..., Any])
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


class StepListener(Protocol):
    """Receiver of the rare events of a clock."""

    def first_backward(self) -> bool:
        """Handle the start of the first backward pass; return whether a torch optimizer is alive."""

    def new_optimizer(self, optimizer: Any) -> None:
        """Handle the first step of an optimizer."""

    def is_trained(self, module: Any) -> bool:
        """Return whether an optimizer has parameters of the module."""

    def maintain(self, forward_ns: int, backwards: int) -> None:
        """Handle the end of the first step, then of every 64th, given its forward time and backward passes."""


class Bind(Protocol):
    """Gives a function the fields of a clock that it declares as free variables."""

    def __call__(self, function: Function, /) -> Function:
        """Return a copy of the function that shares them."""


class StepDeviceTimer(Protocol):
    """Timer for the device time of the open step: see `device.DeviceTimes`."""

    def mark_own(self) -> None:
        """Mark the last local gradient."""

    def cut(self) -> None:
        """Mark a cut: what follows may belong to another step."""

    def discard(self) -> None:
        """Drop the step: what followed the cut was evaluation."""

    def close(self, step: int) -> bool:
        """End the step (-1: without a row); return whether a device row will follow."""

    def close_prefix(self, step: int) -> bool:
        """End the step at the cut; return whether a device row will follow."""

    def drain(self) -> None:
        """Read what is complete, at the end of the run."""

    @property
    def ns_per_step(self) -> int:
        """Cost of measuring on the host in ns, per step."""


class StepRow(NamedTuple):
    """Values of a step that `PhaseTimer.append_step` writes.

    Attributes:
        times: nanoseconds by bucket.
        sequence: number of collectives that the process group has issued at its end.
        own_ns: own work in backward; counts only with `StepFlag.CALLBACK`.
        data: elements and samples.
    """

    times: list[int]
    end_ns: int
    total_ns: int
    micro_batches: int
    flags: int
    sequence: int
    own_ns: int = -1
    data: tuple[int, int] = (0, 0)


class PhaseTimer:
    """Times of the open step, by phase.

    It runs on the training thread only; hooks compare `thread` with their own and do nothing on another thread. Hooks
    read and write the fields of this class directly; `clock_implementations` says where they are.

    A step may be cut into parts (see `StepClock`). Fields named `committed_*` and `*_at_cut`, `cut_ns` and
    `micro_batches` describe the part before the last cut. `backwards`, `batches`, `batch`, `samples`, `elements`,
    `trained`, `evaluated`, `own` and `flags` describe the part after it. The buckets cover both.
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
    rows: int  # number of rows so far
    before: int  # steps before the first row, of the training that this one resumes
    part_start: int  # start of the part
    closing_trigger: Any  # the loader whose next request closes the step, or a sentinel
    step_call: int  # id of the optimizer of the step's first optimizer step call, 0 before one
    backwards: int
    batches: int
    input_shape: Any  # shape of the input of the last forward; None: look at the next one
    input_samples: int
    input_elements: int
    samples: int  # of the inputs whose gradients were computed
    elements: int
    loss_mask: int  # the loss is read in steps whose number has none of these bits
    inspects: bool  # the next batch gets a fingerprint
    batch: Any  # the first loader that gave a batch in this part
    first_loader: Any  # the first loader that gave a batch in this step
    sequence: Any  # returns the number of collectives that a group with several ranks has issued; None without one
    needs_slow_commit: bool  # closing this step takes all rules: see `commit_slow`
    has_user_phases: bool  # this step has time in user phases
    slow_row: int  # from this row on, closing a step takes all rules too
    needs_slow_backward: bool  # backward passes take the slow path: see `StepClock.plan_backward`

    hook: Callable[..., Callable[..., Any]] | None = None  # makes hooks in C; None: hooks are Python functions
    bind: Bind  # gives Python functions the fields
    commit: Callable[[int], None]  # closes the open step at a given time: appends the row and begins the next step
    user_phase: Callable[[Any, int, int], Any] | None = None  # makes user phases in C; None: they are in Python
    enter_user: Callable[[Any, int, int], None]  # in Python: begins a user phase, given its bucket and its name's id
    leave_user: Callable[[Any], None]  # in Python: ends one that is open, and those that began inside it

    def __init__(self, flight: FlightFile, listener: StepListener, thread: int) -> None:
        self.listener, self.thread, self.errors = listener, thread, 0
        self.token = [True]
        self.ring = flight.ring("steps")
        self._append_step = self.ring.appender(*_COLUMNS)
        self._append_eval = flight.ring("evals").appender("step", "t_end_ns", "ns", "batches")
        self._append_epoch = flight.ring("epochs").appender("step", "t_end_ns", "ns", "create_ns", "drain_ns", "first")
        self._append_fingerprint = flight.ring("fingerprints").appender("step", "fingerprint")
        self._append_user = flight.ring("user_phases").appender("step", "name_id", "ns", "count")
        self.open_slots = flight.open_slots
        self.device: StepDeviceTimer | None = None
        self.group: Any = None  # the default process group once there is one
        self.sequence = None
        self.reductions: ReductionCounter | None = None  # once there is a parallel model
        self.is_grouped = False  # there is a process group with several ranks
        self.slow_commits = False  # there is a profile: every step needs a slow commit
        self.at_boundary: Callable[[], int] | None = None  # called at the end of a step; returns flags of the next one
        self.all_measured_to = -1  # the last of the steps that are all measured
        self.mean_ns = 0
        self.measuring_ns = 0  # what measuring the device time of a step takes the host
        self.slow_row = NO_ROW

        self.rows, self.before = self.ring.appended, 0
        self.current, self.needs_slow_backward = OTHER, True
        self.zeros = [0] * FIRST_USER
        self.users: list[int] = []  # name ids of user phases, by index
        self.open_user_phases: list[list[Any]] = []  # in Python: [phase, enclosing phase, start], innermost last
        self.eval_ns = self.eval_batches = self.eval_end = 0
        self._clear(0)
        self.open_slots[_STEP] = -1  # no step is open yet
        self.loss_mask = 0
        self.inspects, self.input_shape = False, None
        self.input_samples = self.input_elements = 0
        self.split_size = 0  # size of the loader's batches where each backward pass is on a part of one

    @property
    def extras(self) -> bool:
        """Whether there is more to measure than times on the host: a device, or waiting for other ranks."""
        return self.is_grouped or self.device is not None

    @property
    def step(self) -> int:
        """Number of the open step."""
        number: int = self.rows + self.before
        return number

    def continue_at(self, step: int) -> bool:
        """Give the next step a number, and the steps after it those that follow; return whether that is possible.

        An open step that has been trained is the one before. Numbers never go back: steps would have the same.
        """
        before = step - self.rows - bool(self.step_call)
        if before < self.before:
            return False

        self.all_measured_to += before - self.before
        self.before = before
        if self.open_slots[_STEP] >= 0:
            self.open_slots[_STEP] = self.step

        return True

    # ---- phases ----

    @property
    def times(self) -> list[int]:
        """Times of all buckets, as a copy."""
        times = self.rare_times.copy()
        times[_INPUT_WAIT], times[_FORWARD] = self.input_ns, self.forward_ns
        times[_BACKWARD], times[_OPTIMIZER] = self.backward_ns, self.optimizer_ns
        return times

    @times.setter
    def times(self, times: list[int]) -> None:
        self.input_ns, self.forward_ns = times[_INPUT_WAIT], times[_FORWARD]
        self.backward_ns, self.optimizer_ns = times[_BACKWARD], times[_OPTIMIZER]
        self.rare_times = times

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

    def append_user_phases(self) -> int:
        """Append the rows of a usual step's user phases, which all have ended; return their time."""
        total = self._append_users(self.rare_times)
        self.rare_times = self.zeros.copy()
        return total

    # ---- rows ----

    def new_iterator(self, create_ns: int) -> None:
        """Handle a new iterator of a loader: the step that waits for its first batch begins an epoch."""
        self.create_ns += create_ns
        self.is_drained = False
        self.flags |= _EPOCH
        self.needs_slow_commit = True

    def workers_ended(self, began: Began) -> None:
        """Handle the end of a dropped iterator's workers: the row of the epoch that follows in this step has it."""
        try:
            self.drain_ns += monotonic_ns() - began[1]
            self.needs_slow_commit = True
        except Exception as error:  # noqa: BLE001 - fail open: the clock counts and logs it
            self.fail(error)

    def commit_slow(self, t: int) -> None:
        """Close a step that has parts, rare phases, open user phases, flags, a group or a device."""
        sequence = self.issued()  # first: Ctrl-C may be raised in it
        self.account_user_phases(t)
        flags = self.flags | self.committed_flags | (_NO_LOADER if self.first_loader is None else 0)
        self.add_part()
        if self.eval_ns:
            self._flush_evals(self.step)

        total = self.committed_ns + t - self.part_start
        self.add_iterators()
        self.note_total(total)
        if self.device is not None and self.device.close(self.step):
            flags |= _DEVICE

        own_ns = self.own + self.committed_own_ns
        self.append_step(
            StepRow(self.times, t, total, self.micro_batches, flags, sequence, own_ns, self.committed_data)
        )
        self._clear(t)
        self.plan_step()
        if self.at_boundary is not None:
            self.cross_boundary()

    def call_at_boundary(self, function: Callable[[], int] | None) -> None:
        """Call a function at the end of each step, on the training thread, or no longer call any.

        Another thread than the training repeats this until the first call: a step that ends meanwhile may miss it.

        Args:
            function: returns the `StepFlag`s of the step that begins.
        """
        self.at_boundary = function
        if function is not None:
            self.slow_commits = self.needs_slow_commit = True
        else:
            self.slow_commits = False

    def cross_boundary(self) -> None:
        """Call the function of `call_at_boundary`: a step has ended, and the next one has begun."""
        function = self.at_boundary
        if function is None:
            return

        with fail_open(_log, "instrument", "a profile is abandoned"):
            self.flags |= function()
            return

        self.call_at_boundary(None)

    @property
    def committed_data(self) -> tuple[int, int]:
        """Elements and samples before the last cut."""
        return self.committed_elements, self.committed_samples

    def note_total(self, total: int) -> None:
        """Update the moving mean of step times, which decides how detailed the next steps are measured."""
        if self.extras:
            self.mean_ns += (total - self.mean_ns) >> 4

    def plan_backward(self) -> None:
        """Decide whether backward passes take the slow path."""

    def plan_step(self) -> None:
        """Decide what the step that begins measures, and which step is the next to need a slow commit."""

    def issued(self) -> int:
        """Return the number of collectives that the process group has issued; 0 without a group of several ranks."""
        return self.sequence() if self.sequence is not None else 0

    def append_step(self, row: StepRow) -> None:
        """Append the row of a step, and the rows of its user phases."""
        n, step, times, flags = self.rows, self.step, row.times, row.flags
        columns = times[:OTHER]
        columns[_USER] = self._append_users(times) if self.users else 0
        own_ns = row.own_ns if flags & _CALLBACK else -1
        if self.committed_fingerprint:
            self._append_fingerprint(step, self.committed_fingerprint)

        if flags & _EPOCH:
            iterator = self.committed_create_ns, self.committed_drain_ns, int(not self.ring.appended)
            self._append_epoch(step, row.end_ns, times[_INPUT_WAIT], *iterator)

        bits = pack_bits(row.micro_batches, flags, row.sequence)
        self._append_step(step, row.end_ns, row.total_ns, *columns, own_ns, *row.data, bits)
        self.rows = n + 1
        if not n & MAINTENANCE_MASK:
            self.listener.maintain(times[_FORWARD], row.micro_batches)

    def use_device(self, device: StepDeviceTimer) -> None:
        """Measure device time too, from the next step."""
        self.device = device
        self.measure_first()

    def join_group(self, sequence: Callable[[], int] | None) -> None:
        """Measure own backward too: a process group has several ranks.

        Args:
            sequence: returns the number of collectives that it has issued; None if it has no counter.
        """
        self.is_grouped, self.sequence = True, sequence
        self.needs_slow_backward = True
        self.measure_first()

    def measure_first(self) -> None:
        """Measure all of the next steps: how long they take is not known yet, and a short run has no others."""
        self.all_measured_to = self.step + _MEASURED_FIRST
        self.needs_slow_commit = True

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

    def _clear(self, t: int) -> None:
        """Begin an empty step at `t`."""
        self.times = self.zeros.copy()
        self.part_start = t
        self.closing_trigger = CHECK_FORWARD
        self.step_call = self.backwards = self.batches = self.flags = self.own = self.samples = self.elements = 0
        self.fingerprint = 0
        self.create_ns = self.drain_ns = 0  # creating iterators, and the ends of others, in this part
        self.batch = self.first_loader = None
        self.trained: Any = None  # a weak reference to a module whose forward was called with gradients
        self.evaluated = False  # a module was called without gradients
        self.evaluating = False  # the previous part was evaluation
        self.fused = False  # an optimizer stepped inside backward
        self.later_step_calls: set[int] = set()  # ids of the optimizers of further step calls
        self._drop_prefix()
        self.needs_slow_commit, self.has_user_phases = self.slow_commits, False
        self.open_slots[_STEP_START], self.open_slots[_STEP] = t, self.step

    def _drop_prefix(self) -> None:
        self.times_at_cut: list[int] | None = None  # the buckets at the cut
        self.loader_at_cut: Any = None  # `first_loader` at the cut
        self.pending = False  # the part before the cut has stepped: it may be a whole step
        self.committed_elements = self.committed_samples = self.committed_fingerprint = 0
        self.cut_ns = self.committed_ns = self.committed_flags = self.committed_own_ns = self.micro_batches = 0
        self.committed_create_ns = self.committed_drain_ns = 0

    def add_part(self) -> None:
        """Add the micro-batches of the part, and their data, to those before it."""
        # After the loader's end, a batch that was fetched before it may be left.
        backwards, batches = self.backwards, self.batches or int(self.first_loader is not None)
        # Several models that train on one batch, as in a GAN, do not make it larger. Nor do several optimizers without
        # a loader, as actor and critics: each has a part, and is taken to train on the same data.
        if batches:
            share = min(batches / backwards, 1) if backwards else 1
            if self.split_size and self.samples:
                share = min(batches * self.split_size / self.samples, 1)

            self.committed_elements += int(self.elements * share)
            self.committed_samples += int(self.samples * share)
        else:
            self.committed_elements = max(self.committed_elements, self.elements)
            self.committed_samples = max(self.committed_samples, self.samples)

        self.micro_batches += min(backwards, batches) if batches else backwards
        if backwards and self.fingerprint:
            self.committed_fingerprint = self.committed_fingerprint or self.fingerprint

        self.fingerprint = 0

    def add_iterators(self) -> None:
        """Add the creation and the end of iterators in the part to those before it."""
        self.committed_create_ns += self.create_ns
        self.committed_drain_ns += self.drain_ns
        self.create_ns = self.drain_ns = 0

    def _flush_evals(self, step: int) -> None:
        self._append_eval(step, self.eval_end, self.eval_ns, self.eval_batches)
        self.eval_ns = self.eval_batches = 0

    def _append_users(self, times: list[int]) -> int:
        total = 0
        for index, name_id in enumerate(self.users):
            at = FIRST_USER + 2 * index
            if at + 1 < len(times) and (times[at] or times[at + 1]):
                self._append_user(self.step, name_id, times[at], times[at + 1])
                total += times[at]

        return total
