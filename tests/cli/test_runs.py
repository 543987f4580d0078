"""`traceml runs`."""

from __future__ import annotations

import json

import pytest

from tests.diagnosis.fabricated import Job
from tests.renderers.reports import with_data
from tests.runs.fabricated_store import STARTED, store_run
from traceml import cli
from traceml.runs.report.report import build_report, save_report


@pytest.fixture
def three(tmp_path, monkeypatch):
    """Three runs; the newest has a report, the oldest failed."""
    monkeypatch.chdir(tmp_path)
    made = []
    for number, state in enumerate(("failed", "finished", "finished")):
        facts = {"started": STARTED + 100 * number, "ended": STARTED + 100 * number + 42, "state": state}
        made.append(store_run(tmp_path / "traceml_runs" / f"run-{number}", Job(steps=60), facts=facts))

    save_report(made[-1], with_data(build_report(made[-1]), samples=16.0))
    return made


def test_runs_are_listed_newest_first(three, capsys):
    """Each run has a line with its id, state, verdict, ranks, samples, duration and size, within 80 columns."""
    assert cli.main(["runs"]) == 0

    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "state", "verdict", "ranks", "samples/s", "took", "size"]
    assert [line.split()[:2] for line in lines] == [["run-2", "finished"], ["run-1", "finished"], ["run-0", "failed"]]
    assert lines[0].split()[2] == json.loads((three[-1] / "report.json").read_text())["verdict"]["kind"]
    assert lines[1].split()[2:7] == ["-", "2", "-", "42", "s"]
    mean_ms = json.loads((three[-1] / "report.json").read_text())["steps"]["mean_ms"]
    assert float(lines[0].split()[4].replace(",", "")) == pytest.approx(16e3 / mean_ms, rel=1e-2)
    assert max(map(len, (head, *lines))) <= 80


def test_json(three, capsys):
    """--json prints the list and nothing else."""
    assert cli.main(["runs", "--json"]) == 0

    told = json.loads(capsys.readouterr().out)
    assert [run["id"] for run in told] == ["run-2", "run-1", "run-0"]
    assert told[0]["path"] == str(three[-1])


def test_prune_keeps_the_newest(three, capsys):
    """--prune removes what is beyond the number to keep, and says what it freed."""
    assert cli.main(["runs", "--prune", "--keep", "1"]) == 0

    assert capsys.readouterr().out.splitlines()[:2] == ["removed run-1", "removed run-0"]
    assert [folder.exists() for folder in three] == [False, False, True]


def test_prune_by_setting(three, capsys, monkeypatch):
    """The setting keep_runs says how many stay."""
    monkeypatch.setenv("TRACEML_KEEP_RUNS", "3")

    assert cli.main(["runs", "--prune"]) == 0
    assert capsys.readouterr().out == "Nothing to remove\n"


@pytest.mark.parametrize(
    "words", [["--prune"], ["--keep", "1"], ["--prune", "--keep", "-1"], ["--prune", "--keep", "x"]]
)
def test_prune_asks_for_a_number(three, capsys, words):
    """Nothing is removed without a proper number of runs to keep."""
    assert cli.main(["runs", *words]) == 2
    assert all(folder.exists() for folder in three)


def test_no_runs(tmp_path, capsys, monkeypatch):
    """Without runs the list says how to make one."""
    monkeypatch.chdir(tmp_path)

    assert cli.main(["runs"]) == 0
    assert "traceml run SCRIPT" in capsys.readouterr().out
