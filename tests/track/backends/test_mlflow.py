"""MLflow, a real server and a database file: everything once, names and values as they can be kept."""

from __future__ import annotations

import json
import math
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.track.backends.conftest import Maker
from tests.track.servers import MLflowServer
from traceml.errors import BackendBusyError, BackendError, BackendRefusedError, BackendUnauthorizedError, PluginError
from traceml.track.plugins.failure_kinds import FailureKind, classify
from traceml.track.plugins.metric import Metric

# MLflow and SQLAlchemy warn about each other; neither is ours to mend.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)

NAMES = [
    "loss",
    "val/acc",
    "größe",
    "a:b[c]{d}",
    "a%b",
    "a(b",
    "a//b",
    "/a",
    "a/",
    "a/../b",
    "..",
    "x" * 300,
    "x" * 299 + "y",
    "",
    "a b",
]
ABOUT = {"id": "exp-1", "name": "first", "project": "tests", "tags": {}, "parent": None, "params": {}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_mlflow: Path) -> Iterator[MLflowServer]:
    """A server for this module."""
    running = MLflowServer(tmp_path_factory.mktemp("mlflow"), database=empty_mlflow).start()
    yield running
    running.kill()


@pytest.fixture(scope="module", params=["server", "sqlite"])
def uri(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, empty_mlflow: Path) -> str:
    """A tracking URI of either kind."""
    if request.param == "sqlite":
        return f"sqlite:///{shutil.copy(empty_mlflow, tmp_path_factory.mktemp('sqlite') / 'm.db')}"

    server: MLflowServer = request.getfixturevalue("server")
    return server.url


def _client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri)


def _history(uri: str, run_id: str, name: str) -> list[tuple[float, int, int]]:
    return [(each.value, each.step, each.timestamp) for each in _client(uri).get_metric_history(run_id, name)]


@pytest.mark.parametrize(
    ("state", "status"),
    [
        ("finished", "FINISHED"),
        ("stopped", "KILLED"),
        ("lost", "KILLED"),
        ("failed", "FAILED"),
        ("hung", "FAILED"),
        ("of a later version", "FAILED"),
    ],
)
def test_states_are_those_of_mlflow(make: Maker, uri: str, state: str, status: str) -> None:
    """A training that was stopped by Ctrl-C did not fail; one whose end is not known did not finish."""
    backend = make("mlflow", tracking_uri=uri)
    run_id = backend.start_experiment("first", "tests")

    backend.end_state(state)

    assert _client(uri).get_run(run_id).info.status == status


def test_everything_is_read_back(make: Maker, uri: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Values, steps, times, parameters, tags, texts, histograms, images and artifacts are what was given."""
    body = tmp_path / "weights.bin"
    body.write_bytes(bytes(range(256)) * 100)
    backend = make("mlflow", tracking_uri=uri, experiment={"id": request.node.name})

    run_id = backend.start_experiment("first", "tests")
    backend.set_tags({"team": "ü"})
    backend.log_metrics([Metric("loss", i / 7, i, 1.7e9 + i / 1000) for i in range(2500)])
    backend.log_metric("one", 1.5, 2**40)
    backend.log_params({"lr": 1e-3, "name": "x", "long": "p" * 7000, "a%b": 1, "phase": "train"})
    backend.log_params({"lr": 2e-3, "phase": "test"})
    backend.log_params({"phase": "train"})
    backend.log_text("note", "zwei\nZeilen", 4)
    backend.log_histogram("h", [1, 2], [0.0, 0.5, 1.0], 5)
    backend.log_artifact(str(body), "model/my weights.bin")
    backend.end_state("failed")
    backend.end_experiment()

    client = _client(uri)
    run = client.get_run(run_id)
    assert _history(uri, run_id, "loss") == [(i / 7, i, 1_700_000_000_000 + i) for i in range(2500)]
    assert _history(uri, run_id, "one")[0][:2] == (1.5, 2**40)
    assert (run.info.run_name, run.info.status) == ("first", "FAILED")
    assert run.data.params["lr"] == "0.001"
    assert run.data.tags["param.lr"] == "0.002"
    assert run.data.tags["param.phase"] == "train"  # the newest, although it is the first again
    assert run.data.tags["team"] == "ü"
    for path, content in [
        ("params/long.txt", b"p" * 7000),
        ("text/note/4.txt", b"zwei\nZeilen"),
        ("model/my weights.bin", body.read_bytes()),
    ]:
        assert Path(client.download_artifacts(run_id, path, str(tmp_path))).read_bytes() == content

    histogram = client.download_artifacts(run_id, "histograms/h/5.json", str(tmp_path))
    assert json.loads(Path(histogram).read_text())["edges"] == [0.0, 0.5, 1.0]


def test_a_replay_doubles_nothing(make: Maker, uri: str, request: pytest.FixtureRequest) -> None:
    """A batch that comes again after a crash is there once, also rows that look the same within one millisecond."""
    experiment = {"id": request.node.name}
    rows = [Metric("same", 1.0, 0, 1.7e9) for _ in range(5)]
    rows += [
        Metric("same", math.nan, 0, 1.7e9),
        Metric("same", math.nan, 0, 1.7e9 + 0.001),
        Metric("loss", 2.0, 9, 1.7e9),
    ]
    first = make("mlflow", tracking_uri=uri, experiment=experiment)
    run_id = first.start_experiment("first", "tests")
    first.log_metrics(rows[:3])
    mark = json.loads(json.dumps(first.mark()))
    first.log_metrics(rows[3:])

    second = make("mlflow", tracking_uri=uri, experiment=experiment)
    assert second.resume(mark)
    assert second.start_experiment("first", "tests") == run_id
    second.log_metrics(rows[3:6])
    second.log_metrics(rows[6:])
    second.end_experiment()

    history = _history(uri, run_id, "same")
    assert sorted(stamp for value, _, stamp in history if value == 1.0) == [1_700_000_000_000 + i for i in range(5)]
    assert sum(math.isnan(value) for value, _, _ in history) == 2
    assert len(history) == 7
    assert len(_history(uri, run_id, "loss")) == 1


def test_a_resumed_run_has_the_words_of_its_newest_verdict(
    make: Maker, uri: str, request: pytest.FixtureRequest
) -> None:
    """A parameter keeps its first value: the run of a killed job said `ended without a report` after its last job."""
    from mlflow import MlflowClient

    backend = make("mlflow", tracking_uri=uri, experiment={"id": request.node.name})
    run_id = backend.start_experiment("first", "tests")
    for words in ("Rank 0 ended without a report.", "Nothing was found."):
        backend.log_facts({"traceml/verdict_summary": words, "system/cores": 8})

    data = MlflowClient(uri).get_run(run_id).data
    assert data.tags["traceml/verdict_summary"] == "Nothing was found."
    assert data.params == {"system/cores": "8"}


def test_a_deleted_run_refuses_no_row(make: Maker, uri: str, request: pytest.FixtureRequest) -> None:
    """The rows wait for its restoration; each of them was searched for, counted as refused and lost."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    backend = make("mlflow", tracking_uri=uri, experiment={"id": request.node.name})
    run_id = backend.start_experiment("first", "tests")
    client.delete_run(run_id)
    for call in (
        lambda: backend.log_metrics([Metric("loss", 0.5, 1, 1.7e9)]),
        lambda: backend.log_params({"lr": 0.1}),
        lambda: backend.set_tags({"a": "b"}),
    ):
        with pytest.raises(BackendError, match="deleted in MLflow") as raised:
            call()

        assert classify(raised.value).kind is FailureKind.TRANSIENT

    client.restore_run(run_id)
    backend.log_metrics([Metric("loss", 0.5, 1, 1.7e9)])
    assert len(_history(uri, run_id, "loss")) == 1


def test_parameters_that_a_run_has_are_not_sent_again(
    make: Maker, uri: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten thousand took longer than a call may last; each process began with the first, and none came to the end."""
    from mlflow import MlflowClient
    from mlflow.entities import Param

    sent: list[str] = []
    real = MlflowClient.log_batch

    def log_batch(self: Any, run_id: str, *, params: list[Param] = (), **rows: Any) -> None:  # type: ignore[assignment]
        sent.extend(param.key for param in params)
        real(self, run_id, params=params, **rows)

    given = {f"p{number}": str(number) for number in range(150)}
    first = make("mlflow", tracking_uri=uri, experiment={"id": request.node.name})
    run_id = first.start_experiment("first", "tests")
    first.log_params(dict(list(given.items())[:100]))

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    second = make("mlflow", tracking_uri=uri, experiment={"id": request.node.name})
    assert second.start_experiment("first", "tests") == run_id
    second.log_params(given)
    second.log_params(given)
    assert sent == list(given)[100:]
    assert MlflowClient(uri).get_run(run_id).data.params == given


def test_a_start_that_was_not_noted_finds_its_run(make: Maker, uri: str, request: pytest.FixtureRequest) -> None:
    """A delivery that died right after it had created the run leaves no second one."""
    experiment = {"id": request.node.name}
    first = make("mlflow", tracking_uri=uri, experiment=experiment)
    second = make("mlflow", tracking_uri=uri, experiment=experiment)

    assert first.start_experiment("first", "tests") == second.start_experiment("first", "tests")


def test_any_name_is_taken_and_none_is_mixed_up(make: Maker, uri: str, request: pytest.FixtureRequest) -> None:
    """Names that MLflow refuses are changed, each into one of its own."""
    backend = make("mlflow", tracking_uri=uri, experiment={"id": request.node.name})
    run_id = backend.start_experiment("first", "tests")
    backend.log_metrics([Metric(name, float(i), 0, 1.7e9) for i, name in enumerate(NAMES)])
    backend.end_experiment()

    metrics = _client(uri).get_run(run_id).data.metrics
    assert sorted(metrics.values()) == [float(i) for i in range(len(NAMES))]
    assert metrics["größe"] == NAMES.index("größe")
    assert metrics["a b"] == NAMES.index("a b")


def test_long_names_of_runs_and_projects(make: Maker, uri: str, request: pytest.FixtureRequest) -> None:
    """MLflow refuses a project of more than 500 characters; a database may refuse a run's of more than 250."""
    about = {"id": request.node.name}
    ids = [make("mlflow", tracking_uri=uri, experiment=about).start_experiment("r" * 999, "p" * 600) for _ in range(2)]
    info = _client(uri).get_run(ids[0]).info

    assert ids[0] == ids[1]
    assert len(info.run_name) == 250
    assert len(_client(uri).get_experiment(info.experiment_id).name) == 500


def test_the_experiment_of_mlflows_variable(make: Maker, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is that of runs for which nobody names a project; in Databricks an id is the usual way to name one."""
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", wanted := _client(uri).create_experiment(f"of {uri}"))
    runs = [make("mlflow", tracking_uri=uri, experiment={"id": f"of {project}"}).start_experiment("first", project)
            for project in ("default", "tests")]  # fmt: skip

    found = [_client(uri).get_run(run_id).info.experiment_id for run_id in runs]
    assert [each == wanted for each in found] == [True, False]


def test_special_values_and_steps_out_of_order(make: Maker, uri: str, request: pytest.FixtureRequest) -> None:
    """NaN stays; the infinities become the largest numbers, as MLflow keeps them; steps may go backwards."""
    backend = make("mlflow", tracking_uri=uri, experiment={"id": request.node.name})
    run_id = backend.start_experiment("first", "tests")
    values = [math.nan, math.inf, -math.inf]
    backend.log_metrics([Metric("x", value, 5 - i, 1.7e9 + i) for i, value in enumerate(values)])
    backend.end_experiment()

    got = sorted(_history(uri, run_id, "x"), key=lambda each: each[2])
    assert math.isnan(got[0][0])
    assert [value for value, _, _ in got[1:]] == [sys.float_info.max, -sys.float_info.max]
    assert [step for _, step, _ in got] == [5, 4, 3]


def test_nested_and_continued_runs(make: Maker, uri: str, request: pytest.FixtureRequest) -> None:
    """A nested run names its parent; a continued one goes on in the same run."""
    parent = make("mlflow", tracking_uri=uri, experiment={"id": request.node.name + "parent"})
    parent_id = parent.start_experiment("outer", "tests")
    child = make("mlflow", tracking_uri=uri, experiment={"id": request.node.name + "child", "parent": parent_id})
    child_id = child.start_experiment("inner", "tests")
    child.log_metric("loss", 1.0, 0)
    child.end_experiment()
    again = make("mlflow", tracking_uri=uri, experiment={"id": request.node.name + "again"}, continue_run=child_id)
    assert again.start_experiment("inner", "tests") == child_id
    again.log_metric("loss", 2.0, 1)
    again.end_experiment()

    run = _client(uri).get_run(child_id)
    assert run.data.tags["mlflow.parentRunId"] == parent_id
    assert run.info.status == "FINISHED"
    assert [value for value, _, _ in _history(uri, child_id, "loss")] == [1.0, 2.0]


class _Proxy(BaseHTTPRequestHandler):
    """A proxy before a server that answers itself, as one that wants a login does; the server class has the answer."""

    def do_GET(self) -> None:
        """Answer."""
        status, headers, body = self.server.answer
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)

        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.mark.parametrize(
    ("status", "headers", "body", "kind", "words"),
    [
        (401, {}, b'{"message": "Unauthorized"}', BackendUnauthorizedError, "(401)"),
        (403, {}, b'{"message": "Forbidden"}', BackendUnauthorizedError, "(403)"),
        (403, {}, b"<html>Forbidden</html>", BackendUnauthorizedError, "(403)"),
        (429, {}, b'{"message": "Too many requests"}', BackendBusyError, "(429)"),
        (503, {"Retry-After": "3"}, b'{"message": "Down"}', BackendBusyError, "(503)"),
        (407, {}, b"<html>Proxy Authentication Required</html>", BackendUnauthorizedError, "(407)"),
        (418, {}, b'{"message": "Teapot"}', BackendError, "(418)"),
        (200, {}, b"<html>Log in to the guest network</html>", BackendError, "valid JSON"),
    ],
)
def test_the_answer_of_a_proxy_is_told_as_it_was(
    make: Maker, status: int, headers: dict[str, str], body: bytes, kind: type[BackendError], words: str
) -> None:
    """The client calls every answer in JSON that is not MLflow's a 500: a missing key was told as a broken server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Proxy) as proxy:
        proxy.answer = (status, headers, body)
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        backend = make("mlflow", tracking_uri=f"http://127.0.0.1:{proxy.server_port}")
        try:
            with pytest.raises(BackendError) as raised:
                backend.start_experiment("first", "tests")
        finally:
            proxy.shutdown()

    assert type(raised.value) is kind
    assert words in str(raised.value)


def test_an_image_is_an_artifact(make: Maker, server: MLflowServer, tmp_path: Path) -> None:
    """The bytes of an image arrive unchanged through the server."""
    image = tmp_path / "some.png"
    image.write_bytes(b"\x89PNG\r\n" + bytes(2000))
    backend = make("mlflow", tracking_uri=server.url, experiment={"id": "image"})
    run_id = backend.start_experiment("first", "tests")
    backend.log_image("samples/cat %", image, 7)
    backend.end_experiment()

    client = _client(server.url)
    (folder,) = [each.path for each in client.list_artifacts(run_id, "images/samples")]
    assert Path(client.download_artifacts(run_id, f"{folder}/7.png", str(tmp_path))).read_bytes() == image.read_bytes()


def test_a_run_whose_folder_was_moved_goes_on_where_it_began(tmp_path: Path, empty_mlflow: Path) -> None:
    """The database beside the runs is found again; none is made at the new place."""
    from traceml.track.backends.mlflow import MLflowBackend

    def made(folder: str, mark: dict[str, Any] | None = None) -> MLflowBackend:
        run_dir = str(tmp_path / folder / "r")
        return MLflowBackend({"options": {}, "run_id": "r", "run_dir": run_dir, "experiment": ABOUT, "mark": mark})

    (tmp_path / "one").mkdir()
    shutil.copy(empty_mlflow, tmp_path / "one" / "mlflow.db")
    first = made("one")
    run = first.start_experiment("first", "tests")
    first.log_metric("loss", 1.0, 0)
    moved = made("two", first.mark())
    assert moved.resume(first.mark())
    assert moved.start_experiment("first", "tests") == run
    moved.log_metric("loss", 2.0, 1)

    assert [row[0] for row in _history(f"sqlite:///{tmp_path}/one/mlflow.db", run, "loss")] == [1.0, 2.0]
    assert not (tmp_path / "two").exists()


def test_a_dead_server_is_said_at_once(make: Maker, tmp_path: Path) -> None:
    """Nothing is tried again by the library: that is delivery's policy."""
    backend = make("mlflow", tracking_uri=MLflowServer(tmp_path).url)

    with pytest.raises(BackendError):
        backend.start_experiment("first", "tests")


def test_a_row_that_is_refused_is_told_apart(make: Maker, server: MLflowServer) -> None:
    """Rows that MLflow never accepts are a refusal, not a failure to retry."""
    backend = make("mlflow", tracking_uri=server.url, experiment={"id": "refused"})
    backend.start_experiment("first", "tests")

    with pytest.raises(BackendRefusedError):
        backend.log_metrics([Metric("loss", 1.0, 0, -5.0)])


def test_where_it_goes(make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets hide credentials, and `local_only` takes this machine only."""
    remote = make("mlflow", tracking_uri="https://user:secret@example.com:5000/x")

    assert remote.target == "https://example.com:5000/x"
    assert make("mlflow", tracking_uri="http://127.0.0.1:1", local_only=True).is_local
    assert make("mlflow", local_only=True).target == f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(PluginError, match="not on this machine"):
        make("mlflow", tracking_uri="http://10.0.0.1:5000", local_only=True)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://10.0.0.1:5000")
    assert make("mlflow").target == "http://10.0.0.1:5000"
    assert make("mlflow", tracking_uri="local").target == f"sqlite:///{tmp_path}/mlflow.db"
