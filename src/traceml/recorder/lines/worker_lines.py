"""Lines that loader workers run while they make batches.

A worker has a thread that looks at the worker's main thread some ten times a second. It writes how often torch's
fetcher was seen in which line, and how often it did not run, into a pipe of the rank, whose recorder makes rows of
`schema.LINES` of it. The worker opens the pipe by /proc: this works for a forked worker and for one that was started
anew.

A sample is armed, as those of `line_sampler` are, but only for milliseconds: with a short switch interval the worker's
other threads, which hand batches over to the rank, would get the interpreter's lock sooner than without tracing.

Process: `WorkerSampling` runs in the worker, `WorkerLines` in the rank.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from select import PIPE_BUF
from time import sleep
from typing import TYPE_CHECKING

from traceml.clock import monotonic_ns
from traceml.database.schema import LINE_WORKERS, Slot
from traceml.fail_open import fail_open
from traceml.inspection.switch_interval import switch_interval
from traceml.inspection.thread_frames import thread_stack
from traceml.recorder.lines.line_sampler import LONGEST_SWITCH_S, MAX_S, MIN_S
from traceml.recorder.lines.sampled_place import SampledPlace, sampled_place
from traceml.recorder.user_code import UserCode
from traceml.trusted_files import GuardedDescriptor

if TYPE_CHECKING:
    from traceml.database.flight.flight import FlightFile

__all__ = ["WorkerLines", "WorkerSampling"]

_FETCHER = "/torch/utils/data/_utils/fetch.py"
_DENSE, _DENSER = 20, 4  # so many first samples come this many times as often: a worker may live for an epoch only
_BREAK = 10  # more idle samples in a row are not between two batches, but before an epoch, or while nobody asks
_FLUSH_S = 0.25
_ROWS_S = 2.0
_MAX_DEPTH = 200
_MAX_NAMES = 512
_MAX_BYTES = 64 * 1024
_AFTER_EVALUATION_S = 1.5  # for so long a row may be of a worker that evaluates
_IDLE = SampledPlace(None, 0, None)
_FAILED = "the lines of a loader worker are not sampled"
_log = logging.getLogger("traceml")


@dataclass(frozen=True)
class WorkerSampling:
    """Start of the sampling in a worker, to which it is sent."""

    rank_pid: int
    pipe: int  # the rank's descriptor of the pipe's end for writing
    interval_s: float  # usual time between two samples

    def __call__(self) -> None:
        """Sample this process from now on, on a thread of its own."""
        with fail_open(_log, "recorder", _FAILED, once=True), suppress(OSError):  # the rank's /proc is out of reach
            pipe = os.open(f"/proc/{self.rank_pid}/fd/{self.pipe}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            watched = threading.get_ident()
            thread = threading.Thread(target=self._run, args=(pipe, watched), name="traceml-worker-lines", daemon=True)
            thread.start()

    def _run(self, pipe: int, watched: int) -> None:
        with (
            fail_open(_log, "recorder", _FAILED, once=True),
            suppress(OSError),
        ):  # the rank has ended, or closed the pipe
            self._sample(GuardedDescriptor(pipe), watched)

    def _sample(self, pipe: GuardedDescriptor, watched: int) -> None:
        user, counts, due_s = UserCode(), Counter[SampledPlace](), time.monotonic() + _FLUSH_S
        idle, started = 0, False  # samples since it made a batch
        for number in count():
            interval_s = self.interval_s / (_DENSER if number < _DENSE else 1)
            sleep(max(interval_s * (0.5 + _random()) - MAX_S / 2, 0.0))
            switch_interval.shorten(LONGEST_SWITCH_S)
            sleep(MIN_S + (MAX_S - MIN_S) * _random())
            place = _worker_place(watched, user)
            switch_interval.restore()
            if place == _IDLE:
                idle += 1
            else:
                counts += Counter({place: 1, _IDLE: idle if started and idle <= _BREAK else 0})
                started, idle = True, 0

            if time.monotonic() >= due_s:
                pipe.check()
                for message in _messages(counts):
                    with suppress(BlockingIOError):  # a rank that does not read
                        os.write(pipe.number, message)

                counts.clear()
                due_s = time.monotonic() + _FLUSH_S


def _random() -> float:
    return os.urandom(1)[0] / 255


def _worker_place(watched: int, user: UserCode) -> SampledPlace:
    """Return the place of a thread that makes a batch; `_IDLE` if it waits for an order, or hands a batch over."""
    stack = thread_stack(watched, _MAX_DEPTH)  # dropped at once: frames keep the batch alive
    makes_batch = any(each.f_code.co_filename.endswith(_FETCHER) for each in stack)
    return sampled_place(stack, user) if makes_batch else _IDLE


def _messages(counts: Counter[SampledPlace]) -> Iterator[bytes]:
    """Yield lines of JSON, joined up to the size that is written to a pipe as a whole."""
    message = b""
    for place, samples in counts.items():
        line = json.dumps([place.user_name, place.library_name, samples]).encode() + b"\n"
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
        is_evaluating: returns whether an evaluation runs: its workers make no batches of the training.
        interval_s: usual time between two samples of a worker.
    """

    def __init__(self, flight: FlightFile, is_evaluating: Callable[[], bool], interval_s: float) -> None:
        read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.sampling = WorkerSampling(os.getpid(), write, interval_s)
        """What a worker calls to be sampled."""
        self._pipe, self._write_end = GuardedDescriptor(read), GuardedDescriptor(write)
        self._slots, self._lines, self._name_id = flight.open_slots, flight.ring("lines"), flight.names.id_of
        self._is_evaluating, self._evaluated_s = is_evaluating, -_AFTER_EVALUATION_S
        self._rest, self._counts, self._due_s = b"", Counter[tuple[str, str]](), time.monotonic() + _ROWS_S
        self._ids: dict[str, int] = {"": -1}

    def __call__(self, last: bool) -> None:
        """Append rows of what has arrived from time to time; the last time, close the pipe."""
        self._receive()
        now_s = time.monotonic()
        if last or now_s >= self._due_s:
            self._append()
            self._due_s = now_s + _ROWS_S

        if last:
            self._pipe.close()
            self._write_end.close()

    def _receive(self) -> None:
        now_s, data = time.monotonic(), self._read()
        if self._is_evaluating():
            self._evaluated_s = now_s

        *lines, self._rest = (self._rest + data).split(b"\n")
        if not lines or now_s - self._evaluated_s < _AFTER_EVALUATION_S:
            return

        for user, library, samples in map(json.loads, lines):
            self._counts[user, library] += samples

    def _append(self) -> None:
        now_ns, step = monotonic_ns(), self._slots[Slot.STEP]
        for (user, library), samples in self._counts.items():
            self._lines.append(now_ns, step, LINE_WORKERS, self._id(user), self._id(library), samples, 0, 0)

        self._counts.clear()

    def _read(self) -> bytes:
        try:
            self._pipe.check()
            return os.read(self._pipe.number, _MAX_BYTES)
        except OSError:  # nothing has arrived, or the script has closed the pipe
            return b""

    def _id(self, name: str) -> int:
        if name not in self._ids and len(self._ids) < _MAX_NAMES:
            known = self._name_id(name)
            self._ids[name] = -1 if known is None else known

        return self._ids.get(name, -1)
