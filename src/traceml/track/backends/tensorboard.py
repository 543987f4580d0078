"""TensorBoard event files, written without torch or TensorFlow.

Exact: an event file only grows, and `resume` cuts off events after the mark. Values are float32, as in TensorBoard.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from traceml.database.states import RunStatus
from traceml.track.backends.backend_bases import FileBackend
from traceml.track.backends.safe_names import flattened, json_number, safe_file_name, safe_name, utf8_text
from traceml.track.plugins.metric import Metric
from traceml.track.plugins.plugin_metadata import PluginMetadata

__all__ = ["TensorBoardBackend"]

_REFUSED = re.compile("[\ud800-\udfff]")  # a tag is UTF-8, which has no lone surrogates
_LONGEST_NAME = 4000
_NOT_IN_FOLDERS = re.compile(r"[^\w.\-]+|^\.+")
_MAX_HPARAMS = 1000  # they are kept with the position, and the page shows no more
_LONGEST_HPARAM = 1000


class TensorBoardBackend(FileBackend):
    """Writes one event file; a continued run gets another one, as with TensorBoard's own writers."""

    metadata = PluginMetadata(
        name="tensorboard",
        version="1",
        description="TensorBoard event files",
        dependencies=("tensorboard",),
        extra="tensorboard",
        options={"log_dir": str},
        address_option="log_dir",
    )

    def __init__(self, config: Mapping[str, Any]) -> None:
        options, self._experiment = config.get("options") or {}, config["experiment"]
        folder = Path(options.get("log_dir") or Path(config["run_dir"], "tensorboard")).expanduser().absolute()
        run_folder = Path(config.get("continue_run") or folder / _folder_name(self._experiment))
        mark = config.get("mark") or {}
        super().__init__(folder, run_folder / _file_name(self._experiment, mark))
        # TensorBoard keeps the first hyperparameters of a run, so they are written once, at its end.
        self._hparams: dict[str, Any] = dict(mark.get("hparams") or {})
        self._event: Any = None
        self._summary: Any = None

    @property
    def url(self) -> str:
        """The run's folder."""
        return self._path.parent.as_uri()

    def start_experiment(self, name: str, project: str) -> str:
        """Open the event file; a new one starts with the format version and the experiment's facts."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._event, self._summary = Event, Summary
        self._open()
        if not self._keep:
            started = self._experiment.get("started") or time.time()  # by it TensorBoard sorts runs
            self._write([Event(wall_time=started, file_version="brain.Event:2")])
            self.log_text("traceml/run", _table({"name": name, "project": project, "id": self._experiment["id"]}), 0)

        return str(self._path.parent)

    def log_metrics(self, rows: Sequence[Metric]) -> None:
        """Write a batch with one call, each row with its own time."""
        event, summary = self._event, self._summary
        made = []
        for row in rows:
            value = summary.Value(tag=safe_name(row.name, _REFUSED, _LONGEST_NAME), simple_value=row.value)
            made.append(event(wall_time=row.timestamp, step=row.step or 0, summary=summary(value=[value])))

        self._write(made)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Write parameters as a table of the Text tab, nested ones as `model/depth`; keep them for the HParams tab."""
        flat = flattened(params, "/")
        self.log_text("traceml/params", _table(flat), 0)
        self._hparams |= {name: _hparam(value) for name, value in flat.items()}
        self._hparams = dict(list(self._hparams.items())[:_MAX_HPARAMS])

    def log_facts(self, facts: Mapping[str, Any]) -> None:
        """Write the facts of each collector as a table of the Text tab."""
        for collector in dict.fromkeys(key.partition("/")[0] for key in facts):
            part = {key: value for key, value in facts.items() if key.partition("/")[0] == collector}
            self.log_text(f"facts/{collector}", _table(part), 0)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Write tags as a table of the Text tab."""
        self.log_text("traceml/tags", _table(tags), 0)

    def log_text(self, name: str, text: str, step: int) -> None:
        """Write a text."""
        from tensorboard.plugins.text.metadata import create_summary_metadata

        metadata = create_summary_metadata(display_name="", description="")
        content = text.encode("utf-8", "backslashreplace")
        self._tensor(name, metadata, step, dtype=7, shape=(), string_val=[content])  # DT_STRING

    def log_image(self, name: str, path: Path, step: int) -> None:
        """Write an image's bytes unchanged."""
        content = path.read_bytes()
        width, height = _png_size(content)
        image = self._summary.Image(encoded_image_string=content, width=width, height=height, colorspace=3)
        self._value(self._summary.Value(tag=safe_name(name, _REFUSED, _LONGEST_NAME), image=image), step)

    def log_histogram(self, name: str, counts: Sequence[float], edges: Sequence[float], step: int) -> None:
        """Write a histogram: rows of left edge, right edge, count."""
        from tensorboard.plugins.histogram.metadata import create_summary_metadata

        buckets = [cell for each in zip(edges[:-1], edges[1:], counts, strict=True) for cell in each]
        metadata = create_summary_metadata(display_name="", description="")
        content = struct.pack(f"<{len(buckets)}d", *buckets)
        self._tensor(name, metadata, step, dtype=2, shape=(len(counts), 3), tensor_content=content)  # DT_DOUBLE

    def log_artifact(self, artifact_path: str, artifact_name: str | None = None) -> None:
        """Write the path of the file: TensorBoard stores no files."""
        name = artifact_name or Path(artifact_path).name
        self.log_text(f"artifacts/{name}", json.dumps({"path": artifact_path}), 0)

    def end_state(self, state: str) -> None:
        """Write the state in which the training ended, and the hyperparameters with the run's times."""
        from tensorboard.plugins.hparams.api_pb2 import Status
        from tensorboard.plugins.hparams.metadata import SESSION_END_INFO_TAG, SESSION_START_INFO_TAG
        from tensorboard.plugins.hparams.plugin_data_pb2 import SessionEndInfo, SessionStartInfo

        self.log_text("traceml/state", state, 0)
        start = SessionStartInfo(start_time_secs=self._experiment.get("started") or time.time())
        for name, value in self._hparams.items():
            kind = "bool" if isinstance(value, bool) else "number" if isinstance(value, int | float) else "string"
            setattr(start.hparams[name], f"{kind}_value", value)

        known = {RunStatus.FINISHED.value: Status.STATUS_SUCCESS}
        known[RunStatus.STOPPED.value] = Status.STATUS_UNKNOWN  # it has no word for stopped
        status = known.get(state, Status.STATUS_FAILURE)
        end = SessionEndInfo(status=status, end_time_secs=self._ended or time.time())
        self._session(SESSION_START_INFO_TAG, session_start_info=start)
        self._session(SESSION_END_INFO_TAG, session_end_info=end)

    def mark(self) -> dict[str, Any]:
        """Return the file, its length, and the hyperparameters so far."""
        return {**super().mark(), "hparams": self._hparams}

    def _session(self, tag: str, **content: Any) -> None:
        """Write a record of the HParams plugin."""
        from tensorboard.compat.proto.summary_pb2 import SummaryMetadata
        from tensorboard.plugins.hparams.metadata import NULL_TENSOR, PLUGIN_DATA_VERSION, PLUGIN_NAME
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

        data = HParamsPluginData(version=PLUGIN_DATA_VERSION, **content)
        plugin = SummaryMetadata.PluginData(plugin_name=PLUGIN_NAME, content=data.SerializeToString())
        metadata = SummaryMetadata(plugin_data=plugin)
        self._value(self._summary.Value(tag=tag, metadata=metadata, tensor=NULL_TENSOR), 0)

    def _tensor(self, name: str, metadata: Any, step: int, *, shape: Sequence[int], **content: Any) -> None:
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

        dims = TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in shape])
        tensor = TensorProto(tensor_shape=dims, **content)
        tag = safe_name(name, _REFUSED, _LONGEST_NAME)
        self._value(self._summary.Value(tag=tag, tensor=tensor, metadata=metadata), step)

    def _value(self, value: Any, step: int) -> None:
        self._write([self._event(wall_time=self._row_s, step=step, summary=self._summary(value=[value]))])

    def _write(self, events: Sequence[Any]) -> None:
        """Append events."""
        from tensorboard.summary.writer.record_writer import masked_crc32c

        parts = []
        for event in events:
            data = event.SerializeToString()
            length = struct.pack("<Q", len(data))
            parts += [length, struct.pack("<I", masked_crc32c(length)), data, struct.pack("<I", masked_crc32c(data))]

        self._append(b"".join(parts))


def _folder_name(experiment: Mapping[str, Any]) -> str:
    """Return the folder of a run, which TensorBoard shows as its name: readable, and different for each experiment."""
    digest = hashlib.sha256(str(experiment["id"]).encode()).hexdigest()[:6]
    name = _NOT_IN_FOLDERS.sub("_", str(experiment.get("name") or "run"))[:100]
    return f"{name.encode()[:200].decode('utf-8', 'ignore')}-{digest}"  # file systems take 255 bytes


def _file_name(experiment: Mapping[str, Any], mark: Mapping[str, Any]) -> str:
    """Return the name of an event file; for an experiment that has one already, the next one.

    `resume` continues the one of the mark. After the end of the experiment it is complete.
    """
    name = f"events.out.tfevents.traceml.{safe_file_name(str(experiment['id']))}"
    number = Path(mark["path"]).name.removeprefix(f"{name}.") if mark else ""
    return f"{name}.{(int(number) if number.isdigit() else 0) + 1:03}" if mark else name


def _table(values: Mapping[str, Any]) -> str:
    """Return a Markdown table of names and values."""
    cells = [(_cell(name), _cell(value)) for name, value in values.items()]
    return "\n".join(("| name | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells)))


def _cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


def _hparam(value: Any) -> bool | float | str:
    """Return a value that the HParams tab can hold."""
    if isinstance(value, bool | int | float):
        return json_number(value)

    return utf8_text(str(value))[:_LONGEST_HPARAM]


def _png_size(content: bytes) -> tuple[int, int]:
    """Return width and height of a PNG, or zeros for another format; viewers read the image itself."""
    if content[:8] != b"\x89PNG\r\n\x1a\n" or len(content) < 24:
        return 0, 0

    width, height = struct.unpack(">II", content[16:24])
    return width, height
