"""An offline W&B run, read back from its file: everything once, in order, whatever dies in between."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.track.backends.conftest import Maker
from tests.track.backends.wandb_reader import history, records
from tests.track.fabricated import LoggedRun, deliver, state_of
from traceml.errors import PluginError
from traceml.track.plugins.interfaces import BackendInterface
from traceml.track.plugins.metric import Metric
from traceml.track.wandb_sweep import variables

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep the machine's own W&B configuration out, and put the environment back afterwards."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)

    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name in ("WANDB_SILENT", "WANDB_ERROR_REPORTING", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def _folder(backend: BackendInterface) -> Path:
    assert backend.url is not None
    return Path(backend.url.removeprefix("file://"))


def _values(rows: list[dict[str, Any]]) -> list[tuple[str, int, float]]:
    """Return (name, step, value) of each value in the order of the records."""
    return [
        (key, row["traceml/step"], value)
        for row in rows
        for key, value in row.items()
        if not key.startswith("_") and key != "traceml/step"
    ]


def test_everything_is_read_back(make: Maker, tmp_path: Path) -> None:
    """Values, steps, times, parameters, tags, texts, histograms, images and artifacts are in the run."""
    from PIL import Image

    image, body = tmp_path / "red.png", tmp_path / "weights.bin"
    Image.new("RGB", (3, 2), "red").save(image)
    body.write_bytes(bytes(range(256)))
    backend = make("wandb", mode="offline", local_only=True)

    backend.start_experiment("first", "tests")
    backend.set_tags({"team": "ü" * 90, "quick": "true"})
    names = ["loss", "val/acc", "a.b", "größe % [x]", "_step", "traceml/step", "", "half \ud800"]
    backend.log_metrics([Metric(name, i / 7, 50 - i, 1.7e9 + i) for i in range(50) for name in names])
    backend.log_metrics([Metric("x", value, 3, 1.8e9) for value in (math.nan, math.inf, -math.inf, 2.0, 2.0)])
    backend.log_params({"lr": 1e-3, "deep": {"a": [1]}})
    backend.log_params({"lr": 2e-3})
    backend.log_text("note", "zwei\nZeilen", 4)
    backend.log_histogram("h", [1, 2], [0.0, 0.5, 1.0], 5)
    backend.log_image("cat", image, 6)
    backend.log_artifact(str(body), "model/my weights.bin")
    backend.end_state("failed")
    folder = _folder(backend)
    backend.end_experiment()

    rows = history(folder)
    plain = [row for row in rows if "x" not in row][:50]
    assert [len(row) - 4 for row in plain] == [len(names)] * 50  # _step, _timestamp, _runtime, traceml/step
    assert [(row["loss"], row["traceml/step"], row["_timestamp"]) for row in plain] == [
        (i / 7, 50 - i, 1.7e9 + i) for i in range(50)
    ]
    assert str([row["x"] for row in rows if "x" in row]) == "[nan, inf, -inf, 2, 2]"
    assert [row["_step"] for row in rows] == list(range(len(rows)))
    (note,) = [row for row in rows if "note" in row]
    assert (note["note"], note["traceml/step"]) == ("zwei\nZeilen", 4)
    assert [row["h.values"] for row in rows if "h.values" in row] == [[1, 2]]
    (shown,) = [row["cat.path"] for row in rows if "cat.path" in row]
    assert (folder / "files" / shown).read_bytes() == image.read_bytes()
    by_kind: dict[str, list[Any]] = {}
    for record in records(folder):
        by_kind.setdefault(record.WhichOneof("record_type"), []).append(record)

    config = {item.key: item.value_json for record in by_kind["config"] for item in record.config.update}
    assert config["lr"] == "0.002"
    run = by_kind["run"][-1].run
    assert (run.display_name, run.project, by_kind["exit"][0].exit.exit_code) == ("first", "tests", 1)
    assert set(run.tags) == {f"team:{'ü' * 59}", "quick"}
    artifact = (
        by_kind["request"][0].request.log_artifact.artifact if "request" in by_kind else by_kind["artifact"][0].artifact
    )
    (entry,) = artifact.manifest.contents
    assert (entry.path, Path(entry.local_path).read_bytes()) == ("my weights.bin", body.read_bytes())


def test_an_image_that_cannot_be_opened_stops_nothing(make: Maker, tmp_path: Path) -> None:
    """It becomes an artifact: as a failure that passes it was tried again, with all of the run, without an end."""
    drawing = tmp_path / "plot.svg"
    drawing.write_text("<svg/>")
    backend = make("wandb", mode="offline")
    backend.start_experiment("first", "tests")
    backend.log_image("plot", drawing, 6)
    backend.log_metric("loss", 1.0, 1)
    folder = _folder(backend)
    backend.end_experiment()

    assert _values(history(folder)) == [("loss", 1, 1.0)]
    kinds = [record.WhichOneof("record_type") for record in records(folder)]
    assert "request" in kinds or "artifact" in kinds


def test_records_depend_on_rows_alone(make: Maker) -> None:
    """However the rows are cut into batches, the same records come out: counting them tells where to go on."""
    rows = [Metric(f"m{i % 3}", float(i), i // 7, 1.7e9 + i) for i in range(600)]
    found = []
    for size in (600, 7, 1):
        backend = make("wandb", mode="offline", experiment={"id": f"cut-{size}"})
        backend.start_experiment("first", "tests")
        for first in range(0, len(rows), size):
            backend.log_metrics(rows[first : first + size])

        folder = _folder(backend)
        backend.end_experiment()
        found.append([{key: row[key] for key in row if key != "_runtime"} for row in history(folder)])

    assert found[0] == found[1] == found[2]
    assert sorted(_values(found[0])) == sorted((row.name, row.step, row.value) for row in rows)


SWEPT = """
import sys
from traceml.track.plugins.plugin_registry import create_backend
config = {"run_id": "r", "run_dir": sys.argv[1], "options": {"mode": "offline"}, "experiment": {"id": "exp-1"}}
backend = create_backend("wandb", config)
print(backend.start_experiment("first", "tests"), backend.url)
backend.end_experiment()
"""


def test_a_sweep_is_joined(tmp_path: Path) -> None:
    """Under a sweep agent the run is the agent's, with the parameters that it chose."""
    parameters = tmp_path / "config-swept.yaml"
    parameters.write_text("wandb_version: 1\n\nlr:\n  value: 0.25\n")
    given = {"WANDB_SWEEP_ID": "sw33p", "WANDB_RUN_ID": "swept", "WANDB_SWEEP_PARAM_PATH": str(parameters)}
    command = [sys.executable, "-c", SWEPT, str(tmp_path / "run")]
    done = subprocess.run(command, env={**os.environ, **given}, capture_output=True, text=True, check=True)

    number, url = done.stdout.split()
    found = list(records(Path(url.removeprefix("file://"))))
    (run, *_) = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    assert (number, run.run_id, run.sweep_id) == ("swept", "swept", "sw33p")
    assert {item.key: item.value_json for item in run.config.update}["lr"] == "0.25"


def test_a_sweep_is_joined_by_a_delivery_that_was_started_elsewhere(tmp_path: Path) -> None:
    """Under `traceml serve` the agent's variables are the rank's alone: they come with what it announces, no keys."""
    given = {"WANDB_SWEEP_ID": "sw33p", "WANDB_RUN_ID": "swept", "WANDB_MODE": "offline", "WANDB_API_KEY": "k" * 40}
    told = variables(given)
    assert told == {name: value for name, value in given.items() if name != "WANDB_API_KEY"}
    run = LoggedRun(tmp_path / "runs" / "r1")
    run.experiment(["wandb"], id="exp-1", environ={**told, "WANDB_API_KEY": "k" * 40, "LD_PRELOAD": "/x.so"})
    run.metrics({"loss": [1.0]})
    run.end()

    done = deliver(run.path, "wandb")
    assert done.returncode == 0, done.stderr
    (kept,) = state_of(run.path, "wandb").experiments.values()
    found = list(records(Path(kept["url"].removeprefix("file://"))))
    (about, *_) = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    assert (kept["id"], about.run_id, about.sweep_id) == ("swept", "swept", "sw33p")


@pytest.mark.parametrize("project", ["team/vision", "p" * 600, "50%: why?"])
def test_any_project_is_taken(make: Maker, project: str) -> None:
    """W&B refuses some characters and long names, and with them all rows of the experiment."""
    backend = make("wandb", mode="offline")
    backend.start_experiment("first", project)
    backend.log_metric("loss", 1.0, 1)
    folder = _folder(backend)
    backend.end_experiment()
    (about, *_) = [record.run for record in records(folder) if record.WhichOneof("record_type") == "run"]

    assert about.project.startswith(project[:2])
    assert _values(history(folder)) == [("loss", 1, 1.0)]


def test_a_continued_run_has_its_id(make: Maker) -> None:
    """Resuming an experiment gives a further offline part of the same run, and leaves the first one alone."""
    first = make("wandb", mode="offline")
    run = first.start_experiment("first", "tests")
    first.log_metric("loss", 1.0, 1)
    folder = _folder(first)
    first.end_experiment()
    second = make("wandb", mode="offline", continue_run=run, experiment={"id": "exp-2"})
    assert second.start_experiment("first", "tests") == run
    second.log_metric("loss", 2.0, 2)
    further = _folder(second)
    second.end_experiment()

    assert _values(history(folder)) == [("loss", 1, 1.0)]
    assert _values(history(further)) == [("loss", 2, 2.0)]


def test_where_it_goes(make: Maker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a key it works offline; `local_only` refuses a server elsewhere."""
    assert make("wandb", local_only=True).target == str(tmp_path / "run" / "wandb")
    assert make("wandb", mode="online", base_url="http://localhost:8080", local_only=True).is_local
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)

    with pytest.raises(PluginError, match="not on this machine"):
        make("wandb", local_only=True)
