"""Delivery loop of one run and one backend, and its handling of failures.

The cursor moves when the backend has confirmed a batch. After a failure that a second try in this process would not
fix, the process ends and is started again: the new one reads the keys again and has no half-finished work in a library.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from traceml.database.states import RunStatus
from traceml.database.store.reader import StoreReader
from traceml.errors import BackendError
from traceml.fail_open import fail_open
from traceml.formatting import left_text
from traceml.process_ends import StopRequest
from traceml.run_folder import STORE_NAME
from traceml.settings import Config
from traceml.track.delivery.audit import AuditLog
from traceml.track.delivery.batch_sender import BatchSender
from traceml.track.delivery.call_watchdog import CallWatchdog
from traceml.track.delivery.credentials import read_key_file
from traceml.track.delivery.delivery_plan import DeliveryPlan, PlannedExperiment, restricted, settings_of
from traceml.track.delivery.derived import INPUT_TABLES
from traceml.track.delivery.experiment_rules import RulesOfExperiments
from traceml.track.delivery.record_reader import RecordBatch, RecordReader, position
from traceml.track.delivery.refusals import RefusalOutcome, RefusalSearch
from traceml.track.delivery.retry_policy import RetryPolicy, succeeded
from traceml.track.delivery.tracker_session import Delivery, RewindError, TrackerSession
from traceml.track.delivery.verdict_sender import has_report
from traceml.track.filters import check_delivery_options, timeout_of
from traceml.track.plugins.failure_kinds import FailureKind, TrackerFailure, classify
from traceml.track.tracker_state import EXIT_AGAIN, EXIT_BROKEN, EXIT_DONE, DeliveryPhase, ResumeState, TrackerState
from traceml.track.wandb_sweep import variables

__all__ = ["DeliveryLoop"]

_MIN_ROWS, _FIRST_ROWS, _BATCH_ROWS = 100, 1_000, 5_000
_SLOW_BATCH_S = 2.0
_POLL_S = 0.5
_REPORT_S = 15.0  # longest wait for the report of a run that has ended
_TIMEOUT_S = 60.0
_STOP_S = 10.0
_ANNOUNCEMENT_S = 5.0
_OF_A_TRY = ("delivered", "derived", "filtered", "failed", "reasons", "resume")  # in the state

_log = logging.getLogger("traceml")


class DeliveryLoop:
    """Delivers one run to one backend.

    Args:
        backend: a backend's name or import path.
        once: deliver what is there and end, even if the run is not over.
        options: options of the backend, in place of those of the experiments; if given, every experiment is delivered.
        settings: current settings from `filters.delivery_settings`, for a run that did not request this backend.
        installed_only: import nothing from the folders that the run names.

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
        installed_only: bool = False,
    ) -> None:
        self._run_dir = run_dir
        self._once = once
        self._installed_only = installed_only
        self._stop = StopRequest()
        self._state = TrackerState.load(run_dir, backend)
        self._state.pid = os.getpid()
        self._refusals = RefusalSearch(self._state)
        self._has_warned_unsaved = self._is_saved = False
        self._before: dict[str, Any] = {}  # of the state, while a try changes it
        self._unannounced: dict[int, float] = {}  # number of an experiment -> deadline for its announcement
        self._reader = StoreReader(run_dir / STORE_NAME)
        self._plan = DeliveryPlan(self._reader, run_dir)
        self._plan.refresh()
        self._requested_by = requested_by = self._plan.backends().get(backend)
        self._config = self._settings(requested_by, settings)
        self._options = (
            options if options is not None else requested_by.options(backend) if requested_by is not None else {}
        )
        self._fallback = str(self._options.get("fallback") or "")
        self._delivers_all = options is not None or requested_by is None
        self._given_options = options
        self._policy = RetryPolicy(self._config.max_retries, self._config.backoff_factor, self._config.max_backoff)
        current = None if settings is None else settings_of(settings)
        self._rules = RulesOfExperiments(backend, self._config, current, options)
        self._masked_before = self._state.masked
        self._watchdog = CallWatchdog(self._hangs)
        self._uses_fallback = self._is_delivered = False

    def stop(self, *_: object) -> None:
        """End after the current batch, and at the latest after 10 s."""
        self._watchdog.end_within(_STOP_S)
        self._stop()

    def run(self) -> int:
        """Deliver until all is done or a new process is needed; return the exit status."""
        try:
            self._prepare()
            try:
                return self._follow()
            finally:
                self._session.close()
        except RewindError:
            self._rewind()
            return EXIT_AGAIN
        except Exception as error:  # noqa: BLE001 - a library may raise anything; its kind decides how to continue
            return self._failed(error)
        except SystemExit as error:
            return self._failed(BackendError(f"the tracker's library ended its process: sys.exit({error.code!r:.100})"))
        except BaseException as error:  # noqa: BLE001 - a panic of code in Rust, a cancelled coroutine
            return self._failed(error)

    def _settings(self, requested_by: PlannedExperiment | None, current: dict[str, Any] | None) -> Config:
        """Return the settings of the run; a tracker that it did not request gets no more than they allow."""
        announced = requested_by or next(iter(self._plan.experiments.values()), None)
        if current is None:
            return announced.settings() if announced is not None else Config()

        now = settings_of(current)
        return restricted(announced.settings(), now) if announced is not None else now

    # --- loop ----------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        planned = next(iter(self._plan.experiments.values()), None)
        first = planned.row if planned is not None else {}
        # Only known names: the row came over a connection.
        os.environ.update(variables({str(name): str(value) for name, value in (first.get("environ") or {}).items()}))
        if self._installed_only:
            self._plan.check_installed(self._state.backend, self._fallback)
        else:
            sys.path.extend(path for path in first.get("sys_path") or () if path not in sys.path)

        with contextlib.suppress(OSError):  # relative paths in options start at the folder of the script's start
            os.chdir(str(first.get("folder") or "."))

        check_delivery_options(self._options)
        _read_key(self._state.backend, self._options, planned)
        self._records = RecordReader(self._reader, INPUT_TABLES)
        self._audit = AuditLog(self._run_dir, self._state)
        self._session = self._make_session()
        delivery = Delivery(
            run_dir=self._run_dir,
            reader=self._reader,
            records=self._records,
            plan=self._plan,
            config=self._config,
            rules=self._rules,
            session=self._session,
            state=self._state,
            audit=self._audit,
        )
        self._sender = BatchSender(delivery, self._is_done, everything=self._delivers_all)

    def _make_session(self) -> TrackerSession:
        """Create the session of the backend, or of its fallback while it fails."""
        state = self._state
        self._uses_fallback = (
            bool(self._fallback)
            and state.phase in {DeliveryPhase.OPEN, DeliveryPhase.UNAUTHORIZED}
            and (state.fallback_due or time.time() < state.retry_at)
        )
        state.fallback_done = False
        return self._session_of(self._fallback if self._uses_fallback else "")

    def _session_of(self, fallback: str) -> TrackerSession:
        """Return a session of the fallback, or of the backend itself ("")."""
        if fallback and self._requested_by is not None:
            _read_key(fallback, self._requested_by.options(fallback), self._requested_by)

        return TrackerSession(
            fallback or self._state.backend,
            self._run_dir,
            self._state,
            self._save,
            self._watchdog,
            self._rules,
            self._audit,
            timeout_s=timeout_of(self._options, _TIMEOUT_S),
            options=None if fallback else self._given_options,
            is_fallback=bool(fallback),
        )

    def _follow(self) -> int:
        while True:
            is_over = self._once or self._is_over()  # checked before reading, so that no row is missed
            batch = self._next_batch()
            self._plan.refresh()
            if not is_over and self._is_early(batch):
                self._stop.wait(_POLL_S)
                continue

            is_empty = batch.cursor == self._cursor()
            if is_empty and is_over:
                return self._finish()
            if is_empty and self._stop.is_set:
                return self._stopped()
            # A process may start after `retry_at`: it delivers a batch before the failed backend is probed.
            may_probe = time.time() >= self._state.retry_at and (is_empty or not self._state.fallback_due)
            if self._uses_fallback and may_probe:  # by the next process
                self._state.fallback_due = False
                self._save()
                return EXIT_AGAIN
            if is_empty:
                self._record_idle()
                if self._sender.has_pending_closes:
                    self._end_finished()
                    self._save()

                self._stop.wait(_POLL_S)
                continue

            if (status := self._deliver(batch)) is not None:
                return status
            if self._stop.is_set:
                return self._stopped()
            if batch.is_last and not is_over:
                self._stop.wait(_POLL_S)

    def _next_batch(self) -> RecordBatch:
        """Read a batch; it ends around refused rows and where an experiment was ended."""
        here = self._cursor()
        stops = [
            *self._refusals.stops(),
            *(stored["end"] for stored in self._state.experiments.values() if stored.get("end")),
        ]
        ahead = [stop for stop in stops if position(stop) > position(here)]
        limit = self._refusals.limit(here, self._state.batch_rows or _FIRST_ROWS)
        return self._records.read(here, limit, min(ahead, key=position, default=None))

    def _is_early(self, batch: RecordBatch) -> bool:
        """Whether to wait for an experiment's announcement: values of another table may arrive before it."""
        unannounced = {part.experiment for part in batch.metrics if self._plan.of(part.stream, part.experiment) is None}
        now_s = time.monotonic()
        return any(now_s < self._unannounced.setdefault(number, now_s + _ANNOUNCEMENT_S) for number in unannounced)

    def _deliver(self, batch: RecordBatch) -> int | None:
        """Deliver one batch; return an exit status when this process should end over it."""
        began_s = time.monotonic()
        if self._refusals.knows(batch):
            self._state.failed += batch.rows
        else:
            try:
                with self._undone():
                    self._sender.send(batch)
                    self._session.confirm()
            except RewindError:
                raise
            except Exception as error:  # noqa: BLE001 - see run()
                failure = classify(error)
                is_refused = failure.kind is FailureKind.REFUSED
                status = self._refused(batch, failure) if is_refused else self._retry_or_exit(error)
                if status is None:
                    self._session.resume()

                return status

        self._passed(batch, time.monotonic() - began_s)
        self._save()
        is_ending = self._sender.has_pending_closes
        if is_ending:
            self._end_finished()

        has_written = self._audit.write(dict(self._rules.masked))
        if is_ending or has_written:
            self._save()

        return None

    def _end_finished(self) -> None:
        with self._undone():
            self._sender.end_finished()

    def _is_done(self, experiment: PlannedExperiment) -> bool:
        """Whether an experiment was ended with all rows up to the cursor: it needs none when others start over."""
        end = self._session.state_of(experiment).get("end")
        return end is not None and position(self._cursor()) < position(end)

    def _passed(self, batch: RecordBatch, took_s: float) -> None:
        """Move the cursor past a confirmed batch."""
        state = self._state
        state.cursor, state.passed = dict(batch.cursor), state.passed + batch.rows
        state.reach(batch.reached)
        took_ms = 1e3 * took_s
        state.latency_ms = took_ms if state.latency_ms is None else 0.8 * state.latency_ms + 0.2 * took_ms
        self._refusals.passed()
        # A slow tracker gets smaller batches, so that progress shows and a death loses little.
        rows = state.batch_rows or _FIRST_ROWS
        if took_s > _SLOW_BATCH_S:
            state.batch_rows = max(rows // 2, _MIN_ROWS)
        elif took_s < _SLOW_BATCH_S / 4:
            state.batch_rows = min(rows * 2, _BATCH_ROWS)

        if self._uses_fallback:
            state.fallback, state.fallback_due = state.fallback + batch.rows, False
        elif position(state.cursor) > position(state.resume.get("before", {})):
            succeeded(state)
        else:
            state.phase = DeliveryPhase.DELIVERING

    def _finish(self) -> int:
        """Send what was held back, end the experiments, and record that all is done."""
        try:
            with self._undone():
                self._sender.finish()
                self._session.confirm()

            self._save()
            run = self._reader.meta().get("run", {})
            end = str(run.get("state") or RunStatus.FINISHED.value), run.get("ended")
            self._sender.end(*end)
        except RewindError:
            raise
        except Exception as error:  # noqa: BLE001 - see run()
            return self._failed(error)

        self._audit.write(dict(self._rules.masked), force=True)
        if self._uses_fallback:
            self._state.fallback_done = True
            self._save()
            return EXIT_AGAIN

        succeeded(self._state)
        self._state.phase = DeliveryPhase.DONE
        self._is_delivered = True
        self._save()
        self._end_at_fallback(*end)
        return EXIT_DONE

    def _end_at_fallback(self, run_state: str, run_ended: float | None) -> None:
        """End what the fallback has begun, and the backend itself has continued: else it would run there forever."""
        own, known = f"{self._fallback}:", self._state.experiments.items()
        if all(stored["ended"] for key, stored in known if key.startswith(own)):
            return

        target, failed = self._state.target, f"experiments of {self._fallback} have not ended"
        with (
            fail_open(_log, "track", failed),  # the backend has all rows
            contextlib.closing(self._session_of(self._fallback)) as session,
        ):
            for experiment in self._plan.experiments.values():
                session.end(experiment, run_state, run_ended)

        self._state.target = target
        self._save()

    def _stopped(self) -> int:
        self._audit.write(dict(self._rules.masked), force=True)
        if self._state.phase in {DeliveryPhase.DELIVERING, DeliveryPhase.STARTING}:
            self._state.phase = DeliveryPhase.STOPPED

        self._save()
        return EXIT_AGAIN

    # --- failures ----------------------------------------------------------------------------------------------------

    def _retry_or_exit(self, error: BaseException, *, in_place: bool = True) -> int | None:
        """Record a failure; wait and return None when this process may try again, else return its exit status."""
        failure = classify(error)
        _log.warning("%s: %s", self._state.backend, failure.text, exc_info=_log.isEnabledFor(logging.DEBUG))
        wait_s = self._record_failure(failure)
        if failure.kind is FailureKind.BROKEN:
            return EXIT_BROKEN

        may = in_place and self._state.phase is DeliveryPhase.WAITING and self._session.is_idempotent
        if not may or self._stop.wait(wait_s):
            return EXIT_AGAIN

        return None

    def _failed(self, error: BaseException) -> int:
        """Record a failure outside of a batch; return the exit status."""
        status = self._retry_or_exit(error, in_place=False)
        return EXIT_AGAIN if status is None else status

    def _refused(self, batch: RecordBatch, failure: TrackerFailure) -> int | None:
        """Continue the search for the refused row; return an exit status when this process should end."""
        outcome = self._refusals.record(batch, self._cursor(), failure.text)
        if outcome is RefusalOutcome.EVERYTHING:
            self._record_failure(TrackerFailure(FailureKind.BROKEN, f"the tracker refuses everything: {failure.text}"))
            return EXIT_BROKEN

        if outcome is RefusalOutcome.FOUND:
            _log.warning("%s refuses a row: %s", self._state.backend, failure.text)

        self._save()
        return None if self._session.is_idempotent else EXIT_AGAIN

    def _hangs(self, call: str, allowed_s: float) -> None:
        """Record that a call did not return; the process ends right after this."""
        _log.error("%s: %s did not return within %.0f s", self._state.backend, call, allowed_s)
        if self._is_delivered:  # the call was to the fallback, or of a cleanup
            os._exit(EXIT_DONE)

        self._record_failure(
            TrackerFailure(FailureKind.TRANSIENT, f"{call} did not return within {left_text(allowed_s)}")
        )

    def _record_failure(self, failure: TrackerFailure) -> float:
        wait_s = self._policy.record_failure(self._state, failure)
        self._state.fallback_due = not self._uses_fallback
        self._save()
        return wait_s

    def _rewind(self) -> None:
        """Start the backend's runs over, except those that have ended, which are complete, and its fallback's."""
        _log.info("%s starts over from the run's first row", self._state.backend)
        state = self._state
        others = () if self._uses_fallback else (f"{self._fallback}:",)
        kept = {key: each for key, each in state.experiments.items() if each.get("ended") or key.startswith(others)}
        # Rows that it had before are no success: what fails behind them would be tried without an end.
        before = max(state.cursor, state.resume.get("before", {}), key=position)
        resume: ResumeState = {**self._refusals.carried(), "before": before}
        fresh = TrackerState(state.backend, pid=state.pid, experiments=kept, resume=resume)
        fresh.target, fresh.retries, fresh.reasons = state.target, state.retries, state.reasons
        fresh.masked = state.masked
        fresh.save(self._run_dir)

    # --- helpers ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _undone(self) -> Iterator[None]:
        """Undo the changes of a failed try to the state, except the positions at the tracker.

        What is saved meanwhile has none of them either: after a kill the try is made again from its beginning.
        """
        self._before = {name: copy.deepcopy(getattr(self._state, name)) for name in _OF_A_TRY}
        try:
            yield
        except BaseException:
            for name, value in self._before.items():
                setattr(self._state, name, value)

            raise
        finally:
            self._before = {}

    def _cursor(self) -> dict[str, int]:
        return {"frame": self._state.cursor.get("frame", 0), "row": self._state.cursor.get("row", 0)}

    def _is_over(self) -> bool:
        """Return whether the run has ended, and its report, whose verdict is sent, is there or no longer expected."""
        meta = self._reader.meta()
        if meta.get("run", {}).get("ended") is None:
            return False

        asked_s = meta.get("report_asked_s", 0.0)
        is_expected = 0 <= time.time() - asked_s < _REPORT_S  # not for longer where a clock was set back
        return not is_expected or has_report(self._run_dir, asked_s)

    def _record_idle(self) -> None:
        """Report success, and that this process continues, when there was nothing to do since the start."""
        is_new = self._state.phase not in {DeliveryPhase.DELIVERING, DeliveryPhase.OPEN, DeliveryPhase.UNAUTHORIZED}
        if is_new:
            succeeded(self._state)

        if is_new or not self._is_saved:  # by the number of a killed process, the tracker would seem stopped
            self._save()

    def _save(self) -> None:
        """Write the state; on a full disk delivery continues, and backends with marks stay exact."""
        self._state.masked = self._masked_before + self._rules.masked.total()
        try:
            replace(self._state, **self._before).save(self._run_dir)
            self._has_warned_unsaved, self._is_saved = False, True
        except OSError as error:
            if not self._has_warned_unsaved:
                _log.error("the state of %s cannot be saved: %s", self._state.backend, error)

            self._has_warned_unsaved = True


def _read_key(backend: str, options: dict[str, Any], planned: PlannedExperiment | None) -> None:
    """Copy a key from its file to the environment of this process, where the backend's library looks."""
    if key_file := options.get("api_key_file"):
        known = planned.registered(backend) if planned is not None else {}
        os.environ.update(read_key_file(backend, Path(str(key_file)), known))
