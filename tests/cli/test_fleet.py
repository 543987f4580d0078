"""`traceml fleet`."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.diagnosis.fabricated import Job
from tests.runs.fabricated_store import store_run
from tests.runs.fleet.fabricated_fleet import fleet_report
from traceml import cli
from traceml.formatting import phase_words
from traceml.runs.fleet.fleet_dataset import FleetDataset

HOSTS = [f"h{number:02}" for number in range(12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of runs whose dataset has 60 runs on eight of twelve hosts; the last one waits for data."""
    made = tmp_path_factory.mktemp("runs")
    dataset, random = FleetDataset(made / "fleet"), np.random.default_rng(0)
    for number in range(60):
        hosts = list(random.choice(HOSTS, 8, replace=False))
        factors = {"input_wait": 4.0} if number == 59 else {}
        dataset.add(fleet_report(number, hosts, random=random, slow={"h03": 1.3}, factors=factors))

    return made


@pytest.fixture
def fleet(folder, capsys, monkeypatch):
    """Run the command on that folder; return (status, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*words):
        status = cli.main(["fleet", *words, "--runs-dir", str(folder)])
        return status, *capsys.readouterr()

    return run


def test_it_shows_the_newest_run_and_the_slow_host(fleet):
    """With the words of what the figures cover; no line is wider than the terminal."""
    status, shown, complaint = fleet()
    words = " ".join(shown.split())

    assert (status, complaint) == (0, "")
    assert "60 runs from 2025-10-09 to 2025-12-07" in words
    assert "Run run-0059: train.py, ResNet, 16 ranks" in words
    assert f"Next to 50 earlier runs like it, the step is slower than usual and {phase_words('input_wait')} is" in words
    assert "Hosts: 1 of 12 judged hosts was among the slowest in most of their last jobs" in words
    assert "20 of 20" in words
    assert "60 jobs on two or more hosts with 50 steps or more; 0 other runs left out. 12 of 12 hosts had 5" in words
    assert max(map(len, shown.splitlines())) <= 100


def test_a_run_as_usual(fleet):
    """Nothing is told that is not there."""
    words = " ".join(fleet("0040")[1].split())

    assert "Next to 40 earlier runs like it, every phase is as usual" in words


def test_what_differs_is_told_in_whole_sentences(tmp_path, capsys, monkeypatch):
    """All phases that are slower, a run that is not counted, and why a short one is not compared."""
    monkeypatch.setenv("COLUMNS", "100")
    dataset, random = FleetDataset(tmp_path / "fleet"), np.random.default_rng(0)
    for number in range(12):
        dataset.add(fleet_report(number, HOSTS[:2], random=random, batch_size=64 if number == 3 else 32))

    dataset.add(fleet_report(20, HOSTS[:2], factors={"input_wait": 3, "forward": 2, "backward": 2}))
    dataset.add(fleet_report(30, HOSTS[:2], steps=20))

    def words(run):
        assert cli.main(["fleet", run, "--runs-dir", str(tmp_path)]) == 0
        return " ".join(capsys.readouterr().out.split())

    slower = ", ".join(f"{phase} is slower than usual" for phase in ("the step", "backward", "forward"))
    differs = (
        " 1 other earlier run of the script is not counted: its model, how that is trained, or the number of ranks"
    )
    assert f"Next to 11 earlier runs like it, {slower} and 1 other phase is not as usual.{differs} differs." in words(
        "0020"
    )
    assert f"It is not compared: it has fewer than 50 steps.{differs}" in words("0030")


def test_a_name_that_one_run_has_names_it(tmp_path, capsys):
    """As in the other commands; of several runs the id is needed."""
    dataset = FleetDataset(tmp_path / "fleet")
    for number in range(2):
        report = fleet_report(number, HOSTS[:2])
        report.run.name = ("first", "train")[number]
        dataset.add(report)

    assert cli.main(["fleet", "first", "--runs-dir", str(tmp_path)]) == 0
    assert "Run run-0000" in capsys.readouterr().out


def test_conditions_choose_the_runs(fleet):
    """Without the slow host's jobs no host is listed; a condition that no run meets is an error."""
    status, shown, _ = fleet("--where", "!hosts~h03")
    assert status == 0
    assert "none of the judged hosts was among the slowest" in " ".join(shown.split())

    status, _, complaint = fleet("--where", "project=nlp")
    assert status == 3
    assert "none of the 60 runs" in complaint


def test_json(fleet):
    """The document alone, with the host and the phases."""
    document = json.loads(fleet("--json")[1])

    assert document["schema"] == "traceml.fleet/1"
    assert [slow["host"] for slow in document["hosts"]["slow"]] == ["h03"]
    outcomes = {phase["phase"]: phase["outcome"] for phase in document["history"]["phases"]}
    assert outcomes["input_wait"] == "slower"
    assert outcomes["forward"] == "same"


def test_an_unknown_run_is_an_error(fleet):
    """It tells how to add runs; a text that fits several is refused."""
    assert "no run 'zz' in the dataset. `traceml fleet --update`" in fleet("zz")[2]
    assert "matches 10 runs" in fleet("run-000")[2]


def test_without_a_dataset_it_tells_how_to_make_one(tmp_path, capsys):
    """And makes it of the runs of the folder."""
    words = ["fleet", "--runs-dir", str(tmp_path)]
    assert cli.main(words) == 3
    assert "`traceml fleet --update` makes it" in capsys.readouterr().err

    store_run(tmp_path / "a", Job(steps=60))
    store_run(tmp_path / "b", Job(steps=0))
    assert cli.main([*words, "--update"]) == 0
    shown, told = capsys.readouterr()
    assert told == "traceml fleet: 1 run added, 1 without steps\n"
    assert "It is not compared: there are too few earlier runs like it (0)." in " ".join(shown.split())
    assert "Hosts: none has enough jobs on several hosts to be judged" in shown
    assert cli.main(["runs", "--json", "--runs-dir", str(tmp_path)]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2  # the dataset is no run


def test_the_setting_names_the_folder(tmp_path, capsys, monkeypatch, folder):
    """Without --dataset and --runs-dir."""
    monkeypatch.setenv("TRACEML_FLEET_DIR", str(folder / "fleet"))
    assert cli.main(["fleet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"] == 60

    assert cli.main(["fleet", "--json", "--dataset", str(tmp_path)]) == 3
