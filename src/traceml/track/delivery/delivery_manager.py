"""Deliveries of the aggregator's runs: one process per run and backend, as long as there is something to do."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from traceml.database.store.reader import StoreReader
from traceml.errors import StoreError
from traceml.fail_open import fail_open
from traceml.run_folder import STORE_NAME
from traceml.track.delivery.delivery_plan import DeliveryPlan
from traceml.track.delivery.delivery_process import STOP_S, DeliveryProcess
from traceml.track.tracker_state import states_of

__all__ = ["STALL_LIMIT_S", "DeliveryManager", "RunDeliveries"]

# A tracker that accepts nothing for this long does not delay the end of a run or of the aggregator.
STALL_LIMIT_S = 10.0

# Reading the states of deliveries takes longer than what they are read for.
_CURSORS_S = 5.0

_log = logging.getLogger("traceml")


class RunDeliveries:
    """All deliveries of one run, as its experiments request them.

    Args:
        start: starts the process of one backend; a `DeliveryProcess` without its first arguments.
    """

    def __init__(self, run_dir: Path, start: Callable[[Path, str, dict[str, Any]], DeliveryProcess]) -> None:
        self.run_dir = run_dir
        self._start = start
        self.processes: dict[str, DeliveryProcess] = {}
        self.ended = False
        self._reader: StoreReader | None = None
        self._plan: DeliveryPlan | None = None
        self._cursors: list[int] = []
        self._cursors_until_s = 0.0

    def poll(self, *, ended: bool) -> None:
        """Start the requested deliveries, and supervise those that run."""
        if ended and not self.ended:
            for process in self.processes.values():
                process.retry_now()
        elif self.ended and not ended:
            for process in self.processes.values():
                process.resume()

        self.ended = ended
        self._find_backends()
        for process in self.processes.values():
            process.poll()

    @property
    def unfinished(self) -> list[DeliveryProcess]:
        """Deliveries that have something left to do."""
        return [process for process in self.processes.values() if not process.over]

    @property
    def cursors(self) -> list[int]:
        """Id of the last frame of the store that each delivery has done, as of the last seconds; they only grow."""
        if time.monotonic() >= self._cursors_until_s:
            self._cursors_until_s = time.monotonic() + _CURSORS_S
            done = {state.backend: int(state.cursor.get("frame", 0)) for state in states_of(self.run_dir)}
            self._cursors = list((dict.fromkeys(self.processes, 0) | done).values())

        return self._cursors

    def close(self) -> None:
        """End the processes, which save their progress first, and close the store. Takes at most a few seconds."""
        for process in self.processes.values():
            process.stop()

        until_s = time.monotonic() + STOP_S
        for process in self.processes.values():
            process.join(max(until_s - time.monotonic(), 0.1))

        if self._reader is not None:
            self._reader.close()
            self._reader = self._plan = None

    def _find_backends(self) -> None:
        """Read which backends the run's experiments request."""
        try:
            if self._plan is None:
                self._reader = StoreReader(self.run_dir / STORE_NAME)
                self._plan = DeliveryPlan(self._reader, self.run_dir)

            if not self._plan.refresh():
                return
        except StoreError as error:
            _log.debug("%s", error)
            return

        for backend, experiment in self._plan.backends().items():
            if backend not in self.processes:
                self._cursors_until_s = 0.0
                self.processes[backend] = self._start(self.run_dir, backend, experiment.options(backend))


class DeliveryManager:
    """The deliveries of an aggregator's runs.

    Args:
        stall_limit_s: when a run is over, how long to wait for a tracker that accepts nothing; None waits forever.
        nice: nice value of the processes.
        profile: write a profile of each process.
    """

    def __init__(self, stall_limit_s: float | None, nice: int, *, profile: bool) -> None:
        self._stall_limit_s = stall_limit_s
        self._start = partial(DeliveryProcess, nice=nice, profile=profile)
        self._runs: dict[Path, RunDeliveries] = {}

    def poll(self, run_dir: Path, *, ended: bool) -> None:
        """Supervise the deliveries of a run; call it often, also after its end, until it is delivered.

        An error is logged, and the deliveries of other runs continue: what a run announces came over a connection.
        """
        if run_dir not in self._runs:
            self._runs[run_dir] = RunDeliveries(run_dir, self._start)

        with fail_open(_log, "track", f"run {run_dir.name} could not be delivered", once=True, level=logging.ERROR):
            self._runs[run_dir].poll(ended=ended)

    def cursors(self, run_dir: Path) -> list[int]:
        """Return the id of the last frame of a run's store that each of its deliveries has done."""
        return self._runs[run_dir].cursors if run_dir in self._runs else []

    def pop_delivered(self) -> list[RunDeliveries]:
        """Remove and return the runs that are over and whose deliveries have ended or stall; the caller closes them."""
        delivered = [run for run in self._runs.values() if run.ended and not self._is_delivering(run)]
        for run in delivered:
            del self._runs[run.run_dir]

        return delivered

    @property
    def ended_runs(self) -> list[Path]:
        """Runs that are over and not delivered yet."""
        return [run_dir for run_dir, run in self._runs.items() if run.ended]

    def forget(self, run_dir: Path) -> None:
        """Forget a run that is discarded."""
        run = self._runs.pop(run_dir, None)
        if run is not None:
            run.close()

    def stop(self) -> None:
        """End all processes; they save their progress first."""
        for run in self._runs.values():
            for process in run.processes.values():
                process.stop()

        for run in self._runs.values():
            run.close()

        self._runs.clear()

    def _is_delivering(self, run: RunDeliveries) -> bool:
        unfinished = run.unfinished
        if self._stall_limit_s is None:
            return bool(unfinished)

        stuck = {process.backend for process in unfinished if process.is_stuck(self._stall_limit_s)}
        return any(process.backend not in stuck for process in unfinished)
