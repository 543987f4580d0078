"""A snapshot of a rank of this host that cannot answer: its recorder's thread does not run.

Somebody holds the GIL inside a call into C, or the process is stopped, or stuck in the kernel. Its flight file has
step and phase, /proc the state, and faulthandler the stack, where it is safe to ask.

Process: aggregator and agent.
"""

from __future__ import annotations

import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

from traceml.clock import monotonic_ns
from traceml.database.flight.flight_header import COUNTERS_AT, MAGIC, OPEN_SLOTS_AT, open_phase, own_mapping
from traceml.database.schema import LINE_PHASES, OPEN_SLOTS, PACKED, STEPS, Slot
from traceml.database.snapshots.blocker_snapshot import blocker_of
from traceml.database.snapshots.rank_snapshot import (
    MAX_FRAMES,
    MAX_THREADS,
    FrameSnapshot,
    RankSnapshot,
    ThreadSnapshot,
)
from traceml.inspection.kernel_state import (
    DEAD_STATES,
    UsageRates,
    process_info,
    read_status,
    thread_here,
    wait_state,
    waits_with,
)
from traceml.inspection.stack_signal import SignaledStacks, find_stack_file
from traceml.inspection.stack_text import main_frames, other_frames
from traceml.inspection.user_files import is_debugger, is_user_file
from traceml.trusted_files import opened_trusted

__all__ = ["FIRST_SILENT_S", "ExternalSnapshots", "LiveSlots", "silent_s"]

FIRST_SILENT_S = 3.0
"""Silence after which the first snapshot is made: loading a library holds the GIL for a second or two."""
_VOLATILE = {"at_ns", "quiet_s", "cpu_share", "io_bytes_per_s", "blocker", "is_last"}
# A snapshot that is like the one before is stored again after a quarter of the silence, and every 10 s: where nothing
# else comes from the host of the rank, readers know of no more silence than the newest one tells. While the training
# goes on, its end is told again every 3 s: the rank would count as one without an answer.
_STAMP_S, _STAMP_SHARE = 10.0, 0.25
_AGAIN_S = 10.0  # a thread that computes in C may be in another call by now
_REFUSED_S = 3.0  # where it was not safe to ask, it may be now

_SLOTS = struct.Struct(f"@{OPEN_SLOTS}q")
_COUNT = struct.Struct("@q")
_STEPS_AT = COUNTERS_AT + 64 * PACKED.index(STEPS)
_SLOTS_END = _STEPS_AT + _COUNT.size
_RECENT_NS = 10**9


class ExternalSnapshots:
    """Snapshots of one rank of this host, taken from another process."""

    def __init__(self, rank: int, pid: int, flight: Path) -> None:
        self.rank, self._pid, self._flight = rank, pid, flight
        self.asked_s = 0.0
        """Monotonic time at which the process was asked for its stack last, safely or not; 0 before."""
        self._frames: tuple[FrameSnapshot, ...] = ()
        self._holders: tuple[ThreadSnapshot, ...] = ()
        self._is_waiting_for_gil = self._is_gil_held = False
        self._heartbeat_ns = 0
        self._progress: tuple[int, ...] = ()
        self._moved_ns = 0
        self._asked: tuple[str, int] | None = None
        self._rates = UsageRates(pid)
        self._stored: dict[str, object] = {}
        self._stored_ns = 0

    def slots(self) -> LiveSlots | None:
        """Return what the rank had open when its recorder woke last; None without a readable file."""
        own = own_mapping(self._flight)  # closing a second descriptor of an own file would drop its lock
        if own is not None:
            return _parsed(own[:_SLOTS_END])

        try:
            with opened_trusted(self._flight) as descriptor:
                return _parsed(os.pread(descriptor, _SLOTS_END, 0))
        except OSError:
            return None

    def make(self, *, is_last: bool = False, may_ask: bool = True) -> RankSnapshot | None:
        """Return a snapshot of this moment; it takes up to a second.

        None if its flight file cannot be read, or the process is dead: what it did is in the snapshot before. Also if
        the training goes on, and only the recorder is silent, as in a call of a stalled file system: then the snapshot
        before, if there is one, is ended.

        Args:
            is_last: whether the job is being ended.
            may_ask: whether the process may be asked for its stack, which is what takes the time.
        """
        slots = self.slots()
        if slots is None:
            return None

        quiet_s = silent_s(slots)
        if self._has_moved(slots):
            over = self.end(quiet_s) if self.has_news else None
            self._moved_ns = monotonic_ns()
            return over

        seen, info = wait_state(self._pid), process_info(self._pid)
        if seen.state in DEAD_STATES:
            return None

        frames = self._stack(slots, seen.state, may_ask=may_ask)
        if self._is_waiting_for_gil:
            seen = seen._replace(state="S", wchan="")  # it wakes now and then to ask again

        cpu_share, io_bytes_per_s = self._rates.read()
        snapshot = RankSnapshot(
            at_ns=monotonic_ns(),
            rank=self.rank,
            pid=self._pid,
            quiet_s=self._still_s(quiet_s),
            step=slots.step,
            in_step=slots.in_step,
            phase=slots.phase,
            answered="signal" if frames else "kernel",
            frames=frames,
            line_id=-1 if frames else slots.line_id,
            blocker=blocker_of(self._pid, self._pid),
            cpu_share=cpu_share,
            io_bytes_per_s=io_bytes_per_s,
            is_waiting_for_gil=self._is_waiting_for_gil,
            is_gil_held=self._is_gil_held,
            is_debugged=any(is_debugger(each.file) for each in frames),
            threads=self._holders,
            is_last=is_last,
        )
        return snapshot.with_process(seen, info, [frame for frame in frames if frame.is_user])

    def is_news(self, snapshot: RankSnapshot) -> bool:
        """Return whether a snapshot is to be stored: it differs from the last one stored, or that is long ago."""
        state = {name: value for name, value in snapshot.to_row().items() if name not in _VOLATILE}
        state["busy"] = snapshot.is_busy_itself
        age_s = (snapshot.at_ns - self._stored_ns) / 1e9
        is_stamp = snapshot.ended and "ended" in self._stored and age_s < FIRST_SILENT_S
        if is_stamp or (state == self._stored and age_s < min(_STAMP_S, _STAMP_SHARE * snapshot.quiet_s)):
            return False

        self._stored, self._stored_ns = state, snapshot.at_ns
        return True

    @property
    def has_news(self) -> bool:
        """Whether any snapshot was stored."""
        return bool(self._stored)

    def end(self, quiet_s: float) -> RankSnapshot | None:
        """Return the snapshot that ends a silence of this many seconds, less those in which the training went on."""
        slots = self.slots()
        if slots is None:
            return None

        return RankSnapshot(
            at_ns=monotonic_ns(), rank=self.rank, quiet_s=round(self._still_s(quiet_s), 3), step=slots.step,
            in_step=slots.in_step, phase=slots.phase, answered="kernel", ended=True,
        )  # fmt: skip

    def _still_s(self, quiet_s: float) -> float:
        """Return for how many of these seconds the training thread has not been seen to go on."""
        return min(quiet_s, (monotonic_ns() - self._moved_ns) / 1e9)

    def _has_moved(self, slots: LiveSlots) -> bool:
        """Return whether the training thread has gone on since the last look."""
        before, self._progress = self._progress, slots.progress
        return before not in ((), slots.progress)

    def _stack(self, slots: LiveSlots, state: str, *, may_ask: bool) -> tuple[FrameSnapshot, ...]:
        """Return the main thread's stack; asked for again only when the thread has run since."""
        moment = self._moment(state)
        if moment == self._asked:
            return self._frames

        if slots.heartbeat_ns != self._heartbeat_ns:  # else the GIL is still held in the same call
            self._frames, self._holders = (), ()
            self._is_waiting_for_gil = self._is_gil_held = False

        now_s = time.monotonic()
        if not may_ask or (self._asked is None and now_s - self.asked_s < _REFUSED_S):
            return self._frames

        thread = thread_here(self._pid, slots.recorder_thread) if moment and slots.recorder_thread else None
        if thread is None:
            return self._frames

        file = find_stack_file(self._pid)
        try:
            self.asked_s = now_s
            asked = SignaledStacks(self._pid, file, silent_thread=thread)
            self._take(asked.wait(), thread)
            self._asked = self._moment(state) if asked.was_sent else None
            self._heartbeat_ns, self._is_gil_held = slots.heartbeat_ns, asked.asks_for_gil
        finally:
            if file is not None:
                os.close(file)

        return self._frames

    def _take(self, text: str, thread: int) -> None:
        """Keep the stacks that faulthandler has written, if it has."""
        frames = tuple(_frame(each) for each in main_frames(text)[:MAX_FRAMES])
        if frames:
            self._frames = frames
            self._is_waiting_for_gil = waits_with(self._pid, thread)
            self._holders = tuple(_callers(text)[:MAX_THREADS]) if self._is_waiting_for_gil else ()

    def _moment(self, state: str) -> tuple[str, int] | None:
        """Return what changes when the main thread continues; None while it is stopped, as it cannot answer."""
        if state == "R" or (self._is_waiting_for_gil and state == "S"):
            return "R", int(time.monotonic() / _AGAIN_S)

        return (state, int(read_status(self._pid, "voluntary_ctxt_switches") or 0)) if state in "SD" else None


def silent_s(slots: LiveSlots) -> float:
    """Return for how many seconds a rank's recorder has not run."""
    return round(max(0, monotonic_ns() - slots.heartbeat_ns) / 1e9, 3) if slots.heartbeat_ns else 0.0


def _callers(text: str) -> list[ThreadSnapshot]:
    """Return the threads, other than the main one, that are in a call of the user's code: one of them has the GIL.

    Those that wait for another thread, as for a queue, are left out.
    """
    stacks = [[_frame(each) for each in frames] for frames in other_frames(text)]
    calls = [frames for frames in stacks if frames and not frames[0].file.endswith("/threading.py")]
    lines = (next((frame for frame in frames if frame.is_user), None) for frames in calls)
    return [ThreadSnapshot(line=line, is_daemon=True) for line in lines if line is not None]


def _frame(found: tuple[str, int, str]) -> FrameSnapshot:
    file, line, function = found
    return FrameSnapshot(file=file, line=line, function=function, is_user=is_user_file(file))


@dataclass(frozen=True, slots=True)  # an agent may run where msgspec is not installed
class LiveSlots:
    """Open slots at one moment, and the number of steps that had ended."""

    slots: tuple[int, ...]
    steps: int

    @property
    def heartbeat_ns(self) -> int:
        """Monotonic timestamp of the last time the recorder's thread woke, 0 before the first."""
        return self.slots[Slot.HEARTBEAT]

    @property
    def recorder_thread(self) -> int:
        """The kernel's id of the recorder's thread, 0 before its start."""
        return self.slots[Slot.RECORDER_THREAD]

    @property
    def is_ending(self) -> bool:
        """Whether the process has begun to end."""
        return self.slots[Slot.EXIT_START] > 0

    @property
    def in_step(self) -> bool:
        """Whether a step is open."""
        return self.slots[Slot.STEP_START] > 0

    @property
    def step(self) -> int:
        """The open step, else the last one that ended; -1 before the first."""
        step = self.slots[Slot.STEP]
        return step if self.in_step else max(step, self.steps) - 1

    @property
    def progress(self) -> tuple[int, ...]:
        """Numbers that change whenever the training thread goes on to another phase or step."""
        return self.steps, *self.slots[: Slot.STEP + 1]

    @property
    def phase(self) -> str:
        """The innermost open phase, as in `schema.LINE_PHASES`, or `exit`."""
        return "exit" if self.is_ending else LINE_PHASES[open_phase(self.slots, self.steps > 0)[0]]

    @property
    def line_id(self) -> int:
        """Id in `names` of the user's line that was sampled last; -1 if that was long before the recorder fell silent.

        In the phase that is open any sample shows where it is; one of another phase, where it just was.
        """
        phase, since_ns = open_phase(self.slots, self.steps > 0)
        at_ns = self.slots[Slot.LINE_AT]
        is_of_phase = self.slots[Slot.LINE_PHASE] == phase and at_ns >= since_ns > 0
        return self.slots[Slot.LINE] if at_ns and (is_of_phase or self.heartbeat_ns - at_ns <= _RECENT_NS) else -1


def _parsed(data: bytes) -> LiveSlots | None:
    if len(data) < _SLOTS_END or not data.startswith(MAGIC):
        return None

    return LiveSlots(_SLOTS.unpack_from(data, OPEN_SLOTS_AT), _COUNT.unpack_from(data, _STEPS_AT)[0])
