"""One delivery process: started, started again after its death, and told apart from one that is stuck.

What it is doing is read from its state file; nothing is sent to it but SIGTERM.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from traceml.track.delivery.credentials import environment_for
from traceml.track.tracker_state import EXIT_BROKEN, EXIT_DONE, EXIT_TAKEN, FOLDER, DeliveryPhase, TrackerState

__all__ = ["STOP_S", "DeliveryProcess"]

STOP_S = 5.0
# After a death: at once, then after pauses that double.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _LIVED_LONG_S = 0.2, 30.0, 30.0
_START_S = 45.0  # a process imports its library first, on a host that may be busy with training
_BATCH_S = 25.0  # one batch may take long on such a host
_STARVED_S = 45.0
_TAKEN_PAUSE_S = 0.5
_LOG_BYTES = 1 << 20
_FAILING = {DeliveryPhase.OPEN, DeliveryPhase.UNAUTHORIZED, DeliveryPhase.BROKEN}

_log = logging.getLogger("traceml")


class DeliveryProcess:
    """One backend's process, kept alive while there is something to do for it.

    Args:
        run_dir: the run's folder.
        backend: the backend.
        options: its options, by which its environment is chosen.
        once: deliver what is there and end, rather than follow.
        forced: options that it is given instead of those of the run, which then delivers everything. They stand in
            its command line, so none may be a secret.
        settings: what `plan.told_by` returned of the settings of now, with `forced`.
        nice: how far it steps back behind the training.
    """

    def __init__(
        self,
        run_dir: Path,
        backend: str,
        options: dict[str, Any],
        *,
        once: bool = False,
        forced: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
        nice: int = 19,
    ) -> None:
        self.run_dir = run_dir
        self.backend = backend
        self._options = forced if forced is not None else options
        self._once = once
        self._forced = forced
        self._settings = settings
        self._nice = nice
        self._process: subprocess.Popen[bytes] | None = None
        self._pause_s = _FIRST_PAUSE_S
        self._due_s = self._started_s = 0.0
        self._moved_s = time.monotonic()
        self._seen: tuple[Any, ...] = ()
        self._waited_s = 0.0
        self.over = False
        """Whether nothing is left to be done by this process: all is delivered, or a person has to mend something."""

    def __repr__(self) -> str:
        return f"<delivery of {self.run_dir.name} to {self.backend}>"

    @property
    def state(self) -> TrackerState:
        """Where it stands."""
        return TrackerState.load(self.run_dir, self.backend)

    @property
    def pid(self) -> int | None:
        """Its process, None where there is none."""
        return self._process.pid if self._process is not None else None

    def keep(self) -> None:
        """Start it if it is time to, and take note of how it ended. Call it often."""
        if self._process is not None and (status := self._process.poll()) is not None:
            self._process = None
            self._ended(status)

        if not self.over and self._process is None and time.monotonic() >= self._due_s:
            self._start()

    def probe(self) -> None:
        """Do not wait for the next try: the run has ended, and somebody waits."""
        self._due_s = 0.0
        self._moved_s = time.monotonic()

    def wake(self) -> None:
        """Go on after all: the run does."""
        self.over = False

    @property
    def is_given_up(self) -> bool:
        """Whether its tracker fails and nothing but time will help; its fallback has got everything, if it has one."""
        state = self.state
        return state.phase in _FAILING and (state.stood_in or not self._stands_in(state))

    def is_stuck(self, patience_s: float) -> bool:
        """Whether nothing has moved for so long, and no call is under way that may take longer."""
        state = self.state
        if state.stood_in:
            return True

        now = (
            state.passed,
            state.delivered,
            state.derived,
            state.cursor.get("frame"),
            state.phase is DeliveryPhase.DONE,
        )
        waited_s = _waited_for_a_core_s(self.pid)
        if now != self._seen:
            self._seen, self._moved_s, self._waited_s = now, time.monotonic(), waited_s

        waiting = state.phase in {
            DeliveryPhase.WAITING,
            DeliveryPhase.OPEN,
            DeliveryPhase.UNAUTHORIZED,
            DeliveryPhase.BROKEN,
        }
        if not waiting and self._process is not None:
            patience_s = max(patience_s, _START_S if state.pid != self._process.pid else _BATCH_S)
            if state.pid == self._process.pid and state.is_in_slow_call:
                return False

        # Who steps back behind others that use every core is slow, not stuck; but nobody waits for that for ever.
        waited_s = min(max(waited_s - self._waited_s, 0.0), _STARVED_S)
        return time.monotonic() - self._moved_s - waited_s > patience_s

    def stop(self) -> None:
        """Ask it to end soon."""
        self.over = True
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def join(self, timeout_s: float = STOP_S) -> None:
        """Wait for its end after `stop`, and enforce it."""
        if self._process is None:
            return

        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

        self._process = None

    def _start(self) -> None:
        command = [sys.executable, "-m", "traceml.track.delivery", str(self.run_dir), self.backend]
        command += ["--parent", str(os.getpid()), "--nice", str(self._nice)]
        command += ["--once"] if self._once else []
        command += ["--options", json.dumps(self._forced)] if self._forced is not None else []
        command += ["--settings", json.dumps(self._settings)] if self._settings is not None else []
        self._started_s = time.monotonic()
        environ = environment_for(self.backend, self._options) | {"OMP_NUM_THREADS": "1"}
        try:
            folder = self.run_dir / FOLDER
            folder.mkdir(exist_ok=True)
            with _log_file(folder / f"{TrackerState.path_in(self.run_dir, self.backend).name[:-11]}.log") as log:
                self._process = subprocess.Popen(
                    command,
                    env=environ,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C at the terminal is for the job
                )
        except OSError as error:
            _log.warning("%r cannot be started: %s", self, error)
            self._pause()

    def _ended(self, status: int) -> None:
        if status == EXIT_DONE:
            self.over = True
            return

        state = self.state
        if status == EXIT_BROKEN:
            self.over = True
            _log.error("%s cannot deliver: %s", self.backend, state.error)
            return

        if status == EXIT_TAKEN:  # by `traceml sync`, or by one whose aggregator was killed a moment ago
            self._due_s = time.monotonic() + _TAKEN_PAUSE_S
            return

        if time.monotonic() - self._started_s > _LIVED_LONG_S:
            self._pause_s = _FIRST_PAUSE_S

        if status < 0:
            _log.warning("%r was ended by signal %d", self, -status)

        self._pause()
        if state.retry_at and not self._stands_in(state):  # a tracker that failed is left alone until then
            self._due_s = max(self._due_s, time.monotonic() + state.retry_at - time.time())

    def _stands_in(self, state: TrackerState) -> bool:
        """Whether the next process will deliver to the fallback instead of waiting."""
        return (
            bool(self._options.get("fallback"))
            and state.phase in _FAILING - {DeliveryPhase.BROKEN}
            and not state.stood_in
        )

    def _pause(self) -> None:
        self._due_s = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)


def _waited_for_a_core_s(pid: int | None) -> float:
    """Return how long a process's main thread was ready without a core; 0 where that is not told."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


@contextlib.contextmanager
def _log_file(path: Path) -> Iterator[Any]:
    """Open a log for appending, begun anew when it has grown too long."""
    mode = "ab" if not path.exists() or path.stat().st_size < _LOG_BYTES else "wb"
    with path.open(mode) as file:
        yield file
