"""Handle of a delivery process in its parent: start, restart after a death, and detection of a stuck one.

Its state file reports what it does; it is controlled by SIGTERM alone.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import time
from pathlib import Path
from typing import Any, BinaryIO

from traceml.errors import PluginError
from traceml.helper_programs import end_process, helper_program
from traceml.inspection.kernel_state import core_wait_ns
from traceml.process_ends import end_of_status
from traceml.run_folder import TRACKERS_FOLDER
from traceml.track.delivery.credentials import environment_for
from traceml.track.delivery.retry_policy import RetryPolicy
from traceml.track.plugins.failure_kinds import FailureKind, TrackerFailure
from traceml.track.tracker_state import (
    EXIT_BROKEN,
    EXIT_DONE,
    EXIT_TAKEN,
    EXITS,
    FAILING_PHASES,
    DeliveryPhase,
    TrackerState,
    locked,
)

__all__ = ["STOP_S", "DeliveryProcess"]

STOP_S = 5.0
# Pauses before a restart: they double, and start over for a process that lived long.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _LONG_LIFE_S = 0.2, 30.0, 30.0
_START_S = 45.0  # a process first imports its library, on a host that may be busy with training
_BATCH_S = 25.0  # longest time for one batch on such a host
_STARVED_S = 45.0  # most time without a core that is excused
_TAKEN_PAUSE_S = 0.5
_LOG_BYTES = 1 << 20
_FALLBACK_PHASES = {DeliveryPhase.OPEN, DeliveryPhase.UNAUTHORIZED}

_log = logging.getLogger("traceml")


class DeliveryProcess:
    """One backend's process, kept alive while there is something to do for it.

    Args:
        options: its options, which select its environment.
        once: deliver what is there and end, rather than follow.
        forced: options that replace those of the run; everything is then delivered. They are part of the command
            line, so none may be a secret.
        settings: the current settings from `filters.delivery_settings`, with `forced`.
        installed_only: import nothing from the working directory, nor from folders that the run names.
        profile: write a profile of each process next to its state.
    """

    def __init__(
        self,
        run_dir: Path,
        backend: str,
        options: dict[str, Any],
        *,
        nice: int,
        once: bool = False,
        forced: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
        installed_only: bool = False,
        profile: bool = False,
    ) -> None:
        self.run_dir = run_dir
        self.backend = backend
        self._options = forced if forced is not None else options
        command = helper_program("traceml.track.delivery", str(run_dir), backend)
        command += ["--parent", str(os.getpid()), "--nice", str(nice)]
        command += ["--once"] if once else []
        command += ["--installed-only"] if installed_only else []
        command += ["--profile"] if profile else []
        command += ["--options", json.dumps(forced)] if forced is not None else []
        command += ["--settings", json.dumps(settings)] if settings is not None else []
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._pause_s = _FIRST_PAUSE_S
        self._due_s = self._started_s = 0.0
        self._moved_s = time.monotonic()
        self._seen: tuple[Any, ...] = ()
        self._waited_s = 0.0
        self.over = False
        """Whether this process has nothing left to do: all is delivered, or a person has to fix something."""

    def __repr__(self) -> str:
        return f"<delivery of {self.run_dir.name} to {self.backend}>"

    @property
    def state(self) -> TrackerState:
        """Progress of the delivery."""
        return TrackerState.load(self.run_dir, self.backend)

    @property
    def pid(self) -> int | None:
        """Id of the process, None if there is none."""
        return self._process.pid if self._process is not None else None

    def poll(self) -> None:
        """Start the process when it is due, and handle its end. Call it often."""
        if self._process is not None and (status := self._process.poll()) is not None:
            self._process = None
            self._ended(status)

        if not self.over and self._process is None and time.monotonic() >= self._due_s:
            self._start()

    def retry_now(self) -> None:
        """Try again without waiting: the run has ended, and a user waits."""
        self._due_s = 0.0
        self._moved_s = time.monotonic()

    def resume(self) -> None:
        """Continue, because the run does."""
        self.over = False

    @property
    def is_given_up(self) -> bool:
        """Whether its tracker fails and only time will help, and its fallback, if any, has everything."""
        state = self.state
        return state.phase in FAILING_PHASES - {DeliveryPhase.WAITING} and (
            state.fallback_done or not self._uses_fallback(state)
        )

    def is_stuck(self, limit_s: float) -> bool:
        """Whether nothing has moved for `limit_s`, and no call is running that may take longer."""
        state = self.state
        if state.fallback_done:
            return True

        is_done = state.phase is DeliveryPhase.DONE
        now = (state.passed, state.delivered, state.derived, state.cursor.get("frame"), is_done)
        waited_s = core_wait_ns(str(self.pid)) / 1e9
        if now != self._seen:
            self._seen, self._moved_s, self._waited_s = now, time.monotonic(), waited_s

        if state.phase not in FAILING_PHASES and self._process is not None:
            limit_s = max(limit_s, _START_S if state.pid != self._process.pid else _BATCH_S)
            if state.pid == self._process.pid and state.is_in_slow_call:
                return False

        # A process that waits for a core is slow, not stuck, up to a limit.
        waited_s = min(max(waited_s - self._waited_s, 0.0), _STARVED_S)
        return time.monotonic() - self._moved_s - waited_s > limit_s

    def stop(self) -> None:
        """Ask the process to end soon."""
        self.over = True
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def join(self, timeout_s: float = STOP_S) -> None:
        """Wait for the end of the process after `stop`, and kill it after the timeout."""
        if self._process is not None:
            end_process(self._process, timeout_s)
            self._process = None

    def _start(self) -> None:
        self._started_s = time.monotonic()
        try:
            environ = environment_for(self.backend, self._options) | {"OMP_NUM_THREADS": "1"}
            folder = self.run_dir / TRACKERS_FOLDER
            folder.mkdir(exist_ok=True)
            with _open_log(self._log_path) as log:
                self._process = subprocess.Popen(
                    self._command,
                    env=environ,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C at the terminal is for the job
                )
        except PluginError as error:
            state = self.state
            state.phase, state.error = DeliveryPhase.BROKEN, f"PluginError: {error}"
            state.save(self.run_dir)
            self._ended(EXIT_BROKEN)
        except OSError as error:
            _log.warning("%r cannot be started: %s", self, error)
            self._pause()

    def _ended(self, status: int) -> None:
        if status == EXIT_DONE:
            self.over = True
            return

        has_crashed = status not in EXITS and not self.over  # else it was asked to end
        state = self._record_crash(status) if has_crashed else self.state
        if status == EXIT_BROKEN:
            self.over = True
            _log.error("%s cannot deliver: %s", self.backend, state.error)
            return

        if status == EXIT_TAKEN:  # `traceml sync` delivers, or a process whose aggregator was just killed
            self._due_s = time.monotonic() + _TAKEN_PAUSE_S
            return

        if time.monotonic() - self._started_s > _LONG_LIFE_S:
            self._pause_s = _FIRST_PAUSE_S

        self._pause()
        if state.retry_at and not self._uses_fallback(state):  # a tracker that failed is not called before that
            self._due_s = max(self._due_s, time.monotonic() + state.retry_at - time.time())

    def _record_crash(self, status: int) -> TrackerState:
        """Record that the process died, as of a tracker's library that crashes, as a failure; return the state."""
        how = end_of_status(status)
        _log.warning("%r %s", self, how)
        with locked(self.run_dir, self.backend) as is_locked:
            state = self.state
            if is_locked:  # else another process delivers, and writes the state
                why = f"the process that calls the tracker's library {how}; its output is in {self._log_path}"
                RetryPolicy().record_failure(state, TrackerFailure(FailureKind.TRANSIENT, why))
                state.save(self.run_dir)

        return state

    @property
    def _log_path(self) -> Path:
        """File with what the processes print."""
        path = TrackerState.path_in(self.run_dir, self.backend)
        return path.with_name(f"{path.name[:-11]}.log")

    def _uses_fallback(self, state: TrackerState) -> bool:
        """Whether the next process will deliver to the fallback instead of waiting."""
        return bool(self._options.get("fallback")) and state.phase in _FALLBACK_PHASES and not state.fallback_done

    def _pause(self) -> None:
        self._due_s = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)


def _open_log(path: Path) -> BinaryIO:
    """Open a log for appending; start a new one when it is too long."""
    return path.open("ab" if not path.exists() or path.stat().st_size < _LOG_BYTES else "wb")
