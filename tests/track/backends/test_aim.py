"""Aim, read back in a fresh process: everything once, also what is given again, repeated, or out of order."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.forked import client as forked
from tests.track.backends.conftest import Maker
from traceml.track.plugins.metric import Metric

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
    pytest.mark.skipif(sys.version_info >= (3, 13), reason="there is no Aim for this Python"),
]

READER = """
import json, sys
import aim
repo = aim.Repo(sys.argv[1])
run = repo.get_run(sys.argv[2])
out = {"metrics": [], "texts": [], "images": [], "distributions": [], "artifacts": {}}
for metric in run.metrics():
    frame = metric.dataframe()
    frame["time"] = frame["time"].astype("datetime64[us]").astype("int64") / 1e6
    out["metrics"].append([metric.name, metric.context.to_dict(), frame[["step", "value", "time"]].values.tolist()])
for kind in ("texts", "images", "distributions"):
    get = getattr(run, f"get_{kind[:-1]}_sequence")
    for name, context, _ in run.iter_sequence_info_by_type(f"aim.{kind[:-1]}"):
        for step, (value, _, _) in get(name, context).data.items():
            shown = value.data if kind == "texts" else value.size if kind == "images" else value.bin_count
            out[kind].append([name, context.to_dict(), step, shown])
out["params"] = run["hparams"] if run.get("hparams") else {}
out["traceml"] = run["traceml"]
out["state"] = run.get("state")
out["name"], out["experiment"], out["tags"] = run.name, run.experiment, sorted(run.tags)
out["created"] = run.creation_time
out["ended"] = run.end_time is not None
for name, artifact in run.artifacts.items():
    out["artifacts"][name] = artifact.uri if hasattr(artifact, "uri") else artifact["uri"]
print(json.dumps(out, default=str))
"""


@pytest.fixture(autouse=True)
def _forked_migrations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the process in which Aim prepares a repository's database."""
    from aim.storage.migrations import utils

    processes = SimpleNamespace(Popen=partial(forked.Popen, imports="aim"), SubprocessError=subprocess.SubprocessError)
    monkeypatch.setattr(utils, "subprocess", processes)


def _read(repo: Path, run: str) -> dict[str, Any]:
    """Read a run in a process of its own, as a user would."""
    command = [sys.executable, "-c", READER, repo, run]
    done = forked.run(command, imports="aim", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    out: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return out


def _values(read: dict[str, Any], name: str) -> list[list[float]]:
    rows = [row for found, _, part in read["metrics"] if found == name for row in part]
    return sorted(rows, key=lambda row: (row[0], row[2]))


def test_everything_is_read_back(make: Maker, tmp_path: Path) -> None:
    """Values, steps, times, parameters, tags, texts, images, histograms and artifacts are what was given.

    An image that Pillow cannot open is an artifact; it kept all later rows from Aim. An integer that Aim cannot hold,
    such as a seed of torch, is a text; it kept all parameters after it from Aim.
    """
    from PIL import Image

    image, body, drawing = tmp_path / "red.png", tmp_path / "weights.bin", tmp_path / "plot.svg"
    drawing.write_text("<svg/>")
    Image.new("RGB", (3, 2), "red").save(image)
    body.write_bytes(bytes(range(256)))
    backend = make("aim", repo=str(tmp_path / "repo"), experiment={"parent": "outer"})

    run = backend.start_experiment("first", "tests")
    backend.set_tags({"team": "ü"})
    backend.log_metrics([Metric(name, i / 7, i, 1.7e9 + i) for i in range(500) for name in ("loss", "größe % [x]")])
    backend.log_metrics([Metric("x", v, 9 - i, 1.7e9) for i, v in enumerate((math.nan, math.inf, -math.inf, 1.0))])
    backend.log_params({"lr": 1e-3, "seed": 2**64 - 1, "deep": {"a": [1, -(2**63)]}, "other": Path("/x")})
    backend.log_params({"lr": 2e-3})
    for _ in range(2):
        backend.log_text("note", "zwei\nZeilen", 4)
        backend.log_image("cat", image, 5)
        backend.log_histogram("even", [1, 2], [0.0, 0.5, 1.0], 6)

    backend.log_text("note", "another", 4)
    backend.log_histogram("odd", [1, 2], [0.0, 0.1, 1.0], 6)
    backend.log_artifact(str(body), "model/../weights.bin")
    backend.log_image("plot", drawing, 5)
    backend.end_state("finished")
    backend.end_experiment()

    read = _read(tmp_path / "repo", run)
    assert _values(read, "loss") == [[i, i / 7, 1.7e9 + i] for i in range(500)]
    assert len(_values(read, "größe % [x]")) == 500
    odd = _values(read, "x")
    assert [row[0] for row in odd] == [6, 7, 8, 9]
    assert odd[0][1] == 1.0
    assert (odd[1][1], odd[2][1]) == (-math.inf, math.inf)
    assert math.isnan(odd[3][1])
    assert read["params"] == {"lr": 2e-3, "seed": str(2**64 - 1), "deep": {"a": [1, -(2**63)]}, "other": "/x"}
    assert (read["name"], read["experiment"], read["tags"]) == ("first", "tests", ["team: ü"])
    assert (read["state"], read["ended"], read["traceml"]["parent"]) == ("finished", True, "outer")
    assert sorted((name, step, text) for name, _, step, text in read["texts"] if name == "note") == [
        ("note", 4, "another"),
        ("note", 4, "zwei\nZeilen"),
    ]
    assert read["images"] == [["cat", {}, 5, [3, 2]]]
    assert [each[0] for each in read["distributions"]] == ["even"]
    assert json.loads(next(text for name, *_, text in read["texts"] if name == "odd"))["edges"] == [0.0, 0.1, 1.0]
    stored = [Path(uri.removeprefix("file://")).read_bytes() for uri in read["artifacts"].values()]
    assert sorted(stored) == sorted([body.read_bytes(), drawing.read_bytes()])


def test_a_replay_doubles_nothing(make: Maker, tmp_path: Path) -> None:
    """Rows that come again overwrite themselves; other values at a step stand beside the first; a run goes on.

    Another experiment that continues it changes neither its name nor its start.
    """
    repo = str(tmp_path / "repo")
    first = make("aim", repo=repo, experiment={"started": 1.5e9})
    run = first.start_experiment("first", "tests")
    first.log_metrics([Metric("loss", float(i), i, float(i)) for i in range(100)])
    mark = json.loads(json.dumps(first.mark()))
    later = [Metric("loss", float(i), i % 120, 200.0 + i) for i in range(100, 300)]
    first.log_metrics(later)
    first.end_experiment()

    second = make("aim", repo=repo)
    second.resume(mark)
    assert second.start_experiment("first", "tests") == run
    second.log_metrics(later[:77])
    second.log_metrics(later[77:])
    second.end_experiment()
    third = make("aim", repo=repo, continue_run=run, experiment={"id": "exp-2", "started": 1.6e9})
    assert third.start_experiment("part 2", "tests") == run
    third.log_metric("more", 1.0, 0)
    third.end_experiment()

    given = sorted([i % 120 if i >= 100 else i, float(i)] for i in range(300))
    read = _read(tmp_path / "repo", run)
    assert sorted(row[:2] for row in _values(read, "loss")) == given
    assert [row[:2] for row in _values(read, "more")] == [[0, 1.0]]
    assert (read["name"], read["created"]) == ("first", 1.5e9)


def test_a_relative_repository(make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts at the folder of the script, for the artifacts too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("content")
    backend = make("aim", repo="./mine")
    run = backend.start_experiment("first", "tests")
    backend.log_artifact("file.txt")
    backend.end_experiment()

    (uri,) = _read(tmp_path / "mine", run)["artifacts"].values()
    assert Path(uri.removeprefix("file://")).read_text() == "content"
    assert Path(uri.removeprefix("file://")).is_relative_to(tmp_path / "mine")


def test_where_it_goes(make: Maker, tmp_path: Path) -> None:
    """By default a folder beside the runs."""
    assert make("aim", local_only=True).target == str(tmp_path)
    assert make("aim", repo="aim://127.0.0.1:53800", local_only=True).is_local
    assert not make("aim", repo="aim://example.com:53800").is_local
