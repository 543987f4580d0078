"""Trackio: a real server of its own, and what a folder holds of odd names and values, read by Trackio itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.track.backends.conftest import Maker
from traceml.errors import BackendUnauthorizedError, PluginError
from traceml.track.plugins.interfaces import BackendInterface
from traceml.track.plugins.metric import Metric

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"),
    pytest.mark.timeout(240),
]

_SERVER = """
import sys, trackio
print(trackio.show(open_browser=False, block_thread=False, host="127.0.0.1")[3], flush=True)
sys.stdin.read()
"""
_READ = """
import json, sys
from trackio.sqlite_storage import SQLiteStorage
about = {"project": SQLiteStorage.get_projects()[0], "run_id": sys.argv[1]}
print(json.dumps([SQLiteStorage.get_logs(**about), SQLiteStorage.get_run_config(**about)], default=str))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a server; yield its URL with the write token."""
    folder = tmp_path_factory.mktemp("trackio")
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "TRACKIO_DIR": str(folder)},
    )  # fmt: skip
    assert process.stdout is not None
    url = next((line.strip() for line in process.stdout if line.startswith("http")), None)
    assert url, "the server has ended"
    yield url
    process.communicate()


def _ask(server: str, name: str, **arguments: Any) -> Any:
    answer = httpx.post(f"{server.partition('?')[0]}/api/{name}", json={"args": [], "kwargs": arguments}, timeout=240)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


def _log_everything(backend: BackendInterface, folder: Path) -> None:
    from PIL import Image

    Image.new("RGB", (3, 2), (80, 0, 0)).save(folder / "cat.png")
    (folder / "weights.bin").write_bytes(b"x" * 1000)
    backend.log_metrics([Metric("loss", 0.5, 3, 1_700_000_000.0), Metric("loss", float("nan"), 4, 1_700_000_001.0)])
    backend.log_params({"lr": 0.1, "model": {"depth": 2}})
    backend.log_text("note", "all is well", 3)
    backend.log_histogram("h", [1.0, 2.0], [0.0, 0.5, 1.0], 3)
    backend.log_image("cat", folder / "cat.png", 3)
    backend.log_artifact(str(folder / "weights.bin"), "model/weights.bin")


def test_a_server_holds_each_row_once(server: str, make: Maker, tmp_path: Path) -> None:
    """Everything is sent twice, the second time by a delivery that continues; then the training ends."""
    for mark, started in (({}, 1.5e9), ({"id": "exp-1"}, 1.6e9)):
        backend = make("trackio", server_url=server, experiment={"started": started})
        if mark:
            assert backend.resume(mark)

        assert backend.start_experiment("first", "tests") == "exp-1"
        _log_everything(backend, tmp_path)
        backend.end_experiment()

    assert backend.is_local
    assert "token" not in backend.target
    logs = [
        row for row in _ask(server, "get_logs", project="tests", run_id="exp-1") if set(row) - {"step", "timestamp"}
    ]
    values = {(name, row["step"]): row[name] for row in logs for name in set(row) - {"step", "timestamp"}}
    image = values.pop(("cat", 3))
    assert len(logs) == 5
    assert values == {
        ("loss", 3): 0.5,
        ("loss", 4): None,  # the server's JSON has no NaN
        ("note", 3): {"_type": "trackio.markdown", "_value": "all is well"},
        ("h", 3): {"_type": "trackio.histogram", "bins": [0.0, 0.5, 1.0], "values": [1.0, 2.0]},
    }
    (artifact,) = _ask(server, "get_run_artifacts", project="tests", run_id="exp-1")["output"]
    assert (artifact["size_bytes"], artifact["version"]) == (1000, 0)
    config = _ask(server, "get_run_summary", project="tests", run_id="exp-1")["config"]
    assert (config["lr"], config["model"]) == (0.1, {"depth": 2})
    assert config["_Created"].startswith("2017-07-14")  # what continues a run does not move its start
    folder = _ask(server, "get_settings")["media_dir"]
    shown = httpx.get(
        f"{server.partition('?')[0]}/file", params={"path": f"{folder}/{image['file_path']}"}, timeout=240
    )
    assert shown.content == (tmp_path / "cat.png").read_bytes()


def test_a_server_requires_its_token(server: str, make: Maker) -> None:
    """The failure is that of a key, so that it is read again, and no row is given up."""
    backend = make("trackio", server_url=server.partition("?")[0])

    with pytest.raises(BackendUnauthorizedError, match="TRACKIO_WRITE_TOKEN"):
        backend.start_experiment("first", "tests")


def test_a_folder_takes_any_name_and_value(tmp_path: Path) -> None:
    """What Trackio reserves is renamed, and no number is lost."""
    program = """
import json, sys
from traceml.track.plugins.metric import Metric
from traceml.track.plugins.plugin_registry import create_backend
about = {"id": "exp 1", "name": "../first", "parent": "p", "user": "ada"}
backend = create_backend("trackio", {"options": {}, "run_dir": sys.argv[1], "experiment": about, "run_id": "r"})
number = backend.start_experiment("../first", "験" * 300)  # more bytes than a file's name may have
for i, name in enumerate(("step", "__a", "a\\ud800", "x" * 2000, "Größe")):
    backend.log_metrics([Metric(name, float("inf") if i == 4 else i / 8, i, 1.0 + i)])
backend.set_tags({"team": "vision"})
backend.log_params({"_x": 1, "big": 2**70, "odd": [1, {"k": object}]})
print(json.dumps([number, backend.target]))
"""
    run_dir = tmp_path / "runs" / "run"
    done = subprocess.run(
        [sys.executable, "-c", program, str(run_dir)], capture_output=True, text=True, check=False,
        env={name: value for name, value in os.environ.items() if not name.startswith("TRACKIO")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    number, target = json.loads(done.stdout)
    read = subprocess.run(
        [sys.executable, "-c", _READ, number], capture_output=True, text=True, check=True,
        env={**os.environ, "TRACKIO_DIR": target},
    )  # fmt: skip
    logs, config = json.loads(read.stdout)
    values = {name: (row["step"], row[name]) for row in logs for name in set(row) - {"step", "timestamp"}}
    assert sorted(values.values()) == [(0, 0.0), (1, 0.125), (2, 0.25), (3, 0.375), (4, float("inf"))]
    assert values["Größe"] == (4, float("inf"))
    assert [name for name in values if name.startswith("__") or len(name) > 1000] == []
    assert config["big"] == str(2**70)
    assert (config["tags/team"], config["_Group"], config["_Username"]) == ("vision", "p", "ada")
    assert target == str(tmp_path / "runs" / "trackio")


def test_options_are_checked(make: Maker) -> None:
    """A misspelled option is no silent default."""
    with pytest.raises(PluginError, match="no option 'url'; there are: dir, server_url"):
        make("trackio", url="http://127.0.0.1:1")
