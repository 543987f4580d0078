"""Lines that loader workers run while they make batches.

A worker has a thread that looks at the worker's main thread some ten times a second. It writes how often torch's
fetcher was seen in which line into a pipe of the rank, whose recorder makes rows of `schema.LINES` of it. The worker
opens the pipe by /proc: this works for a forked worker and for one that was started anew.

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
from select import PIPE_BUF
from time import sleep
from typing import TYPE_CHECKING

from traceml.clock import monotonic_ns
from traceml.database.schema import LINE_WORKERS, Slot
from traceml.fail_open import fail_open
from traceml.inspection.switch_interval import switch_interval
from traceml.inspection.thread_frames import thread_stack
from traceml.recorder.lines.line_sampler import LONGEST_SWITCH_S
from traceml.recorder.lines.sampled_place import SampledPlace, sampled_place
from traceml.recorder.user_code import UserCode
from traceml.trusted_files import GuardedDescriptor

if TYPE_CHECKING:
    from traceml.database.flight.flight import FlightFile

__all__ = ["WorkerLines", "WorkerSampling"]

_FETCHER = "/torch/utils/data/_utils/fetch.py"
_FIRST_FLUSH_S, _FLUSH_S = 0.3, 1.0
_MAX_DEPTH = 200
_MAX_NAMES = 512
_MAX_BYTES = 64 * 1024
_AFTER_EVALUATION_S = 1.5  # for so long a row may be of a worker that evaluates
_log = logging.getLogger("traceml")


@dataclass(frozen=True)
class WorkerSampling:
    """Start of the sampling in a worker, to which it is sent."""

    rank_pid: int
    pipe: int  # the rank's descriptor of the pipe's end for writing
    interval_s: float  # usual time between two samples

    def __call__(self) -> None:
        """Sample this process from now on, on a thread of its own."""
        with fail_open(_log, "recorder", "the lines of a loader worker are not sampled", once=True):
            pipe = os.open(f"/proc/{self.rank_pid}/fd/{self.pipe}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            watched = threading.get_ident()
            thread = threading.Thread(target=self._run, args=(pipe, watched), name="traceml-worker-lines", daemon=True)
            thread.start()

    def _run(self, pipe: int, watched: int) -> None:
        with suppress(OSError):  # the rank has ended, or the script has closed the pipe
            self._sample(GuardedDescriptor(pipe), watched)

    def _sample(self, pipe: GuardedDescriptor, watched: int) -> None:
        switch_interval.shorten(LONGEST_SWITCH_S)  # else samples are only taken where the worker releases the lock
        user, counts, due_s = UserCode(), Counter[SampledPlace](), time.monotonic() + _FIRST_FLUSH_S
        while True:
            sleep(self.interval_s * (0.5 + os.urandom(1)[0] / 255))
            if (place := _fetched_place(watched, user)) is not None:
                counts[place] += 1

            if time.monotonic() >= due_s:
                pipe.check()
                for message in _messages(counts):
                    with suppress(BlockingIOError):  # a rank that does not read
                        os.write(pipe.number, message)

                counts.clear()
                due_s = time.monotonic() + _FLUSH_S


def _fetched_place(watched: int, user: UserCode) -> SampledPlace | None:
    """Return the place of a thread that makes a batch; None if it waits for an order."""
    stack = thread_stack(watched, _MAX_DEPTH)  # dropped at once: frames keep the batch alive
    makes_batch = any(each.f_code.co_filename.endswith(_FETCHER) for each in stack)
    return sampled_place(stack, user) if makes_batch else None


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
        self._rest = b""
        self._ids: dict[str, int] = {"": -1}

    def __call__(self, last: bool) -> None:
        """Append rows of what has arrived; the last time, close the pipe."""
        self._append()
        if last:
            self._pipe.close()
            self._write_end.close()

    def _append(self) -> None:
        now_s, data = time.monotonic(), self._read()
        if self._is_evaluating():
            self._evaluated_s = now_s

        *lines, self._rest = (self._rest + data).split(b"\n")
        if not lines or now_s - self._evaluated_s < _AFTER_EVALUATION_S:
            return

        counts = Counter[tuple[int, int]]()
        for user, library, samples in map(json.loads, lines):
            counts[self._id(user), self._id(library)] += samples

        for (line, library_id), samples in counts.items():
            self._lines.append(monotonic_ns(), self._slots[Slot.STEP], LINE_WORKERS, line, library_id, samples, 0, 0)

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
