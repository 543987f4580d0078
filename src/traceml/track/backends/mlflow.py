"""MLflow: a server or a database file, batches of 1,000 with the original timestamps.

Exact wherever MLflow stores its rows in SQL: sending the same row again changes nothing, so a replay duplicates
nothing. Rows that agree in name, value, step and millisecond would become one for the same reason, so they are shifted
apart by a millisecond.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from traceml.database.states import RunStatus
from traceml.errors import BackendError
from traceml.ids import DEFAULT_PROJECT
from traceml.loopback import is_on_this_machine
from traceml.track.backends.backend_bases import BatchBackend
from traceml.track.backends.mlflow_rows import DuplicateShifter, MetricRow, RepeatedPaths, insert, is_insertable
from traceml.track.backends.safe_names import NO_TEXT, flattened, json_number, safe_name, safe_path
from traceml.track.plugins.failure_kinds import error_of_status
from traceml.track.plugins.metric import Metric
from traceml.track.plugins.plugin_metadata import PluginMetadata, first_set

__all__ = ["MLflowBackend"]

# MLflow refuses other characters, and names that are not clean relative paths (`/a`, `a/`, `a//b`, `a/../b`).
_REFUSED = re.compile(r"[^/\w.\- :]|^/|/$|//|(?<![^/])\.{1,2}(?![^/])")
_RETRIED = re.compile(r"too many (\d{3}) error")
_DELETED = "must be in the 'active' state"
_LONGEST_NAME = 250
_LONGEST_PROJECT = 500
_LONGEST_PATH = 400
_LONGEST_PARAM = 6000
_LONGEST_TAG = 8000
_BATCH = 1000
# Facts of collectors that MLflow shows under names of its own.
_SYSTEM_TAGS = {
    "git/commit": "mlflow.source.git.commit",
    "git/branch": "mlflow.source.git.branch",
    "git/remote": "mlflow.source.git.repoURL",
}
_VERDICT = "traceml/verdict"
_LOCAL = "local"  # the tracking URI of the database next to the runs
_TERMINAL: dict[str, str] = {  # of all others FAILED
    RunStatus.FINISHED: "FINISHED",
    RunStatus.STOPPED: "KILLED",
    RunStatus.LOST: "KILLED",
}


class MLflowBackend(BatchBackend):
    """Delivers to one MLflow run."""

    metadata = PluginMetadata(
        name="mlflow",
        version="1",
        description="an MLflow server, or a database file",
        dependencies=("mlflow",),
        extra="mlflow",
        options={"tracking_uri": str, "experiment_id": str},
        option_variables={
            "tracking_uri": first_set("MLFLOW_TRACKING_URI"),
            "experiment_id": first_set("MLFLOW_EXPERIMENT_ID"),
        },
        address_option="tracking_uri",
        key_variable="MLFLOW_TRACKING_TOKEN",
        project_variable="MLFLOW_EXPERIMENT_NAME",
        environment=(
            "MLFLOW_*", "DATABRICKS_*", "AWS_*", "AZURE_*", "GOOGLE_*", "BOTO*", "S3_*", "REQUESTS_CA_BUNDLE",
        ),
    )  # fmt: skip
    idempotent: ClassVar[bool] = True

    def __init__(self, config: Mapping[str, Any]) -> None:
        options = self.metadata.with_environment(config.get("options") or {})
        given = str(options.get("tracking_uri") or _LOCAL)
        self._is_default = given == _LOCAL
        self._uri = (
            f"sqlite:///{Path(config['run_dir']).absolute().parent / 'mlflow.db'}" if self._is_default else given
        )
        previous = str((config.get("mark") or {}).get("database") or "")
        if self._is_default and (database := _database(previous)) is not None and database.exists():
            self._uri = previous  # the run's folder has been moved since

        self._experiment: Mapping[str, Any] = config["experiment"]
        self._traceml_run = str(config.get("run_id", ""))
        self._run_id: str | None = config.get("continue_run")
        self._experiment_id, self._wanted_id = "", str(options.get("experiment_id") or "")
        self._params: dict[str, str] = {}
        self._tags: set[str] = set()  # tags with the newest values of parameters that have changed
        self._duplicates = DuplicateShifter()
        self._paths = RepeatedPaths((config.get("mark") or {}).get("paths"))
        self._client: Any = None

    @property
    def target(self) -> str:
        """The tracking URI, without credentials."""
        return re.sub(r"//[^/@]*@", "//", self._uri)

    @property
    def is_local(self) -> bool:
        """Whether it is a file, or a server on this machine."""
        return urlsplit(self._uri).scheme in {"", "file", "sqlite"} or is_on_this_machine(self._uri)

    @property
    def url(self) -> str | None:
        """The run's page."""
        if self._run_id is None or not self._uri.startswith("http"):
            return None

        return f"{self.target.rstrip('/')}/#/experiments/{self._experiment_id}/runs/{self._run_id}"

    def resume(self, mark: Mapping[str, Any]) -> bool:
        """Continue the same run."""
        self._run_id = mark["run_id"]
        self._duplicates = DuplicateShifter((tuple(series), spans) for series, spans in mark.get("taken", []))
        self._paths = RepeatedPaths(mark.get("paths"))
        return True

    def start_experiment(self, name: str, project: str) -> str:
        """Find the run or create it; a delivery that died may have created it without recording that."""
        with _errors():
            self._connect()
            self._experiment_id = self._project(project)
            run = self._client.get_run(self._run_id) if self._run_id else self._existing_run()
            if run is None:
                started_ms = round(1000 * (self._experiment.get("started") or time.time()))
                tags = self._own_tags()
                run = self._client.create_run(
                    self._experiment_id, started_ms, tags, safe_name(name, NO_TEXT, _LONGEST_NAME)
                )
            elif run.info.status != "RUNNING":
                self._client.update_run(run.info.run_id, status="RUNNING")

            self._run_id = run.info.run_id
            self._experiment_id = run.info.experiment_id
            self._params = dict(run.data.params)
            self._tags = {tag for tag in run.data.tags if tag.startswith("param.")}

        return str(self._run_id)

    def log_metrics(self, rows: Sequence[Metric]) -> None:
        """Send rows, under names that MLflow accepts."""
        metric_rows = [
            MetricRow(
                safe_name(row.name, _REFUSED, _LONGEST_NAME), row.value, round(row.timestamp * 1000), row.step or 0
            )
            for row in rows
        ]
        given = self._duplicates.shift(metric_rows)
        with _errors():
            self._send(given)

        self._duplicates.commit()  # only after all are sent: a batch that failed is shifted again, the same way

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Send parameters that the run has not yet, nested ones as `model.depth`.

        One that changes keeps its first value in MLflow, and the newest becomes a tag. A server takes milliseconds for
        each: what follows a call that was cut off continues it.
        """
        from mlflow.entities import Param

        fresh, changed, long = {}, {}, {}
        for name, value in flattened(params, ".").items():
            key, text = safe_name(name, _REFUSED, _LONGEST_NAME), value if isinstance(value, str) else repr(value)
            if len(text) > _LONGEST_PARAM:
                long[key], text = text, text[: _LONGEST_PARAM - 3] + "..."

            tag = safe_name(f"param.{name}", _REFUSED, _LONGEST_NAME)
            if self._params.get(key, text) != text or tag in self._tags:
                changed[tag] = text
            elif key not in self._params:
                fresh[key] = text

        with _errors():
            self._client.log_batch(self._run_id, params=[Param(*each) for each in fresh.items()])
            self._params |= fresh
            for key, text in long.items():
                self._client.log_text(self._run_id, text, f"params/{_file(key)}.txt")

        self.set_tags(changed)
        self._tags |= changed.keys()

    def log_facts(self, facts: Mapping[str, Any]) -> None:
        """Send facts as parameters, and those that MLflow shows itself as its own tags.

        The words of the verdict are tags: a run that is resumed gets others, and a parameter keeps its first value.
        """
        words = {key: str(value) for key, value in facts.items() if key.startswith(_VERDICT)}
        self.log_params({key: value for key, value in facts.items() if key not in words})
        own = {_SYSTEM_TAGS[key]: str(value) for key, value in facts.items() if key in _SYSTEM_TAGS and value}
        self.set_tags(own | words)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Send tags, cut to the length that MLflow accepts."""
        from mlflow.entities import RunTag

        given = [
            RunTag(safe_name(key, _REFUSED, _LONGEST_NAME), str(value)[:_LONGEST_TAG]) for key, value in tags.items()
        ]
        with _errors():
            self._client.log_batch(self._run_id, tags=given)

    def log_text(self, name: str, text: str, step: int) -> None:
        """Send a text as an artifact `text/<name>/<step>.txt`."""
        self._text(f"text/{_file(name)}/{step}", ".txt", text)

    def log_histogram(self, name: str, counts: Sequence[float], edges: Sequence[float], step: int) -> None:
        """Send a histogram as an artifact `histograms/<name>/<step>.json`."""
        content = json.dumps({"counts": list(counts), "edges": list(edges), "step": step})
        self._text(f"histograms/{_file(name)}/{step}", ".json", content)

    def log_image(self, name: str, path: Path, step: int) -> None:
        """Send an image as an artifact `images/<name>/<step>.png`."""
        where = self._paths.path_of(f"images/{_file(name)}/{step}", path.suffix, path.read_bytes())
        self.log_artifact(str(path), where)

    def log_artifact(self, artifact_path: str, artifact_name: str | None = None) -> None:
        """Upload a file; a link gives it another name."""
        import tempfile

        folder, _, name = _file(artifact_name or Path(artifact_path).name).rpartition("/")
        with _errors(), tempfile.TemporaryDirectory() as place:
            link = Path(place, name)
            link.symlink_to(Path(artifact_path).absolute())
            self._client.log_artifact(self._run_id, str(link), folder or None)

    def end_state(self, state: str) -> None:
        """Record the state and the time in which the training ended."""
        with _errors():
            self._client.set_terminated(self._run_id, _TERMINAL.get(state, "FAILED"), self._ended_ms())

    def end_experiment(self) -> None:
        """Finish the run unless `end_state` did."""
        if self._client is None or self._run_id is None:
            return

        with _errors():
            if self._client.get_run(self._run_id).info.status == "RUNNING":
                self._client.set_terminated(self._run_id, end_time=self._ended_ms())

        self._client = None

    def _ended_ms(self) -> int | None:
        """Return the time of the end; None for that of the call."""
        return None if self._ended is None else round(1000 * self._ended)

    def mark(self) -> dict[str, Any]:
        """Return the run, the times that its last rows have taken, and its newest paths."""
        mark = {"run_id": self._run_id, "taken": self._duplicates.taken(), "paths": self._paths.recent()}
        return mark | ({"database": self._uri} if self._is_default else {})

    def _own_tags(self) -> dict[str, str]:
        """Return the tags of a new run: those by which it is found again, and those that MLflow's client sets."""
        about = self._experiment
        tags = {
            "traceml.experiment": str(about["id"]),
            "traceml.run": self._traceml_run,
            "mlflow.parentRunId": str(about.get("parent") or ""),
            "mlflow.user": str(about.get("user") or ""),
            "mlflow.source.name": str(about.get("source") or ""),
            "mlflow.source.type": "LOCAL",
        }
        return {key: value for key, value in tags.items() if value}

    def _text(self, stem: str, suffix: str, text: str) -> None:
        content = text.encode("utf-8", "backslashreplace")
        with _errors():
            self._client.log_text(self._run_id, content.decode(), self._paths.path_of(stem, suffix, content))

    def _connect(self) -> None:
        """Create a client whose requests share connections; it does not retry, since delivery does."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        if (database := _database(self._uri)) is not None:
            from traceml.track.backends.mlflow_database import prepare_database  # with sqlite3, which no rank needs

            prepare_database(database, is_ours=self._is_default)

        from mlflow import MlflowClient

        self._client = MlflowClient(self._uri)

    def _project(self, project: str) -> str:
        """Return the MLflow experiment of that name; another delivery may create it at the same moment.

        Where no project is named, it is the one of the option `experiment_id`.
        """
        from mlflow.exceptions import MlflowException

        if self._wanted_id and project == DEFAULT_PROJECT:
            return str(self._client.get_experiment(self._wanted_id).experiment_id)

        project = safe_name(project, NO_TEXT, _LONGEST_PROJECT)
        found = self._client.get_experiment_by_name(project)
        if found is None:
            try:
                return str(self._client.create_experiment(project, artifact_location=self._artifacts()))
            except MlflowException:
                found = self._client.get_experiment_by_name(project)
                if found is None:
                    raise

        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)

        return str(found.experiment_id)

    def _artifacts(self) -> str | None:
        """Return the place for artifacts next to a database file; a server has its own."""
        database = _database(self._uri)
        return None if database is None else database.with_name("mlartifacts").as_uri()

    def _existing_run(self) -> Any:
        """Return the run that an earlier delivery of this experiment created, or None."""
        wanted = str(self._experiment["id"]).replace("'", "")
        runs = self._client.search_runs(
            [self._experiment_id],
            f"tags.`traceml.experiment` = '{wanted}' and tags.`traceml.run` = '{self._traceml_run}'",
        )
        return runs[0] if runs else None

    def _send(self, rows: Sequence[MetricRow]) -> None:
        """Send rows by the fastest way: insert into a database file, post to a server, or call the store."""
        from mlflow.entities import Metric as MLflowMetric

        store = self._client._tracking_client.store
        if is_insertable(store):
            insert(store, str(self._run_id), rows)
            return

        for first in range(0, len(rows), _BATCH):
            part = rows[first : first + _BATCH]
            if self._uri.startswith("http"):
                self._post(part)
            else:  # the store itself: the client's log_batch creates every row again
                store.log_batch(self._run_id, [MLflowMetric(*row) for row in part], [], [])

    def _post(self, rows: Sequence[MetricRow]) -> None:
        """Post rows to a server as the JSON that the client would send."""
        from mlflow.utils.rest_utils import http_request

        metrics = [
            {"key": key, "value": json_number(value), "timestamp": stamp, "step": step}
            for key, value, stamp, step in rows
        ]
        # without retry_codes the response is returned with its status and Retry-After
        response = http_request(
            self._client._tracking_client.store.get_host_creds(),
            "/api/2.0/mlflow/runs/log-batch",
            "POST",
            max_retries=0,
            retry_codes=frozenset(),
            raise_on_status=False,
            json={"run_id": self._run_id, "metrics": metrics},
        )
        if response.status_code != 200:
            retry_after = response.headers.get("Retry-After")
            raise _error_of(response.status_code, response.text[:500], retry_after)


def _database(uri: str) -> Path | None:
    """Return the database file of a tracking URI; None for a server or any other."""
    file = uri.removeprefix("sqlite:///").partition("?")[0]
    return Path(file).absolute() if uri.startswith("sqlite:///") and file not in {"", ":memory:"} else None


def _file(name: str) -> str:
    """Return a name as the path of an artifact, with its file extension."""
    return safe_path(name, _REFUSED, _LONGEST_PATH)


@contextmanager
def _errors() -> Iterator[None]:
    """Convert MLflow's errors to those that delivery classifies."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if (reason := _unreachable(error)) is not None:
            raise BackendError(f"MLflow cannot be reached: {reason}") from error

        status, retry_after = _answer(error)
        status = status or error.get_http_status_code()
        raise _error_of(status, str(error), retry_after) from error


def _error_of(status: int | None, why: str, retry_after: str | None) -> BackendError:
    """Return the error for an answer. A deleted run refuses every row: they wait, as it may be restored."""
    if _DELETED in why:
        return BackendError(f"the run or its experiment was deleted in MLflow, and gets its rows when restored: {why}")

    return error_of_status("MLflow", status, why, retry_after=retry_after)


def _answer(error: BaseException) -> tuple[int | None, str | None]:
    """Return status and Retry-After of the answer that caused an error; None where there is none.

    The client takes the status from the text alone, where a proxy's `{"message": "Forbidden"}` has none: it says 500.
    """
    if found := _RETRIED.search(str(error)):  # it has dropped the answer
        return int(found[1]), None

    trace = error.__traceback__
    while trace is not None:
        response = trace.tb_frame.f_locals.get("response")
        status, headers = getattr(response, "status_code", None), getattr(response, "headers", None)
        if isinstance(status, int) and status >= HTTPStatus.BAD_REQUEST and headers is not None:
            return status, headers.get("Retry-After")

        trace = trace.tb_next

    return None, None


def _unreachable(error: BaseException | None) -> str | None:
    """Return the reason for a missing connection, which MLflow's client reports as a 500 with a page of text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno and error.strerror:
            return error.strerror

        error = error.__cause__ or error.__context__

    return None
