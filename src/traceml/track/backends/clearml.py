"""ClearML: a server, or an offline session that `Task.import_offline_session` uploads later.

Offline sessions are exact: events are lines of a file that only grows, and `resume` cuts off events after the mark. A
server gives each event an id of its own, so after the death of a delivery process at most one batch is there twice.

The SDK's reporter and `Task.init` are not used: they throttle the caller, wait for fixed times, collect data that was
not requested, and allow one task per process. Events have the SDK's form, with the time of the call.

ClearML has no NaN and no infinities (its SDK writes 0 instead). Here such a value becomes a 0 in a series of its own,
`<series> (nan)`, `<series> (inf)` or `<series> (-inf)`, so that it is neither missing nor mistaken for a number.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from traceml.database.states import RunStatus
from traceml.errors import BackendError
from traceml.loopback import is_on_this_machine
from traceml.track.backends.backend_bases import AppendFile, BatchBackend, cut_back
from traceml.track.backends.safe_names import NO_TEXT, flattened, merged_tags, safe_name, safe_path, utf8_text
from traceml.track.plugins.failure_kinds import error_of_status
from traceml.track.plugins.metric import Metric
from traceml.track.plugins.plugin_metadata import PluginMetadata, first_set

__all__ = ["ClearMLBackend"]

_LONGEST_NAME = 1000
_BATCH = 1000
_EVENTS = "metrics.jsonl"  # file of an offline session
_STATUS = {RunStatus.FINISHED.value: "completed", RunStatus.STOPPED.value: "stopped"}  # of all others failed


class ClearMLBackend(BatchBackend):
    """Delivers to one ClearML task."""

    metadata = PluginMetadata(
        name="clearml",
        version="1",
        description="a ClearML server, or an offline session",
        dependencies=("clearml",),
        extra="clearml",
        options={"mode": str, "offline_dir": str, "api_host": str},
        option_variables={
            "api_host": first_set("CLEARML_API_HOST"),
            "mode": lambda environ: "offline" if environ.get("CLEARML_OFFLINE_MODE", "0") not in {"", "0"} else "",
        },
        address_option="api_host",
        key_variable="CLEARML_API_SECRET_KEY",
        environment=("CLEARML_*", "TRAINS_*"),
    )

    def __init__(self, config: Mapping[str, Any]) -> None:
        options = self.metadata.with_environment(config.get("options") or {})
        self._experiment = config["experiment"]
        self._offline = _is_offline(options)
        self._cache = Path(options.get("offline_dir") or Path(config["run_dir"], "clearml")).expanduser().absolute()
        self._host = str(options.get("api_host") or "")
        self._traceml_run = str(config.get("run_id", ""))
        self._id: str | None = config.get("continue_run")
        self._task: Any = None
        self._events: Path | None = None
        self._state = RunStatus.FINISHED.value

    @property
    def target(self) -> str:
        """The folder of offline sessions, or the server."""
        return str(self._cache) if self._offline else self._host or "the ClearML server"

    @property
    def is_local(self) -> bool:
        """Whether it is an offline session, or a server on this machine."""
        return self._offline or is_on_this_machine(self._host)

    @property
    def url(self) -> str | None:
        """The task's page, or the file to import."""
        if self._task is None:
            return None
        if self._offline:
            return Path(f"{self._task.get_offline_mode_folder()}.zip").as_uri()

        return str(self._task.get_output_log_web_page())

    def resume(self, mark: Mapping[str, Any]) -> bool:
        """Continue the same task; cut off events after the mark in an offline session."""
        self._id = mark["id"]
        if mark.get("events"):
            cut_back(Path(mark["events"]), mark["offset"])

        return True

    def start_experiment(self, name: str, project: str) -> str:
        """Create the task, or open it again."""
        self._set_environment()
        with _errors():
            from clearml import Task

            if not self._offline:
                _open_session()

            kind = Task.TaskTypes.training
            made = {"project_name": project, "task_name": name, "task_type": kind}
            given = {"task_id": self._id} if self._id else made
            # the constructor behind Task.create and Task.get_task, which both refuse to work offline
            self._task = Task(private=Task._Task__create_protection, log_to_backend=False, **given)
            self._id = str(self._task.id)
            if self._offline:
                folder = Path(self._task.get_offline_mode_folder())
                folder.mkdir(parents=True, exist_ok=True)
                self._events = folder / _EVENTS
                self._task._project_name = (None, project)
            else:
                self._task.mark_started(force=True)

            if self._experiment.get("parent"):
                self._task.set_parent(str(self._experiment["parent"]))

        self.log_params({"traceml/run": self._traceml_run, "traceml/experiment": self._experiment["id"]})
        return self._id

    def log_metrics(self, rows: Sequence[Metric]) -> None:
        """Send a batch; `a/b` is the series `b` of the plot `a`."""
        events = []
        for row in rows:
            title, series = _title_and_series(row.name)
            value = row.value
            if not math.isfinite(value):
                series, value = f"{series} ({value})", 0.0

            events.append(
                {
                    "type": "training_stats_scalar",
                    "task": self._id,
                    "timestamp": round(row.timestamp * 1000),
                    "metric": title,
                    "variant": series,
                    "iter": row.step or 0,
                    "value": value,
                }
            )

        self._add(events)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Send parameters, nested ones as `model/depth`; a new value replaces the old one. Numbers keep their type."""
        self._send_params({f"General/{key}": value for key, value in flattened(params, "/").items()})

    def log_facts(self, facts: Mapping[str, Any]) -> None:
        """Send facts as parameters in a section of their collector."""
        self._send_params(flattened(facts, "/"))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Send tags as `key` or `key: value`, in place of earlier values."""
        with _errors():
            self._task.set_tags(merged_tags(self._task.get_tags() or (), tags, ": "))

    def log_text(self, name: str, text: str, step: int) -> None:
        """Send a text to the task's console."""
        event = {"type": "log", "task": self._id, "timestamp": round(self._row_s * 1000), "level": "info"}
        self._add([{**event, "worker": "traceml", "msg": utf8_text(f"{name} [{step}]: {text}")}])

    def log_histogram(self, name: str, counts: Sequence[float], edges: Sequence[float], step: int) -> None:
        """Send a histogram as a plot."""
        title, series = _title_and_series(name)
        bars = {
            "type": "bar",
            "name": series,
            "x": [(low + high) / 2 for low, high in pairwise(edges)],
            "width": [high - low for low, high in pairwise(edges)],
            "y": list(counts),
        }
        plot = {"data": [bars], "layout": {"title": title, "bargap": 0}}
        event = {"type": "plot", "task": self._id, "timestamp": round(self._row_s * 1000), "metric": title}
        self._add([{**event, "variant": series, "iter": step, "plot_str": json.dumps(plot)}])

    def log_image(self, name: str, path: Path, step: int) -> None:
        """Send an image as a debug sample, in a file that a replay reuses and another image does not."""
        from clearml.backend_interface.metrics.events import ImageEvent

        title, series = _title_and_series(safe_path(name, NO_TEXT, _LONGEST_NAME))  # they are folders
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        file = safe_path(f"{title}_{series}_{step}_{digest}", NO_TEXT, _LONGEST_NAME)
        with _errors():
            event = ImageEvent(
                title, series, image_data=None, local_image_path=str(path), iter=step, override_filename=file,
                timestamp=round(self._row_s * 1000),
            )  # fmt: skip
            manager = self._task._get_metrics_manager(self._task._get_default_report_storage_uri())
            manager._do_write_events([event])
            if event.upload_exception is not None:
                raise BackendError(f"the image was not uploaded: {event.upload_exception}")

    def log_artifact(self, artifact_path: str, artifact_name: str | None = None) -> None:
        """Upload a file, and wait for it."""
        name = safe_path(artifact_name or Path(artifact_path).name, NO_TEXT, _LONGEST_NAME)  # it is a folder
        with _errors():
            if not self._task.upload_artifact(name, Path(artifact_path), wait_on_upload=True, retries=0):
                raise BackendError(f"artifact {name} was not uploaded")

    def end_state(self, state: str) -> None:
        """Record the state in which the training ended."""
        self._state = state

    def end_experiment(self) -> None:
        """Finish the task; an offline session is packed into a file for import."""
        if self._task is None:
            return

        with _errors():
            if not self._offline:
                if self._state == RunStatus.FINISHED:
                    self._task.mark_completed(ignore_errors=False)
                elif self._state == RunStatus.STOPPED:
                    self._task.stopped(ignore_errors=False)
                else:
                    self._task.mark_failed(ignore_errors=False, status_reason=self._state)
            else:
                self._task._edit(status=_STATUS.get(self._state, "failed"))
                _pack(Path(self._task.get_offline_mode_folder()))

        self._task = None

    def mark(self) -> dict[str, Any]:
        """Return the task, and the length of an offline session's events."""
        if self._events is None:
            return {"id": self._id}

        offset = self._events.stat().st_size if self._events.exists() else 0
        return {"id": self._id, "events": str(self._events), "offset": offset}

    def _send_params(self, params: Mapping[str, Any]) -> None:
        named = {safe_name(key, NO_TEXT, _LONGEST_NAME): _typed(value) for key, value in params.items()}
        with _errors():
            self._task.update_parameters(named)

    def _set_environment(self) -> None:
        """Set whether the SDK works offline, which it reads when it is imported and holds for the whole process."""
        os.environ["CLEARML_OFFLINE_MODE"] = "1" if self._offline else "0"
        if self._offline:
            os.environ["CLEARML_CACHE_DIR"] = str(self._cache)
        elif self._host:
            os.environ["CLEARML_API_HOST"] = self._host

        os.environ.setdefault("CLEARML_SUPPRESS_UPDATE_MESSAGE", "1")

    def _add(self, events: Sequence[dict[str, Any]]) -> None:
        if self._offline:
            assert self._events is not None, "start_experiment comes first"
            with closing(AppendFile(self._events)) as file:  # a full disk leaves no incomplete line
                file.write((json.dumps(list(events)) + "\n").encode())

            return

        with _errors():
            from clearml.backend_api.services import events as api

            for first in range(0, len(events), _BATCH):
                requests = [api.AddRequest(event=_RawEvent(each)) for each in events[first : first + _BATCH]]
                self._task.send(api.AddBatchRequest(requests=requests), raise_on_errors=True)


class _RawEvent:
    """An event in the form of a dictionary, which is all that the SDK needs."""

    def __init__(self, content: dict[str, Any]) -> None:
        self._content = content

    def to_dict(self) -> dict[str, Any]:
        return self._content


def _is_offline(options: Mapping[str, Any]) -> bool:
    """Whether to work offline: by option, else when there are no credentials."""
    if mode := options.get("mode"):
        return str(mode) == "offline"

    config = Path(os.environ.get("CLEARML_CONFIG_FILE") or Path.home() / "clearml.conf")
    return not os.environ.get("CLEARML_API_ACCESS_KEY") and not config.exists()


def _open_session() -> None:
    """Connect once, with the current keys: the SDK's own session would retry for hours."""
    from clearml.backend_api import Session
    from clearml.backend_interface.base import InterfaceBase
    from clearml.config import config_obj

    tries = {"total": 0, "connect": 0, "read": 0, "redirect": 2, "status": 0, "backoff_factor": 0}
    session = Session(
        initialize_logging=False,
        config=config_obj,
        api_key=os.environ.get("CLEARML_API_ACCESS_KEY"),
        secret_key=os.environ.get("CLEARML_API_SECRET_KEY"),
        http_retries_config=tries,
    )
    InterfaceBase._set_default_session(session)


def _title_and_series(name: str) -> tuple[str, str]:
    """Return plot and series of a name, different for different names."""
    name = safe_name(name, NO_TEXT, _LONGEST_NAME)
    title, _, series = name.partition("/")
    return (title, series) if title and series and title != series else (name, name)


def _typed(value: Any) -> Any:
    """Return a value of a type that ClearML has for parameters; any other becomes a text."""
    if isinstance(value, list | tuple):
        return [_typed(each) for each in value]

    if isinstance(value, bool | int | float):
        return value

    return utf8_text(value if isinstance(value, str) else repr(value))


def _pack(folder: Path) -> None:
    """Pack an offline session as the SDK does, atomically."""
    target, part = Path(f"{folder}.zip"), Path(f"{folder}.zip.part")
    with zipfile.ZipFile(part, "w", allowZip64=True, compression=zipfile.ZIP_DEFLATED) as packed:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                packed.write(path, path.relative_to(folder))

    part.replace(target)


@contextmanager
def _errors() -> Iterator[None]:
    """Convert ClearML's errors to those that delivery classifies."""
    try:
        yield
    except (ImportError, AttributeError, BackendError):
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        code = getattr(getattr(getattr(error, "result", None), "meta", None), "result_code", None)
        # Its login raises the same error for a server that is down and for a wrong key.
        refused = type(error).__name__ in {"LoginError", "MissingConfigError"} and "ConnectionError" not in why
        raise error_of_status("ClearML", 401 if refused else code, why) from error
