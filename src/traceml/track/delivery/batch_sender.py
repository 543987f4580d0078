"""Calls of a backend for a batch of rows: filters, names by rank, counts."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from traceml.database.schema import LOGGED, METRICS, STEPS
from traceml.database.states import RunStatus
from traceml.database.store.reader import Frame, StreamRecord
from traceml.errors import BackendRefusedError
from traceml.formatting import json_text, name_at_rank
from traceml.track.delivery.delivery_plan import PlannedExperiment
from traceml.track.delivery.derived import DerivedMetrics
from traceml.track.delivery.record_reader import LoggedRecord, MetricRows, RecordBatch
from traceml.track.delivery.refusals import count_refused, refusal_counted
from traceml.track.delivery.tracker_session import Delivery
from traceml.track.delivery.verdict_sender import send_live_verdict, send_verdict
from traceml.track.plugins.failure_kinds import classify
from traceml.track.plugins.metric import Metric
from traceml.track.tracker_state import ResumeState
from traceml.trusted_files import is_file_inside

__all__ = ["BatchSender"]

_PARAMS_REMEMBERED = 10_000
_FACT_CHARS = 250
_FACT_FRAMES = 64  # of a process, in which its collectors' facts are: they read at its start
_LINGER_S = 10.0  # the last experiment stays open for this long
_LATE_VALUES_S = 600.0  # longest wait for values that were logged before an end

_log = logging.getLogger("traceml")


class BatchSender:
    """Sends batches to one backend.

    Args:
        delivery: the run, the backend, and what the run's settings select.
        is_done: whether an experiment has the rows at the cursor already, and was ended with them.
        everything: send every experiment of the run, also those that did not request this backend.
    """

    def __init__(self, delivery: Delivery, is_done: Callable[[PlannedExperiment], bool], *, everything: bool) -> None:
        self._state, self._session, self._audit = delivery.state, delivery.session, delivery.audit
        self._run_dir, self._reader, self._plan = delivery.run_dir, delivery.reader, delivery.plan
        self._rules, self._config = delivery.rules, delivery.config
        self._records = delivery.records
        self._is_done = is_done
        self._delivery = delivery
        self._everything = everything
        self._started = float(self._reader.meta().get("run", {}).get("started") or 0.0)
        self._calls = {
            "params": self._send_params,
            "tags": self._send_tags,
            "collected": self._send_facts,
            "text": self._send_text,
            "value": self._send_text,
            "histogram": self._send_histogram,
            "image": self._send_image,
            "artifact": self._send_artifact,
            "refused": self._send_refused,
        }

    @property
    def _resume(self) -> ResumeState:
        return self._state.resume

    def send(self, batch: RecordBatch) -> None:
        """Send a batch; the caller undoes its changes to the state if it raises."""
        for logged in batch.logged:
            experiment = self._experiment_of(logged) if logged.row.get("kind") == "experiment" else None
            if experiment is not None:
                self._session.connect(experiment)
                self._send_earlier_facts(experiment, logged)

        # Rank 0 first: equal parameters of other ranks are not sent.
        for logged in sorted(filter(_has_no_step, batch.logged), key=lambda each: each.stream.rank):
            self._send_logged(logged)

        self._send_in_order(batch)
        self._send_live_verdicts()

    def _send_in_order(self, batch: RecordBatch) -> None:
        """Send what has steps in the order of the store, however it is cut into batches: W&B counts what it has."""
        main, derived = self._main(), self._derived()
        waiting: dict[str, list[Metric]] = {}  # values by the experiment's key, to be sent with one call
        for part in batch.parts:
            if isinstance(part, MetricRows):
                self._add_passing(part, waiting)
            elif isinstance(part, LoggedRecord):
                if not _has_no_step(part):
                    self._send_waiting(waiting)
                    self._send_logged(part)
            elif (rows := derived.take(part, self._stream_of(part))) and main is not None:
                self._send_waiting(waiting)
                self._send_derived_values(main, rows)

        self._send_waiting(waiting)

    def finish(self) -> None:
        """Send what filters and intervals still hold back, at the end of the run."""
        for experiment in self._wanted():
            self._send_windows(experiment)

        main = self._main()
        if main is None:
            return

        self._send_derived_values(main, self._derived().finish())
        send_verdict(self._delivery, main)

    def end(self, run_state: str, run_ended: float | None) -> None:
        """End every open experiment, the inner ones first, in its own state and time or else in those of the run."""
        for experiment in reversed(self._wanted()):
            own_state, _, ended = self._experiments_to_close.pop(experiment.key, (run_state, 0.0, run_ended))
            self._session.end(experiment, own_state, ended)

    # --- experiments --------------------------------------------------------------------------------------------

    def _wanted(self) -> list[PlannedExperiment]:
        wanted = [each for each in self._plan.experiments.values() if self._wants(each)]
        if not wanted and self._everything:
            wanted = [self._plan.assign(0, self._plan.run_experiment())]

        return sorted(wanted, key=lambda each: each.number != 0)  # the run's own first, then by start

    def _wants(self, experiment: PlannedExperiment) -> bool:
        return self._everything or self._state.backend in experiment.backends

    def _experiment(self, stream: int, number: int) -> PlannedExperiment | None:
        experiment = self._plan.of(stream, number)
        if experiment is None and self._everything:
            experiment = self._plan.assign(stream, self._plan.run_experiment())

        if experiment is None or not self._wants(experiment) or self._is_done(experiment):
            return None

        return experiment

    def _experiment_of(self, logged: LoggedRecord) -> PlannedExperiment | None:
        return self._experiment(logged.stream.id, int(logged.row.get("experiment", 0)))

    def _open(self) -> list[PlannedExperiment]:
        return [each for each in self._wanted() if not self._session.state_of(each).get("ended")]

    def _main(self) -> PlannedExperiment | None:
        """Return the experiment that gets values of the whole run: the first open one."""
        return next(iter(self._open()), None)

    def _derived(self) -> DerivedMetrics:
        return DerivedMetrics(
            self._resume.setdefault("derived", {}),
            self._config.metrics_interval,
            self._started,
            system=self._config.track_system,
        )

    @property
    def _experiments_to_close(self) -> dict[str, list[Any]]:
        """Experiments to end: the state of each, the epoch seconds at which that was read, and at which it ended."""
        return self._resume.setdefault("to_end", {})

    def _windows(self) -> dict[str, Any]:
        return self._resume.setdefault("windows", {})

    # --- values ------------------------------------------------------------------------------------------------------

    def _add_passing(self, part: MetricRows, waiting: dict[str, list[Metric]]) -> None:
        """Add the values that filters let pass."""
        experiment, passing = self._experiment(part.stream, part.experiment), []
        if experiment is not None:
            passing = self._rules.of(experiment).filters.apply(part.rows, self._windows(), experiment.key)
            waiting.setdefault(experiment.key, []).extend(passing)

        self._state.filtered += len(part.rows) - len(passing)

    def _send_waiting(self, waiting: dict[str, list[Metric]]) -> None:
        for key, rows in waiting.items():
            self._send_values(self._plan.experiments[key], rows)

        waiting.clear()

    def _send_values(self, experiment: PlannedExperiment, rows: list[Metric]) -> None:
        if not rows:
            return

        refused = self._upload(experiment, rows)
        for error in refused:
            self._refused(error)

        self._state.delivered += len(rows) - len(refused)

    def _upload(self, experiment: PlannedExperiment, rows: list[Metric]) -> list[Exception]:
        """Send values to the tracker; return why it refuses some of them."""
        refused = self._session.metrics(experiment, rows)
        self._audit.record("metrics", {row.name for row in rows}, len(rows))
        return [error for _, error in refused]

    def _send_windows(self, experiment: PlannedExperiment) -> None:
        """Send the aggregates of an experiment's open windows."""
        rows = self._rules.of(experiment).filters.finish(self._windows(), experiment.key)
        self._state.filtered -= len(rows)
        self._send_values(experiment, rows)

    def _refused(self, error: Exception) -> None:
        failure = classify(error)
        _log.warning("%s refuses a row: %s", self._state.backend, failure.text)
        count_refused(self._state, failure.text)

    def _send_derived_values(self, experiment: PlannedExperiment, rows: list[Metric]) -> None:
        """Send values that the user has not logged; they are counted separately."""
        filters = self._rules.of(experiment).filters
        passing = [row for row in rows if filters.takes(row.name, row.rank)]
        if passing:
            self._state.derived += len(passing) - len(self._upload(experiment, passing))

    def _send_live_verdicts(self) -> None:
        main = self._main()
        if main is None:
            return

        for event in self._reader.events(self._resume.get("event", 0), "verdict"):
            self._resume["event"] = event.id
            send_live_verdict(self._delivery, main, event)

    def _stream_of(self, frame: Frame) -> StreamRecord:
        is_first = frame.table == STEPS.name and frame.seq == 0  # by then it is known what the rank continues from
        return self._records.stream(frame.stream, fresh=is_first)

    # --- everything else ---------------------------------------------------------------------------------------------

    def _send_logged(self, logged: LoggedRecord) -> None:
        row, kind = logged.row, str(logged.row.get("kind"))
        experiment = self._experiment_of(logged)
        if kind in {"experiment", "end"}:
            if experiment is not None and kind == "end":
                self._record_end(experiment, logged)

            return

        if experiment is None or not self._passes(experiment, row, logged.stream.rank):
            self._state.filtered += 1
            return

        call = self._calls.get(kind)
        if call is None:
            why = f"rows of kind {kind!r} are unknown to this version of traceml"
            _log.warning("%s is not sent a row: %s", self._state.backend, why)
            count_refused(self._state, why)
            return

        with refusal_counted(self._state, "a row"):  # only this one: nothing else of its batch is sent again
            for size in call(experiment, row, logged.stream.rank):
                names = row.get("params") or row.get("tags") or row.get("facts") or [str(row.get("name") or kind)]
                self._audit.record(kind, names, 1, size)

            self._state.delivered += 1

    def _passes(self, experiment: PlannedExperiment, row: dict[str, Any], rank: int) -> bool:
        kind = str(row.get("kind"))
        if kind in {"params", "tags", "collected", "refused"}:
            return True  # their keys are filtered one by one

        return self._rules.of(experiment).filters.takes(str(row.get("name") or kind), rank)

    # Each makes the calls for a row of one kind, and yields the bytes sent with each of them.

    def _send_params(self, experiment: PlannedExperiment, row: dict[str, Any], rank: int) -> Iterator[int]:
        if params := self._params_of(experiment, row.get("params") or {}, rank):
            self._session.params(experiment, params)
            yield 0

    def _send_tags(self, experiment: PlannedExperiment, row: dict[str, Any], rank: int) -> Iterator[int]:
        if tags := self._params_of(experiment, row.get("tags") or {}, rank, "tags"):
            self._session.tags(experiment, tags)
            yield 0

    def _send_text(self, experiment: PlannedExperiment, row: dict[str, Any], rank: int) -> Iterator[int]:
        text = str(row.get("text") if row.get("kind") == "text" else row.get("value"))
        self._session.text(experiment, _name_of(row, rank), text, _step_of(row), _time_of(row))
        yield len(text)

    def _send_histogram(self, experiment: PlannedExperiment, row: dict[str, Any], rank: int) -> Iterator[int]:
        values = _name_of(row, rank), row["counts"], row["edges"], _step_of(row)
        self._session.call(experiment, "log_histogram", *values, time_s=_time_of(row))
        yield 8 * len(row["counts"])

    def _send_image(self, experiment: PlannedExperiment, row: dict[str, Any], rank: int) -> Iterator[int]:
        path = self._file(row)
        shown = _name_of(row, rank), path, _step_of(row)
        self._session.call(experiment, "log_image", *shown, time_s=_time_of(row), file=path)
        yield path.stat().st_size

    def _send_artifact(self, experiment: PlannedExperiment, row: dict[str, Any], rank: int) -> Iterator[int]:
        path = self._file(row)
        plain = str(row.get("name") or path.name)
        name = f"rank_{rank}/{plain}" if rank else plain
        self._session.call(experiment, "log_artifact", str(path), name, file=path)
        yield path.stat().st_size

    def _send_refused(self, experiment: PlannedExperiment, row: dict[str, Any], rank: int) -> Iterator[int]:
        name, text = f"traceml/refused/{_name_of(row, rank)}", f"{row.get('what')}: {row.get('why')}"
        self._session.text(experiment, name, text, _step_of(row), _time_of(row))
        yield 0

    def _send_facts(self, experiment: PlannedExperiment, row: dict[str, Any], rank: int) -> Iterator[int]:
        """Send the facts of a collector, long ones as texts."""
        short, long = self._facts_of(experiment, row, rank)
        if short:
            self._session.facts(experiment, short)
            yield 0

        for key, text in long.items():
            self._session.text(experiment, key, text, 0, _time_of(row))
            yield len(text)

    def _send_earlier_facts(self, experiment: PlannedExperiment, logged: LoggedRecord) -> None:
        """Send a further experiment of rank 0 the short facts that collectors have read for the first one."""
        if logged.stream.rank or logged.row.get("parent"):
            return

        logged_first = self._reader.first_maps(LOGGED.name, logged.stream.id, _FACT_FRAMES)
        collected = [row for row in logged_first if row.get("kind") == "collected"]
        for row in {row.get("name"): row for row in collected if row.get("experiment") != experiment.number}.values():
            short, _ = self._facts_of(experiment, row, 0)
            if short:
                with refusal_counted(self._state, "facts"):
                    self._session.facts(experiment, short)
                    self._audit.record("collected", short, 1)
                    self._state.derived += 1

    def _facts_of(
        self, experiment: PlannedExperiment, row: dict[str, Any], rank: int
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the facts in a row that pass: short ones, and long ones as texts."""
        facts = {f"{row.get('name')}/{key}": value for key, value in (row.get("facts") or {}).items()}
        passing = self._params_of(experiment, facts, rank, "tags")
        shown = {key: json_text(value) for key, value in passing.items()}
        long = {key: text for key, text in shown.items() if len(text) > _FACT_CHARS or "\n" in text}
        return {key: value for key, value in passing.items() if key not in long}, long

    def _file(self, row: Mapping[str, Any]) -> Path:
        """Return the path of a logged file; a row may name one outside of the run's folder, which is not sent."""
        path = self._run_dir / str(row["path"])
        if not is_file_inside(path, self._run_dir):
            raise BackendRefusedError(
                f"the file of {row['kind']} {row.get('name')!r} is not in the run's folder: {path}"
            )

        return path

    def _params_of(
        self,
        experiment: PlannedExperiment,
        params: dict[str, Any],
        rank: int,
        kind: Literal["params", "tags"] = "params",
    ) -> dict[str, Any]:
        """Return the parameters that pass, under their ranks' names, without those that rank 0 has sent equally."""
        sent = self._resume.setdefault(kind, {}).setdefault(experiment.key, {})
        filters, passing = self._rules.of(experiment).filters, {}
        for key, value in params.items():
            if not filters.takes(key):
                continue

            if rank == 0:
                passing[key] = value
                if len(sent) < _PARAMS_REMEMBERED:
                    sent[key] = _digest(value)
            elif sent.get(key) != _digest(value):
                passing[name_at_rank(key, rank)] = value

        return passing

    def _record_end(self, experiment: PlannedExperiment, logged: LoggedRecord) -> None:
        """Schedule the end of an experiment when every rank that began it has ended it; later rows reopen it."""
        open_on = self._resume.setdefault("open", {}).setdefault(experiment.key, {})
        open_on[str(logged.stream.id)] = False
        behind = self._resume.setdefault("behind", {}).setdefault(experiment.key, {})
        behind[str(logged.stream.id)] = int(logged.row.get("values") or 0)
        if all(not open_on.get(str(stream), True) for stream in experiment.begun_on):
            state = str(logged.row.get("state") or RunStatus.FINISHED.value)
            self._experiments_to_close[experiment.key] = [state, time.time(), _time_of(logged.row)]

    @property
    def has_pending_closes(self) -> bool:
        """Whether there are experiments that `end_finished` has to end, now or later."""
        return bool(self._experiments_to_close)

    def end_finished(self) -> None:
        """End the experiments that all their ranks have left; call it after each confirmed batch, and when idle.

        The last experiment stays open for 10 s, and after the end of the run: usually the run ends with it, and the
        run's last step times and its verdict are still to come.
        """
        for key, (own_state, noted, ended) in list(self._experiments_to_close.items()):
            experiment = self._plan.experiments.get(key)
            if experiment is not None:
                passed_s = time.time() - noted
                if self._is_last(key) and (passed_s < _LINGER_S or self._has_run_ended()):
                    continue
                if passed_s < _LATE_VALUES_S and not self._has_all(key):
                    continue

                self._send_windows(experiment)
                main = self._main()
                if main is not None and main.key == key:
                    self._send_derived_values(main, self._derived().finish())
                    send_verdict(self._delivery, main)  # that of the run so far: the report comes when nothing is open

                self._session.end(experiment, own_state, ended)

            del self._experiments_to_close[key]

    def _has_run_ended(self) -> bool:
        """Whether `end` will end all experiments, once the report is there or no longer awaited."""
        return self._reader.meta().get("run", {}).get("ended") is not None

    def _has_all(self, key: str) -> bool:
        """Whether all values logged before an experiment's end have arrived; they are in another table than the end."""
        behind, reached = self._resume.get("behind", {}).get(key, {}), self._state.reached
        return all(reached.get(stream, {}).get(METRICS.name, 0) >= count for stream, count in behind.items())

    def _is_last(self, key: str) -> bool:
        """Whether an experiment was the last to end, with no other open."""
        return {each.key for each in self._open()} <= self._experiments_to_close.keys() and key == next(
            reversed(self._experiments_to_close)
        )


def _has_no_step(logged: LoggedRecord) -> bool:
    """Whether a row is about the whole run."""
    return logged.row.get("kind") in {"params", "tags"}


def _name_of(row: Mapping[str, Any], rank: int) -> str:
    return name_at_rank(str(row.get("name") or row.get("kind")), rank)


def _step_of(row: Mapping[str, Any]) -> int:
    return int(row.get("step") or 0)


def _time_of(row: Mapping[str, Any]) -> float | None:
    """Return the epoch seconds of a row, if it has them."""
    return int(row.get("t_ns") or 0) / 1e9 or None


def _digest(value: Any) -> str:
    """Return a digest to compare values; the state file must not hold a secret."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]
