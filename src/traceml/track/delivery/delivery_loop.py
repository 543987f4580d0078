"""Delivering one run to one backend: the loop, and what becomes of failures.

The cursor moves when the backend has confirmed a batch. When something fails that a second try in this process would
not mend, the process ends and is started again: a new one reads keys anew, and nothing half done is left in a library.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from traceml.database.reader import StoreReader
from traceml.database.store_file import STORE_NAME
from traceml.privacy import Masker
from traceml.settings import Config
from traceml.track.delivery.audit import AuditLog
from traceml.track.delivery.batch_sender import BatchSender
from traceml.track.delivery.call_watchdog import CallWatchdog
from traceml.track.delivery.credentials import read_key_file
from traceml.track.delivery.derived import FOLLOWED
from traceml.track.delivery.plan import DeliveryPlan, PlannedExperiment, settings_of, tightened
from traceml.track.delivery.record_reader import RecordBatch, RecordReader, position
from traceml.track.delivery.refusals import RefusalOutcome, RefusalSearch
from traceml.track.delivery.retry_policy import RetryPolicy, succeeded
from traceml.track.delivery.tracker_session import RewindError, TrackerSession
from traceml.track.filters import DeliveryFilter
from traceml.track.plugins.failure_kinds import FailureKind, TrackerFailure, classify
from traceml.track.tracker_state import EXIT_AGAIN, EXIT_BROKEN, EXIT_DONE, DeliveryPhase, TrackerState
from traceml.track.wandb_sweep import variables

__all__ = ["DeliveryLoop"]

_LEAST_ROWS, _FIRST_ROWS, _BATCH_ROWS = 100, 1_000, 5_000
_SLOW_BATCH_S = 2.0
_LOOK_S = 0.5
_TIMEOUT_S = 60.0
_STOP_S = 10.0
_EARLY_S = 5.0

_log = logging.getLogger("traceml")


class DeliveryLoop:
    """Delivers one run to one backend.

    Args:
        run_dir: the run's folder.
        backend: a backend's name or import path.
        once: deliver what is there and end, whether or not the run says that it is over.
        options: of the backend, over those that the run's experiments give; given, every experiment is delivered.
        settings: what `plan.told_by` returned of the settings of now, for a run that did not ask for this backend.

    Raises:
        TraceMLError: the store cannot be read, or the settings are wrong.
    """

    def __init__(
        self,
        run_dir: Path,
        backend: str,
        *,
        once: bool = False,
        options: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self._run_dir = run_dir
        self._once = once
        self._stop = threading.Event()
        self._state = TrackerState.load(run_dir, backend)
        self._state.pid = os.getpid()
        self._refusals = RefusalSearch(self._state)
        self._told_unsaved = False
        self._undo: Callable[[], None] | None = None
        self._unknown: dict[int, float] = {}  # number of an experiment -> until when its announcement is waited for
        self._reader = StoreReader(run_dir / STORE_NAME)
        self._plan = DeliveryPlan(self._reader, run_dir)
        self._plan.refresh()
        self._asking = asking = self._plan.backends().get(backend)
        self._config = self._settings(asking, settings)
        self._options = options if options is not None else asking.options(backend) if asking is not None else {}
        self._everything = options is not None or asking is None
        self._given_options = options
        self._policy = RetryPolicy(self._config.max_retries, self._config.backoff_factor, self._config.max_backoff)
        self._masker = Masker(self._config.mask)
        self._masked_before = self._state.masked
        self._watchdog = CallWatchdog(self._hangs)

    def stop(self, *_: object) -> None:
        """End soon: after the batch that is under way, and in any case after some seconds."""
        self._stop.set()
        self._watchdog.end_within(_STOP_S)

    def run(self) -> int:
        """Deliver until all is done or something needs a new process; return the exit status."""
        try:
            self._prepare()
            return self._follow()
        except RewindError:
            self._rewind()
            return EXIT_AGAIN
        except Exception as error:  # noqa: BLE001 - a library may raise anything; what it was decides what comes next
            return self._failed(error)

    def _settings(self, asking: PlannedExperiment | None, now: dict[str, Any] | None) -> Config:
        """Return the settings of the run, as far as it has any; a tracker that it did not ask for gets no more."""
        told = asking or next(iter(self._plan.experiments.values()), None)
        if now is None:
            return told.settings() if told is not None else Config()

        return tightened(told.settings(), settings_of(now)) if told is not None else settings_of(now)

    # --- the loop ----------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        first = next((each.row for each in self._plan.experiments.values()), {})
        # By name, whatever the row says: it came over a connection.
        os.environ.update(variables({str(name): str(value) for name, value in (first.get("environ") or {}).items()}))
        sys.path.extend(path for path in first.get("sys_path") or () if path not in sys.path)
        with contextlib.suppress(OSError):  # paths among the options are meant from where the script was started
            os.chdir(str(first.get("folder") or "."))

        _read_key(self._state.backend, self._options, first.get("registered"))
        self._records = RecordReader(self._reader, FOLLOWED)
        self._sender = BatchSender(
            self._state,
            self._reader,
            self._records,
            self._plan,
            DeliveryFilter.of(self._config.include, self._config.exclude, self._options),
            self._run_dir,
            everything=self._everything,
            interval_s=self._config.metrics_interval,
            system=self._config.track_system,
        )
        self._session = self._make_session()
        self._audit = AuditLog(self._run_dir, self._state)

    def _make_session(self) -> TrackerSession:
        """Connect to the backend, or to the one that takes its place while it fails."""
        state, fallback = self._state, str(self._options.get("fallback") or "")
        stands_in = (
            bool(fallback)
            and state.phase in {DeliveryPhase.OPEN, DeliveryPhase.UNAUTHORIZED}
            and time.time() < state.retry_at
        )
        timeout_s = float(self._options.get("timeout_s") or _TIMEOUT_S)
        self._stands_in = stands_in
        if stands_in and self._asking is not None:
            _read_key(fallback, self._asking.options(fallback), self._asking.row.get("registered"))

        state.stood_in = False
        return TrackerSession(
            fallback if stands_in else state.backend,
            self._run_dir,
            state,
            self._save,
            self._watchdog,
            self._masker,
            timeout_s=timeout_s,
            options=None if stands_in else self._given_options,
            is_fallback=stands_in,
            local_only=self._config.local_only,
        )

    def _follow(self) -> int:
        while True:
            is_over = self._once or self._is_over()  # asked before the rows: what came before it is read then
            batch = self._next_batch()
            self._plan.refresh()
            if not is_over and self._is_early(batch):
                self._stop.wait(_LOOK_S)
                continue

            is_empty = batch.cursor == self._cursor()
            if is_empty and is_over:
                return self._finish()
            if is_empty and self._stop.is_set():
                return self._stopped()
            if self._stands_in and time.time() >= self._state.retry_at:
                return EXIT_AGAIN  # for a probe of the one that failed
            if is_empty:
                self._look_alive()
                if self._sender.ends_some:
                    self._end_some()

                self._stop.wait(_LOOK_S)
                continue

            if (status := self._deliver(batch)) is not None:
                return status
            if self._stop.is_set():
                return self._stopped()
            if batch.is_last and not is_over:
                self._stop.wait(_LOOK_S)

    def _next_batch(self) -> RecordBatch:
        """Read on, up to where a batch has to end: around rows that are refused, and where an experiment was ended."""
        here = self._cursor()
        stops = [
            *self._refusals.stops(),
            *(kept["end"] for kept in self._state.experiments.values() if kept.get("end")),
        ]
        ahead = [stop for stop in stops if position(stop) > position(here)]
        limit = self._refusals.limit(here, self._state.batch_rows or _FIRST_ROWS)
        return self._records.read(here, limit, min(ahead, key=position, default=None))

    def _is_early(self, batch: RecordBatch) -> bool:
        """Whether values have come before the announcement of their experiment, which is another table: it is near."""
        unknown = {number for stream, number in batch.metrics if self._plan.of(stream, number) is None}
        now_s = time.monotonic()
        return any(now_s < self._unknown.setdefault(number, now_s + _EARLY_S) for number in unknown)

    def _deliver(self, batch: RecordBatch) -> int | None:
        """Deliver one batch; return an exit status when this process should end over it."""
        began_s = time.monotonic()
        if self._refusals.knows(batch):
            self._state.failed += batch.rows
        else:
            try:
                with self._undone():
                    self._sender.give(batch, self._session, self._audit, self._is_done)
                    self._session.confirm()
            except RewindError:
                raise
            except Exception as error:  # noqa: BLE001 - see run()
                failure = classify(error)
                return self._refused(batch, failure) if failure.kind is FailureKind.REFUSED else self._again(error)

        self._passed(batch, time.monotonic() - began_s)
        self._save()
        self._end_some()
        self._audit.write(self._state.target, dict(self._masker.counts))
        self._save()
        return None

    def _end_some(self) -> None:
        with self._undone():
            self._sender.end_some(self._session, self._audit)

    def _is_done(self, experiment: PlannedExperiment) -> bool:
        """Whether an experiment was ended with all that came up to here: it needs nothing when others start over."""
        end = self._session.kept(experiment).get("end")
        return end is not None and position(self._cursor()) < position(end)

    def _passed(self, batch: RecordBatch, took_s: float) -> None:
        """Move the cursor over a batch that is confirmed."""
        state = self._state
        state.cursor, state.passed = dict(batch.cursor), state.passed + batch.rows
        took_ms = 1e3 * took_s
        state.latency_ms = took_ms if state.latency_ms is None else 0.8 * state.latency_ms + 0.2 * took_ms
        self._refusals.passed()
        # A slow tracker gets less at a time, so that one sees it getting on and loses little to a death.
        rows = state.batch_rows or _FIRST_ROWS
        if took_s > _SLOW_BATCH_S:
            state.batch_rows = max(rows // 2, _LEAST_ROWS)
        elif took_s < _SLOW_BATCH_S / 4:
            state.batch_rows = min(rows * 2, _BATCH_ROWS)

        if self._stands_in:
            state.fallback += batch.rows
        else:
            succeeded(state)

    def _finish(self) -> int:
        """Give what was held back, end the experiments, and say that all is done."""
        try:
            with self._undone():
                self._sender.finish(self._session, self._audit)
                self._session.confirm()

            self._save()
            self._sender.end(self._session, str(self._reader.meta().get("run", {}).get("state") or "finished"))
        except RewindError:
            raise
        except Exception as error:  # noqa: BLE001 - see run()
            status = self._again(error, in_place=False)
            return EXIT_AGAIN if status is None else status

        self._audit.write(self._state.target, dict(self._masker.counts), force=True)
        if self._stands_in:
            self._state.stood_in = True
            self._save()
            return EXIT_AGAIN

        succeeded(self._state)
        self._state.phase = DeliveryPhase.DONE
        self._save()
        return EXIT_DONE

    def _stopped(self) -> int:
        self._audit.write(self._state.target, dict(self._masker.counts), force=True)
        if self._state.phase in {DeliveryPhase.DELIVERING, DeliveryPhase.STARTING}:
            self._state.phase = DeliveryPhase.STOPPED

        self._save()
        return EXIT_AGAIN

    # --- failures ----------------------------------------------------------------------------------------------------

    def _again(self, error: Exception, *, in_place: bool = True) -> int | None:
        """Note a failure; wait and return None where this process may try again, else its exit status."""
        failure = classify(error)
        _log.warning("%s: %s", self._state.backend, failure.text, exc_info=_log.isEnabledFor(logging.DEBUG))
        wait_s = self._note(failure)
        if failure.kind is FailureKind.BROKEN:
            return EXIT_BROKEN

        may = in_place and self._state.phase is DeliveryPhase.WAITING and self._session.is_idempotent
        if not may or self._stop.wait(wait_s):
            return EXIT_AGAIN

        return None

    def _failed(self, error: Exception) -> int:
        """Note what went wrong outside of a batch; return the exit status."""
        status = self._again(error, in_place=False)
        return EXIT_AGAIN if status is None else status

    def _refused(self, batch: RecordBatch, failure: TrackerFailure) -> int | None:
        """Look for the row that is refused; return an exit status when this process should end over it."""
        came_to = self._refusals.note(batch, self._cursor(), failure.text)
        if came_to is RefusalOutcome.EVERYTHING:
            self._note(TrackerFailure(FailureKind.BROKEN, f"it refuses everything: {failure.text}"))
            return EXIT_BROKEN

        if came_to is RefusalOutcome.FOUND:
            _log.warning("%s refuses a row: %s", self._state.backend, failure.text)

        self._save()
        return None if self._session.is_idempotent else EXIT_AGAIN

    def _hangs(self, call: str, allowed_s: float) -> None:
        """Note that a call did not return; the process ends right after this."""
        _log.error("%s: %s did not return within %.0f s", self._state.backend, call, allowed_s)
        if self._undo is not None:
            self._undo()

        self._note(TrackerFailure(FailureKind.TRANSIENT, f"{call} did not return within {allowed_s:.0f} s"))

    def _note(self, failure: TrackerFailure) -> float:
        wait_s = self._policy.note(self._state, failure)
        self._save()
        return wait_s

    def _rewind(self) -> None:
        """Start the backend's runs over, except for those that were ended: they are complete."""
        _log.info("%s goes on from the run's first row", self._state.backend)
        state = self._state
        ended = {key: kept for key, kept in state.experiments.items() if kept.get("ended")}
        fresh = TrackerState(state.backend, pid=state.pid, experiments=ended, memory=self._refusals.carried())
        fresh.target, fresh.retries, fresh.reasons = state.target, state.retries, state.reasons
        fresh.masked = state.masked
        fresh.save(self._run_dir)

    # --- inside ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _undone(self) -> Iterator[None]:
        """Undo what a failed attempt changed in the state, but for what stands at the tracker."""
        state = self._state
        counts = {name: getattr(state, name) for name in ("delivered", "derived", "filtered", "failed")}
        counts["reasons"] = dict(state.reasons)
        memory = copy.deepcopy(state.memory)

        def undo() -> None:
            state.memory = memory
            for name, value in counts.items():
                setattr(state, name, value)

        self._undo = undo
        try:
            yield
        except BaseException:
            undo()
            raise
        finally:
            self._undo = None

    def _cursor(self) -> dict[str, int]:
        return {"frame": self._state.cursor.get("frame", 0), "row": self._state.cursor.get("row", 0)}

    def _is_over(self) -> bool:
        return self._reader.meta().get("run", {}).get("ended") is not None

    def _look_alive(self) -> None:
        """Say that all is well where there was nothing to do since the start."""
        if self._state.phase not in {DeliveryPhase.DELIVERING, DeliveryPhase.OPEN, DeliveryPhase.UNAUTHORIZED}:
            succeeded(self._state)
            self._save()

    def _save(self) -> None:
        """Write the state; without space on the disk delivery goes on, and what is exact by marks stays exact."""
        self._state.masked = self._masked_before + self._masker.counts.total()
        try:
            self._state.save(self._run_dir)
            self._told_unsaved = False
        except OSError as error:
            if not self._told_unsaved:
                _log.error("the state of %s cannot be saved: %s", self._state.backend, error)

            self._told_unsaved = True


def _read_key(backend: str, options: dict[str, Any], known: Mapping[str, str] | None) -> None:
    """Copy a key from its file to the environment of this process, where the backend's library looks."""
    if key_file := options.get("api_key_file"):
        os.environ.update(read_key_file(backend, Path(str(key_file)), known))
