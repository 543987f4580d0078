"""A run that ranks send to: reports of exits, commits, maintenance, and its end."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from traceml.aggregator.recovery import DeadFlight, appended_rows, dead_flights, recover
from traceml.aggregator.streams.run_streams import RunStreams
from traceml.aggregator.streams.stream import Incarnation, RankStream, StreamState
from traceml.aggregator.streams.stream_ends import final_state, note_exit, note_flight, note_host_lost, state_of_dead
from traceml.clock import boot_id
from traceml.database.flight.postmortem import FlightSnapshot
from traceml.database.states import RunStatus
from traceml.diagnosis.facts.ends import END, ending_signal_of
from traceml.diagnosis.findings import Finding
from traceml.errors import StoreError
from traceml.fail_open import fail_open, failures
from traceml.run_folder import COPIES_FOLDER, RUN_FOLDERS, STORE_NAME
from traceml.transport.exit_report import ExitReport
from traceml.transport.hello import WORLD_LIMIT
from traceml.transport.server import Peer

__all__ = ["ActiveRun"]

# A rank on another host, or one whose process is not visible here, counts as lost after this long without a connection.
LOST_AFTER_S = 30.0
# After all ranks have ended, another process of the job may still join, as a spawned one does.
JOIN_GRACE_S = 0.1
# torchrun starts its workers again within seconds, but they import torch first.
RESTART_S = 120.0
# For a run without connections whose missing ranks never came.
ABANDONED_S = 60.0
# Likewise when the launcher was killed that should have started them: they end with it.
ORPHANED_S = 5.0
# The launcher reports the end of the run; this is the longest wait for it.
LAUNCHER_WAIT_S = 3600.0
# Of each process, steps and samples of about half an hour stay complete, however many ranks there are.
MIN_RETAINED_BYTES = 500_000

_log = logging.getLogger("traceml")


class ActiveRun(RunStreams):
    """One run, open or ended.

    Args:
        named: whether the user chose its id: then a job that comes again under this id is its next attempt.
    """

    def __init__(self, path: Path, key: str, *, named: bool, retention_gb: float | None = None) -> None:
        self._failures_before = Counter(failures())
        super().__init__(path, key, named=named)
        self._retention_gb = retention_gb
        self._recovered: list[FlightSnapshot] = []
        self._leaving: list[Peer] = []
        self._unmatched_exits: list[ExitReport] = []
        self.final_findings: list[Finding] = []
        """Findings at the end of the run, if they were wanted."""

    def __repr__(self) -> str:
        return f"<run {self.id}: {self.state}, {len(self.streams)} streams>"

    @property
    def recovered(self) -> set[Path]:
        """Flight files whose rows are recovered, but not stored yet."""
        return {image.path for image in self._recovered}

    def recover_flights(self) -> None:
        """Recover the rows of ranks of this run that were never connected here."""
        copies = self.path / COPIES_FOLDER
        for flight in dead_flights(self.key, self.path.parent, copies=copies, but=self.recovered):
            if flight.may_be_of(self.id):
                self.recover_flight(flight)

    def recover_flight(self, flight: DeadFlight) -> None:
        """Add the rows of a rank that died before it could connect, or that left only its flight file."""
        stream = self.stream_of(flight.incarnation, flight.rank)
        if stream is None:
            if not self.streams:
                self._facts.values |= {"name": flight.name, "project": flight.project}
                self._resize(flight.world_size)

            self._facts.begin_at(flight.began_s)
            self._facts.write(self.store)

            attempt = self._facts.attempt_of(flight.attempt, flight.incarnation.host)
            is_helper = flight.is_helper or self._is_no_rank(flight, attempt)
            while not is_helper and self._table.of_rank(attempt, flight.rank) is not None:
                attempt += 1  # a second job of this run's id, whose launcher counts from 0, too

            stream = self._add_stream(
                attempt,
                flight.rank,
                flight.incarnation,
                flight.local_rank,
                str(flight.path),
                is_helper=is_helper,
            )
            self.store.update_stream(stream.id, clock=list(flight.image.clock))
            for report in [report for report in self._unmatched_exits if report.pid == flight.incarnation.pid]:
                self._unmatched_exits.remove(report)
                note_exit(stream, report)

        self._finalize_dead(stream, flight.image)

    def bye(self, stream: RankStream, reason: str, peer: Peer, handled: dict[str, int] | None = None) -> None:
        """End a rank that says bye; the answer follows when all its rows are stored.

        Args:
            reason: `finished` or `failed`.
            handled: failures that the rank's process has handled, by package.
        """
        self._leaving.append(peer)
        if handled:
            self.store.update_stream(stream.id, failures=handled)

        failed = stream.exit.get("exception") or stream.exit.get("code") or reason == "failed"
        self._end_stream(stream, StreamState.FAILED if failed else StreamState.FINISHED)

    def end_relayed(self, stream: RankStream, state: StreamState) -> None:
        """End a rank as the aggregator of its host has found it; its exit is known already."""
        stream.disconnect()
        self._end_stream(stream, state, is_total_known=state is not StreamState.LOST)

    def take_exit(self, report: ExitReport) -> None:
        """Take a launcher's report of the end of a process."""
        if report.exitcode is None and not report.lost:
            _log.info("run %s ignores an exit report without a code: %s", self.id, report)
            return

        stream = self._table.of_exit(report)
        if stream is None:
            self._unmatched_exits.append(report)  # it may have left a flight file, or died even before that
            return

        if report.lost:
            note_host_lost(stream, report)
            if not stream.ended or stream.state is StreamState.LOST:
                self._end_stream(stream, StreamState.LOST, is_total_known=False)

            return

        note_exit(stream, report)
        if stream.state is StreamState.FINISHED and report.exitcode == 0:
            self.store.update_stream(stream.id, exit=stream.exit)  # the rank's bye said the same
        elif not stream.connected:
            self._finalize_dead(stream)

    def add_unmatched_exits(self) -> None:
        """Add processes that failed before their recorder started: only the launcher reports them."""
        for report in self._unmatched_exits:
            rank = report.rank
            if rank is None or not 0 <= rank < WORLD_LIMIT:
                continue
            if not (report.exitcode or report.lost) or self._table.of_rank(self.attempt, rank):
                _log.info("no rank of run %s matches the exit %s", self.id, report)
                continue

            if rank >= self.world_size:
                self._resize(rank + 1)

            incarnation = Incarnation(report.host or socket.gethostname(), boot_id(), report.pid or 0, 0, "")
            stream = self._add_stream(self.attempt, rank, incarnation, report.local_rank, "")
            if report.lost:
                note_host_lost(stream, report)
                self._end_stream(stream, StreamState.LOST, is_total_known=False)
                continue

            note_exit(stream, report)
            self._end_stream(stream, state_of_dead(stream, self.world_size))

        self._unmatched_exits.clear()

    def check_absent(self) -> None:
        """Finalize disconnected ranks that are dead, and give up silent ones after a while."""
        for stream in list(self._table.disconnected):
            if stream.is_dead:
                self._finalize_dead(stream)
            elif not stream.seen_here and time.monotonic() - stream.disconnected_s > LOST_AFTER_S:
                self._end_stream(stream, StreamState.LOST, is_total_known=False)

    def is_over(self, *, has_launcher: bool) -> bool:
        """Return whether the run can be closed.

        Args:
            has_launcher: whether a launcher will report the end of this run.
        """
        quiet_s = time.monotonic() - self._touched_s
        if self.ended or self.ingest.waiting or self.is_connected or (has_launcher and quiet_s < LAUNCHER_WAIT_S):
            return False

        members = self._table.of_attempt(self.attempt)
        if any(not stream.ended for stream in members) or any(s.is_helper and not s.ended for s in self.streams):
            return False  # its process is alive, or its connection was lost recently: it may reconnect

        if len(members) < self.world_size:
            return quiet_s > (ORPHANED_S if self._has_lost_launcher else ABANDONED_S)

        broken = any(stream.state is not StreamState.FINISHED for stream in members)
        return quiet_s > (RESTART_S if broken and self._facts.values.get("restarts_left") else JOIN_GRACE_S)

    def note_ending(self, ended_by: object) -> None:
        """Take the signal that ended the job, as its launcher reports it; see `ending_signal_of`."""
        if (found := ending_signal_of(ended_by)) is not None:
            self.live.note_ending(found)
            self._ended_by = {"ended_by": ended_by}

    @property
    def has_ending(self) -> bool:
        """Whether it is known which signal ended the job."""
        return bool(self._ended_by)

    def note_lost_launcher(self, pid: int) -> None:
        """Note, once, that the launcher was killed: it has reported no end."""
        if not self.has_ending:
            self.note_ending({"launcher_pid": pid, "time": time.time()})
            self._touched_s = time.monotonic()

    @property
    def _has_lost_launcher(self) -> bool:
        return "launcher_pid" in (self._ended_by.get("ended_by") or {})

    def end_remaining(self, status: int | None) -> None:
        """Finalize every rank that has not ended: the launcher reports the end of the job and its status."""
        for stream in self.streams:
            if not stream.ended:
                if status == 0:  # a rank that ends by os._exit says no bye
                    stream.exit.setdefault("code", 0)

                self._finalize_dead(stream)

    def commit(self, *, force: bool = False) -> bool:
        """Commit and acknowledge the rows, then diagnose them; return whether all are stored."""
        if not self.ingest.commit(force=force):
            return False

        with fail_open(_log, "aggregator", f"the live verdict of run {self.id} lacks rows", level=logging.ERROR):
            self.live.scatter()

        for image in self._recovered:
            image.unlink()

        for peer in self._leaving:
            peer.send({"t": "bye", "reason": "all rows are stored"})
            peer.close()

        self._recovered.clear()
        self._leaving.clear()
        return True

    def maintain(self, budget_s: float, cursors: Sequence[int]) -> None:
        """Sum, merge and thin rows of the store for a while.

        Args:
            cursors: id of the last frame that each delivery has read.
        """
        limit_bytes = None
        if self._retention_gb is not None:
            limit_bytes = max(int(self._retention_gb * 1e9), MIN_RETAINED_BYTES * len(self.streams))

        try:
            self.store.maintain(budget_s, cursors, limit_bytes)
        except StoreError as error:  # the next commit reports a disk that is full
            _log.debug("run %s: %s", self.id, error)

    def end(self, status: int | None = None, *, diagnose: bool = False, report_follows: bool = False) -> bool:
        """Close the run; return False while rows cannot be stored.

        Args:
            status: exit status of the job, as its launcher reports it.
            diagnose: whether `final_findings` are wanted.
            report_follows: whether its report is written next, for which deliveries to trackers wait.
        """
        if not self.commit(force=True):
            return False

        before = dict(self._facts.values)
        state = self._final_state(status)
        if diagnose:
            with fail_open(_log, "aggregator", f"the last findings of run {self.id} are not known"):
                self.final_findings = self.live.final_findings(state)

        is_present = self._is_attended or status is not None
        self._facts.end(state, None if is_present else max(self._signs_s, default=self._last_written_s))
        if report_follows:
            self.store.put_meta("report_asked_s", time.time())

        self._facts.write(self.store)
        if handled := Counter(failures()) - self._failures_before:
            self.store.put_meta("failures", dict(handled))

        try:
            self.store.commit()
        except StoreError as error:
            _log.error("run %s cannot be closed yet: %s", self.id, error)
            self._facts.values = before
            return False

        self.store.event(END, {"state": self.state, "status": status, **self._ended_by})
        self.store.close()
        self.live.resize(0)  # an aggregator remembers many runs that are over
        for stream in self.connected:  # a rank with more rows comes back, and opens the run again
            if stream.peer is not None:
                stream.peer.abort()

        _log.info("run %s is over: %s", self.id, self.state)
        return True

    def _final_state(self, status: int | None) -> str:
        members = self._table.of_attempt(self.attempt)
        state = final_state(members, status, ending_signal_of(self._ended_by.get("ended_by")))
        if self._has_lost_launcher and state == RunStatus.FINISHED and len(members) < self.world_size:
            state = RunStatus.LOST.value  # before its ranks could connect

        with fail_open(_log, "aggregator", f"whether run {self.id} has hung is not known"):
            return RunStatus.HUNG.value if state != RunStatus.FINISHED and self.live.has_hung(state) else state

        return state

    def remove(self) -> None:
        """Remove the folder of a run that has ended, if nothing but the store is in it."""
        for path in self.path.glob(f"{STORE_NAME}*"):
            path.unlink(missing_ok=True)

        for folder in (*RUN_FOLDERS, "."):
            with contextlib.suppress(OSError):
                (self.path / folder).rmdir()

    def close(self) -> None:
        """Release a run that is not over, so that another aggregator can continue it."""
        if not self.ended:
            self.commit(force=True)
            try:
                self.store.close()
            except StoreError as error:
                _log.error("run %s: %s", self.id, error)

    def _is_no_rank(self, flight: DeadFlight, attempt: int) -> bool:
        """Whether another process is the rank of one that never connected.

        It has only started that one, and has no steps; or it is its child, as in a process pool, and trained alone.
        """
        current = self._table.of_rank(attempt, flight.rank)
        if current is None:
            return False

        trained_alone = flight.is_spawned and flight.world_size == 1 and bool(current.next.get("steps"))
        return trained_alone or not appended_rows(flight.image).get("steps")

    def _finalize_dead(self, stream: RankStream, image: FlightSnapshot | None = None) -> None:
        """Recover the rows of a dead rank and set its final state."""
        known = next((each for each in self._recovered if each.path == stream.flight_path), None)
        image = known or recover(stream, self.ingest, self.path.parent, image)
        if image is not None:
            note_flight(stream, image)
            if known is None:
                self._recovered.append(image)

            self.store.update_stream(stream.id, appended=appended_rows(image))
            self._signs_s.append(image.last_beat_s)

        state = state_of_dead(stream, self.world_size)
        if state is StreamState.LOST:
            stream.exit["process_gone"] = True  # certain, unlike for a host that fell silent

        has_said_bye = stream.ended and stream.state is not StreamState.LOST
        is_known = image is not None or has_said_bye or stream.has_removed_flight
        self._end_stream(stream, state, is_total_known=is_known)
