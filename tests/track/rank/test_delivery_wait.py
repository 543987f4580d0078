"""`flush` and `sync`: what they return is true."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import traceml
from tests.aggregator.conftest import Serving
from tests.track.conftest import Script, finish
from tests.track.fabricated import LoggedRun
from traceml.recorder import current_recorder

ROOT = str(Path(__file__).parents[3])
QUICK = {"TRACEML_DELIVERY_NICE": "0", "PYTHONPATH": ROOT}


def test_flush_returns_when_trackers_have_everything(script: Script) -> None:
    """Values, texts, files and the end; the next line of the script reads them at the tracker."""
    out = finish(
        script(
            """
        import json, pathlib, traceml
        assert traceml.flush()  # nothing was logged
        pathlib.Path("weights.bin").write_bytes(b"w" * 1000)
        experiment = traceml.Experiment("e", backend=["jsonl"], options={"jsonl": {"path": "out"}})
        assert experiment.flush()  # it has not begun

        def lines():
            (path,) = pathlib.Path("out").glob("*.jsonl")
            return [json.loads(line) for line in path.read_text().splitlines()]

        for i in range(5000):
            experiment.log_metric("loss", i, i)
        experiment.log_artifact("weights.bin")
        done = experiment.flush(None)
        types = [line["type"] for line in lines()]  # what was found out about the code comes in its own time
        print(done, types.count("metric"), types.count("artifact"))
        with traceml.Experiment("inner", backend=[]) as inner:
            inner.log_metric("alone", 1)
            print(inner.flush(None))
        experiment.log_text("note", "last")
        experiment.end()
        print(traceml.flush(None), [line["text"] for line in lines() if line.get("name") == "note"])
        traceml.shutdown()
        print(traceml.flush(None), lines()[-1]["type"])
        """,
            **QUICK,
        )
    )
    assert out.splitlines() == ["True 5000 1", "True", "True ['last']", "True end"]


def test_flush_of_a_process_that_may_still_become_another_rank(script: Script, serving: Serving) -> None:
    """It is stored at once: a spawned child that only logs joins no process group that it could wait for."""
    process = script(
        """
        import torch.multiprocessing as mp, traceml

        def log(rank):
            import traceml.recorder.recording
            traceml.recorder.recording._PROVISIONAL_S = 3600.0  # it holds the connection back for so long
            traceml.log_metric("loss", rank, 0)
            print(traceml.flush(60))

        if __name__ == "__main__":
            traceml.init()
            mp.spawn(log, nprocs=1)
        """,
        serving=serving,
    )
    assert finish(process).split() == ["True"]


def test_flush_on_a_host_without_the_folder(script: Script, serving: Serving) -> None:
    """The aggregator is asked, and tells what is true: delivered, and not delivered."""
    process = script(
        """
        import sys, traceml
        from tests.track.rank.elsewhere import hide
        hide(sys.argv[1])
        traceml.init()
        done = traceml.Experiment("done", backend=["jsonl"])
        for i in range(100):
            done.log_metric("loss", i, i)
        print(done.flush(None))
        down = traceml.Experiment("down", backend="mlflow", options={"mlflow": {"tracking_uri": "http://127.0.0.1:9"}})
        down.log_metric("x", 1)
        print(down.flush(1.0))
        """,
        serving.folder,
        serving=serving,
        **QUICK,
    )
    assert finish(process).split() == ["True", "False"]


def test_flush_tells_of_a_tracker_that_has_not(script: Script) -> None:
    """A broken tracker at once, one that is down after the timeout; others do not make it true."""
    out = finish(
        script(
            """
        import pathlib, traceml
        traceml.start_logging("a", backend=["jsonl", "no_such_package:Backend"])
        traceml.log_metric("x", 1)
        print(traceml.flush(None))
        down = traceml.Experiment("b", backend="mlflow", options={"mlflow": {"tracking_uri": "http://127.0.0.1:9"}})
        down.log_metric("x", 1)
        print(down.flush(1.0))
        up = traceml.Experiment("c", backend="jsonl")
        up.log_metric("x", 1)
        print(up.flush(None))
        """,
            **QUICK,
        )
    )
    assert out.split() == ["False", "False", "True"]


def test_flush_waits_for_the_trackers_that_work(script: Script) -> None:
    """It returned at once when one was broken, whatever the others had."""
    out = finish(
        script(
            """
        import json, pathlib, time, traceml
        options = {"jsonl": {"path": "out"}}
        with traceml.Experiment("e", backend=["nowhere:Missing", "jsonl"], options=options) as experiment:
            experiment.log_metric("first", 1)
            assert not traceml.flush(None)  # the tracker is broken now
            for i in range(5000):
                traceml.log_metric("loss", i, i)
            done = traceml.flush(None)
            (path,) = pathlib.Path("out").glob("*.jsonl")
            print(done, path.read_text().count('"loss"'))
        """,
            **QUICK,
        )
    )
    assert out.splitlines() == ["False 5000"]


def test_sync_delivers_what_is_left(script: Script, tmp_path: Path) -> None:
    """Of this process's run after its end, of a run by its name, and of all; a tracker that fails makes it false."""
    earlier = LoggedRun(tmp_path / "traceml_runs" / "20260101-000000-earlier-abcd")
    earlier.experiment(["jsonl"], id="x")
    earlier.metrics({"loss": [1.0, 2.0]})
    earlier.end()
    out = finish(
        script(
            """
        import pathlib, traceml
        print(traceml.sync("20260101-000000-earlier-abcd"))
        experiment = traceml.start_logging("a", backend="jsonl")
        experiment.log_metric("x", 1)
        print(traceml.sync())
        traceml.shutdown()
        print(traceml.sync())
        (path,) = pathlib.Path("traceml_runs/latest/").resolve().glob("jsonl/*.jsonl")
        print('"end"' in path.read_text())
        print(traceml.sync("nosuchrun"))
        """,
            **QUICK,
        )
    )
    assert out.split() == ["True"] * 4 + ["False"]
    assert (earlier.path / "jsonl" / "x.jsonl").read_text().count('"loss"') == 2


def test_sync_of_the_own_run_does_not_wait_for_its_end(script: Script) -> None:
    """By folder, id and `latest`: what was logged so far is delivered, as by `flush`."""
    out = finish(
        script(
            """
        import pathlib, traceml
        traceml.log_metric("x", 1)
        assert traceml.flush()
        folder = pathlib.Path("traceml_runs/values")
        for value, run in enumerate((folder, folder.name, "latest", "traceml_runs/latest/")):
            traceml.log_metric("x", value)
            delivered = traceml.sync(run, timeout=60)
            (path,) = folder.glob("jsonl/*.jsonl")
            print(delivered, path.read_text().count('"x"'))
        """,
            **QUICK,
            TRACEML_BACKEND="jsonl",
            TRACEML_RUN_ID="values",
        )
    )
    assert out.splitlines() == [f"True {count}" for count in (2, 3, 4, 5)]


def test_sync_starts_nothing_when_tracing_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by a variable, before anything was logged, nor with a disabled recorder; a named run is synced."""
    started: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        started.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("TRACEML_ENABLED", "0")
    monkeypatch.setattr(current_recorder.state, "recorder", None)
    assert traceml.sync()
    assert not started
    assert traceml.sync("20260101-000000-earlier-abcd")
    assert len(started) == 1

    monkeypatch.delenv("TRACEML_ENABLED")
    traceml.init(enabled=False)
    assert traceml.sync()
    assert len(started) == 1


def test_a_complaint_of_the_command_names_it_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Some of its messages begin with its name, some do not."""
    for message in ("traceml sync: no run 'x'\n", "no run 'x'\n"):
        ended = subprocess.CompletedProcess([], 3, "", message)
        monkeypatch.setattr(subprocess, "run", lambda *_, ended=ended, **__: ended)
        assert not traceml.sync("x")

    assert caplog.messages == ["traceml sync: no run 'x'"] * 2
