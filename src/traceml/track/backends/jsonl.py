"""Lines of JSON in a local file, without library or server; also a fallback for any other tracker."""

from __future__ import annotations

import filecmp
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from traceml.track.backends.backend_bases import FileBackend
from traceml.track.backends.safe_names import NO_PATH, json_number, safe_file_name, safe_path
from traceml.track.plugins.metric import Metric
from traceml.track.plugins.plugin_metadata import PluginMetadata

__all__ = ["JsonlBackend"]

_LONGEST_PATH = 1000


class JsonlBackend(FileBackend):
    """Writes `<folder>/<experiment>.jsonl`. Exact: `resume` cuts off lines after the mark.

    Lines are strict JSON: NaN and infinities are the texts "NaN", "Infinity" and "-Infinity".
    """

    metadata = PluginMetadata(
        name="jsonl",
        version="1",
        description="lines of JSON in a local file",
        options={"path": str},
        address_option="path",
    )

    def __init__(self, config: Mapping[str, Any]) -> None:
        options, experiment = config.get("options") or {}, config["experiment"]
        folder = Path(options.get("path") or Path(config["run_dir"], "jsonl")).expanduser().absolute()
        path = Path(config.get("continue_run") or folder / f"{safe_file_name(str(experiment['id']))}.jsonl")
        super().__init__(folder, path, keep=bool(config.get("continue_run")))
        self._copies = "path" in options  # else files stay in the run's artifacts folder
        self._experiment = experiment

    @property
    def url(self) -> str:
        """The file."""
        return self._path.as_uri()

    def start_experiment(self, name: str, project: str) -> str:
        """Open the file and, when it is new, say what it is about."""
        if not self._open().size:
            about = {key: self._experiment.get(key) for key in ("id", "parent")}
            started = self._experiment.get("started") or time.time()
            self._write([{"type": "start", "name": name, "project": project, **about, "timestamp": started}])

        return str(self._path)

    def log_metrics(self, rows: Sequence[Metric]) -> None:
        """Write a batch with one call."""
        self._write(
            {
                "type": "metric",
                "name": row.name,
                "value": json_number(row.value),
                "step": row.step,
                "timestamp": row.timestamp,
                "rank": row.rank,
            }
            for row in rows
        )

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Write parameters in one line."""
        self._write([{"type": "params", "params": _strict(params)}])

    def log_facts(self, facts: Mapping[str, Any]) -> None:
        """Write facts in one line."""
        self._write([{"type": "facts", "facts": _strict(facts)}])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Write tags in one line."""
        self._write([{"type": "tags", "tags": _strict(tags)}])

    def log_text(self, name: str, text: str, step: int) -> None:
        """Write a text in one line."""
        self._write([{"type": "text", "name": name, "text": text, "step": step, "timestamp": self._row_s}])

    def log_histogram(self, name: str, counts: Sequence[float], edges: Sequence[float], step: int) -> None:
        """Write a histogram in one line."""
        line = {"type": "histogram", "name": name, "counts": list(counts), "edges": list(edges), "step": step}
        self._write([_strict({**line, "timestamp": self._row_s})])

    def log_image(self, name: str, path: Path, step: int) -> None:
        """Write the path of the image."""
        where = self._stored_path(path, f"{name}/{step}{path.suffix}", may_replace=False)
        self._write([{"type": "image", "name": name, "path": where, "step": step, "timestamp": self._row_s}])

    def log_artifact(self, artifact_path: str, artifact_name: str | None = None) -> None:
        """Write the path of the file."""
        name = artifact_name or Path(artifact_path).name
        self._write([{"type": "artifact", "name": name, "path": self._stored_path(Path(artifact_path), name)}])

    def end_state(self, state: str) -> None:
        """Write the state and the time in which the training ended."""
        self._write([{"type": "end", "state": state, "timestamp": self._ended or time.time()}])

    def _write(self, lines: Any) -> None:
        """Append lines."""
        self._append("".join(_encode(line) + "\n" for line in lines).encode("utf-8", "backslashreplace"))

    def _stored_path(self, path: Path, name: str, *, may_replace: bool = True) -> str:
        """Return the path of the content: its own, or that of a copy next to the lines if the option `path` is set.

        Args:
            may_replace: whether it may take the place of another content under that name.
        """
        if not self._copies:
            return str(path)

        copy = self._path.with_suffix("") / safe_path(name, NO_PATH, _LONGEST_PATH)
        if not may_replace and copy.exists() and not filecmp.cmp(copy, path, shallow=False):
            copy = copy.with_stem(f"{copy.stem}-{path.stem[:8]}")  # of its digest

        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        except (FileExistsError, IsADirectoryError, NotADirectoryError):  # a folder has the name, or a file that of one
            copy = self._path.with_suffix("") / path.name
            shutil.copyfile(path, copy)

        return str(copy)


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=str).encode


def _strict(value: Any) -> Any:
    """Return plain values in a form that strict JSON can hold."""
    if isinstance(value, float):
        return json_number(value)
    if isinstance(value, Mapping):
        return {str(key): _strict(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_strict(each) for each in value]

    return value
