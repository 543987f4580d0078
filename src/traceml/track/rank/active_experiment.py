"""Loggers of the experiments that are open, and of the run as a whole."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from traceml import settings
from traceml.fail_open import fail_open
from traceml.recorder.current_recorder import current_recorder, on_change
from traceml.recorder.identity import script_name
from traceml.track.rank.announcement import announcement, storable_trackers
from traceml.track.rank.logger import Logger

__all__ = ["ExperimentLoggers", "loggers"]

_log = logging.getLogger("traceml")
_UNDECIDED = 10_000


class ExperimentLoggers:
    """Open experiments' loggers, the innermost last.

    Attributes:
        root: logs for the run's own experiment.
        active: logs for the innermost experiment that is open, else for the run's own.
    """

    def __init__(self) -> None:
        self.root = Logger(0, self._root_row)
        self.active = self.root
        self._open: list[Logger] = []
        self._backends: dict[int, tuple[str, ...]] = {}  # by number of the experiment, of `_announced_to`
        self._announced_to: object = None
        self._first: Logger | None = None  # of the first experiment that the script began with the current recorder
        self._undecided: deque[Callable[[Logger], object]] = deque(maxlen=_UNDECIDED)

    @property
    def has_announced(self) -> bool:
        """Whether the run's own experiment, or one of the script, has begun with the current recorder."""
        return self._first is not None or self.root.has_begun

    def activate(self, logger: Logger) -> None:
        """Open an experiment inside those that are open."""
        self._first = self._first or logger
        self._open.append(logger)
        self._set_active(logger)

    def deactivate(self, logger: Logger) -> None:
        """Close an experiment; the one around it is active again."""
        self._open.remove(logger)
        self._set_active(self._open[-1] if self._open else self.root)

    def announce_run(self) -> None:
        """Announce the run's own experiment, unless an explicit one has taken its place."""
        if self._first is None:
            self.root.begin()

        self.settle()

    def note_backends(self, number: int, backends: Sequence[str]) -> None:
        """Record the trackers of an experiment that was announced to the current recorder."""
        recorder = current_recorder()
        if recorder is not self._announced_to:
            self._announced_to = recorder
            self._backends.clear()

        self._backends[number] = tuple(backends)

    def backends(self, number: int | None = None) -> set[str]:
        """Return the trackers of an experiment; by default of all that were announced to the current recorder.

        Also after its stop.
        """
        if self._announced_to is not current_recorder():
            return set()
        if number is not None:
            return set(self._backends.get(number, ()))

        return {name for names in self._backends.values() for name in names}

    def when_decided(self, action: Callable[[Logger], object]) -> None:
        """Log something about the whole run as soon as it is known which experiment represents the run.

        That is the run's own once something is logged for it, or the first one that the script begins.
        """
        self._undecided.append(action)
        if self.has_announced:
            self.settle()

    def settle(self) -> None:
        """Run the actions that wait for the experiment that represents the run."""
        while True:
            try:
                action = self._undecided.popleft()
            except IndexError:  # also where another thread has just taken the last one
                return

            action(self._open[0] if self._open else self._first or self.root)

    def forget_run(self, forked: bool) -> None:
        """Forget which experiment represents the run: the next recorder has another run.

        Args:
            forked: whether the recorder changes because this process was forked, and the run stays.
        """
        if forked:
            return

        self._first = self._open[0] if self._open else None
        self._undecided.clear()
        recorder = current_recorder()
        if recorder is not None and recorder.spawned is not None:
            self.root.experiment = recorder.spawned.experiment

    def _set_active(self, logger: Logger) -> None:
        """Set the active logger; children that are spawned from now on log for its experiment too."""
        self.active = logger
        recorder = current_recorder()
        if recorder is not None and recorder.enabled:
            recorder.export_to_children(logger.experiment)

    def _root_row(self, config: settings.Config) -> dict[str, Any] | None:
        """Return the announcement of the run's own experiment.

        None if the settings name no tracker that may be used, and in a spawned child, whose parent has announced it.
        """
        if not config.backend or self.root.experiment:
            return None

        with fail_open(_log, "track", "the run could not be announced to its trackers"):
            chosen = storable_trackers(config)
            if chosen.backends:
                about = {"id": config.run_id or "", "name": config.run_name or script_name(), "tags": {}}
                row = about | announcement(config, chosen.backends, chosen.options)
                self.note_backends(self.root.experiment, chosen.backends)
                return row

        return None


loggers = ExperimentLoggers()
on_change(loggers.forget_run)
