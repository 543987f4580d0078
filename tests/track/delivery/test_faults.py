"""Faults: something dies, is full, or responds wrongly. Training continues, and every value arrives once.

Each of these is a real job under `traceml run` (or alone) that logs all the while, with real trackers.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.aggregator.test_durability import fill
from tests.eventually import eventually
from tests.ports import free_port
from tests.track.jobs import Job, Proxy, finish
from tests.track.readers import Value, jsonl, mlflow
from tests.track.servers import MLflowServer
from traceml.track.tracker_state import DeliveryPhase, states_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"),
    pytest.mark.timeout(240),
]

Start = Callable[..., Job]
FAILING = {DeliveryPhase.WAITING, DeliveryPhase.OPEN}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_mlflow: Path) -> Iterator[MLflowServer]:
    """One MLflow server for all; each test leaves it running."""
    made = MLflowServer(tmp_path_factory.mktemp("mlflow"), database=empty_mlflow)
    yield made
    made.kill()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start jobs; what still runs at the end is killed."""
    started: list[Job] = []

    def starter(backends: dict[str, dict[str, object]], **more: str) -> Job:
        started.append(Job(tmp_path, backends, **more))
        return started[-1]

    yield starter
    for job in started:
        job.close()


def expected(count: int) -> list[Value]:
    return [("loss", i, i / 8) for i in range(count)]


def of_user(values: list[Value]) -> list[Value]:
    return [value for value in values if not value[0].startswith(("traceml/", "system/"))]


def delivered(run_dir: Path, backend: str, uri: str | None = None) -> list[Value]:
    """Read back what a backend has, with its own means."""
    state = next(state for state in states_of(run_dir) if state.backend == backend)
    (kept,) = state.experiments.values()
    read = mlflow(run_dir, kept["id"], uri) if backend == "mlflow" else jsonl(run_dir, kept["id"])
    return of_user(read)


def test_a_server_that_is_down_at_the_start_comes_dies_and_comes_again(server: MLflowServer, start: Start) -> None:
    server.kill()
    job = start({"mlflow": {"tracking_uri": server.url}})
    job.wait_for(lambda: job.state("mlflow").phase in FAILING)
    job.goes_on()
    assert job.state("mlflow").delivered == 0

    server.start()
    job.wait_for(lambda: job.state("mlflow").delivered > 0)
    server.kill()
    job.wait_for(lambda: job.state("mlflow").phase in FAILING)
    job.goes_on()
    server.start()

    shown = job.finish()
    assert f"mlflow {job.logged + 1:,} delivered" in shown  # and the parameter
    assert delivered(job.run_dir, "mlflow", server.url) == expected(job.logged)


def test_a_server_that_never_comes_back_gets_all_by_sync(server: MLflowServer, start: Start) -> None:
    server.kill()
    job = start({"mlflow": {"tracking_uri": server.url}})
    job.wait_for(lambda: job.state("mlflow").phase in FAILING)
    job.goes_on()

    shown = job.finish()
    assert "traceml sync delivers the pending rows" in shown
    assert finish(job.folder, "sync").returncode == 3
    server.start()
    done = finish(job.folder, "sync")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"mlflow {job.logged + 1:,} delivered" in done.stdout
    assert finish(job.folder, "sync").stdout == "Nothing to deliver\n"
    assert delivered(job.run_dir, "mlflow", server.url) == expected(job.logged)
    report = json.loads((job.run_dir / "report.json").read_text())
    assert [(each["state"], each["pending"]) for each in report["trackers"]] == [("done", 0)]
    assert report["metrics"]["loss"]["count"] == job.logged


def test_a_busy_a_locked_and_a_hanging_server_each_get_their_own_treatment(
    server: MLflowServer, start: Start, tmp_path: Path
) -> None:
    """429: waited for as long as it says; 401: the key is read anew; no answer: the process is started again."""
    if not server.is_running:
        server.start()

    proxy = Proxy(server.port)
    key_file = tmp_path / "key"
    key_file.touch(0o600)
    key_file.write_text("first")
    proxy.key = "first"
    try:
        job = start({"mlflow": {"tracking_uri": proxy.url, "timeout_s": 10, "api_key_file": str(key_file)}})
        job.wait_for(lambda: job.state("mlflow").delivered > 0)

        proxy.behavior = "busy"
        job.wait_for(lambda: job.state("mlflow").phase is DeliveryPhase.WAITING and proxy.seen.get("busy", 0) > 1)
        proxy.behavior = "pass"

        before = job.state("mlflow").delivered
        job.wait_for(lambda: job.state("mlflow").delivered > before)
        proxy.key = "hush-second-hush"
        job.wait_for(lambda: job.state("mlflow").phase is DeliveryPhase.UNAUTHORIZED)
        job.goes_on()
        key_file.write_text("hush-second-hush")

        before = job.state("mlflow").delivered
        job.wait_for(lambda: job.state("mlflow").delivered > before)
        proxy.behavior = "hang"
        job.wait_for(lambda: "did not return" in job.state("mlflow").error)
        job.goes_on()
        proxy.behavior = "pass"

        job.finish()
    finally:
        proxy.close()

    assert delivered(job.run_dir, "mlflow", server.url) == expected(job.logged)
    written = "".join(path.read_text(errors="replace") for path in job.run_dir.rglob("*.*") if path.suffix != ".db")
    assert "hush-second" not in written


def test_a_training_that_is_killed_has_all_that_it_logged(start: Start) -> None:
    job = start({"jsonl": {}})
    job.goes_on(100)
    pid = job.pid_of("traceml/session/entry.py")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)

    job.process.communicate(timeout=240)

    assert job.process.returncode == 128 + signal.SIGKILL
    found = delivered(job.run_dir, "jsonl")
    # It may have been killed between logging a value and counting it.
    assert found == expected(len(found))
    assert len(found) - job.logged in {0, 1}


def test_deliveries_and_aggregators_may_be_killed_as_often_as_one_likes(start: Start) -> None:
    job = start({"jsonl": {}, "tensorboard": {}})
    for words in ("traceml.track.delivery", "traceml serve", "traceml.track.delivery", "traceml.track.delivery"):
        job.goes_on()
        pid = job.wait_for(lambda: job.pid_of(words))  # noqa: B023
        os.kill(pid, signal.SIGKILL)
        job.wait_for(lambda: job.pid_of(words) not in {None, pid})  # noqa: B023

    job.finish()
    assert delivered(job.run_dir, "jsonl") == expected(job.logged)
    assert [(state.backend, state.phase) for state in states_of(job.run_dir)] == [
        ("jsonl", DeliveryPhase.DONE), ("tensorboard", DeliveryPhase.DONE),
    ]  # fmt: skip


def test_a_job_whose_every_process_is_killed_is_delivered_by_sync(tmp_path: Path) -> None:
    """Alone, without `traceml run`: what had not left the dead rank is in its flight file."""
    job = Job(tmp_path, {"jsonl": {}}, command=(), TRACEML_PORT=str(free_port()), TRACEML_LOCAL="1")
    try:
        job.wait_for(lambda: job.run_dir.name != "latest" and job.state("jsonl").delivered > 0)
        _signal(tmp_path, "traceml serve", signal.SIGSTOP)  # it would store what the dead rank has left
        for words in ("script.py", "traceml serve", "traceml.track.delivery"):
            _signal(tmp_path, words, signal.SIGKILL)
    finally:
        job.close()

    eventually(lambda: not _pids_in(tmp_path))
    done = finish(tmp_path, "sync")

    assert (done.returncode, done.stderr) == (0, f"{job.run_dir.name}: stored what its ranks left in memory\n")
    found = delivered(job.run_dir, "jsonl")
    assert found == expected(len(found))
    assert len(found) - job.logged in {0, 1}


def test_a_library_that_is_broken_is_reported_and_holds_nobody_up(start: Start, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "clearml.py").write_text("raise ImportError('libclear.so.3: cannot open shared object')")
    job = start({"clearml": {}, "jsonl": {}}, PYTHONPATH=str(tmp_path / "broken"))
    job.wait_for(lambda: job.state("clearml").phase is DeliveryPhase.BROKEN)
    job.goes_on()

    shown = job.finish()

    assert "libclear.so.3" in shown
    assert delivered(job.run_dir, "jsonl") == expected(job.logged)


def test_a_full_disk_holds_delivery_up_and_loses_nothing(start: Start, tiny_disk: Callable[[int], Path]) -> None:
    """The store, the states and the tracker's own file lie on it."""
    disk = tiny_disk(4 << 20)
    job = start({"jsonl": {"path": str(disk / "out")}}, TRACEML_RUNS_DIR=str(disk / "runs"))
    run_dir = disk / "runs" / "latest"
    job.wait_for(lambda: any(state.delivered for state in states_of(run_dir)))
    ballast = fill(disk)
    job.goes_on(100)
    ballast.unlink()
    job.goes_on()

    job.finish()

    assert delivered(run_dir.resolve(), "jsonl") == expected(job.logged)


def test_old_runs_go_when_they_are_delivered_and_not_before(tmp_path: Path) -> None:
    code = """
        import sys, traceml
        with traceml.Experiment("short", backend="BACKEND"):
            traceml.log_metric("loss", 1.0, step=0)
    """
    for backend in ("no_such_module:Backend", "jsonl", "jsonl", "jsonl"):
        job = Job(tmp_path, {}, code=code.replace("BACKEND", backend), TRACEML_KEEP_RUNS="2")
        job.finish()
        job.close()

    kept = [path for path in (tmp_path / "traceml_runs").iterdir() if path.is_dir() and not path.is_symlink()]
    assert sorted(str(state.phase) for path in kept for state in states_of(path)) == ["broken", "done", "done"]


def test_an_experiment_gets_what_is_said_of_its_run_at_the_end(start: Start) -> None:
    """Its block ends before the run does; last step times and the verdict belong to it all the same, and its end."""
    code = """
        import traceml
        with traceml.Experiment("steps", backend="jsonl"):
            for i in range(60):
                with traceml.trace_step():
                    traceml.log_metric("loss", i / 8)
    """
    job = start({}, code=code)
    job.finish()

    (state,) = states_of(job.run_dir)
    (kept,) = state.experiments.values()
    rows = [json.loads(line) for line in Path(kept["id"]).read_text().splitlines()]
    names = {row["name"] for row in rows if row["type"] == "metric"}
    assert names >= {"loss", "traceml/step_ms", "traceml/steps_per_s", "traceml/goodput", "traceml/share/other"}
    tags = {key: value for row in rows if row["type"] == "tags" for key, value in row["tags"].items()}
    assert "traceml/verdict" in tags
    assert [row["state"] for row in rows if row["type"] == "end"] == ["finished"]


def _pids_in(folder: Path) -> list[int]:
    """Return the processes that work in a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cwd").resolve() == folder:
                found.append(int(entry.name))
        except OSError:
            continue

    return found


def _signal(folder: Path, words: str, number: signal.Signals) -> None:
    for pid in _pids_in(folder):
        try:
            if words in Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " "):
                os.kill(pid, number)
        except (ProcessLookupError, FileNotFoundError):
            continue
