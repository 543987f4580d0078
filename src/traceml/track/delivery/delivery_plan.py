"""A run's experiments, as the ranks announced them, with the settings of the announcement."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from traceml.database.schema import LOGGED
from traceml.database.store.reader import StoreReader
from traceml.errors import PluginError
from traceml.ids import DEFAULT_PROJECT
from traceml.settings import Config
from traceml.track.filters import DELIVERY_SETTINGS
from traceml.track.plugins.plugin_metadata import PluginType
from traceml.track.plugins.plugin_registry import BUILT_IN, check_name, is_sent
from traceml.track.plugins.plugin_signature import SIGNED, is_signed

__all__ = ["DeliveryPlan", "PlannedExperiment", "requested_backends", "restricted", "settings_of"]


class PlannedExperiment(msgspec.Struct):
    """One experiment of a run, the same on all its ranks."""

    key: str  # key of its state: the number and the name
    number: int
    row: dict[str, Any]  # the newest row that announced it
    begun_on: set[int] = msgspec.field(default_factory=set)  # streams that have begun it
    started: float = 0.0  # epoch seconds at which the first of them did; 0 if unknown

    @property
    def name(self) -> str:
        """Name given by the user."""
        return str(self.row.get("name") or "run")

    @property
    def backends(self) -> list[str]:
        """Backends that it is delivered to."""
        return [str(name) for name in self.row.get("backends") or ()]

    def options(self, backend: str) -> dict[str, Any]:
        """Return the options of a backend."""
        options = (self.row.get("options") or {}).get(backend)
        return dict(options) if isinstance(options, dict) else {}

    def registered(self, backend: str) -> dict[str, str]:
        """Return the backends that its script registered, to load one of them.

        Raises:
            PluginError: the script has sent its class, and no process of this user with this home has: whoever can
                write rows could run code here.
        """
        found = self.row.get("registered")
        found = dict(found) if isinstance(found, dict) else {}
        if is_sent(str(found.get(backend, ""))) and not is_signed(self.row):
            raise PluginError(
                f"backend {backend!r} is code that a script has sent, and the run was not recorded by this user with "
                "this home: it is not run. Move the class into a module"
            )

        return found

    def settings(self) -> Config:
        """Return the settings of its announcement, with defaults for missing ones."""
        return settings_of(self.row)


def requested_backends(reader: StoreReader, run_dir: Path) -> set[str]:
    """Return the backends that a run's experiments ask for."""
    plan = DeliveryPlan(reader, run_dir)
    plan.refresh()
    return set(plan.backends())


def settings_of(row: Mapping[str, Any]) -> Config:
    """Return the settings in a row, with defaults for missing ones."""
    given = {name: row[name] for name in DELIVERY_SETTINGS if row.get(name) is not None}
    lists = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    return Config(**{**given, **lists})


def restricted(config: Config, current: Config) -> Config:
    """Return a run's settings with the restrictions of the current ones added; no restriction of the run is lifted."""
    return config.replaced(
        mask=(*config.mask, *(pattern for pattern in current.mask if not pattern.startswith("!"))),
        exclude=(*config.exclude, *current.exclude),
        include=config.include or current.include,
        local_only=config.local_only or current.local_only,
    )


class DeliveryPlan:
    """A run's experiments, read from its store."""

    def __init__(self, reader: StoreReader, run_dir: Path) -> None:
        self._reader = reader
        self._run_dir = run_dir
        self._after = 0
        self._by_number: dict[tuple[int, int], PlannedExperiment] = {}
        self._numbered: dict[int, PlannedExperiment] = {}
        self.experiments: dict[str, PlannedExperiment] = {}

    def refresh(self) -> bool:
        """Read announcements since the last call; return whether there were any.

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
        """Return the experiment of a stream's number; None if none was announced under that number.

        A forked child may log for its parent's experiment before its own announcement arrives.
        """
        return self._by_number.get((stream, number)) or self._numbered.get(number)

    def backends(self) -> dict[str, PlannedExperiment]:
        """Return every requested backend, with the first experiment that requests it."""
        wanted: dict[str, PlannedExperiment] = {}
        for experiment in self.experiments.values():
            for backend in experiment.backends:
                wanted.setdefault(backend, experiment)

        return wanted

    def unknown_backends(self) -> dict[str, str]:
        """Return the requested backends that do not exist here, and the texts about them."""
        unknown: dict[str, str] = {}
        for name, experiment in self.backends().items():
            try:
                if name not in (experiment.row.get("registered") or ()):
                    check_name(PluginType.BACKEND, name)
            except PluginError as error:
                unknown[name] = str(error)

        return unknown

    @property
    def is_own(self) -> bool:
        """Whether a process of this user has named the code of this run: every announcement bears its signature."""
        return bool(self.experiments) and all(is_signed(experiment.row) for experiment in self.experiments.values())

    def check_installed(self, *backends: str) -> None:
        """Check that backends are built in or of an installed package, not imported from a path that the run names.

        Raises:
            PluginError: one is a plugin of the run; the text says how to import it all the same, if that is possible.
        """
        for name in filter(None, backends):
            naming = [each for each in self.experiments.values() if name in (each.row.get("registered") or ())]
            if name not in BUILT_IN[PluginType.BACKEND] and (":" in name or naming):
                for experiment in naming:
                    experiment.registered(name)  # a class that was sent is not loaded with consent either

                raise PluginError(
                    f"backend {name!r} is code that the run names, and the run was not recorded by this user with this "
                    "home: it is not imported without your consent. If you trust it: traceml sync "
                    f"{self._run_dir.name} --backend {name}"
                )

    def run_experiment(self) -> PlannedExperiment:
        """Return an experiment for the whole run, which gets rows that were logged outside of any."""
        meta = self._reader.meta().get("run", {})
        row = {
            "experiment": 0, "id": self._run_dir.name, "name": meta.get("name") or self._run_dir.name,
            "project": meta.get("project") or DEFAULT_PROJECT, "run_dir": os.fspath(self._run_dir),
        }  # fmt: skip
        return PlannedExperiment(_key(row), 0, row, started=float(meta.get("started") or 0.0))

    def assign(self, stream: int, experiment: PlannedExperiment) -> PlannedExperiment:
        """Assign an experiment that was not announced to a stream's number 0."""
        known = self.experiments.setdefault(experiment.key, experiment)
        self._by_number[stream, experiment.number] = known
        return known

    def _begin(self, stream: int, row: dict[str, Any]) -> None:
        number = int(row.get("experiment", 0))
        experiment = self.experiments.setdefault(_key(row), PlannedExperiment(_key(row), number, row))
        known = experiment.row
        experiment.row = _with_signed({**known, **row} if stream in experiment.begun_on else {**row, **known}, row)
        experiment.begun_on.add(stream)
        began = int(row.get("t_ns") or 0) / 1e9
        if number == 0:  # the run's own is announced some time after the run began
            began = float(self._reader.meta().get("run", {}).get("started") or began)

        experiment.started = min(experiment.started or began, began)
        self._by_number[stream, number] = experiment
        self._numbered.setdefault(number, experiment)


def _with_signed(merged: dict[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the merged row of an experiment, with the code of this user where one of its rows names that."""
    differing = {name: row.get(name) for name in SIGNED if row.get(name) != merged.get(name)}
    return {**merged, **differing} if differing and is_signed(row) and not is_signed(merged) else merged


def _key(row: Mapping[str, Any]) -> str:
    return f"{row.get('experiment', 0)}-{row.get('name') or 'run'}"
