"""Lines that loader workers run while they make batches.

A worker has a thread that looks at the worker's main thread some ten times a second. It writes how often torch's
fetcher was seen in which line, and how often it did not run, into a pipe of the rank, whose recorder makes rows of
`schema.LINES` of it. The worker opens the pipe by /proc: this works for a forked worker and for one that was started
anew.

Between two samples of the fetcher it also counts for how long its thread ran or waited for a core: a worker may live
for an epoch of a second, in which `samplers.worker_sampler` does not see it twice.

A sample is armed, as those of `line_sampler` are, but only for milliseconds: with a short switch interval the worker's
other threads, which hand batches over to the rank, would get the GIL sooner than without tracing.

Process: `WorkerSampling` runs in the worker, `WorkerLines` in the rank.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from select import PIPE_BUF
from typing import TYPE_CHECKING, NamedTuple, Self, TypeVar

from traceml.clock import monotonic_ns, random_share
from traceml.clock import own_time as time
from traceml.database.info_kinds import InfoKind, InfoSender
from traceml.database.schema import LINE_WORKERS, Slot
from traceml.fail_open import fail_open
from traceml.inspection.kernel_state import core_wait_ns, thread_cpu_ns
from traceml.inspection.switch_interval import LONGEST_S, MAX_SLEEP_S, MIN_SLEEP_S, switch_interval
from traceml.inspection.thread_frames import thread_stack
from traceml.process_ends import start_without_signals
from traceml.recorder.lines.sampled_place import SampledPlace, makes_batch, sampled_place
from traceml.recorder.user_code import UserCode
from traceml.trusted_files import GuardedDescriptor

if TYPE_CHECKING:
    from traceml.database.flight.flight import FlightFile
    from traceml.instrument.workers.loader_workers import WorkersOfLoader

__all__ = ["WorkerLines", "WorkerSampling"]

_DENSE, _DENSER = 20, 4  # so many first samples come this many times as often: a worker may live for an epoch only
_MAX_IDLE = 20  # samples without a batch in a row that count: others are between two epochs
_FLUSH_S = 0.25
_ROWS_S = 5.0
_NOTE_AGAIN = 2  # how often workers made batches is noted when it is so many times as often
_MAX_DEPTH = 200
_MAX_NAMES = 512
_MAX_PIDS = 4096  # of workers of earlier epochs, too: their last samples may arrive after their end
_MAX_BYTES = 64 * 1024
_UNREAD = 40  # full pipes in a row, in some 10 s, after which the rank has stopped to record
_IDLE = SampledPlace(None, 0, None)
_Sums = tuple[int, int, int]  # samples, time watched, time on a core or ready for one, in nanoseconds
_Key = TypeVar("_Key")
_log = logging.getLogger("traceml")


@dataclass(frozen=True)
class WorkerSampling:
    """Start of the sampling in a worker, to which it is sent."""

    rank_pid: int
    number: int  # the rank's descriptor of the pipe's end for writing
    pipe: tuple[int, int]  # device and inode of the pipe: the number may be that of a file of the script by now
    interval_s: float  # usual time between two samples

    def __call__(self) -> None:
        """Sample this process from now on, on a thread of its own."""
        with _quiet():
            name = f"/proc/{self.rank_pid}/fd/{self.number}"
            pipe = GuardedDescriptor(os.open(name, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
            run = functools.partial(self._run, pipe, threading.get_ident(), threading.get_native_id())
            try:
                start_without_signals(threading.Thread(target=run, name="traceml-worker-lines", daemon=True))
            except OSError:  # no more threads are allowed
                pipe.close()
                raise

    def _run(self, pipe: GuardedDescriptor, watched: int, native_id: int) -> None:
        with _quiet(), closing(pipe):
            if pipe.file == self.pipe:
                self._sample(pipe, watched, native_id)

    def _sample(self, pipe: GuardedDescriptor, watched: int, native_id: int) -> None:
        user, counts, due_s = UserCode(), dict[SampledPlace, _Sums](), time.monotonic() + _FLUSH_S
        idle, started, unread = 0, False, 0  # idle: samples since it made a batch
        seen = _ThreadTimes.of(native_id)
        for number in count():
            interval_s = self.interval_s / (_DENSER if number < _DENSE else 1)
            time.sleep(max(interval_s * (0.5 + random_share()) - MAX_SLEEP_S / 2, 0.0))
            place, before, seen = _armed_place(watched, user), seen, _ThreadTimes.of(native_id)
            if place == _IDLE:
                idle += 1
            else:
                makes_on = started and not idle  # no order was awaited since the sample before
                _add(counts, place, (1, *(seen.since(before) if makes_on else (0, 0))))
                _add(counts, _IDLE, (min(idle, _MAX_IDLE) if started else 0, 0, 0))
                started, idle = True, 0

            if time.monotonic() >= due_s:
                unread = 0 if _sent(pipe, counts) else unread + 1
                if unread >= _UNREAD:
                    return

                counts.clear()
                due_s = time.monotonic() + _FLUSH_S


class _ThreadTimes(NamedTuple):
    """The clock, and the time for which the watched thread has run or waited for a core."""

    now_ns: int
    ready_ns: int

    @classmethod
    def of(cls, thread: int) -> Self:
        """Read both.

        Args:
            thread: the thread's native id.
        """
        return cls(monotonic_ns(), (thread_cpu_ns(thread) or 0) + core_wait_ns(f"{os.getpid()}/task/{thread}"))

    def since(self, before: Self) -> tuple[int, int]:
        """Return how long ago an earlier reading was, and how long the thread was ready since then."""
        passed_ns = self.now_ns - before.now_ns
        return passed_ns, min(max(self.ready_ns - before.ready_ns, 0), passed_ns)


def _add(counts: dict[_Key, _Sums], key: _Key, sums: _Sums) -> None:
    if any(sums):
        samples, watched_ns, ready_ns = counts.get(key, (0, 0, 0))
        counts[key] = samples + sums[0], watched_ns + sums[1], ready_ns + sums[2]


def _quiet() -> fail_open:
    """Return what handles any error at debug level: each worker of each epoch would warn of it."""
    return fail_open(_log, "recorder", "the lines of a loader worker are not sampled", level=logging.DEBUG)


def _armed_place(watched: int, user: UserCode) -> SampledPlace:
    try:
        switch_interval.shorten(LONGEST_S)
        time.sleep(MIN_SLEEP_S + (MAX_SLEEP_S - MIN_SLEEP_S) * random_share())
        return _worker_place(watched, user)
    finally:
        switch_interval.restore()


def _sent(pipe: GuardedDescriptor, counts: Mapping[SampledPlace, _Sums]) -> bool:
    """Write the counts; return False if the pipe is full, as the rank does not read."""
    pipe.check()
    for message in _messages(counts):
        try:
            os.write(pipe.number, message)
        except BlockingIOError:
            return False

    return True


def _worker_place(watched: int, user: UserCode) -> SampledPlace:
    """Return the place of a thread that makes a batch; `_IDLE` if it waits for an order, or hands a batch over."""
    stack = thread_stack(watched, _MAX_DEPTH)  # dropped at once: frames keep the batch alive
    return sampled_place(stack, user) if makes_batch(stack) else _IDLE


def _messages(counts: Mapping[SampledPlace, _Sums]) -> Iterator[bytes]:
    """Yield lines of JSON, joined up to the size that is written to a pipe as a whole."""
    message = b""
    for place, sums in counts.items():
        line = json.dumps([os.getpid(), place.user_name, place.library_name, *sums]).encode() + b"\n"
        if message and len(message) + len(line) > PIPE_BUF:
            yield message
            message = b""

        if len(line) <= PIPE_BUF:
            message += line

    if message:
        yield message


class WorkerLines:
    """Makes rows of what workers have sampled. Called in each cycle of the recorder's thread.

    Args:
        flight: takes the rows, and has the open step.
        workers: returns the workers of the loaders that are read.
        interval_s: usual time between two samples of a worker.
        note: appends a row to `info`: how often each worker made a batch.
    """

    def __init__(
        self,
        flight: FlightFile,
        workers: Callable[[], Iterable[WorkersOfLoader]],
        interval_s: float,
        note: InfoSender,
    ) -> None:
        read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._pipe, self._write_end = GuardedDescriptor(read), GuardedDescriptor(write)
        self.sampling = WorkerSampling(os.getpid(), write, self._write_end.file, interval_s)
        """What a worker calls to be sampled."""
        self._slots, self._lines, self._name_id = flight.open_slots, flight.ring("lines"), flight.names.id_of
        self._workers, self._note = workers, note
        self._places = dict[int, tuple[int, int]]()  # process id -> number of its loader, and its own in there
        self._made: dict[int, list[int]] = {}  # loader -> samples by worker
        self._noted: dict[int, int] = {}  # loader -> sum of those at the last note
        self._rest, self._counts, self._due_s = b"", dict[tuple[int, str, str], _Sums](), time.monotonic() + _ROWS_S
        self._ids: dict[str, int | None] = {"": -1}

    def __call__(self, last: bool) -> None:
        """Append rows of what has arrived from time to time; the last time, close the pipe."""
        self._receive()
        now_s = time.monotonic()
        if last or now_s >= self._due_s:
            self._append()
            self._note_made(1 if last else _NOTE_AGAIN)
            self._due_s = now_s + _ROWS_S

        if last:
            self.close()

    def close(self) -> None:
        """Close the pipe: workers end their sampling."""
        self._pipe.close()
        self._write_end.close()

    def _receive(self) -> None:
        known = self._places if len(self._places) < _MAX_PIDS else {}
        self._places = known | {
            pid: (group.loader, number) for group in self._workers() for number, pid in enumerate(group.pids)
        }
        if not self._places:  # most runs have no workers at first, or none at all
            return

        *lines, self._rest = (self._rest + self._read()).split(b"\n")
        for pid, user, library, *sums in map(json.loads, lines):
            if pid in self._places:
                loader, number = self._places[pid]
                _add(self._counts, (loader, user, library), tuple(sums))
                made = self._made.setdefault(loader, [])
                made += [0] * (number + 1 - len(made))
                made[number] += sums[0] if user or library else 0

    def _append(self) -> None:
        now_ns, step = monotonic_ns(), self._slots[Slot.STEP]
        for (loader, user, library), sums in self._counts.items():
            line, called = self._id(user), self._id(library)
            if line is not None and called is not None:
                self._lines.append(now_ns, step, LINE_WORKERS - loader, line, called, *sums)

        self._counts.clear()

    def _note_made(self, factor: int) -> None:
        """Note how often each worker made a batch, if that is more than `factor` times as often as at the last note."""
        for loader, made in self._made.items():
            if sum(made) > factor * self._noted.get(loader, 0):
                self._note(InfoKind.WORKER_SAMPLES, number=loader, samples=made.copy())
                self._noted[loader] = sum(made)

    def _read(self) -> bytes:
        try:
            self._pipe.check()
            return os.read(self._pipe.number, _MAX_BYTES)
        except OSError:  # nothing has arrived, or the script has closed the pipe
            return b""

    def _id(self, name: str) -> int | None:
        if name not in self._ids and len(self._ids) < _MAX_NAMES:
            self._ids[name] = self._name_id(name)

        return self._ids.get(name)
