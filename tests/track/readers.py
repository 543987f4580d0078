"""Readers of each tracker's values of a run by its own means: sorted (name, step, value)."""

from __future__ import annotations

import json
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

from tests.forked import client as forked
from tests.track.backends.wandb_reader import history

__all__ = ["READERS", "Value", "aim", "clearml", "jsonl", "mlflow", "tensorboard", "trackio", "trackio_run", "wandb"]

Value = tuple[str, int, float]

_AIM = """
import json, sys
import aim
run = aim.Repo(sys.argv[1]).get_run(sys.argv[2])
rows = [
    [metric.name, int(step), float(value)]
    for metric in run.metrics()
    for step, value in metric.dataframe()[["step", "value"]].values
]
print(json.dumps(rows))
"""


def jsonl(run_dir: Path, number: str) -> list[Value]:
    """Read the lines; the run's id is the file."""
    words = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}
    rows = [json.loads(line) for line in Path(number).read_text().splitlines()]
    return sorted(
        (row["name"], row["step"], float(words.get(row["value"], row["value"])))
        for row in rows
        if row["type"] == "metric"
    )


def mlflow(run_dir: Path, number: str, uri: str | None = None) -> list[Value]:
    """Ask the store for every metric's history."""
    from mlflow import MlflowClient

    client = MlflowClient(uri or f"sqlite:///{run_dir.parent}/mlflow.db")
    names = client.get_run(number).data.metrics
    return sorted((name, row.step, row.value) for name in names for row in client.get_metric_history(number, name))


def wandb(run_dir: Path, number: str) -> list[Value]:
    """Read the one offline run there is of that id."""
    (folder,) = run_dir.glob(f"wandb/offline-run-*-{number}")
    return sorted(
        (name, row["traceml/step"], float(value))
        for row in history(folder)
        for name, value in row.items()
        if not name.startswith("_") and name != "traceml/step" and isinstance(value, int | float)
    )


def clearml(run_dir: Path, number: str) -> list[Value]:
    """Read the packed session, the file that an import takes."""
    with zipfile.ZipFile(run_dir / "clearml" / "offline" / f"{number}.zip") as packed:
        lines = packed.read("metrics.jsonl").decode().splitlines()

    events: list[dict[str, Any]] = [event for line in lines for event in json.loads(line)]
    return sorted(
        (_name(event["metric"], event["variant"]), event["iter"], float(event["value"]))
        for event in events
        if event["type"] == "training_stats_scalar"
    )


def _name(title: str, series: str) -> str:
    return title if title == series else f"{title}/{series}"


def aim(run_dir: Path, number: str) -> list[Value]:
    """Read in a fresh process, as a user would."""
    command = [sys.executable, "-c", _AIM, str(run_dir.parent), number]
    out = forked.run(command, imports="aim", capture_output=True, text=True, check=True).stdout
    return sorted((name, step, value) for name, step, value in json.loads(out.splitlines()[-1]))


def tensorboard(run_dir: Path, number: str) -> list[Value]:
    """Read with TensorBoard's own accumulator; values are float32."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(number, size_guidance={"scalars": 0}).Reload()
    return sorted((name, each.step, each.value) for name in read.Tags()["scalars"] for each in read.Scalars(name))


_TRACKIO = """
import json, sys
from trackio.sqlite_storage import SQLiteStorage
about = {"project": sys.argv[1], "run_id": sys.argv[2]}
logs = SQLiteStorage.get_logs(**about)
links = SQLiteStorage.get_run_artifacts(sys.argv[1], None, sys.argv[2])["output"]
artifacts = [SQLiteStorage.get_artifact_manifest(sys.argv[1], each["name"], f"v{each['version']}") for each in links]
print(json.dumps({"logs": logs, "config": SQLiteStorage.get_run_config(**about), "artifacts": artifacts}, default=str))
"""


def trackio_run(run_dir: Path, number: str) -> dict[str, Any]:
    """Read a run in a fresh process, as Trackio's own page does."""
    command = [sys.executable, "-c", _TRACKIO, "tests", number]
    environment = {**os.environ, "TRACKIO_DIR": str(run_dir.parent / "trackio")}
    done = forked.run(command, imports="trackio", capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def trackio(run_dir: Path, number: str) -> list[Value]:
    """Read the entries' numbers."""
    return sorted(
        (name, row["step"], float(value))
        for row in trackio_run(run_dir, number)["logs"]
        for name, value in row.items()
        if name not in {"step", "timestamp"} and isinstance(value, int | float)
    )


READERS = {
    "jsonl": jsonl,
    "mlflow": mlflow,
    "wandb": wandb,
    "clearml": clearml,
    "aim": aim,
    "tensorboard": tensorboard,
    "trackio": trackio,
}
