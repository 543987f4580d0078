"""TensorBoard event files, written without torch or TensorFlow.

Exact: an event file only grows, and `resume` cuts off events after the mark. Values are float32, as in TensorBoard.
"""

from __future__ import annotations

import json
import re
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from traceml.track.backends.append_file import FileBackend
from traceml.track.backends.safe_names import safe_name
from traceml.track.plugins.metric import Metric
from traceml.track.plugins.plugin_metadata import PluginMetadata

__all__ = ["TensorBoardBackend"]

_REFUSED = re.compile("[\ud800-\udfff]")  # a tag is UTF-8, which has no lone surrogates
_LONGEST_NAME = 4000


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
        run_folder = Path(config.get("continue_run") or folder / str(self._experiment["id"]))
        super().__init__(folder, run_folder / f"events.out.tfevents.traceml.{self._experiment['id']}")
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
            self._write([Event(wall_time=time.time(), file_version="brain.Event:2")])
            about = {"name": name, "project": project, "id": self._experiment["id"]}
            tags = self._experiment.get("tags") or {}
            self.log_params({**about, **{f"tags/{key}": value for key, value in tags.items()}})

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
        """Write each parameter as a text, for the Text tab."""
        for name, value in params.items():
            self.log_text(f"params/{name}", value if isinstance(value, str) else repr(value), 0)

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
        """Write the state in which the training ended."""
        self.log_text("state", state, 0)

    def _tensor(self, name: str, metadata: Any, step: int, *, shape: Sequence[int], **content: Any) -> None:
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

        dims = TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in shape])
        tensor = TensorProto(tensor_shape=dims, **content)
        tag = safe_name(name, _REFUSED, _LONGEST_NAME)
        self._value(self._summary.Value(tag=tag, tensor=tensor, metadata=metadata), step)

    def _value(self, value: Any, step: int) -> None:
        self._write([self._event(wall_time=time.time(), step=step, summary=self._summary(value=[value]))])

    def _write(self, events: Sequence[Any]) -> None:
        """Append events."""
        from tensorboard.summary.writer.record_writer import masked_crc32c

        parts = []
        for event in events:
            data = event.SerializeToString()
            length = struct.pack("<Q", len(data))
            parts += [
                length,
                struct.pack("<I", masked_crc32c(length)),
                data,
                struct.pack("<I", masked_crc32c(data)),
            ]

        self._append(b"".join(parts))


def _png_size(content: bytes) -> tuple[int, int]:
    """Return width and height of a PNG, or zeros for another format; viewers read the image itself."""
    if content[:8] != b"\x89PNG\r\n\x1a\n" or len(content) < 24:
        return 0, 0

    width, height = struct.unpack(">II", content[16:24])
    return width, height
