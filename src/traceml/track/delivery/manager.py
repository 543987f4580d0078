"""Keeps the deliveries of runs: one process per run and backend, for as long as there is something to do.

The aggregator keeps those of its runs, `traceml sync` those of old runs.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from traceml.database.reader import StoreReader
from traceml.database.store_file import STORE_NAME
from traceml.errors import StoreError
from traceml.track.delivery.delivery_process import STOP_S, DeliveryProcess
from traceml.track.delivery.plan import DeliveryPlan

__all__ = ["PATIENCE_S", "DeliveryManager", "RunDeliveries"]

# A tracker that takes nothing for so long holds up nobody's end.
PATIENCE_S = 10.0

_log = logging.getLogger("traceml")


class RunDeliveries:
    """All deliveries of one run, as its experiments ask for them.

    Args:
        run_dir: the run's folder.
        nice: how far its processes step back behind the training.
    """

    def __init__(self, run_dir: Path, nice: int = 19) -> None:
        self.run_dir = run_dir
        self._nice = nice
        self.processes: dict[str, DeliveryProcess] = {}
        self.ended = False
        self._reader: StoreReader | None = None
        self._plan: DeliveryPlan | None = None

    def look(self, *, ended: bool) -> None:
        """Start what is asked for, and keep what runs.

        Args:
            ended: whether the run is over.
        """
        if ended and not self.ended:
            for process in self.processes.values():
                process.probe()
        elif self.ended and not ended:
            for process in self.processes.values():
                process.wake()

        self.ended = ended
        self._find()
        for process in self.processes.values():
            process.keep()

    @property
    def unfinished(self) -> list[DeliveryProcess]:
        """Those that have something to do yet."""
        return [process for process in self.processes.values() if not process.over]

    def leave(self) -> None:
        """End what still runs: it saves where it stands first; then close the store. Takes a few seconds at most."""
        for process in self.processes.values():
            process.stop()

        until_s = time.monotonic() + STOP_S
        for process in self.processes.values():
            process.join(max(until_s - time.monotonic(), 0.1))

        if self._reader is not None:
            self._reader.close()
            self._reader = self._plan = None

    def _find(self) -> None:
        """Read which backends the run's experiments ask for."""
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
                self.processes[backend] = DeliveryProcess(
                    self.run_dir, backend, experiment.options(backend), nice=self._nice
                )


class DeliveryManager:
    """The deliveries of an aggregator's runs.

    Args:
        patience_s: when a run is over, how long a tracker that takes nothing is waited for; None waits for ever.
        nice: how far the processes step back behind the training.
    """

    def __init__(self, patience_s: float | None, nice: int = 19) -> None:
        self._patience_s = patience_s
        self._nice = nice
        self._runs: dict[Path, RunDeliveries] = {}

    def look(self, run_dir: Path, *, ended: bool) -> None:
        """Look after the deliveries of a run; call it often, also after its end, until it is settled."""
        if run_dir not in self._runs:
            self._runs[run_dir] = RunDeliveries(run_dir, self._nice)

        self._runs[run_dir].look(ended=ended)

    def settled(self) -> list[RunDeliveries]:
        """Return the runs that are over and have no delivery that goes on; they are forgotten here: `leave` them."""
        settled = [run for run in self._runs.values() if run.ended and not self._goes_on(run)]
        for run in settled:
            del self._runs[run.run_dir]

        return settled

    @property
    def ended_runs(self) -> list[Path]:
        """The runs that are over and not settled yet."""
        return [run_dir for run_dir, run in self._runs.items() if run.ended]

    def forget(self, run_dir: Path) -> None:
        """Forget a run that came to nothing."""
        run = self._runs.pop(run_dir, None)
        if run is not None:
            run.leave()

    def stop(self) -> None:
        """End all processes: they save where they stand first."""
        for run in self._runs.values():
            for process in run.processes.values():
                process.stop()

        for run in self._runs.values():
            run.leave()

        self._runs.clear()

    def _goes_on(self, run: RunDeliveries) -> bool:
        unfinished = run.unfinished
        if self._patience_s is None:
            return bool(unfinished)

        stuck = {process.backend for process in unfinished if process.is_stuck(self._patience_s)}
        return any(process.backend not in stuck for process in unfinished)
