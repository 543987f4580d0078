"""Thread of the recorder: twice a second or more often it samples, sends, and sleeps again."""

from __future__ import annotations

import logging
import sys
import threading
from _thread import allocate_lock
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from traceml.clock import monotonic_ns
from traceml.clock import own_time as time
from traceml.database.flight.flight import FlightFile
from traceml.database.info_kinds import InfoSender
from traceml.database.schema import Slot
from traceml.fail_open import fail_open
from traceml.fork_gate import fork_gate
from traceml.process_ends import start_without_signals
from traceml.recorder.lines.line_sampler import LineSampler
from traceml.recorder.sending.row_sender import RowSender
from traceml.recorder.sending.uploads import FileUploader
from traceml.recorder.stop_detector import StopDetector
from traceml.samplers.base import SamplerScheduler

__all__ = ["DIALING_S", "RecorderThread", "WakeSignal"]

_log = logging.getLogger("traceml")

_WAKE_S, _ATTENTIVE_S = 0.5, 0.1
_SHORTEST_S = 0.01
_TELEMETRY_NS = 5 * 10**9
_FIRST_TELEMETRY_NS = 10**9
_LARGE_BYTES = 1 << 20
_RELEASE_ROWS = 8192
DIALING_S = 30.0  # more than the start of an aggregator has
_FILES_TIMEOUT_S = 60.0  # an artifact of gigabytes is worth waiting for


class WakeSignal:
    """Like `threading.Event` for one sleeping thread, whose sleep takes 20 us of CPU time less.

    Only that thread calls `wait` and `clear`. A signal handler may call `set`, as it takes no lock that is held.
    """

    def __init__(self) -> None:
        self._is_set = False
        self._sleep = allocate_lock()
        self._sleep.acquire()

    def set(self) -> None:
        """Wake the thread, or end its next sleep at once."""
        self._is_set = True
        with suppress(RuntimeError):  # it is awake already
            self._sleep.release()

    def clear(self) -> None:
        """Let the next sleep last; for what was asked before, a cycle follows."""
        self._is_set = False
        self._sleep.acquire(blocking=False)

    def wait(self, seconds: float) -> bool:
        """Sleep for at most this many seconds; return whether the signal is set."""
        if not self._is_set:
            self._sleep.acquire(timeout=seconds)

        return self._is_set


class RecorderThread:
    """Thread that runs samplers and the sender, in cycles of microseconds; the training never waits for it.

    Args:
        hook_ns: returns the measured cost of the hooks per step.
    """

    def __init__(
        self,
        flight: FlightFile,
        sender: RowSender,
        scheduler: SamplerScheduler,
        hook_ns: Callable[[], int] = lambda: 0,
        *,
        files: FileUploader | None = None,
    ) -> None:
        self.errors = 0
        """Cycles that failed."""
        self.cpu_ns = 0
        """CPU time of the thread so far."""
        self.scheduler = scheduler
        """Runs the samplers."""
        self.is_attentive = False
        """Whether it wakes often, as commands have to be answered at once."""
        self._sender, self._hook_ns, self._files = sender, hook_ns, files
        self._delayed: list[tuple[int, Callable[[], None]]] = []
        self._every_cycle: list[Callable[[bool], None]] = []
        self._stops: StopDetector | None = None
        self._lines: LineSampler | None = None
        self._flight, self._slots = flight, flight.open_slots
        self._telemetry = flight.ring("telemetry")
        # Rings of megabytes: their stored rows need not stay resident in the user's process.
        self._large = [ring for ring in flight.rings.values() if ring.capacity * ring.row_bytes > _LARGE_BYTES]
        self._kept = flight.journaled
        self._released = dict.fromkeys(flight.rings, 0)
        self._telemetry_ns = monotonic_ns() + _FIRST_TELEMETRY_NS
        self._calls: deque[Callable[[], None]] = deque()
        self._wake = WakeSignal()
        self._end: Callable[[], bool] | None = None
        self._stored = False
        self._grace_s, self._keep_trying = 0.0, False
        # A daemon: the interpreter waits for other threads before it runs atexit handlers, and ours ends this one.
        self._thread = threading.Thread(target=self._run, name="traceml-recorder", daemon=True)

    def start(self) -> None:
        """Start the thread. From here on others see when it does not run, even if it never had the GIL."""
        start_without_signals(self._thread)
        self._slots[Slot.RECORDER_THREAD] = self._thread.native_id or 0
        self._flight.beat(monotonic_ns())

    def use(self, scheduler: SamplerScheduler) -> None:
        """Replace the scheduler; before the start, or on the thread."""
        self.scheduler = scheduler

    def sample_lines(self, lines: LineSampler) -> None:
        """Sample the line of the training thread between cycles; before the start, or on the thread."""
        self._lines = lines

    def stop_lines(self) -> None:
        """Sample no more lines: the training thread runs the user's code no longer."""
        self.call(lambda: self._lines.stop() if self._lines is not None else None)

    def detect_stops(self, note: InfoSender) -> None:
        """Note when the process was stopped; before the start."""
        self._stops = StopDetector(self._slots, note)

    def call(self, function: Callable[[], None]) -> None:
        """Run `function` on the thread, in its next cycle."""
        self._calls.append(function)
        self._wake.set()

    def call_later(self, delay_s: float, function: Callable[[], None]) -> None:
        """Run `function` on the thread after this many seconds, unless it has ended by then."""
        self._delayed.append((monotonic_ns() + int(delay_s * 1e9), function))

    def every_cycle(self, function: Callable[[bool], None]) -> None:
        """Call `function` in each cycle, with True in the last; a second registration changes nothing."""
        if function not in self._every_cycle:
            self._every_cycle.append(function)

    def wake(self) -> None:
        """Start a cycle now."""
        self._wake.set()

    def finish(self, reason: str, *, timeout_s: float, keep_trying: bool) -> bool:
        """Take a last sample, send everything, say bye; return whether everything is stored.

        Args:
            timeout_s: time for all of it; an aggregator that starts meanwhile has more.
            keep_trying: whether to continue for that long when no aggregator answers.
        """
        self._grace_s, self._keep_trying = timeout_s, keep_trying
        self._end = lambda: self._sender.finish(reason, timeout_s=timeout_s, keep_trying=self._keep_trying)
        self._wake.set()
        is_busy = self._files is not None and self._files.pending
        limit_s = timeout_s + 0.5 + (_FILES_TIMEOUT_S if is_busy else 0.0)
        self._thread.join(limit_s)
        if keep_trying and not self._sender.dialed.is_set():  # an aggregator starts slowly, as on a busy host
            self._sender.dialed.wait(DIALING_S)
            self._thread.join(limit_s)

        if self._thread.is_alive():
            left = "stay in its flight file" if self._flight.path else "are lost, as there is no flight file"
            _log.warning("the recorder did not end within %.1f s; its last rows %s", timeout_s, left)

        return self._stored

    def _run(self) -> None:
        # Tools of the script (`python -m trace`, coverage, profilers) follow each new thread. This one would be slow,
        # in their results, and change these while they are written at the end.
        sys.settrace(None)
        sys.setprofile(None)
        while self._end is None:
            self._wake.clear()
            self._guarded(self._cycle)
            if self._end is None:
                self._pause(self._pause_s())

        self._guarded(self._last_cycle)

    def _pause(self, pause_s: float) -> None:
        """Sleep until the next cycle, and sample lines meanwhile."""
        end_s = time.monotonic() + pause_s
        while self._lines is not None and self._lines.due_s < end_s:
            if self._sleep(max(0.0, self._lines.due_s - time.monotonic())):
                return

            self._sample_line(self._lines)

        self._sleep(max(0.0, end_s - time.monotonic()))

    def _sleep(self, seconds: float) -> bool:
        """Sleep until a cycle is due now; return whether it is."""
        began_ns = monotonic_ns()
        is_due = self._wake.wait(seconds)
        if self._stops is not None:
            self._stops.slept(seconds, began_ns)

        return is_due

    def _sample_line(self, lines: LineSampler) -> None:
        with fail_open(_log, "recorder", "lines are no longer sampled"):
            lines.sample(self._sleep)
            return

        self._lines = None

    def _cycle(self) -> None:
        now = monotonic_ns()
        self._flight.beat(now)
        if self._stops is not None:
            self._stops.poll()

        while self._calls:
            self._calls.popleft()()

        for due in [each for each in self._delayed if each[0] <= now]:
            self._delayed.remove(due)
            due[1]()

        self.scheduler.run_due(self._slots[Slot.STEP])
        if now >= self._telemetry_ns:
            self._telemetry_ns = now + _TELEMETRY_NS
            self._append_telemetry(now)

        self._call_hooks(last=False)
        self._sender.pump()
        if self._files is not None:
            self._files.poll()

        for table in self._kept:
            table.trim()

        for ring in self._large:
            done = ring.acked
            if done - self._released[ring.name] >= _RELEASE_ROWS:
                ring.release(max(self._released[ring.name], done - ring.capacity), done)
                self._released[ring.name] = done

    def _last_cycle(self) -> None:
        if self._lines is not None:
            self._lines.close()

        self.scheduler.run_all(self._slots[Slot.STEP])
        self._call_hooks(last=True)
        if self._files is not None:
            self._await_files(self._files)

        self._sender.pump(flush=True)  # so that the last telemetry row counts nearly all bytes
        self._append_telemetry(monotonic_ns())
        self.scheduler.close()
        if self._stops is not None:
            self._stops.close()

        if self._end is not None:
            self._stored = self._end()

        self.cpu_ns = time.thread_time_ns()

    def _call_hooks(self, *, last: bool) -> None:
        for function in self._every_cycle:
            with fail_open(_log, "recorder", "a hook of the recorder's thread failed", once=True):
                function(last)

    def _await_files(self, files: FileUploader) -> None:
        """Wait for files that are being copied, while they make progress: their rows come after them."""

        def advance() -> bool:
            self._sender.pump(flush=True)
            files.poll()
            return bool(files.copying) or self._sender.connected or self._keep_trying

        if files.wait(advance, timeout_s=_FILES_TIMEOUT_S, stuck_s=self._grace_s) == "stuck":
            _log.warning("%d logged files have not arrived; they stay next to the journal", files.pending)
            self._keep_trying = False  # it was tried for that long just now

        files.leave()

    def _append_telemetry(self, now: int) -> None:
        sender, scheduler = self._sender, self.scheduler
        if self._lines is not None:
            self._lines.flush()

        self.cpu_ns = time.thread_time_ns()
        self._telemetry.append(
            now,
            sender.rows_appended,
            sender.rows_lost,
            sender.bytes_sent,
            self.cpu_ns,
            self._hook_ns(),
            scheduler.total_ns,
            scheduler.errors,
            max(sender.connections - 1, 0),
        )

    def _pause_s(self) -> float:
        until_sample_s = (self.scheduler.due_ns - monotonic_ns()) / 1e9
        return max(
            _SHORTEST_S, min(self._sender.pause_s(_ATTENTIVE_S if self.is_attentive else _WAKE_S), until_sample_s)
        )

    def _guarded(self, cycle: Callable[[], None]) -> None:
        level = logging.DEBUG if self.errors else logging.WARNING
        with (
            fail_open(_log, "recorder", "a cycle of the recorder's thread failed, and it continues", level=level),
            fork_gate,
        ):
            cycle()
            return

        self.errors += 1
