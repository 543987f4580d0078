"""One delivery, and its connections: a backend object per experiment, started, continued after a death, and ended."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from traceml.database.store.reader import StoreReader
from traceml.errors import PluginError
from traceml.formatting import json_text, name_at_rank
from traceml.ids import DEFAULT_PROJECT
from traceml.settings import Config
from traceml.track.delivery.audit import AuditLog
from traceml.track.delivery.call_watchdog import CallWatchdog
from traceml.track.delivery.delivery_plan import DeliveryPlan, PlannedExperiment
from traceml.track.delivery.experiment_rules import RulesOfExperiments
from traceml.track.delivery.record_reader import RecordReader
from traceml.track.delivery.refusals import refusal_counted
from traceml.track.filters import backend_options
from traceml.track.plugins.failure_kinds import StartError
from traceml.track.plugins.interfaces import BackendInterface
from traceml.track.plugins.metric import Metric
from traceml.track.plugins.plugin_registry import create_backend
from traceml.track.tracker_state import TrackerState, states_of

__all__ = ["Delivery", "RewindError", "TrackerSession"]

# Extra time to start or end a run at a tracker: some wait for their threads, some upload then.
_SLOW_S = 30.0
# An artifact gets the usual time, and one more second per this many bytes.
_BYTES_PER_S = 1 << 20

_OWN_KEY = re.compile(r"\d+-")  # in a state; before that of a fallback's is the name of the fallback

_log = logging.getLogger("traceml")


class RewindError(Exception):
    """A backend can continue after a death only from the run's first row."""


class TrackerSession:
    """Backend objects of one backend.

    Args:
        save: writes the state.
        timeout_s: longest time of a call.
        options: options of the backend that replace those of the experiments.
        is_fallback: whether it replaces a failing backend; its experiments are stored under other keys.
    """

    def __init__(
        self,
        backend: str,
        run_dir: Path,
        state: TrackerState,
        save: Callable[[], None],
        watchdog: CallWatchdog,
        rules: RulesOfExperiments,
        audit: AuditLog,
        *,
        timeout_s: float,
        options: Mapping[str, Any] | None = None,
        is_fallback: bool = False,
    ) -> None:
        self.backend = backend
        self._run_dir = run_dir
        self._state = state
        self._save = save
        self._watchdog = watchdog
        self._rules = rules
        self._audit = audit
        self._timeout_s = timeout_s
        self._options = options
        self._prefix = f"{backend}:" if is_fallback else ""
        self._connected: dict[str, BackendInterface] = {}
        self._cleanups: list[Callable[[], object]] = []
        self._unconfirmed: set[str] = set()
        self._tagged: set[str] = set()  # keys of those whose first tags are there, or were sent in this try
        self._ranked_names: dict[tuple[str, int], str] = {}

    @property
    def is_idempotent(self) -> bool:
        """Whether every connected backend object may be sent the same rows again."""
        return all(backend.idempotent for backend in self._connected.values())

    def state_of(self, experiment: PlannedExperiment) -> dict[str, Any]:
        """Return the state of an experiment at this backend; empty before it was started."""
        return self._state.experiments.get(self._prefix + experiment.key, {})

    def connect(self, experiment: PlannedExperiment) -> BackendInterface:
        """Return the backend object of an experiment, started or continued.

        Raises:
            RewindError: the backend needs the run from its first row.
            StartError: the experiment cannot be started.
            Exception: the tags could not be sent.
        """
        key = experiment.key
        if key not in self._connected:
            with self._watched("start_experiment", _SLOW_S):
                try:
                    backend = self._begin(experiment, self.state_of(experiment))
                except RewindError:
                    raise
                except Exception as error:
                    raise StartError(error) from error

            self._save()
            self._connected[key] = backend

        if key not in self._tagged:
            self._tagged.add(key)  # before the call, which connects, too
            self._send_first_tags(experiment)

        return self._connected[key]

    def _send_first_tags(self, experiment: PlannedExperiment) -> None:
        """Send the tags of an announcement, unless they are there; a tracker that refuses them still gets the rows."""
        tags = self._passing(experiment, "tags")
        if not tags or self.state_of(experiment)["is_tagged"]:
            return

        with refusal_counted(self._state, f"the tags of {experiment.name!r}"):
            self.tags(experiment, tags)
            self._audit.record("tags", tags, 1)

    def _begin(self, experiment: PlannedExperiment, stored: Mapping[str, Any]) -> BackendInterface:
        config, known = self._config(experiment, stored), experiment.registered(self.backend)
        backend = create_backend(self.backend, config, known, self._cleanups.append)
        if stored and not stored.get("ended") and not backend.resume(stored["mark"]):
            raise RewindError

        mask, row = self._rules.of(experiment).masker.mask_text, experiment.row
        self._state.target = mask(str(backend.target))
        number = backend.start_experiment(mask(experiment.name), mask(self._project(row)))
        # Saved at once: after a death from here on, the next process continues this run instead of starting another.
        self._state.experiments[self._prefix + experiment.key] = {
            "id": _text_of(number), "url": _text_of(backend.url), "mark": _mark_of(backend), "ended": False,
            "public": str(row.get("id") or ""), "is_tagged": bool(stored.get("is_tagged")),
        }  # fmt: skip
        return backend

    # --- calls -----------------------------------------------------------------------------------------------

    def metrics(self, experiment: PlannedExperiment, rows: Sequence[Metric]) -> Sequence[tuple[Metric, Exception]]:
        """Send values, each under its rank's name; return those that were refused when the others were accepted."""
        if not rows:
            return ()

        if any(row.rank for row in rows):
            names = self._ranked_names
            for row in rows:
                if (row.name, row.rank) not in names:
                    names[row.name, row.rank] = name_at_rank(row.name, row.rank)

            rows = [replace(row, name=names[row.name, row.rank]) if row.rank else row for row in rows]

        refused = self.call(experiment, "log_metrics", rows)
        return refused if isinstance(refused, list | tuple) else ()

    def params(self, experiment: PlannedExperiment, params: Mapping[str, Any]) -> None:
        """Send parameters, masked."""
        self.call(experiment, "log_params", self._rules.of(experiment).masker.mask_mapping(params))

    def tags(self, experiment: PlannedExperiment, tags: Mapping[str, Any]) -> None:
        """Send tags, masked."""
        masked = self._rules.of(experiment).masker.mask_mapping(tags)
        self.call(experiment, "set_tags", {key: json_text(value) for key, value in masked.items()})

    def facts(self, experiment: PlannedExperiment, facts: Mapping[str, Any]) -> None:
        """Send facts about the run, masked."""
        self.call(experiment, "log_facts", self._rules.of(experiment).masker.mask_mapping(facts))

    def text(self, experiment: PlannedExperiment, name: str, text: str, step: int, time_s: float | None = None) -> None:
        """Send a text, masked by its content and its name."""
        masked = self._rules.of(experiment).masker.mask_logged_text(name, text)
        self.call(experiment, "log_text", name, masked, step, time_s=time_s)

    def call(
        self,
        experiment: PlannedExperiment,
        name: str,
        *args: Any,
        time_s: float | None = None,
        file: Path | None = None,
    ) -> Any:
        """Call a method of the experiment's backend object in bounded time; what it sends is to be confirmed.

        Args:
            time_s: epoch seconds at which it was logged.
            file: what it sends, which takes longer.
        """
        backend = self.connect(experiment)
        backend.row_time = time_s
        self._unconfirmed.add(experiment.key)
        with self._watched(name, 0.0 if file is None else file.stat().st_size / _BYTES_PER_S):
            return getattr(backend, name)(*args)

    def confirm(self) -> None:
        """Return when everything sent is safe at the tracker, and record the position there."""
        # One that is not connected has ended, which includes the flush.
        sent = {key: self._connected[key] for key in self._unconfirmed if key in self._connected}
        for backend in sent.values():
            with self._watched("flush"):
                backend.flush()

        # Afterwards: the rows of all are sent again if one fails.
        for key, backend in sent.items():
            self._state.experiments[self._prefix + key].update(mark=_mark_of(backend), is_tagged=True)

        self._unconfirmed.clear()

    def resume(self) -> None:
        """Let the backend objects continue at their recorded positions, as what came after it is sent again.

        Raises:
            RewindError: a backend needs the run from its first row.
        """
        self._tagged.clear()
        for key, backend in self._connected.items():
            if not backend.resume(self._state.experiments[self._prefix + key]["mark"]):
                raise RewindError

    def end(self, experiment: PlannedExperiment, state: str, ended: float | None = None) -> None:
        """End an experiment at the tracker, unless it has ended or never started.

        Args:
            state: state in which the training ended: finished, stopped, failed, hung or lost.
            ended: epoch seconds at which it did, where that is known.
        """
        stored = self.state_of(experiment)
        if not stored or stored.get("ended"):
            return

        backend = self.connect(experiment)
        backend.row_time = ended
        with self._watched("end_experiment", _SLOW_S):
            if ended is not None:
                backend.end_time(ended)

            backend.end_state(state)
            backend.end_experiment()
            # The cursor separates the rows that it has from rows that come after all.
            self.state_of(experiment).update(ended=True, end=dict(self._state.cursor))

        del self._connected[experiment.key]
        self._save()

    def close(self) -> None:
        """Let the plugins release what they took; an error is logged, as everything is delivered or will be again."""
        while self._cleanups:
            cleanup = self._cleanups.pop()
            try:
                with self._watched("cleanup"):
                    cleanup()
            except Exception:  # noqa: BLE001 - code of a third party
                _log.exception("the cleanup of %s failed", self.backend)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _watched(self, call: str, extra_s: float = 0.0) -> Any:
        allowed_s = self._timeout_s + extra_s
        if extra_s > 1:
            self._state.busy(extra_s)
            self._save()  # so that the delivery does not look stuck meanwhile

        return self._watchdog.watch(call, allowed_s)

    def _config(self, experiment: PlannedExperiment, stored: Mapping[str, Any]) -> dict[str, Any]:
        row, rules = experiment.row, self._rules.of(experiment)
        masker = rules.masker
        options = self._options if self._options is not None else experiment.options(self.backend)
        parent = row.get("parent")
        return {
            "options": backend_options(options),
            "run_id": self._run_dir.name,
            "run_dir": str(self._run_dir),
            "experiment": {
                "id": self._id_of(experiment),
                "name": masker.mask_text(experiment.name),
                "project": masker.mask_text(self._project(row)),
                "tags": masker.mask_mapping(self._passing(experiment, "tags")),
                "parent": self._id_at_tracker(str(parent)) if parent else None,
                "params": masker.mask_mapping(self._passing(experiment, "params")),
                "started": experiment.started or time.time(),
                # By its text alone: by its name it would be masked, and trackers file runs under their user.
                "user": masker.mask_text(str(row.get("user") or "")),
                "source": masker.mask_text(str(row.get("source") or "")),
            },
            "continue_run": stored["id"] if stored.get("ended") else self._resumed(row.get("resume")),
            "mark": stored.get("mark"),
            "local_only": rules.local_only,
        }

    def _id_of(self, experiment: PlannedExperiment) -> str:
        """Return the id under which it is filed: one of its own at a fallback that also has it from somebody else."""
        own = str(experiment.row.get("id") or f"{self._run_dir.name}-{experiment.number}")
        others = [each for each in experiment.backends if each != self._state.backend]
        has_it = {*others, *(experiment.options(each).get("fallback") for each in others)}
        return f"{own}-{self._state.backend}" if self._prefix and self.backend in has_it else own

    def _project(self, row: Mapping[str, Any]) -> str:
        own = (row.get("projects") or {}).get(self.backend)  # of the tracker's own variable
        return str(own or row.get("project") or DEFAULT_PROJECT)

    def _passing(self, experiment: PlannedExperiment, kind: str) -> dict[str, Any]:
        """Return the tags or parameters of an announcement that filters let pass."""
        filters, values = self._rules.of(experiment).filters, experiment.row.get(kind) or {}
        return {key: value for key, value in values.items() if filters.takes(key)}

    def _id_at_tracker(self, public: str) -> str | None:
        """Return the tracker's id of an experiment of this run or of another in the same folder, by its traceml id."""
        for run_dir in (self._run_dir, *sorted(self._run_dir.parent.glob("*/"), reverse=True)):
            for state in states_of(run_dir):
                here = [stored for key, stored in state.experiments.items() if self._is_at(state.backend, key)]
                for stored in here:
                    if public in {stored.get("public"), stored.get("id")}:
                        return str(stored["id"])

                if run_dir.name == public and here:
                    return str(here[0]["id"])

        return None

    def _is_at(self, backend: str, key: str) -> bool:
        """Whether an experiment in the state of a backend is at this session's: its own, or those of its fallback."""
        return backend == self.backend if _OWN_KEY.match(key) else key.startswith(f"{self.backend}:")

    def _resumed(self, wanted: Any) -> str | None:
        continued = self._id_at_tracker(str(wanted)) if wanted else None
        if wanted and continued is None:
            _log.warning(
                "resume=%r: %s has no run with that id in %s, so a new one begins. Give the id of a run or of an "
                "experiment that was delivered to it", wanted, self.backend, self._run_dir.parent,
            )  # fmt: skip

        return continued


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """Parts of one delivery: a run, a backend, and what the run's settings select for it."""

    run_dir: Path
    reader: StoreReader
    records: RecordReader
    plan: DeliveryPlan
    config: Config
    rules: RulesOfExperiments
    session: TrackerSession
    state: TrackerState
    audit: AuditLog


def _text_of(given: Any) -> str | None:
    """Return an id or an address of a plugin in a form that JSON can hold."""
    return None if given is None else str(given)


def _mark_of(backend: BackendInterface) -> Any:
    """Return the position of a backend.

    Raises:
        PluginError: it cannot be kept with the cursor.
    """
    mark = backend.mark()
    try:
        json.dumps(mark)
    except (TypeError, ValueError) as error:
        raise PluginError(f"{type(backend).__name__}.mark() must return what JSON can hold: {error}") from error

    return mark
