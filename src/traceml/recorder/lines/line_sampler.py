"""Samples of the line that the training thread runs, by open phase.

The recorder's thread takes the training thread's frame some 10 times a second; the training thread does nothing. A
thread that wakes from a sleep gets the GIL only when the training thread gives it up by itself. So plain sampling
misses code that keeps the GIL: code that ran 57 % of the time, in blocks of 2 ms, was in 0 % of the samples. Therefore
a sample is *armed*: the switch interval is short while the thread sleeps. Then it gets the GIL within 50 us, on the
line that was running.

It sleeps twice, until the sample is due, and then for a random 2 to 12 ms. Where only the second sleep is armed, it
begins in a place that releases the lock, and is too short to leave blocks of tens of milliseconds (40 % of samples
instead of 60 % of the time, on busy cores). So the interval stays short between samples, unless other threads of the
script compute: these would take the lock from each other at every turn.

A thread that wants the lock wakes once in a switch interval until it gets it. Where the training thread holds the lock
and waits for a core, that is a hundred times or more for a sample, and took up to 4.9 % of a core. So the interval
becomes longer, and samples come less often, while they cost more than `MAX_COST`.

Where one phase was open during the whole second sleep, the training thread's CPU time in it is counted too. It shows
whether the phase computes or waits. While the thread makes a batch, so is that of threads that are not Python's: a
library's pool (tokenizers, Arrow, a video decoder) computes for the thread that waits for it. After the first samples
every other one comes without the second sleep, if the interval was short during the first one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import CodeType, FrameType
from typing import TYPE_CHECKING, NamedTuple

from traceml.clock import monotonic_ns, random_share
from traceml.clock import own_time as time
from traceml.database.flight.flight_header import open_phase
from traceml.database.schema import LINE_OTHER, LINE_OUTSIDE, LINE_STARTUP, LINE_THREADS, Phase, Slot
from traceml.inspection.kernel_state import thread_cpu_ns
from traceml.inspection.process_times import ProcessTimes
from traceml.inspection.switch_interval import (
    LONGEST_S,
    MAX_SLEEP_S,
    MIN_SLEEP_S,
    SHORT_S,
    OtherThreads,
    reduce_timer_slack,
    switch_interval,
)
from traceml.inspection.thread_frames import thread_number, thread_stack
from traceml.inspection.user_files import display_path, is_instrumentation
from traceml.recorder.lines.sampled_place import (
    SampledPlace,
    awaited_place,
    function_name,
    makes_batch,
    sampled_place,
)
from traceml.recorder.user_code import UserCode

if TYPE_CHECKING:
    from traceml.database.flight.flight import FlightFile

__all__ = ["LineSampler"]

PACES = ((60, 5), (240, 2))
"""(number, factor): with fewer samples than the number, samples are taken more often by the factor."""

MAX_COST = 0.004
"""Share of a core above which samples take the lock less eagerly, and come less often: the first ones down to
`_SURE_PACE` times as often as usual, the others down to a `_SURE_PACE`th."""

_SURE_PACE = 3  # else a run of seconds on busy cores would have none
_COST_SAMPLES = 8  # the cost is a mean of this many
_SLEEPS = 2  # each sample has two, and the cost of the second one is known
_MAX_LINES = 512
_MAX_DEPTH = 200
_GRADIENTS = frozenset({"grad", "grads", "gradient", "gradients"})
_INPUT_WAIT = int(Phase.INPUT_WAIT)
_OWN_TABLES = (int(Phase.CHECKPOINT), int(Phase.USER))  # measured as such also during an evaluation


class _ThreadReading(NamedTuple):
    """State of the training thread at a moment."""

    t_ns: int
    cpu_ns: int
    opened: tuple[int, int]
    process: ProcessTimes | None  # while it waits for data


_Key = tuple[int, SampledPlace]
_Counts = dict[_Key, list[int]]


def _move(counts: _Counts, to: _Counts) -> None:
    for key, sums in counts.items():
        known = to.get(key)
        to[key] = sums if known is None else [a + b for a, b in zip(known, sums, strict=True)]


class LineSampler:
    """Counts samples by (open phase, line of the user's code, library function that it has called).

    Args:
        flight: takes the rows of `schema.LINES`, and has the open slots.
        thread: returns the id of the training thread.
        user: recognizes the user's code.
        gives_batches: returns whether a stack (the innermost frame first) runs for an iterator that gives batches, and
            is no DataLoader.
        is_evaluating: returns whether an evaluation runs, whose time is in no step.
        may_be_done: returns whether the open step may be done: a batch that is waited for then may be an evaluation's.
        on_gradients: called with file and function of the user's code that reads gradients outside the phases.
        interval_s: usual time between two samples.
    """

    def __init__(
        self,
        flight: FlightFile,
        thread: Callable[[], int],
        user: UserCode | None = None,
        gives_batches: Callable[[Sequence[FrameType]], bool] | None = None,
        is_evaluating: Callable[[], bool] | None = None,
        may_be_done: Callable[[], bool] | None = None,
        on_gradients: Callable[[str, str], None] | None = None,
        interval_s: float = 0.1,
    ) -> None:
        self.samples = 0
        """Samples so far."""
        self.due_s = time.monotonic()
        """Time of the next sample, by `time.monotonic`."""
        self._interval_s, self._waits_precisely = interval_s, False
        self._startup = 0  # of them before the first step
        self._slots, self._steps, self._lines = flight.open_slots, flight.ring("steps"), flight.ring("lines")
        self._name_id, self._thread = flight.names.id_of, thread
        self._user = user or UserCode()
        self._gives_batches = gives_batches or (lambda _stack: False)
        self._is_evaluating, self._may_be_done = is_evaluating or (lambda: False), may_be_done or (lambda: False)
        self._on_gradients = on_gradients or (lambda _file, _function: None)
        self._others, self._cost_ns = OtherThreads(), 0.0
        self._switch_s, self._judged = SHORT_S, 0  # its interval, and samples since the last look at the cost
        self._native_of = self._native = 0  # training thread, and its id in the system
        self._counts: _Counts = {}
        self._open: _Counts = {}  # since a step has ended: the next one may never do
        self._late: _Counts = {}  # waits for batches in the open step when it may be done
        self._was_late = False  # there were some at the last flush
        self._evals, self._evaluated = flight.ring("evals"), 0  # evaluations that had ended before these
        self._ended, self._seen_ns = 0, 0  # steps that have, and the time of the newest sample before that was seen
        self._newest_ns = 0  # of all samples
        self._ids: dict[_Key, tuple[int, int]] = {}

    @property
    def pace(self) -> int:
        """Factor by which samples come more often: a run of seconds has few of its start-up and of its steps."""
        samples = self.samples - self._startup or self._startup
        return next((pace for below, pace in PACES if samples < below), 1)

    def sample(self, wait: Callable[[float], object]) -> None:
        """Take the sample that is due, on the recorder's thread.

        Args:
            wait: sleeps for this many seconds, or less when the recorder's thread is needed.
        """
        if not self._waits_precisely:
            reduce_timer_slack()
            self._waits_precisely = True

        began_ns, late_s = time.thread_time_ns(), max(0.0, time.monotonic() - self.due_s)
        is_armed = switch_interval.shorten(self._switch_s)
        if not is_armed:
            late_s = 0.0  # it woke where the lock was released: only a whole sleep leads away from there

        is_brief = is_armed and self.pace < PACES[0][1] and self.samples & 1
        try:
            if is_brief:
                self._take_now()
            else:
                self._take(wait, late_s)
        except BaseException:
            switch_interval.restore()
            raise

        self._watch_others()
        if self._others.are_busy:
            switch_interval.restore()

        if not is_brief:  # else the cost of a sleep is not in it
            self._judge(time.thread_time_ns() - began_ns)

        self._schedule()

    def _watch_others(self) -> None:
        """Count the line of the busiest other Python thread, with the CPU time of all of them, in training."""
        busy = self._others.check(self._thread())
        if busy is None or self._opened()[0] in (LINE_OUTSIDE, LINE_STARTUP):
            return

        key = self._place(thread_stack(busy.busiest, _MAX_DEPTH), LINE_THREADS)
        if (counts := self._counts_of(key)) is not None:
            self._newest_ns = monotonic_ns()
            for at, one in enumerate((1, busy.passed_ns, busy.cpu_ns)):
                counts[at] += one

    def _take(self, wait: Callable[[float], object], late_s: float) -> None:
        before = self._reading()
        wait(max(0.0, MIN_SLEEP_S + (MAX_SLEEP_S - MIN_SLEEP_S) * random_share() - late_s))
        stack = thread_stack(self._thread(), _MAX_DEPTH)
        after = self._reading()  # at once: the training thread continues after 50 us
        counts = self._count(stack, after.opened[0], after.t_ns)
        if counts is not None and before.opened == after.opened:
            counts[1] += after.t_ns - before.t_ns
            counts[2] += after.cpu_ns - before.cpu_ns
            if before.process is not None and after.process is not None and makes_batch(stack):
                counts[2] += after.process.of_libraries_since(before.process)

    def _take_now(self) -> None:
        stack = thread_stack(self._thread(), _MAX_DEPTH)
        self._count(stack, self._opened()[0], monotonic_ns())

    def _judge(self, cost_ns: int) -> None:
        self._cost_ns += (_SLEEPS * cost_ns - self._cost_ns) / _COST_SAMPLES
        self._judged += 1
        if self._judged == _COST_SAMPLES:
            self._judged = 0
            self._fit_switch_interval()

    def _schedule(self) -> None:
        # Not from the end of this one: code that holds the lock makes samples late, and would be seen less often.
        due_s, now_s = self.due_s + self._next_s(), time.monotonic()
        self.due_s = due_s if due_s > now_s else now_s + self._next_s()

    def _fit_switch_interval(self) -> None:
        """Take the lock less eagerly if samples at the usual pace cost too much, and eagerly again if they do not."""
        share = self._cost_ns / 1e9 / self._interval_s
        if share > MAX_COST:
            self._switch_s = min(2 * self._switch_s, LONGEST_S)
        elif share < MAX_COST / 4:
            self._switch_s = max(self._switch_s / 2, SHORT_S)

    def _next_s(self) -> float:
        """Return the time from one sample to the next.

        It is random, or samples would follow the period of the steps. On busy cores a sample costs milliseconds, as the
        thread wakes often until the training thread releases the lock; then they come less often.
        """
        pace = self.pace
        most_s = self._interval_s * _SURE_PACE if pace == 1 else self._interval_s / _SURE_PACE
        return max(self._interval_s / pace * (0.5 + random_share()), min(self._cost_ns / 1e9 / MAX_COST, most_s))

    def stop(self) -> None:
        """Take no more samples; those taken stay for `flush`."""
        self.due_s = math.inf
        self.close()

    def close(self) -> None:
        """Restore the switch interval."""
        switch_interval.restore()

    def flush(self) -> None:
        """Append the counts since the last call as rows; those since the end of the last step have a later time.

        It is that of the samples: where none is taken, as at the prompt of an interpreter, this call may come late.
        """
        self._close_ended()
        if self._was_late or self.due_s == math.inf:  # the step may never end
            _move(self._late, self._open)
            self._late.clear()

        self._was_late = bool(self._late)
        for counts, at_ns in ((self._counts, self._seen_ns), (self._open, self._newest_ns)):
            self._append(counts, at_ns)
            counts.clear()

    def _append(self, counts: _Counts, at_ns: int) -> None:
        step = self._slots[Slot.STEP]
        for key, sums in counts.items():
            if (ids := self._ids_of(key)) is not None:
                self._lines.append(at_ns, step, key[0], *ids, *sums)

    def _close_ended(self) -> None:
        """Add the counts of an open step to the others, if it has ended since.

        That the first batch of an evaluation was one is known after it: until then its wait may be the training's.
        """
        has_ended = self._evals.appended != self._evaluated
        if self._late and (has_ended or self._is_evaluating()):
            _move({(LINE_OUTSIDE, place): sums for (_, place), sums in self._late.items()}, self._open)
            self._late.clear()

        if self._steps.appended == self._ended:
            return

        self._ended, self._seen_ns = self._steps.appended, self._newest_ns
        for counts in (self._late, self._open):
            _move(counts, self._counts)
            counts.clear()

    def _ids_of(self, key: _Key) -> tuple[int, int] | None:
        ids = self._ids.get(key)
        if ids is None and len(self._ids) < _MAX_LINES:
            ids = self._ids[key] = self._names_of(key)

        return ids

    def _note(self, key: _Key, at_ns: int) -> None:
        """Leave the line where others find it if this process is killed before the next flush."""
        ids, slots = self._ids_of(key), self._slots
        slots[Slot.LINE_AT] = 0  # so that no reader takes the parts of two samples for one
        slots[Slot.LINE], slots[Slot.LINE_PHASE] = -1 if ids is None else ids[0], key[0]
        slots[Slot.LINE_AT] = at_ns

    def _count(self, stack: Sequence[FrameType], phase: int, at_ns: int) -> list[int] | None:
        """Count a sample; return the counts of its line where they are those of what is open."""
        # Between two phases a hook may run: the line that it interrupted does nothing then.
        if not stack or (phase == LINE_OTHER and is_instrumentation(stack[0].f_code.co_filename)):
            return None

        key = self._key(stack, phase)
        self._note(key, at_ns)
        self._close_ended()
        self._newest_ns = at_ns
        counts = self._counts_of(key)
        if counts is None:
            return None

        counts[0] += 1
        self.samples += 1
        self._startup += key[0] == LINE_STARTUP
        # An iterator of the script is waited for in what is open as code outside the phases.
        return counts if key[0] in (phase, LINE_OUTSIDE, _INPUT_WAIT) else None

    def _counts_of(self, key: _Key) -> list[int] | None:
        """Return the counts of a line in the open step; None if there are too many lines."""
        if not self._late:
            self._evaluated = self._evals.appended

        of_step = self._late if key[0] == _INPUT_WAIT and self._may_be_done() else self._open
        counts = of_step.get(key)
        if counts is None and len(self._counts) + len(self._open) + len(self._late) < _MAX_LINES:
            counts = of_step[key] = [0, 0, 0]

        return counts

    def _reading(self) -> _ThreadReading:
        """Return the time, the training thread's CPU time, and the open phase with the time at which it was opened."""
        opened = self._opened()
        process = ProcessTimes.read() if opened[0] == _INPUT_WAIT else None
        return _ThreadReading(monotonic_ns(), self._cpu_ns(), opened, process)

    def _cpu_ns(self) -> int:
        ident = self._thread()
        if ident != self._native_of:
            self._native_of, self._native = ident, thread_number(ident)

        return thread_cpu_ns(self._native) or 0

    def _key(self, stack: Sequence[FrameType], phase: int) -> _Key:
        if phase not in _OWN_TABLES and self._is_evaluating():
            phase = LINE_OUTSIDE
        elif phase == LINE_OTHER and self._gives_batches(stack):
            phase = _INPUT_WAIT

        return self._place(stack, phase)

    def _place(self, stack: Sequence[FrameType], phase: int) -> _Key:
        return phase, awaited_place(stack, self._user) or sampled_place(stack, self._user)

    def _opened(self) -> tuple[int, int]:
        return open_phase(self._slots, self._steps.appended > 0)

    def _names_of(self, key: _Key) -> tuple[int, int]:
        phase, found = key
        if phase == LINE_OTHER and found.code is not None and _reads_gradients(found.code):
            self._on_gradients(display_path(found.code.co_filename), function_name(found.code))

        return self._id(found.user_name), self._id(found.library_name)

    def _id(self, name: str) -> int:
        known = self._name_id(name) if name else None
        return -1 if known is None else known


def _reads_gradients(code: CodeType) -> bool:
    """Return whether a function has gradients by an attribute or a variable: `p.grad`, `grads`."""
    return not _GRADIENTS.isdisjoint((*code.co_names, *code.co_varnames))
