"""Watch for the time without progress: then the rank takes a snapshot of itself once a second.

A snapshot is sent when it differs from the last one, else every 10 s. Training does nothing for it. A rank whose steps
are long has long pauses: the next snapshot comes only after a pause that is longer than those before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from traceml.clock import monotonic_ns
from traceml.database.schema import Slot
from traceml.database.snapshots.snapshot_timing import first_snapshot_s
from traceml.fail_open import fail_open

if TYPE_CHECKING:
    from traceml.database.flight.flight import FlightFile
    from traceml.database.snapshots.rank_snapshot import RankSnapshot
    from traceml.recorder.no_progress.progress_counters import ProgressCounters
    from traceml.recorder.no_progress.snapshot_maker import SnapshotMaker

__all__ = ["ProgressWatch"]

_EVERY_S, _STAMP_S = 1.0, 10.0
_LAST_SNAPSHOT_S = 5.0
_VOLATILE = {"at_ns", "quiet_s", "cpu_share", "thread_share", "io_bytes_per_s", "blocker", "threads", "is_last"}
_OF_PLACE = ("frames", "process_state", "wchan", "waits_on")

_log = logging.getLogger("traceml")


class ProgressWatch:
    """Called in each cycle of the recorder's thread.

    Args:
        flight: takes the snapshots, as rows of `info`.
        progress: returns whether there was any.
        maker: makes a snapshot; called for the first one.
        hang_timeout_s: a pause of this length is a hang; a snapshot comes before its half at the latest.
    """

    def __init__(
        self,
        flight: FlightFile,
        progress: ProgressCounters,
        maker: Callable[[], SnapshotMaker],
        hang_timeout_s: float,
    ) -> None:
        self.is_quiet = False
        """Whether snapshots of the rank are taken now."""
        self.ns = 0
        """CPU and waiting time of all snapshots so far."""
        self._slots = flight.open_slots
        self._info, self._steps = flight.log("info"), flight.ring("steps")
        self._progress, self._make_maker = progress, maker
        self._maker: SnapshotMaker | None = None
        self._timeout_s = hang_timeout_s
        self._longest_s = 0.0
        self._moved_ns = monotonic_ns()
        self._taken_ns = self._sent_ns = 0
        self._sent: dict[str, object] = {}

    def __call__(self, last: bool) -> None:
        """Record progress, or take a snapshot."""
        now = monotonic_ns()
        if last or self._progress.moved():
            self._resume(now)
        elif now - self._moved_ns >= self._first_s * 1e9 and now - self._taken_ns >= _EVERY_S * 1e9:
            self._taken_ns = now
            self._snapshot(now)

    @property
    def quiet_s(self) -> float:
        """Seconds since the last progress that was noticed."""
        return (monotonic_ns() - self._moved_ns) / 1e9

    def snapshot_now(self, *, is_last: bool = False) -> RankSnapshot:
        """Return a snapshot of this moment, on the recorder's thread.

        Args:
            is_last: whether the job is being ended: then it is stored too, if there was no progress for 5 s. What its
                end has moved since the thread's last cycle is progress: the snapshot before shows how it hung.
        """
        if is_last and self._progress.moved():
            self._resume(monotonic_ns())

        snapshot = self._make(is_last=is_last)
        if is_last and snapshot.quiet_s >= _LAST_SNAPSHOT_S:
            self._send(snapshot, monotonic_ns())

        return snapshot

    def leave_out_output(self) -> None:
        """Take what threads other than the training's have written up to now for no work: it was a notice of ours."""
        self._progress.output.forget()

    @property
    def _first_s(self) -> float:
        if self._slots[Slot.EXIT_START]:  # an exit takes a while on a busy host, and replaces what was seen before it
            return self._timeout_s

        return first_snapshot_s(self._longest_s, self._timeout_s)

    def _snapshots(self) -> SnapshotMaker:
        if self._maker is None:
            self._maker = self._make_maker()

        return self._maker

    def _make(self, *, is_last: bool = False) -> RankSnapshot:
        return self._snapshots().make(self.quiet_s, has_output=self._progress.output.is_some, is_last=is_last)

    def _resume(self, now: int) -> None:
        is_over, self.is_quiet = self.is_quiet, False
        # A process that ends proves no progress: it may have been interrupted in the middle of a hang.
        if is_over and not self._slots[Slot.EXIT_START]:
            with fail_open(_log, "recorder", "the end of a pause is not reported", once=True):
                snapshot = self._snapshots().end(self.quiet_s)
                self._info.append(snapshot.to_info())

        if self._steps.appended:  # the start-up has pauses of its own
            self._longest_s = max(self._longest_s, (now - self._moved_ns) / 1e9)

        self._moved_ns, self._sent = now, {}

    def _snapshot(self, now: int) -> None:
        self.is_quiet = True
        snapshot = self._make()
        state = {name: value for name, value in snapshot.to_row().items() if name not in _VOLATILE}
        state["busy"] = snapshot.is_busy_itself
        if snapshot.is_busy_itself:  # in library code it is elsewhere each time
            for name in _OF_PLACE:
                state.pop(name, None)

        if state != self._sent or now - self._sent_ns >= _STAMP_S * 1e9:
            self._sent = state
            self._send(snapshot, now)

        self.ns += monotonic_ns() - now

    def _send(self, snapshot: RankSnapshot, now: int) -> None:
        self._sent_ns = now
        if self._info.unstored_bytes < self._info.capacity_bytes // 2:  # facts of the training have priority
            self._info.append(snapshot.to_info())
