"""What a run wants delivered: its experiments, as the ranks announced them, and the settings that they came with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from traceml.database.reader import StoreReader
from traceml.database.schema import LOGGED
from traceml.settings import Config

__all__ = ["DeliveryPlan", "PlannedExperiment", "settings_of", "tightened", "told_by"]

# What an experiment's row may say of the settings; where it is silent, the defaults hold.
_SETTINGS = (
    "include", "exclude", "mask", "local_only", "metrics_interval", "track_system", "max_retries", "backoff_factor",
    "max_backoff",
)  # fmt: skip


@dataclass(slots=True)
class PlannedExperiment:
    """One experiment of a run, the same on all its ranks.

    Attributes:
        key: what its state is kept under: the number and the name.
        row: the newest row that announced it.
        open_on: streams that have begun it and not ended it.
        begun_on: streams that have begun it.
    """

    key: str
    number: int
    row: dict[str, Any]
    open_on: set[int] = field(default_factory=set)
    begun_on: set[int] = field(default_factory=set)

    @property
    def name(self) -> str:
        """What the user called it."""
        return str(self.row.get("name") or "run")

    @property
    def backends(self) -> list[str]:
        """Which backends it is delivered to."""
        return [str(name) for name in self.row.get("backends") or ()]

    def options(self, backend: str) -> dict[str, Any]:
        """Return the options of a backend."""
        return dict((self.row.get("options") or {}).get(backend) or {})

    def settings(self) -> Config:
        """Return the settings that it came with, the defaults for what it does not say."""
        return settings_of(self.row)


def settings_of(row: Mapping[str, Any]) -> Config:
    """Return the settings that a row tells, the defaults for what it does not say."""
    said = {name: row[name] for name in _SETTINGS if row.get(name) is not None}
    lists = {name: tuple(value) for name, value in said.items() if isinstance(value, list)}
    return Config(**{**said, **lists})


def told_by(config: Config) -> dict[str, Any]:
    """Return what `settings_of` reads, fit for JSON."""
    return {name: getattr(config, name) for name in _SETTINGS}


def tightened(config: Config, now: Config) -> Config:
    """Return a run's settings with what those of now keep back in addition; they let nothing out that it kept back."""
    return replace(
        config,
        mask=(*config.mask, *(pattern for pattern in now.mask if not pattern.startswith("!"))),
        exclude=(*config.exclude, *now.exclude),
        include=config.include or now.include,
        local_only=config.local_only or now.local_only,
    )


class DeliveryPlan:
    """A run's experiments, read from its store.

    Args:
        reader: the store.
        run_dir: the run's folder.
    """

    def __init__(self, reader: StoreReader, run_dir: Path) -> None:
        self._reader = reader
        self._run_dir = run_dir
        self._after = 0
        self._by_number: dict[tuple[int, int], PlannedExperiment] = {}
        self._numbered: dict[int, PlannedExperiment] = {}
        self.experiments: dict[str, PlannedExperiment] = {}

    def refresh(self) -> bool:
        """Read what was announced since the last call; return whether anything was.

        Raises:
            StoreError: the store cannot be read.
        """
        found = False
        for frame in self._reader.frames(LOGGED.name, self._after) if LOGGED.name in self._reader.tables else ():
            self._after = frame.id
            for row in frame.maps():
                if row.get("kind") == "experiment":
                    self._begin(frame.stream, row)
                    found = True

        return found

    def of(self, stream: int, number: int) -> PlannedExperiment | None:
        """Return the experiment that a stream's number means; None where nobody has announced one under that number.

        A forked child may log for its parent's before its own announcement has come.
        """
        return self._by_number.get((stream, number)) or self._numbered.get(number)

    def backends(self) -> dict[str, PlannedExperiment]:
        """Return every backend that is asked for, with the first experiment that does."""
        wanted: dict[str, PlannedExperiment] = {}
        for experiment in self.experiments.values():
            for backend in experiment.backends:
                wanted.setdefault(backend, experiment)

        return wanted

    def own(self) -> PlannedExperiment:
        """Return an experiment that stands for the run as a whole, for what was logged outside of any."""
        meta = self._reader.meta().get("run", {})
        row = {
            "experiment": 0, "id": self._run_dir.name, "name": meta.get("name") or self._run_dir.name,
            "project": meta.get("project") or "default", "run_dir": os.fspath(self._run_dir),
        }  # fmt: skip
        return PlannedExperiment(_key(row), 0, row)

    def adopt(self, stream: int, experiment: PlannedExperiment) -> PlannedExperiment:
        """Let a stream's number 0 mean an experiment that nobody announced."""
        known = self.experiments.setdefault(experiment.key, experiment)
        self._by_number[stream, experiment.number] = known
        return known

    def _begin(self, stream: int, row: dict[str, Any]) -> None:
        number = int(row.get("experiment", 0))
        experiment = self.experiments.setdefault(_key(row), PlannedExperiment(_key(row), number, row))
        experiment.row = {**experiment.row, **row} if stream in experiment.begun_on else {**row, **experiment.row}
        experiment.begun_on.add(stream)
        experiment.open_on.add(stream)
        self._by_number[stream, number] = experiment
        self._numbered.setdefault(number, experiment)


def _key(row: Mapping[str, Any]) -> str:
    return f"{row.get('experiment', 0)}-{row.get('name') or 'run'}"
