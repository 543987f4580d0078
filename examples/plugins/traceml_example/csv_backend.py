"""A tracker: one CSV file per experiment, one line per value."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

from traceml import BackendInterface, BackendPlugin, PluginMetadata


class CsvBackend(BackendInterface):
    """Writes `<folder>/<experiment>.csv`.

    It is called from one thread of a process of its own, so it may block, and what it raises is tried again.
    """

    def __init__(self, config):
        folder = Path(config["options"].get("folder") or config["run_dir"])
        self.path = folder / f"{config['experiment']['id']}.csv"
        self.offset = None  # where the file ends; None for a new one

    @property
    def target(self):
        return str(self.path.parent)

    @property
    def is_local(self):
        return True  # else `local_only` refuses it

    def resume(self, mark):
        # The process died after the mark was noted. Rows that came later will come again: cut them off.
        self.path, self.offset = Path(mark["path"]), mark["offset"]
        os.truncate(self.path, self.offset)
        return True

    def start_experiment(self, name, project):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("wb" if self.offset is None else "r+b")
        self.file.seek(0, os.SEEK_END)
        if self.offset is None:
            self.write([("kind", "name", "value", "step", "timestamp"), ("experiment", name, project, "", "")])

        return str(self.path)

    def log_metrics(self, rows):
        self.write([("metric", row.name, repr(row.value), row.step, repr(row.timestamp)) for row in rows])

    def log_metric(self, name, value, step):
        self.write([("metric", name, repr(value), step, "")])

    def log_params(self, params):
        self.write([("param", name, json.dumps(value, default=str), "", "") for name, value in params.items()])

    def log_artifact(self, artifact_path, artifact_name=None):
        self.write([("artifact", artifact_name or Path(artifact_path).name, artifact_path, "", "")])

    def end_experiment(self):
        self.file.close()

    def mark(self):
        return {"path": str(self.path), "offset": self.offset}

    def write(self, lines):
        text = io.StringIO()
        csv.writer(text).writerows(lines)
        self.file.write(text.getvalue().encode())
        self.file.flush()
        self.offset = self.file.tell()


class CsvPlugin(BackendPlugin):
    @classmethod
    def get_metadata(cls):
        return PluginMetadata(name="csv", version="0.1.0", description="a CSV file", options={"folder": str})

    def create_backend(self, config):
        return CsvBackend(config)
