"""ClearML's offline session, read back from the file that its import takes: everything once, nothing turned into 0."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.track.backends.conftest import Maker
from traceml.errors import BackendError, PluginError
from traceml.track.plugins.interfaces import BackendInterface
from traceml.track.plugins.metric import Metric

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep the machine's own ClearML configuration out, and put the environment back afterwards."""
    for name in ("CLEARML_OFFLINE_MODE", "CLEARML_CACHE_DIR", "CLEARML_API_ACCESS_KEY", "CLEARML_API_HOST"):
        monkeypatch.setenv(name, "")

    monkeypatch.setenv("CLEARML_CONFIG_FILE", str(tmp_path / "none.conf"))


def _end(backend: BackendInterface) -> tuple[dict[str, Any], list[dict[str, Any]], zipfile.ZipFile]:
    """Finish a run, and return its task, its events, and the whole session."""
    url = backend.url
    backend.end_experiment()
    assert url is not None
    packed = zipfile.ZipFile(Path(url.removeprefix("file://")))
    lines = packed.read("metrics.jsonl").decode().splitlines() if "metrics.jsonl" in packed.namelist() else []
    return json.loads(packed.read("task.json")), [event for line in lines for event in json.loads(line)], packed


def test_everything_is_read_back(make: Maker, tmp_path: Path) -> None:
    """Values, steps, times, parameters, tags, texts, histograms, images and artifacts are in the session."""
    from PIL import Image

    image, body = tmp_path / "red.png", tmp_path / "weights.bin"
    Image.new("RGB", (3, 2), "red").save(image)
    body.write_bytes(bytes(range(256)))
    backend = make("clearml", mode="offline", local_only=True)

    backend.start_experiment("first", "tests")
    backend.set_tags({"team": "ü", "quick": ""})
    names = ["loss", "val/acc", "a/b/c", "loss/loss", "größe % [x]", "/a", "half \ud800"]
    backend.log_metrics([Metric(name, i / 7, 50 - i, 1.7e9 + i) for i in range(50) for name in names])
    backend.log_metrics([Metric("x", value, 3, 1.7e9) for value in (math.nan, math.inf, -math.inf, 0.0)])
    backend.log_params({"lr": 1e-3, "deep": {"a": [1]}})
    backend.log_params({"lr": 2e-3})
    backend.log_text("note", "zwei\nZeilen", 4)
    backend.log_histogram("h", [1, 2], [0.0, 0.5, 1.0], 5)
    backend.log_image("cat", image, 6)
    backend.log_artifact(str(body), "model/weights.bin")
    backend.end_state("failed")

    task, events, packed = _end(backend)
    scalars = [event for event in events if event["type"] == "training_stats_scalar"]
    assert len(scalars) == 50 * len(names) + 4
    series = {(event["metric"], event["variant"]) for event in scalars if event["metric"] != "x"}
    assert len(series) == len(names)
    assert {("loss", "loss"), ("val", "acc"), ("a", "b/c"), ("loss/loss", "loss/loss")} <= series
    acc = [(event["iter"], event["value"], event["timestamp"]) for event in scalars if event["variant"] == "acc"]
    assert acc == [(50 - i, i / 7, 1_700_000_000_000 + i * 1000) for i in range(50)]
    odd = [event["variant"] for event in scalars if event["metric"] == "x"]
    assert odd == ["x (nan)", "x (inf)", "x (-inf)", "x"]
    assert task["hyperparams"]["General"]["lr"]["value"] == "0.002"
    assert (task["name"], task["project_name"], task["status"]) == ("first", "tests", "failed")
    assert sorted(task["tags"]) == ["quick", "team: ü"]
    (text,) = [event["msg"] for event in events if event["type"] == "log"]
    assert text == "note [4]: zwei\nZeilen"
    (plot,) = [json.loads(event["plot_str"]) for event in events if event["type"] == "plot"]
    assert plot["data"][0]["y"] == [1, 2]
    (shown,) = [event for event in events if event["type"] == "training_debug_image"]
    contents = {name: packed.read(name) for name in packed.namelist()}
    assert shown["iter"] == 6
    assert contents[f"data/{shown['key']}"] == image.read_bytes()
    assert body.read_bytes() in contents.values()


def test_a_stopped_training_is_no_failed_task(make: Maker) -> None:
    """Ctrl-C ends the task in ClearML's own state for this."""
    backend = make("clearml", mode="offline", local_only=True)
    backend.start_experiment("first", "tests")
    backend.end_state("stopped")

    assert _end(backend)[0]["status"] == "stopped"


def test_what_came_after_the_mark_is_cut_off(make: Maker) -> None:
    """A batch that was written and not noted comes once when it comes again; a packed session can go on."""
    first = make("clearml", mode="offline")
    task = first.start_experiment("first", "tests")
    first.log_metrics([Metric("loss", float(i), i) for i in range(10)])
    mark = json.loads(json.dumps(first.mark()))
    again = [Metric("loss", float(i), i) for i in range(10, 20)]
    first.log_metrics(again)

    second = make("clearml", mode="offline")
    assert second.resume(mark)
    assert second.start_experiment("first", "tests") == task
    second.log_metrics(again)
    assert [event["iter"] for event in _end(second)[1]] == list(range(20))

    third = make("clearml", mode="offline", continue_run=task)
    assert third.start_experiment("first", "tests") == task
    third.log_metric("loss", 20.0, 20)
    about, events, _ = _end(third)
    assert [event["iter"] for event in events] == list(range(21))
    assert about["name"] == "first"
    assert about["project_name"] == "tests"


def test_a_lost_session_is_said(make: Maker) -> None:
    """A missing session of delivered data is an error; no new session may look complete."""
    first = make("clearml", mode="offline")
    first.start_experiment("first", "tests")
    first.log_metric("loss", 1.0, 1)
    mark = first.mark()
    Path(mark["events"]).unlink()

    with pytest.raises(BackendError, match="fewer than"):
        make("clearml", mode="offline").resume(mark)


def test_where_it_goes(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without credentials it works offline; `local_only` refuses a server elsewhere."""
    assert make("clearml").is_local
    monkeypatch.setenv("CLEARML_OFFLINE_MODE", "")
    monkeypatch.setenv("CLEARML_API_ACCESS_KEY", "key")
    monkeypatch.setenv("CLEARML_API_HOST", "https://api.clear.ml")

    with pytest.raises(PluginError, match="not on this machine"):
        make("clearml", local_only=True)
