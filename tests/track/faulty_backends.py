"""Backends that fail as a file of the test says."""

from __future__ import annotations

import json
import os
import signal
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from traceml.errors import BackendBusyError, BackendRefusedError
from traceml.track.plugins.interfaces import BackendInterface
from traceml.track.plugins.metric import Metric
from traceml.track.plugins.plugin_base import BackendPlugin
from traceml.track.plugins.plugin_metadata import PluginMetadata

__all__ = [
    "Bare",
    "FaultyBackend",
    "FaultyBackendAnew",
    "FaultyBackendIdempotent",
    "FaultyBackendMark",
    "FaultyBackendOdd",
    "FaultyPlugin",
    "ForgetfulPlugin",
]


def _react(folder: Path, to: str) -> None:
    try:
        behaviors = json.loads((folder / "behavior").read_text())
    except FileNotFoundError:
        return

    behavior = behaviors.get(to)
    if behavior == "hang":
        (folder / "hangs").touch()
        time.sleep(600)
    elif behavior == "down":
        raise ConnectionRefusedError("nobody listens")
    elif behavior == "down once":
        (folder / "behavior").unlink()
        raise ConnectionRefusedError("nobody listens yet")
    elif behavior == "busy":
        raise BackendBusyError("come back later", 0.1)
    elif behavior == "refuses":
        raise BackendRefusedError("no such project (400)")
    elif behavior == "exits":
        raise SystemExit(3)
    elif behavior == "panics":
        raise PanicException("called `Option::unwrap()` on a `None` value")
    elif behavior == "crashes":
        os.kill(os.getpid(), signal.SIGKILL)
    elif behavior == "broken":
        raise TypeError("log() got an unexpected keyword argument")


class PanicException(BaseException):
    """A panic of code in Rust, which PyO3 derives from BaseException."""


class FaultyBackend(BackendInterface):
    """Writes lines of JSON unless its file `behavior` says otherwise; cut off at the mark like a real one."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._folder = Path(config["options"]["path"])
        self._path = self._folder / f"{config['experiment']['id']}.jsonl"
        self._file: Any = None

    @property
    def is_local(self) -> bool:
        return True

    def resume(self, mark: Mapping[str, Any]) -> bool:
        if self._file is not None:
            self._file.flush()

        with self._path.open("ab") as file:
            file.truncate(mark["offset"])

        return True

    def start_experiment(self, name: str, project: str) -> str:
        _react(self._folder, "start")
        self._file = self._path.open("ab")
        self._write({"start": name, "project": project, "keyed": os.environ.get("FAULTY_KEY") == "hush"})
        return str(self._path)

    def log_metric(self, name: str, value: float, step: int) -> None:
        raise AssertionError("batches only")

    def log_metrics(self, rows: Sequence[Metric]) -> None:
        _react(self._folder, "metrics")
        for row in rows:
            if "refused" in row.name:
                raise BackendRefusedError(f"bad name {row.name!r}")

            self._write({"metric": row.name, "value": row.value, "step": row.step})

    def log_params(self, params: Mapping[str, Any]) -> None:
        self._write({"params": dict(params)})

    def log_artifact(self, artifact_path: str, artifact_name: str | None = None) -> None:
        _react(self._folder, "artifact")
        self._write({"artifact": artifact_name})

    def end_experiment(self) -> None:
        self.flush()

    def flush(self) -> None:
        self._file.flush()

    def mark(self) -> dict[str, Any]:
        self._file.flush()
        return {"offset": self._file.tell()}

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")


class FaultyBackendIdempotent(FaultyBackend):
    """The same, retried by the same process."""

    idempotent: ClassVar[bool] = True

    def log_metrics(self, rows: Sequence[Metric]) -> None:
        for row in rows:
            if "refused" in row.name:
                raise BackendRefusedError(f"bad name {row.name!r}")

        super().log_metrics(rows)


class FaultyBackendMark(FaultyBackend):
    """The same, with a position that cannot be kept."""

    def mark(self) -> dict[str, Any]:
        return {"file": self._file}


class FaultyBackendOdd(FaultyBackend):
    """The same, with an id and a place that are no texts."""

    @property
    def target(self) -> Any:
        return self._folder

    @property
    def url(self) -> Any:
        return self._path

    def start_experiment(self, name: str, project: str) -> Any:
        super().start_experiment(name, project)
        return uuid.UUID(int=7)


class FaultyBackendAnew(FaultyBackend):
    """The same, continued from the run's first row alone."""

    def resume(self, mark: Mapping[str, Any]) -> bool:
        self._path.unlink()
        return False


class FaultyPlugin(BackendPlugin):
    """Creates the backend, and fails when it is to release what it took."""

    @classmethod
    def get_metadata(cls) -> PluginMetadata:
        return PluginMetadata(name="faulty", version="1")

    def initialize(self, config: Mapping[str, Any]) -> None:
        self._folder = Path(config["path"])

    def create_backend(self, config: Mapping[str, Any]) -> BackendInterface:
        return FaultyBackend(config)

    def cleanup(self) -> None:
        (self._folder / "cleaned").touch()
        _react(self._folder, "cleanup")
        raise OSError("nothing to release")


class ForgetfulPlugin(FaultyPlugin):
    """Creates nothing."""

    def create_backend(self, config: Mapping[str, Any]) -> Any:
        super().create_backend(config)


class Bare(BackendInterface):
    """The minimal backend: it neither resumes nor marks."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._path = Path(config["options"]["path"], "plain.jsonl")

    def start_experiment(self, name: str, project: str) -> str:
        return "1"

    def log_metric(self, name: str, value: float, step: int) -> None:
        if "refused" in name:
            raise ValueError(f"bad name {name!r}")

        self._write({"metric": name, "value": value, "step": step})

    def log_params(self, params: Mapping[str, Any]) -> None:
        if any(name.startswith("tags/") for name in params):
            raise NotImplementedError
        if "refused" in params:
            raise KeyError("refused")

        self._write({"params": dict(params)})

    def log_artifact(self, artifact_path: str, artifact_name: str | None = None) -> None:
        raise NotImplementedError

    def end_experiment(self) -> None:
        return

    def _write(self, line: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
