"""`traceml report` on runs in real stores."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.diagnosis.fabricated import Job, adds
from tests.runs.fabricated_store import store_run
from traceml import cli
from traceml.errors import TraceMLError
from traceml.runs.report.report import build_report, save_report
from traceml.runs.report.report_types import LineSection
from traceml.runs.run import load_run


@pytest.fixture
def runs_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "traceml_runs"


@pytest.fixture(scope="module")
def slow_run(tmp_path_factory):
    """A finished run with a slow rank, its report written."""
    folder = tmp_path_factory.mktemp("written") / "20260101-000000-train-abcd"
    save_report(store_run(folder, Job(), adds("forward", 20.0, (1,))), build_report(folder))
    return folder


@pytest.fixture
def slow(slow_run, runs_dir):
    """A copy of this run."""
    return shutil.copytree(slow_run, runs_dir / slow_run.name)


@pytest.mark.parametrize(
    "words", [[], ["abcd"], ["20260101-000000-train-abcd"], ["traceml_runs/20260101-000000-train-abcd"]]
)
def test_card_of_a_run(slow, capsys, words):
    """A run is found as the latest, by id, by its last letters and by its folder; the card names the slow rank."""
    assert cli.main(["report", *words]) == 0

    shown = capsys.readouterr()
    assert "COMPUTE_STRAGGLER" in shown.out
    assert "Rank 1 is slow in forward" in shown.out
    assert str(slow / "report.json") in shown.out
    assert shown.err == ""


def test_json_is_the_report_and_nothing_else(slow, capsys):
    """--json prints the report as it was written at the end."""
    assert cli.main(["report", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((slow / "report.json").read_text())


def test_markdown_has_the_verdict(slow, capsys):
    """--md prints it for a pull request; it is one of several forms."""
    assert cli.main(["report", "--md"]) == 0
    assert "Rank 1 is slow in forward" in capsys.readouterr().out.splitlines()[0]

    assert cli.main(["report", "--md", "--json"]) == 2
    assert "cannot be combined" in capsys.readouterr().err


def test_running_run_is_read_from_its_store(runs_dir, capsys):
    """A run that goes on has no report yet: it is made from the store, and so is a report that is out of date."""
    folder = store_run(runs_dir / "going-on", Job(steps=100), facts={"state": "running", "ended": None})
    outdated = build_report(folder)
    outdated.steps.count = 3
    save_report(folder, outdated)

    assert cli.main(["report", "going-on", "--json"]) == 0

    assert json.loads(capsys.readouterr().out)["steps"]["count"] == 100


@pytest.mark.parametrize(
    "written", ['{"run": {', "[]", '{"run": {"state": "finished"}}', '{"run": {"state": "finished"}, "findings": []}']
)
def test_damaged_report_is_made_again(slow, capsys, written):
    """A report.json that is cut off, or is none, does not hide the run."""
    (slow / "report.json").write_text(written)

    assert cli.main(["report", "--fail-on", "HEALTHY"]) == 0
    assert "Rank 1 is slow in forward" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kinds", "status"),
    [
        (["COMPUTE_STRAGGLER"], 1),
        (["compute-straggler"], 1),
        (["INPUT_BOUND,COMPUTE_STRAGGLER"], 1),
        (["INPUT_BOUND", "RANK_LOST"], 0),
    ],
)
def test_fail_on_is_a_gate(slow, capsys, kinds, status):
    """The status is 1 when a finding of one of the kinds is there; the report is printed either way."""
    assert cli.main(["report", "abcd", "--json", "--fail-on", *kinds]) == status

    shown = capsys.readouterr()
    assert json.loads(shown.out)["verdict"]["kind"] == "COMPUTE_STRAGGLER"
    assert ("COMPUTE_STRAGGLER" in shown.err) == (status == 1)


def test_kinds_of_several_fail_on_options_count_together(slow):
    """A later option does not turn the gate of an earlier one off."""
    assert cli.main(["report", "abcd", "--fail-on", "COMPUTE_STRAGGLER", "--fail-on", "RANK_LOST"]) == 1


@pytest.mark.parametrize("words", [["--fail-on"], ["--fail-on", ""], ["--fail-on="]])
def test_a_gate_without_a_kind_is_refused(slow, capsys, words):
    """A job whose list of kinds is empty by mistake would always pass."""
    assert cli.main(["report", "abcd", *words]) == 2
    assert "--fail-on needs a" in capsys.readouterr().err


def test_unknown_kind_lists_the_kinds(slow, capsys):
    """An unknown kind is a usage error, before anything is read, with the kinds there are."""
    assert cli.main(["report", "nowhere", "--fail-on", "Slow,jitter"]) == 2

    error = capsys.readouterr().err
    assert "no such kind: Slow. " in error
    assert "COMM_BOUND" in error


def test_no_run_is_reported(runs_dir, capsys):
    """Without any run the error says how to make one, and the status is 3."""
    assert cli.main(["report"]) == 3
    assert "traceml run" in capsys.readouterr().err


def test_unknown_run_names_what_exists(slow, capsys):
    """An id that is not there is told with those that are."""
    assert cli.main(["report", "zzzz"]) == 3

    error = capsys.readouterr().err
    assert "zzzz" in error
    assert slow.name in error


def test_damaged_store_is_reported(runs_dir, capsys):
    """A run whose store is damaged, and that has no report, gives one line that names it."""
    folder = runs_dir / "broken"
    folder.mkdir(parents=True)
    (folder / "store.db").write_bytes(b"no database" * 100)

    assert cli.main(["report", "broken"]) == 3

    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert "broken" in shown.err


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "cannot be read (it is not a regular file)"),
        (lambda path: path.write_bytes(b""), "is damaged"),
        (lambda path: path.write_bytes(b"no database" * 100), "is damaged"),
        (lambda path: os.truncate(path, path.stat().st_size // 2), "is damaged"),
    ],
)
def test_a_report_without_its_store(slow, capsys, damage, told):
    """Command, comparison and object use the written report; the commands say so in a line."""
    copy = slow.with_name("copy")
    shutil.copytree(slow, copy)
    damage(copy / "store.db")

    assert cli.main(["report", "copy", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["verdict"]["kind"] == "COMPUTE_STRAGGLER"
    assert shown.err == f"traceml report: copy: store.db {told}; report.json is shown\n"

    assert cli.main(["compare", slow.name, "copy", "--json"]) == 0
    assert capsys.readouterr().err == f"traceml compare: copy: store.db {told}; report.json is compared\n"

    assert load_run(copy).verdict.kind == "COMPUTE_STRAGGLER"
    (copy / "report.json").unlink()
    with pytest.raises(TraceMLError):
        _ = load_run(copy).verdict


def test_runs_dir_can_be_given(slow, capsys, monkeypatch, tmp_path):
    """--runs-dir finds runs elsewhere, and the command that is told works from there."""
    monkeypatch.chdir("/")

    assert cli.main(["report", "--runs-dir", str(slow.parent)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f" Command traceml report {slow}"


def test_html_is_one_file(slow, tmp_path, capsys):
    """`--html FILE` writes the page, prints nothing, and the gate counts as ever."""
    page = tmp_path / "shared.html"

    assert cli.main(["report", str(slow), "--html", str(page), "--fail-on", "HEALTHY"]) == 0
    assert page.read_text().startswith("<!doctype html>")
    assert capsys.readouterr().out == ""


def test_html_that_cannot_be_written(slow, tmp_path, capsys):
    """The file is named, and the status is that of other failures; with --json it is a usage error."""
    assert cli.main(["report", str(slow), "--html", str(tmp_path / "no" / "where.html")]) == 3
    assert "where.html" in capsys.readouterr().err
    assert cli.main(["report", str(slow), "--html", "x.html", "--json"]) == 2


def test_lines_go_with_every_form_of_the_report(slow, tmp_path, capsys):
    """With --md they are a table after the report; the page has them anyway."""
    report = build_report(slow)
    report.lines.append(LineSection(phase="forward", file="train.py", line=9, function="train", samples=5, share=1.0))
    save_report(slow, report)

    assert cli.main(["report", "--lines", "--md"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-3:] == [
        "| line | phase | share of the phase |",
        "| --- | ---: | ---: |",
        "| `train.py:9 train` | forward | 100 % |",
    ]
    assert cli.main(["report", "--lines", "--html", str(tmp_path / "page.html")]) == 0


def test_lines_are_printed_as_a_flame_graph(slow, capsys):
    """JSON and nothing else on stdout; without --lines, or with --json, which is another document, it is refused."""
    assert cli.main(["report", "--lines", "--format", "speedscope"]) == 0
    assert json.loads(capsys.readouterr().out)["profiles"][0]["type"] == "sampled"
    for others in ([], ["--lines", "--json"], ["--lines", "--md"]):
        assert cli.main(["report", "--format", "perfetto", *others]) == 2
        assert "--lines" in capsys.readouterr().err


@pytest.mark.process
def test_a_written_report_needs_few_modules(tmp_path):
    """Neither numpy and the modules that make reports, nor tyro, which is for scripts."""
    run = store_run(tmp_path / "run", Job(steps=60))
    save_report(run, build_report(run))
    code = "import sys; from traceml import cli; cli.main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    words = ["report", "run", "--fail-on", "HANG", "--runs-dir", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)

    assert "HEALTHY" in done.stdout
    loaded = set(done.stderr.split())
    assert not {"numpy", "tyro", "asyncio", "traceml.runs.report.report", "traceml.diagnosis.ruleset"} & loaded
