"""Search for a running job."""

from __future__ import annotations

import shlex
import threading
import time
from pathlib import Path

import pytest

from tests.cli.test_top import running_run
from tests.runs.fabricated_store import run_facts
from traceml import cli
from traceml.cli.jobs import running_job as module
from traceml.cli.jobs.running_job import aggregator_of, running_job
from traceml.database.store.store import StoreWriter
from traceml.errors import RunNotFoundError, TraceMLError
from traceml.run_folder import STORE_NAME
from traceml.settings import load
from traceml.transport import auth


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A running job of another folder, whose aggregator has the usual port."""
    run = running_run(tmp_path / "other" / "going-on")
    served = auth.PublishedServer("127.0.0.1", 1, "token", 1, 1, "boot", str(run.parent))
    monkeypatch.setattr(auth, "discover", lambda _port: served)
    return Path(run)


def ended_run(runs_dir: Path) -> Path:
    """Make a run that has ended."""
    run_dir = runs_dir / "20250102-030405-train-abcd"
    run_dir.mkdir(parents=True)
    with StoreWriter(run_dir / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(id=run_dir.name))
        writer.commit()

    return run_dir


def test_a_job_of_the_usual_aggregator_is_found(elsewhere: Path, tmp_path: Path) -> None:
    """The folder of the settings has none."""
    assert running_job(None, load(runs_dir=tmp_path / "runs")) == elsewhere


def test_the_command_for_an_ended_run_names_its_folder(tmp_path: Path) -> None:
    """An id alone would be searched in the default folder."""
    run_dir = ended_run(tmp_path / "elsewhere")
    with pytest.raises(TraceMLError, match=f"traceml report {run_dir}"):
        running_job("train", load(runs_dir=run_dir.parent))


@pytest.mark.usefixtures("elsewhere")
def test_a_job_of_another_folder_than_the_named_one_is_not_meant(tmp_path: Path) -> None:
    """Its stacks would be taken for those of a job that has just ended."""
    with pytest.raises(RunNotFoundError, match=rf"no job is running in {tmp_path / 'runs'}.*--runs-dir"):
        running_job(None, load(runs_dir=tmp_path / "runs"), only_there=True)


def test_a_run_that_has_ended_is_named_in_a_command_that_a_shell_understands(tmp_path: Path) -> None:
    """A folder may have spaces; the command is meant to be copied."""
    run_dir = ended_run(tmp_path / "my runs")
    config = load(runs_dir=run_dir.parent)
    with pytest.raises(TraceMLError) as named:
        running_job(str(run_dir), config)

    with pytest.raises(TraceMLError) as latest:
        running_job(None, config, only_there=True)

    for error in (named.value, latest.value):
        words = shlex.split(str(error).partition("traceml report ")[2])
        assert words == [str(run_dir)]


@pytest.mark.parametrize(("waits_s", "says"), [(0.0, "has stored nothing yet"), (60.0, "runs on host node7")])
def test_a_run_that_has_just_begun_is_waited_for(
    waits_s: float, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its store is there before the facts of its aggregator, which the first commit writes."""
    monkeypatch.setattr(module, "_CONNECT_S", waits_s)
    with StoreWriter(tmp_path / STORE_NAME) as writer:

        def store() -> None:
            time.sleep(0.5)
            writer.put_meta("aggregator", {"host": "node7", "pid": 1})
            writer.commit()

        late = threading.Thread(target=store if waits_s else print)
        late.start()
        with pytest.raises(TraceMLError, match=says):
            aggregator_of(tmp_path, load(runs_dir=tmp_path), "stacks")

        late.join()


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> auth.PublishedServer:
    """A run of another node that ranks of this host belong to."""
    run = auth.PublishedServer("10.0.0.1", 1, "t", 1, 1, "boot", "/runs", "20250102-030405-train-abcd", "node1")
    monkeypatch.setattr(auth, "joined_runs", lambda: [run])
    monkeypatch.setattr(auth, "discover", lambda _port: None)
    return run


@pytest.mark.parametrize("target", [None, "abcd", "20250102-030405-train-abcd", "/runs/20250102-030405-train-abcd"])
def test_a_run_of_another_node_is_named_with_its_place(
    joined: auth.PublishedServer, target: str | None, tmp_path: Path
) -> None:
    """Its store is there; only its stacks can be asked for from here."""
    config = load(runs_dir=tmp_path)
    with pytest.raises(RunNotFoundError) as error:
        running_job(target, config, only_there=True)

    assert "the ranks of this host are part of run 20250102-030405-train-abcd of node1" in str(error.value)
    assert "/runs/20250102-030405-train-abcd" in str(error.value)
    assert running_job(target, config, of_other_nodes=True) == Path(joined.runs_dir, joined.run_id)


@pytest.mark.usefixtures("joined")
def test_another_run_than_the_joined_one_is_not_taken_for_it(tmp_path: Path) -> None:
    """The message is that of a host without other nodes."""
    with pytest.raises(RunNotFoundError, match="no run 'ffff'"):
        running_job("ffff", load(runs_dir=tmp_path), of_other_nodes=True)


def test_a_job_of_this_host_is_preferred(joined: auth.PublishedServer, tmp_path: Path) -> None:
    """It is in the folder that the settings name."""
    run = running_run(tmp_path / "20250102-030405-mine-1234")

    assert running_job(None, load(runs_dir=tmp_path), of_other_nodes=True) == Path(run)
    assert joined.run_id not in str(run)


def test_a_report_names_the_node_of_the_run(
    joined: auth.PublishedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its folder is there."""
    assert cli.main(["report", "--runs-dir", str(tmp_path)]) == cli.EXIT_ERROR
    assert f"part of run {joined.run_id} of node1" in capsys.readouterr().err
