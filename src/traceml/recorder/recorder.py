"""Recorder of one rank, as `traceml.init` returns it."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from traceml.database.schema import LOGGED, METRICS
from traceml.errors import RunNotFoundError
from traceml.fail_open import fail_open
from traceml.ids import RankIdentity
from traceml.recorder.identity import Identity, SpawnedFrom, identify
from traceml.recorder.recorder_facts import RecorderEnd, RecorderStatistics
from traceml.recorder.recording import Recording

if TYPE_CHECKING:
    from traceml.database.flight.flight import FlightFile
    from traceml.instrument import Instrumentation
    from traceml.recorder.sending.uploads import FileUploader
    from traceml.settings import Config

__all__ = ["Recorder", "RecorderStatistics"]

_log = logging.getLogger("traceml")

STOP_TIMEOUT_S = 5.0
_SHOW_S = 3.0


class Recorder:
    """Recorder of one rank. `traceml.init` makes it; a disabled one does nothing.

    Examples:
        >>> recorder = traceml.init(local=True)
        >>> recorder.enabled
        True

    Args:
        config: the settings in force.
        parent: identity of the process that this one was forked from, when it logs for that one's run.
        spawned: facts about the process that `multiprocessing` has spawned this one from, for the same reason.
    """

    def __init__(self, config: Config, *, parent: Identity | None = None, spawned: SpawnedFrom | None = None) -> None:
        self.config = config
        self.spawned = spawned
        self.pid = os.getpid()
        self.viewer: Callable[[Path], None] | None = None
        """Shows a run's folder; set by the package that may read runs."""
        self.on_stored: Callable[[Path], None] = lambda _run_dir: None
        """Called with the run's folder when an aggregator has named it, on any thread; set before the start."""
        self._parent = parent if parent is not None else spawned.identity if spawned is not None else None
        self._recording: Recording | None = None
        self._state = "disabled"
        self._stopping = threading.Lock()
        self._before_stop: list[Callable[[], None]] = []
        self.will_trace = False
        """Whether steps are traced, or will be: an aggregator may name the run's folder before the hooks are there."""
        self.end = RecorderEnd()
        """How it has ended; does not refer to the recorder, whose tables take memory."""

    def __repr__(self) -> str:
        if self._recording is None:
            return "<traceml recorder, disabled>"

        own = self.rank_identity
        return f"<traceml recorder of rank {own.rank} of {own.world_size}, {self._state}, {self.address}>"

    @property
    def enabled(self) -> bool:
        """Whether it records."""
        return self._state == "running"

    @property
    def is_over(self) -> bool:
        """Whether it has recorded and was stopped."""
        return self._state == "stopped"

    @property
    def tracing(self) -> bool:
        """Whether the hooks are installed; else only logged values are recorded."""
        return self._recording is not None and self._recording.tracing.is_on

    @property
    def identity(self) -> Identity | None:
        """Rank and job; None before the start."""
        return self._recording.identity if self._recording is not None else None

    @property
    def rank_identity(self) -> RankIdentity:
        """Rank, world size and local rank, as far as they are known."""
        return self._recording.identity.rank_identity if self._recording is not None else RankIdentity()

    @property
    def job(self) -> str:
        """Key by which the ranks of this job find each other's run."""
        return self._recording.identity.job if self._recording is not None else ""

    @property
    def is_child(self) -> bool:
        """Whether it logs in a child, for the run of the process that this one was forked or spawned from."""
        return self._parent is not None

    @property
    def instrumentation(self) -> Instrumentation | None:
        """The installed hooks; None if nothing is traced."""
        return self._recording.tracing.instrumentation if self._recording is not None else None

    @property
    def flight(self) -> FlightFile | None:
        """Tables of the recorder; None before the start."""
        return self._recording.flight if self._recording is not None else None

    @property
    def files(self) -> FileUploader | None:
        """Uploader of files to the run's folder; None before the start."""
        return self._recording.files if self._recording is not None else None

    @property
    def address(self) -> str:
        """The aggregator's address; before the first connection that of the settings."""
        connected = self._recording.address if self._recording is not None else ""
        return connected or f"{self.config.host}:{self.config.port}"

    @property
    def run_dir(self) -> Path | None:
        """The run's folder, as reported by the aggregator; None before a connection, and where nothing is recorded."""
        folder = self._recording.flight.identity.get("run_dir") if self._recording is not None else None
        return Path(folder) if folder else None

    def show(self) -> None:
        """Show the run so far: charts in a notebook, text elsewhere. Waits until the rows so far are stored.

        Raises:
            RunNotFoundError: nothing is recorded, or the run's folder is on another host.
        """
        if self.run_dir is None or self.viewer is None:
            raise RunNotFoundError("there is no run to show: traceml is disabled, or no aggregator has answered yet.")

        if self._recording is not None and self.enabled:
            self._recording.wait_until_stored(_SHOW_S)

        self.viewer(self.run_dir)

    @property
    def is_deferred(self) -> bool:
        """Whether it waits for a training before it connects."""
        return self._recording is not None and self._recording.check_deferred()

    def release(self) -> None:
        """Connect, as this process trains."""
        if self._recording is not None:
            self._recording.release()

    def start(self, *, wait: bool = True, tracing: bool = True, defer_connect: bool = False) -> None:
        """Reserve the tables, connect, install the hooks, start the thread; see `lifecycle.start`."""
        is_spawned = self.spawned is not None
        identity = identify(self.config) if self._parent is None else self._parent.of_child(provisional=is_spawned)
        recording = Recording(
            self.config,
            identity,
            is_child=self.is_child,
            statistics=self.statistics,
            defer_connect=defer_connect,
            on_stored=self.on_stored,
        )
        self._recording, self.will_trace = recording, tracing
        try:
            if wait:
                recording.connect()

            recording.start(tracing=tracing)
            self._state = "running"
            recording.export_to_children(self.spawned.experiment if self.spawned is not None else 0)
            _log.debug("started %r of job %s, tracing %s, flight %s", self, self.job, tracing, recording.flight.path)
        except BaseException:
            self._state = "stopped"
            self._recording = None
            recording.abandon()
            raise

    def trace(self) -> None:
        """Add tracing to a recorder that has only logged so far."""
        self.will_trace = True
        if self._recording is not None:
            self._recording.trace()

    def stop(self, reason: str = "finished", *, timeout_s: float = STOP_TIMEOUT_S) -> bool:
        """Remove the hooks, send the remaining rows, say bye; return whether everything is stored.

        Later calls do nothing.

        Args:
            reason: the bye's reason: `finished` or `failed`.
            timeout_s: time for all of it.
        """
        recording = self._recording
        if recording is None or not self.enabled or self.pid != os.getpid():
            return True
        if not self._stopping.acquire(blocking=False):
            return True

        self._state = "stopped"
        all_stored = recording.finish(reason, timeout_s)
        end = self.end
        end.rank_identity, end.viewer = self.rank_identity, self.viewer
        end.all_stored, end.is_stored_late, end.failed = all_stored, recording.is_stored_late, recording.failed
        return all_stored

    def export_to_children(self, experiment: int = 0) -> None:
        """Let children that are spawned from now on log for this run."""
        if self._recording is not None:
            self._recording.export_to_children(experiment)

    def before_stop(self, function: Callable[[], None]) -> None:
        """Call `function` when the recorder is about to stop, while rows can still be appended."""
        self._before_stop.append(function)

    def every_cycle(self, function: Callable[[bool], None]) -> None:
        """Call `function` in each cycle of the recorder's thread, with True in the last; once, however often given."""
        if self._recording is not None:
            self._recording.thread.every_cycle(function)

    def after(self, delay_s: float, function: Callable[[], None]) -> None:
        """Call `function` on the recorder's thread after this many seconds."""
        if self._recording is not None:
            self._recording.thread.call_later(delay_s, function)

    def prepare_stop(self) -> None:
        """Call the functions given to `before_stop`, the last first."""
        while self._before_stop and self.pid == os.getpid():
            with fail_open(_log, "recorder", "a step of the shutdown failed"):
                self._before_stop.pop()()

    def wait_for_files(self, timeout_s: float) -> bool:
        """Wait until the files being copied have arrived, while they make progress; return whether they have."""
        return self._recording is None or self._recording.wait_for_files(timeout_s)

    def wait_until_stored(self, timeout_s: float) -> bool:
        """Wait until the rows appended before this call are stored; return whether they are."""
        return self._recording is None or self._recording.wait_until_stored(timeout_s)

    @property
    def logged_rows(self) -> dict[str, int]:
        """Number of rows appended so far to each table of logged values."""
        flight = self.flight
        if flight is None:
            return {}

        return {METRICS.name: flight.metrics.appended, LOGGED.name: flight.log(LOGGED.name).appended}

    @property
    def stream(self) -> int | None:
        """Number of this recorder's rows in the run's store; None before a connection."""
        return self._recording.stream if self._recording is not None else None

    @property
    def live_recording(self) -> Recording | None:
        """The recording of this process while it runs."""
        return self._recording if self.enabled and self.pid == os.getpid() else None

    @property
    def failed(self) -> bool:
        """Whether an exit with an exception or a status other than 0 was recorded."""
        return self._recording is not None and self._recording.failed

    def forget(self) -> None:
        """Become a no-op in a forked child: the tables, the thread and the connection are the parent's."""
        self._state = "stopped"
        if self._recording is not None:
            self._recording.forget()

    def statistics(self) -> RecorderStatistics:
        """Return counts and costs so far."""
        if self._recording is None:
            return RecorderStatistics(self._state)

        return self._recording.statistics(self._state, self.address)
