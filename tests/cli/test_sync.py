"""`traceml sync`."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import struct
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.forked import client as forked
from tests.recorder.conftest import environ
from tests.runs.fabricated_store import run_facts
from tests.track.fabricated import LoggedRun
from tests.track.jobs import UNCOLLECTED, finish
from tests.track.readers import jsonl
from traceml import cli
from traceml.cli import sync
from traceml.clock import boot_id, monotonic_ns, process_start_ticks
from traceml.database.flight.flight import FlightFile
from traceml.database.flight.flight_folders import FALLBACK_FOLDER
from traceml.database.schema import STEPS
from traceml.database.store import store_file
from traceml.database.store.store import StoreWriter
from traceml.run_folder import STORE_NAME
from traceml.runs.find import list_runs
from traceml.runs.report.report import build_report, save_report
from traceml.runs.run import load_run
from traceml.track.plugins.plugin_signature import sign
from traceml.track.tracker_state import TrackerState, states_of

FAULTY = "tests.track.faulty_backends:FaultyBackend"


@pytest.fixture
def runs_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "traceml_runs"


def logged(runs_dir: Path, name: str, *backends: str, **facts: Any) -> LoggedRun:
    run = LoggedRun(runs_dir / name)
    if backends:
        run.experiment(backends, id=name)

    run.metrics({"loss": [1.0, 2.0, 3.0]})
    if not facts:
        run.end()
        return run

    run.writer.put_meta("run", {"id": name, "started": 0.0, "ended": None, "state": "running", "job": name})
    run.writer.put_meta("aggregator", facts)
    run.writer.close()
    return run


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "traceml", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return forked.Popen(command, imports="aggregator", forks=True, cwd=folder, env=environ(folder), **pipes)


def values(run_dir: Path) -> list[tuple[str, int, float]]:
    (state,) = (state for state in states_of(run_dir) if state.backend == "jsonl")
    return jsonl(run_dir, next(iter(state.experiments.values()))["id"])


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in run_dir.glob("jsonl/*.jsonl") for line in path.read_text().splitlines()]


THREE = [("loss", 0, 1.0), ("loss", 1, 2.0), ("loss", 2, 3.0)]


def test_without_runs_there_is_nothing_to_deliver(runs_dir, capsys):
    assert cli.main(["sync"]) == 0
    assert capsys.readouterr().out == "Nothing to deliver\n"


@pytest.mark.parametrize("option", ["--runs-dir", "--from-dir"])
def test_a_folder_that_is_not_there_is_named(runs_dir, tmp_path, capsys, option):
    """A misspelt folder is no folder in which everything is delivered."""
    assert cli.main(["sync", option, str(tmp_path / "gone")]) == 0
    assert capsys.readouterr().out == f"There is no folder {tmp_path / 'gone'}\n"


def test_what_runs_owe_is_delivered_once(runs_dir, capsys):
    """All runs that asked for a tracker; a run that did not is left alone until it is named."""
    first, second, third = logged(runs_dir, "a", "jsonl"), logged(runs_dir, "b"), logged(runs_dir, "c", "jsonl")

    assert cli.main(["sync"]) == 0
    assert capsys.readouterr().out.splitlines() == ["a: jsonl 3 delivered", "c: jsonl 3 delivered"]
    assert values(first.path) == values(third.path) == THREE
    assert cli.main(["sync"]) == 0
    assert capsys.readouterr().out == "Nothing to deliver\n"

    assert cli.main(["sync", "b", "--backend", "jsonl"]) == 0
    assert values(second.path) == THREE


def synced(folder: Path, *words: str, **settings: str) -> tuple[int, str, str]:
    """Run `traceml sync` in a process that has imported MLflow; return its status and what it printed."""
    done = finish(folder, "sync", *words, TRACEML_DELIVERY_NICE="0", **settings)
    return done.returncode, done.stdout, done.stderr


def losses_in(path: Path) -> list[float]:
    with closing(sqlite3.connect(path)) as database:
        return [value for (value,) in database.execute("SELECT value FROM metrics WHERE key = 'loss' ORDER BY step")]


def test_a_tracker_that_has_everything_is_named_with_its_place(runs_dir, tmp_path, empty_mlflow):
    """Who names it may mean another place, by the present settings: nothing goes there, and the way is said."""
    run = logged(runs_dir, "a", "mlflow")
    places = [shutil.copy(empty_mlflow, tmp_path / f"{name}.db") for name in "ab"]
    ended = []
    for place in places:
        Path("traceml.toml").write_text(f'[backends.mlflow]\ntracking_uri = "sqlite:///{place}"\n')
        ended.append(synced(tmp_path, "a", "--backend", "mlflow"))

    state = run.path / "trackers" / "mlflow.state.json"
    assert ended[0] == (0, "a: mlflow 3 delivered\n", "")
    assert ended[1] == (
        0,
        "Nothing to deliver\n",
        (
            f"traceml sync: mlflow has all of a already, at sqlite:///{places[0]}. "
            f"To deliver it to another place too, remove {state} before\n"
        ),
    )
    assert losses_in(places[1]) == []

    state.unlink()
    assert synced(tmp_path, "a", "--backend", "mlflow") == (0, "a: mlflow 3 delivered\n", "")
    assert losses_in(places[1]) == [1.0, 2.0, 3.0]

    for words in (["--backend", "mlflow"], ["a"]):
        assert synced(tmp_path, *words) == (0, "Nothing to deliver\n", "")


@pytest.mark.needs("root")
def test_runs_of_other_users_are_delivered_only_when_they_are_named(runs_dir, capsys):
    """A run names trackers and plugins, and a delivery uses the keys of its caller: that needs the caller's consent."""
    first, second = logged(runs_dir, "a", "jsonl"), logged(runs_dir, "b", "jsonl")
    os.chown(first.path, 12345, -1)

    assert cli.main(["sync"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == ["b: jsonl 3 delivered"]
    assert "1 run of other users left out (a)" in err
    assert states_of(first.path) == []
    assert values(second.path) == THREE

    assert cli.main(["sync", "a"]) == 0
    assert "left out" not in capsys.readouterr().err
    assert values(first.path) == THREE


def test_a_damaged_run_is_left_out_aloud(runs_dir, capsys):
    """It may hold values that no tracker has."""
    run = LoggedRun(runs_dir / "a")
    run.end()
    (runs_dir / "b").mkdir()
    (runs_dir / "b" / "store.db").write_bytes(b"no database" * 100)

    assert cli.main(["sync"]) == 0

    out, err = capsys.readouterr()
    assert out == "Nothing to deliver\n"
    assert "1 run that cannot be read left out: b: cannot read the run's store" in err
    assert "file is not a database" in err


def test_a_run_of_which_only_the_report_was_kept_is_left_out(runs_dir, capsys):
    """It has nothing to deliver: each `traceml sync` said that its store is missing."""
    run = LoggedRun(runs_dir / "a")
    run.end()
    save_report(run.path, build_report(run.path))
    (run.path / STORE_NAME).unlink()

    assert cli.main(["sync"]) == 0

    assert capsys.readouterr() == ("Nothing to deliver\n", "")


def test_json_tells_what_became_of_each(runs_dir, capsys):
    run = LoggedRun(runs_dir / "a")
    run.experiment(["jsonl", "no-such-tracker"], id="a")
    run.metrics({"loss": [1.0]})
    run.end()

    assert cli.main(["sync", "--json"]) == 3

    first, second = json.loads(capsys.readouterr().out)
    assert (first["run"], first["backend"], first["state"], first["delivered"]) == ("a", "jsonl", "done", 1)
    assert (second["backend"], second["state"], second["pending"]) == ("no-such-tracker", "broken", 2)
    assert "no-such-tracker" in second["error"]


def test_a_run_that_is_about_to_end_is_awaited(runs_dir, monkeypatch):
    """`python train.py && traceml sync latest` failed now and then: the script had ended, and its run had not."""
    pid = os.getpid()
    me = {"pid": pid, "start_ticks": process_start_ticks(pid), "boot_id": boot_id(), "host": socket.gethostname()}
    run = logged(runs_dir, "a", "jsonl", **me)
    looked, is_ended = [], sync._is_ended

    def look(run_dir: Path) -> bool:
        looked.append(run_dir)
        if len(looked) == 3:
            writer = StoreWriter(run_dir / STORE_NAME)
            writer.put_meta("run", run_facts(id="a", world_size=1))
            writer.close()

        return is_ended(run_dir)

    monkeypatch.setattr(sync, "_is_ended", look)

    assert cli.main(["sync", "a"]) == 0
    assert TrackerState.load(run.path, "jsonl").delivered == 3


def test_a_run_that_goes_on_is_left_to_its_aggregator(runs_dir, capsys, monkeypatch):
    monkeypatch.setattr(sync, "_ENDING_S", 0.0)
    pid = os.getpid()
    me = {"pid": pid, "start_ticks": process_start_ticks(pid), "boot_id": boot_id(), "host": socket.gethostname()}
    logged(runs_dir, "a", "jsonl", **me)

    assert cli.main(["sync", "a"]) == 3
    assert "is still running: its aggregator delivers" in capsys.readouterr().err


def test_wait_delivers_a_run_when_it_is_over(runs_dir):
    """Also where no run is named: runs that are recorded are not left out."""
    pid = os.getpid()
    me = {"pid": pid, "start_ticks": process_start_ticks(pid), "boot_id": boot_id(), "host": socket.gethostname()}
    run = logged(runs_dir, "a", "jsonl", **me)
    waiting = start(runs_dir.parent, "sync", "--wait")
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(1.0)

    with StoreWriter(run.path / STORE_NAME) as writer:
        writer.put_meta("run", {"id": "a", "started": 0.0, "ended": 1.0, "state": "finished", "job": "a"})

    assert waiting.communicate(timeout=240)[0].splitlines() == ["a: jsonl 3 delivered"]
    assert values(run.path) == THREE
    assert cli.main(["sync"]) == 0


def test_a_run_that_lost_its_aggregator_is_finished_and_delivered(runs_dir, capsys):
    gone = {"pid": 1, "start_ticks": -1, "boot_id": boot_id(), "host": socket.gethostname()}
    run = logged(runs_dir, "a", "jsonl", **gone)

    assert cli.main(["sync"]) == 0
    assert values(run.path) == THREE
    report = json.loads((run.path / "report.json").read_text())
    assert report["run"]["state"] in {"finished", "lost"}
    assert report["metrics"]["loss"] == {"last": 3.0, "min": 1.0, "max": 3.0, "count": 3}
    (tracker,) = report["trackers"]
    assert (tracker["backend"], tracker["state"], tracker["delivered"], tracker["pending"]) == ("jsonl", "done", 3, 0)


def test_what_never_reached_an_aggregator_is_found(tmp_path):
    """A rank whose aggregator's port is somebody else's, killed: its flight file becomes a run."""
    code = """if True:
        import os, signal, traceml
        with traceml.Experiment("alone", backend=["jsonl"]) as experiment:
            for i in range(300):
                experiment.log_metric("loss", i / 8, step=i)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = str(nobody.getsockname()[1])
        environment = environ(tmp_path, TRACEML_PORT=port, **UNCOLLECTED)
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=False)

    newer = logged(tmp_path / "traceml_runs", "newer")
    (tmp_path / "traceml_runs" / "latest").symlink_to("newer")
    both = [start(tmp_path, "sync") for _ in range(2)]  # at once: each value is in one run, once

    assert [process.wait(240) for process in both] == [0, 0]
    assert (tmp_path / "traceml_runs" / "latest").resolve() == newer.path
    (run_dir,) = (path for path in (tmp_path / "traceml_runs").glob("2*"))
    said = sorted(process.communicate()[1] for process in both)
    assert said == ["", f"{run_dir.name}: stored what its ranks left in memory\n"]
    assert values(run_dir) == [("loss", i, i / 8) for i in range(300)]
    assert (run_dir / "report.json").exists()


def left_on_another_host(runs_dir: Path, name: str, silent_s: float) -> Path:
    """Make the flight file of a rank on another host of a shared filesystem, as that host leaves it."""
    facts = {"host": "node7", "machine": "node7/", "boot_id": "0" * 36, "runs_dir": str(runs_dir), "job": name}
    flight = FlightFile.create(
        runs_dir / FALLBACK_FOLDER, {**facts, "name": name, "rank": 0, "world_size": 1, "pid": 9}
    )
    assert flight.path is not None
    flight.ring("steps").append(0, monotonic_ns(), 5_000_000, *[0] * (len(STEPS.names) - 3))
    flight.close(unlink=False)
    then_s = time.time() - silent_s
    with flight.path.open("r+b") as file:
        file.seek(24)
        file.write(struct.pack("@qq", monotonic_ns(), int(then_s * 1e9)))

    os.utime(flight.path, (then_s, then_s))
    return flight.path


def test_rows_of_another_host_wait_until_the_user_knows(runs_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody here knows whether their rank lives. Who says that it has ended is believed, but for the last minute."""
    silent, recent = left_on_another_host(runs_dir, "a", 90.0), left_on_another_host(runs_dir, "b", 5.0)

    assert cli.main(["sync"]) == 0
    assert silent.exists()
    assert "ranks on node7 left rows" in capsys.readouterr().err

    assert cli.main(["sync", "--ended"]) == 0
    assert not silent.exists()
    assert recent.exists()
    assert "ranks on node7 left rows" in capsys.readouterr().err
    (info,) = list_runs(runs_dir)
    assert len(load_run(info.path).steps()) == 1


def test_a_run_whose_aggregator_died_elsewhere_is_ended(runs_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As in a container that was killed: this host cannot tell. The user can; nothing was written for a minute."""
    for name, silent_s in (("a", 90.0), ("b", 5.0), ("c", 90_000.0)):
        run = logged(runs_dir, name, host="node7", boot_id="0" * 36, pid=9, start_ticks=1)
        os.utime(run.path / STORE_NAME, (time.time() - silent_s,) * 2)

    assert {info.id: info.state for info in list_runs(runs_dir)} == {"a": "running", "b": "running", "c": "lost"}
    assert cli.main(["sync"]) == 0
    assert "c: stored what its ranks left" in capsys.readouterr().err

    assert cli.main(["sync", "--ended"]) == 0
    assert {info.id: info.state for info in list_runs(runs_dir)} == {"a": "finished", "b": "running", "c": "finished"}
    assert cli.main(["runs", "rm", "--yes", "a", "c"]) == 0


def test_rows_of_a_run_that_cannot_be_opened_are_not_nothing(
    runs_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its disk is full: they stay, the reason is told, and the status is that of rows that are left."""
    flight = left_on_another_host(runs_dir, "a", 90.0)
    monkeypatch.setattr(store_file, "_DDL", "CREATE TABLE full (")

    assert cli.main(["sync", "--ended"]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"the rows in {flight} are not stored, and stay there: cannot create the run's store" in captured.err
    assert flight.exists()


def test_another_folder_takes_what_an_unwritable_one_cannot(
    runs_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way out is in the message; the rows are in memory no longer."""
    flight, ddl = left_on_another_host(runs_dir, "a", 90.0), store_file._DDL
    monkeypatch.setattr(store_file, "_DDL", "CREATE TABLE full (")
    assert cli.main(["sync", "--ended"]) == 3
    command = f"traceml sync --from-dir {runs_dir} --runs-dir OTHER"
    assert f"another folder can take them: `{command}`" in capsys.readouterr().err
    monkeypatch.setattr(store_file, "_DDL", ddl)

    assert cli.main(["sync", "--ended", *command.replace("OTHER", str(tmp_path / "other")).split()[2:]]) == 0

    (info,) = list_runs(tmp_path / "other")
    assert len(load_run(info.path).steps()) == 1
    assert list_runs(runs_dir) == []
    assert not flight.exists()
    assert "another folder" not in capsys.readouterr().err


def plugin_that_leaves_a_mark(folder: Path) -> str:
    """Write a module with a backend that leaves the file `imported` beside it; return its import path."""
    folder.mkdir()
    (folder / "of_a_run.py").write_text(
        "from pathlib import Path\nfrom traceml.track.backends.jsonl import JsonlBackend as Backend\n"
        "Path(__file__).with_name('imported').touch()\n"
    )
    return "of_a_run:Backend"


@pytest.mark.parametrize("role", ["backend", "fallback"])
def test_code_that_a_run_from_elsewhere_names_is_not_imported(
    runs_dir: Path, capsys: pytest.CaptureFixture[str], role: str
) -> None:
    """Whoever sent the run may have written it, so a person has to name the plugin."""
    folder = runs_dir.parent / "code"
    plugin = plugin_that_leaves_a_mark(folder)
    backend = plugin if role == "backend" else "jsonl"
    run = LoggedRun(runs_dir / "a")
    run.experiment([backend], id="a", sys_path=[str(folder)], options={backend: {"fallback": plugin}})
    run.end()

    assert cli.main(["sync", "a"]) == 3
    out = capsys.readouterr().out
    assert f"backend '{plugin}' is code that the run names" in out
    assert f"traceml sync a --backend {plugin}" in out
    assert not (folder / "imported").exists()

    assert cli.main(["sync", "a", "--backend", plugin]) == 0
    assert (folder / "imported").exists()


def test_folders_of_a_run_from_elsewhere_hide_no_library(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its own nor the working directory: a built-in tracker imports its library from where it is installed."""
    Path("msgpack.py").write_text("raise SystemExit('imported from the working directory')")
    run = LoggedRun(runs_dir / "a")
    run.experiment(["jsonl"], id="a", sys_path=[str(runs_dir.parent)])
    run.metrics({"loss": [1.0, 2.0, 3.0]})
    run.end()

    assert cli.main(["sync", "a"]) == 0
    assert values(run.path) == THREE


def test_code_of_an_own_run_is_imported_unasked(runs_dir: Path) -> None:
    """The rank has signed what it announced."""
    folder = runs_dir.parent / "code"
    row = {"backends": [plugin_that_leaves_a_mark(folder)], "sys_path": [str(folder)], "registered": {}}
    run = LoggedRun(runs_dir / "a")
    run.experiment(**row, id="a", signature=sign(row))
    run.end()

    assert cli.main(["sync", "a"]) == 0
    assert (folder / "imported").exists()


def test_consent_is_not_asked_for_a_class_that_was_sent(runs_dir: Path) -> None:
    """It would not help: such a class of a run from elsewhere is never loaded."""
    run = LoggedRun(runs_dir / "a")
    run.experiment(["mine"], id="a", registered={"mine": "sent by Python 3.11:AAAA"})
    run.end()

    cli.main(["sync", "a"])

    (state,) = states_of(run.path)
    assert "Move the class into a module" in state.error
    assert "--backend" not in state.error


@pytest.mark.parametrize("word", ["20260101-a1b2", "a1b2"])
def test_run_comes_before_backend(runs_dir, capsys, word):
    """Whichever word names it."""
    logged(runs_dir, "20260101-a1b2", "jsonl")

    assert cli.main(["sync", "--backend", "jsonl", word]) == 2
    assert f"RUN comes before --backend: traceml sync {word} --backend jsonl" in capsys.readouterr().err


def test_a_tracker_that_failed_gets_all_its_tries_again(runs_dir):
    run = logged(runs_dir, "a", "jsonl")
    state = TrackerState.load(run.path, "jsonl")
    state.retries, state.retry_at = 9, 1e12
    state.save(run.path)

    assert cli.main(["sync"]) == 0
    assert values(run.path) == THREE


def test_a_tracker_that_does_not_exist_is_refused(runs_dir, capsys):
    """Nothing is written into the run: its report would list the misspelled tracker from then on."""
    run = logged(runs_dir, "a", "jsonl")

    assert cli.main(["sync", "--backend", "jsnol"]) == 2
    assert "--backend: there is no tracker 'jsnol'" in capsys.readouterr().err
    assert states_of(run.path) == []


def test_a_tracker_that_the_run_did_not_ask_for_gets_no_more_than_others(runs_dir, monkeypatch):
    """What the run keeps back is kept back from it too, and so is what the settings of now keep back."""
    run = LoggedRun(runs_dir / "a")
    run.experiment(["elsewhere"], id="a", mask=["customer_*"], exclude=["debug/*"])
    run.row("params", params={"customer_id": "C-1", "ward": "W-2", "lr": 0.1})
    run.metrics({"loss": [1.0], "debug/loss": [2.0], "draft/loss": [3.0]})
    run.end()
    plain = LoggedRun(runs_dir / "b")
    plain.row("params", params={"ward": "W-2"})
    plain.end()
    monkeypatch.setenv("TRACEML_MASK", "ward")
    monkeypatch.setenv("TRACEML_EXCLUDE", "draft/*")

    assert cli.main(["sync", "a", "b", "--backend", "jsonl"]) == 0
    assert values(run.path) == [("loss", 0, 1.0)]
    (params,) = (line["params"] for line in lines_of(run.path) if line["type"] == "params")
    assert params == {"customer_id": "[masked:custom]", "ward": "[masked:custom]", "lr": 0.1}
    (params,) = (line["params"] for line in lines_of(plain.path) if line["type"] == "params")
    assert params == {"ward": "[masked:custom]"}


@pytest.mark.parametrize("is_named", [False, True])
def test_a_run_is_delivered_to_the_place_that_its_script_named(runs_dir, tmp_path, empty_mlflow, is_named):
    """Not where the environment of `traceml sync` points, unless the tracker is named: then the address was wrong."""
    script, shell = (f"sqlite:///{tmp_path / name}.db" for name in ("script", "shell"))
    wanted = shutil.copy(empty_mlflow, tmp_path / ("shell.db" if is_named else "script.db"))
    run = LoggedRun(runs_dir / "a")
    run.experiment(["mlflow"], id="a", options={"mlflow": {"tracking_uri": script}})
    run.metrics({"loss": [1.0]})
    run.end()

    status, _, _ = synced(tmp_path, "a", *(["--backend", "mlflow"] if is_named else []), MLFLOW_TRACKING_URI=shell)

    assert status == 0
    assert losses_in(wanted) == [1.0]
    assert [*tmp_path.glob("*.db")] == [wanted]


def test_an_option_that_was_wrong_can_be_mended(runs_dir, capsys):
    """The run keeps its options, so the tracker would refuse its rows for ever; the command that helps is named."""
    run = LoggedRun(runs_dir / "a")
    run.experiment(["jsonl"], id="a", options={"jsonl": {"timeout_s": "60"}})
    run.metrics({"loss": [1.0, 2.0, 3.0]})
    run.end()

    assert cli.main(["sync"]) == 3
    assert "'timeout_s' of a backend is '60'; allowed: a positive number of seconds" in (err := capsys.readouterr().err)
    assert "traceml sync a --backend jsonl takes the present settings" in err
    assert cli.main(["sync", "a", "--backend", "jsonl"]) == 0
    assert values(run.path) == THREE
    assert cli.main(["sync"]) == 0
    assert "timeout_s" not in capsys.readouterr().err


def test_local_only_holds_for_sync_too(runs_dir, monkeypatch, capsys):
    """For a run without settings of its own it is the setting of now that counts."""
    logged(runs_dir, "a")
    monkeypatch.setenv("TRACEML_LOCAL_ONLY", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))

    Path("traceml.toml").write_text('[backends."tests.track.faulty_backends:Bare"]\npath = "."\n')

    assert cli.main(["sync", "a", "--backend", "tests.track.faulty_backends:Bare"]) == 3
    assert "would deliver to Bare, which is not on thi" in capsys.readouterr().out


def test_a_tracker_that_is_always_busy_holds_nobody_up(runs_dir, monkeypatch, capsys):
    """It asks for patience again and again: that is no failure, but somebody waits at a terminal."""
    run = LoggedRun(runs_dir / "a")
    options = {FAULTY: {"path": str(runs_dir)}}
    run.experiment([FAULTY], id="x", sys_path=[str(Path(__file__).parents[2])], options=options)
    run.end()
    (runs_dir / "behavior").write_text('{"start": "busy"}')
    monkeypatch.setattr(sync, "SYNC_STALL_LIMIT_S", 1.0)

    assert cli.main(["sync", "a", "--backend", FAULTY]) == 3
    assert "1 pending" in capsys.readouterr().out


def test_an_option_that_holds_a_secret_is_refused(runs_dir, capsys):
    """It would stand in the list of processes."""
    logged(runs_dir, "a")
    Path("traceml.toml").write_text('[backends.mlflow]\ntracking_uri = "http://jane:hunter22@tracking"\n')

    assert cli.main(["sync", "a", "--backend", "mlflow"]) == 2
    told = capsys.readouterr().err
    assert "'tracking_uri' of backend 'mlflow' looks like a secret" in told
    assert "hunter22" not in told
