"""Trackio: a folder of databases on this machine, or a server.

Every value is an entry of its own, with a key made of its content. Trackio stores each key once, so sending a row again
changes nothing. What its own client would add (a sender's thread, its own times) is left out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

from traceml.loopback import is_on_this_machine
from traceml.track.backends.backend_bases import BatchBackend
from traceml.track.backends.safe_names import NO_TEXT, plain_value, safe_name, safe_path, utf8_text
from traceml.track.backends.trackio_places import TrackioEntry, TrackioFolder, TrackioPlace, TrackioRun, TrackioServer
from traceml.track.plugins.metric import Metric
from traceml.track.plugins.plugin_metadata import PluginMetadata, first_set

__all__ = ["TrackioBackend"]

# Names that Trackio uses itself, and characters that UTF-8 cannot hold.
_REFUSED = re.compile(r"^(?:project|run|timestamp|step|time|metrics)$|^__|[\0\ud800-\udfff]")
_REFUSED_PARAM = re.compile(r"^_|[\0\ud800-\udfff]")
_REFUSED_RUN = re.compile(r"(?:^|(?<=/))\.{1,2}(?=/|$)|^/|/$|//|[\\\0\ud800-\udfff]")  # it is part of a path
_REFUSED_FILE = re.compile(r"[\\/\0\ud800-\udfff]|^\.{1,2}$|^[A-Za-z]:")
_REFUSED_ID = re.compile(r"[^A-Za-z0-9._-]")
_LONGEST_NAME = 1000
_LONGEST_PROJECT = 60  # it is the name of a file: a character has up to 4 bytes
_MAX_BUCKETS = 512  # of a histogram in Trackio
_LARGEST_INTEGER = 2**63


class TrackioBackend(BatchBackend):
    """Delivers to one Trackio run."""

    metadata = PluginMetadata(
        name="trackio",
        version="1",
        description="Trackio: a local folder, a server or a Hugging Face Space",
        dependencies=("trackio",),
        extra="trackio",
        options={"dir": str, "server_url": str},
        option_variables={
            "server_url": first_set("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"),
            "dir": first_set("TRACKIO_DIR"),
        },
        exclusive_options=("server_url", "dir"),
        address_option="server_url",
        key_variable="TRACKIO_WRITE_TOKEN",
        environment=("TRACKIO_*", "HF_TOKEN"),
    )
    idempotent: ClassVar[bool] = True

    def __init__(self, config: Mapping[str, Any]) -> None:
        options = self.metadata.with_environment(config.get("options") or {})
        self._experiment = config["experiment"]
        self._server = str(options.get("server_url") or "")
        given = options.get("dir") or Path(config["run_dir"]).parent / "trackio"
        self._folder = Path(given).expanduser().absolute()
        self._id = str(config.get("continue_run") or safe_name(str(self._experiment["id"]), _REFUSED_ID, 128))
        self._is_continued = bool(config.get("continue_run"))
        self._place: TrackioPlace | None = None
        self._run = TrackioRun("", "", self._id)
        self._config: dict[str, Any] = {}

    @property
    def target(self) -> str:
        """The folder, or the server without its token."""
        return self._server.partition("?")[0] or str(self._folder)

    @property
    def is_local(self) -> bool:
        """Whether it is a folder, or a server on this machine."""
        return not self._server or is_on_this_machine(self._server)

    def resume(self, mark: Mapping[str, Any]) -> bool:
        """Continue the same run."""
        self._id, self._is_continued = mark["id"], True
        return True

    def start_experiment(self, name: str, project: str) -> str:
        """Open the place and the run."""
        self._place = TrackioServer(self._server) if self._server else TrackioFolder(self._folder)
        self._run = TrackioRun(
            safe_name(project, NO_TEXT, _LONGEST_PROJECT), safe_path(name, _REFUSED_RUN, 200), self._id
        )
        if self._is_continued:
            self._config = self._place.config(self._run)

        started = self._experiment.get("started")
        self._config |= {
            "_Username": str(self._experiment.get("user") or "") or None,
            # A run that another experiment continues keeps its start.
            "_Created": self._config.get("_Created") or (_time(started) if started else _now()),
            "_Group": str(self._experiment["parent"]) if self._experiment.get("parent") else None,
        }
        self._write_config({})
        return self._id

    def log_metrics(self, rows: Sequence[Metric]) -> None:
        """Send a batch: an entry per value."""
        self._write([self._entry(row.name, row.value, row.step or 0, row.timestamp) for row in rows])

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Send parameters; a new value replaces the old one."""
        named = {
            safe_name(str(key), _REFUSED_PARAM, _LONGEST_NAME): plain_value(each, largest=_LARGEST_INTEGER)
            for key, each in params.items()
        }
        self._write_config(named)

    def log_text(self, name: str, text: str, step: int) -> None:
        """Send a text as Markdown."""
        self._log(name, {"_type": "trackio.markdown", "_value": utf8_text(text)}, step)

    def log_image(self, name: str, path: Path, step: int) -> None:
        """Send an image, under a name made of its content."""
        from trackio.utils import canonical_project_name

        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:32]
        file = f"{digest}{path.suffix}"
        self._opened.put_media(self._run, path, file, step)
        where = f"{canonical_project_name(self._run.project)}/{self._run.name}/{step}/{file}"
        stored = {"_type": "trackio.image", "file_path": where, "caption": None}
        self._log(name, stored, step)

    def log_histogram(self, name: str, counts: Sequence[float], edges: Sequence[float], step: int) -> None:
        """Send a histogram; one with more buckets than Trackio shows becomes a text of JSON."""
        if len(counts) > _MAX_BUCKETS:
            super().log_histogram(name, counts, edges, step)
            return

        self._log(name, {"_type": "trackio.histogram", "bins": list(edges), "values": list(counts)}, step)

    def log_artifact(self, artifact_path: str, artifact_name: str | None = None) -> None:
        """Send a file as an artifact of its own."""
        title = artifact_name or Path(artifact_path).name
        name = safe_name(title, _REFUSED_ID, 120)
        inner = safe_path(Path(title).name or "file", _REFUSED_FILE, 200)
        self._opened.put_artifact(self._run, name, Path(artifact_path), inner, title)

    def end_time(self, timestamp: float) -> None:
        """Send the time as a value of the config; Trackio has no field for it."""
        self._write_config({"traceml/ended": _time(timestamp)})

    def end_state(self, state: str) -> None:
        """Send the state as a value of the config; Trackio has no field for it."""
        self._write_config({"traceml/state": state})

    def end_experiment(self) -> None:
        """Finish; every call was stored when it returned."""
        self._place = None

    def mark(self) -> dict[str, Any]:
        """Return the run."""
        return {"id": self._id}

    # --- entries -----------------------------------------------------------------------------------------------------

    @property
    def _opened(self) -> TrackioPlace:
        assert self._place is not None  # between start_experiment and end_experiment
        return self._place

    def _entry(self, name: str, value: Any, step: int, timestamp: float | None) -> TrackioEntry:
        key = json.dumps([self._id, name, value, step, timestamp])
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        return TrackioEntry(
            {safe_name(name, _REFUSED, _LONGEST_NAME): value}, step, _time(timestamp) if timestamp else _now(), digest
        )

    def _log(self, name: str, value: Mapping[str, Any], step: int) -> None:
        self._write([self._entry(name, value, step, self.row_time)])

    def _write(self, entries: Sequence[TrackioEntry]) -> None:
        self._opened.write(self._run, entries, None)

    def _write_config(self, values: Mapping[str, Any]) -> None:
        """Send the whole config, which Trackio stores only with an entry: one without values, always the same."""
        self._config |= values
        empty = TrackioEntry({}, 0, str(self._config["_Created"]), f"{self._id}-config")
        self._opened.write(self._run, [empty], self._config)


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _time(timestamp: float) -> str:
    return datetime.fromtimestamp(timestamp, UTC).isoformat()
