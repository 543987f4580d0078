"""`traceml runs`."""

from __future__ import annotations

import io
import json
import sqlite3
from contextlib import closing
from functools import partial
from shutil import copytree

import pytest
from rich.console import Console

from tests.diagnosis.fabricated import Job
from tests.renderers.reports import with_data
from tests.runs.fabricated_store import STARTED, store_run
from traceml import cli
from traceml.cli import runs as runs_command
from traceml.database.store.store import StoreWriter
from traceml.database.store.store_file import STORE_VERSION
from traceml.formatting import ms_text
from traceml.run_folder import STORE_NAME
from traceml.runs.find import describe_run
from traceml.runs.report.report import build_report, save_report


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Three runs; the newest has a report, the oldest failed."""
    folder, made = tmp_path_factory.mktemp("written"), []
    for number, state in enumerate(("failed", "finished", "finished")):
        facts = {"started": STARTED + 100 * number, "ended": STARTED + 100 * number + 42, "state": state}
        made.append(store_run(folder / f"run-{number}", Job(steps=60), facts=facts))

    save_report(made[-1], with_data(build_report(made[-1]), samples=16.0))
    return folder


@pytest.fixture
def three(written, tmp_path, monkeypatch):
    """Copies of these runs, in order of their age."""
    monkeypatch.chdir(tmp_path)
    return sorted(copytree(written, tmp_path / "traceml_runs").iterdir())


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


def test_what_to_do_about_runs_that_cannot_be_read(three, capsys):
    """Of each state the first run is named, on standard error; runs that can be read are not."""
    assert cli.main(["runs"]) == 0
    assert capsys.readouterr().err == ""

    for run in three[:2]:
        with closing(sqlite3.connect(run / STORE_NAME)) as database:
            database.execute(f"PRAGMA user_version={STORE_VERSION + 1}")

    (three[2] / STORE_NAME).write_bytes(b"no database at all" * 100)
    assert cli.main(["runs"]) == 0

    output, problems = capsys.readouterr()
    assert [line.split()[1] for line in output.splitlines()[1:]].count("newer") == 2
    damaged, newer = problems.splitlines()
    assert newer == "newer: run-1 and 1 more: a newer traceml has written it: update this one to read it"
    assert damaged.startswith("damaged: run-2: cannot read the run's store traceml_runs/run-2/store.db: file is not a")


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


def test_prune_keeps_tagged_runs(three, capsys):
    """A baseline is old on purpose."""
    assert cli.main(["runs", "tag", "run-0", "baseline"]) == 0
    assert cli.main(["runs", "--prune", "--keep", "1"]) == 0

    assert "removed run-1" in capsys.readouterr().out
    assert [folder.exists() for folder in three] == [True, False, True]


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


def test_conditions_columns_and_order(three, capsys):
    """Columns as asked, one line per run that meets the conditions."""
    assert cli.main(["runs", "--where", "state=finished", "--sort", "name", "--columns", "id,name,steps"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "name", "steps"]
    assert sorted(line.split()[0] for line in lines) == ["run-1", "run-2"]

    assert cli.main(["runs", "--where", "step_ms>0", "--columns", "step_ms", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["values"] == {"step_ms": told["step_ms"]}

    assert cli.main(["runs", "--where", "step_ms>0", "--columns", "step_ms"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ms_text(told["step_ms"]).split()

    assert cli.main(["runs", "--where", "state=hung"]) == 0
    assert "meets the conditions, of 3 runs with the archived ones" in capsys.readouterr().out


def test_conditions_of_several_options_are_joined(three, capsys):
    assert cli.main(["runs", "--where", "id=run-1", "--where", "state=finished", "--json"]) == 0
    assert [told["id"] for told in json.loads(capsys.readouterr().out)] == ["run-1"]
    assert cli.main(["runs", "--where", "id=run-1", "--where", "state=hung", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


@pytest.mark.parametrize(("columns", "last"), [(36, "verdict"), (46, "ranks"), (56, "samples/s"), (200, "size")])
def test_a_narrow_terminal_shows_the_first_columns(three, capsys, monkeypatch, columns, last):
    """Lines are not broken; a list in a pipe, or of columns that were asked for, is whole."""
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main(["runs"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split()[-1] == "size"

    terminal = partial(Console, force_terminal=True, no_color=True, color_system=None)
    monkeypatch.setattr(runs_command, "plain_console", terminal)
    assert cli.main(["runs"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[-1] == last
    assert max(len(line) for line in lines) <= columns
    assert cli.main(["runs", "--columns", "id,project,name,state,verdict,user,size"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split()[-1] == "size"


def test_labels(three, capsys):
    """Tags and notes are in the folder, in the list and in conditions."""
    assert cli.main(["runs", "tag", "run-1", "baseline", "v2"]) == 0
    assert cli.main(["runs", "tag", "run-1", "v2", "--remove"]) == 0
    assert cli.main(["runs", "note", "run-1", "new loader"]) == 0
    assert capsys.readouterr().out.splitlines() == ["baseline, v2", "baseline", "new loader"]

    assert cli.main(["runs", "--where", "tag:baseline", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert (told["id"], told["tags"], told["note"]) == ("run-1", ["baseline"], "new loader")
    assert cli.main(["runs", "note", "run-1", "", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"tags": ["baseline"], "note": "", "archived": False, "name": ""}
    assert cli.main(["runs", "rename", "run-1", "large batch"]) == 0
    assert describe_run(three[1]).name == "large batch"


def test_the_list_shows_labels_that_a_run_has(three, capsys):
    """Behind the verdict, so that they are not the first to be left out; without labels there is no such column."""
    assert cli.main(["runs", "tag", "run-1", "baseline"]) == 0
    assert cli.main(["runs", "rename", "run-0", "large batch"]) == 0
    capsys.readouterr()
    assert cli.main(["runs"]) == 0

    head, _, tagged, renamed = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "state", "verdict", "name", "tags", "ranks", "samples/s", "took", "size"]
    assert head.index("tags") == tagged.index("baseline")
    assert head.index("name") == renamed.index("large batch")


def test_archived_runs_are_left_out(three, capsys):
    """Until --archived, or until they are listed again."""
    assert cli.main(["runs", "archive", "run-0", "run-2"]) == 0
    assert capsys.readouterr().out == "2 runs archived\n"
    assert cli.main(["runs", "archive", "run-0"]) == 0
    assert capsys.readouterr().out == "0 runs archived; 1 archived already\n"
    assert cli.main(["runs", "archive", "run-1", "run-2", "--undo"]) == 0
    assert capsys.readouterr().out == "1 run listed again; 1 not archived\n"
    assert cli.main(["runs", "archive", "run-2"]) == 0
    capsys.readouterr()

    for words, listed in (([], ["run-1"]), (["--archived"], ["run-2", "run-1", "run-0"])):
        assert cli.main(["runs", "--json", *words]) == 0
        assert [run["id"] for run in json.loads(capsys.readouterr().out)] == listed

    assert cli.main(["runs", "archive", "run-0", "--undo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"run-0": {"archived": False}}


def answers(monkeypatch, text):
    """Let a person at a terminal answer."""
    stdin = io.StringIO(text)
    stdin.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", stdin)


def test_rm_asks(three, capsys, monkeypatch):
    """Nothing is removed without a yes; the question names the runs."""
    answers(monkeypatch, "n\n")
    assert cli.main(["runs", "rm", "run-0", "run-1"]) == 1
    asked = capsys.readouterr().err
    assert "run-0  failed" in asked
    assert "Remove 2 runs? [y/N]" in asked
    assert all(folder.exists() for folder in three)

    answers(monkeypatch, "y\n")
    assert cli.main(["runs", "rm", "run-0", "run-1"]) == 0
    assert [folder.exists() for folder in three] == [False, False, True]


def test_rm_in_a_pipe_needs_yes(three, capsys, monkeypatch):
    """Nobody can answer there."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert cli.main(["runs", "rm", "run-0"]) == 2
    assert "add --yes" in capsys.readouterr().err
    assert three[0].exists()

    assert cli.main(["runs", "rm", "run-0", "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == ["run-0"]
    assert not three[0].exists()


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["rm"], 2), (["rm", "nosuch", "--yes"], 3), (["tag", "run-0", "a b"], 2), (["tag", "run-0", "--remove"], 2),
        (["tag"], 2), (["note"], 2), (["archive"], 2), (["--prune", "--keep", "0", "--where", "run-0"], 2),
        (["--columns", "nosuch"], 2), (["--sort", "nosuch"], 2),
    ],
)  # fmt: skip
def test_what_makes_no_sense_changes_nothing(three, capsys, words, status):
    """An error of one line, and every run is as before."""
    assert cli.main(["runs", *words]) == status
    assert capsys.readouterr().out == ""
    assert all(folder.exists() and not (folder / "labels.json").exists() for folder in three)


def test_a_running_job_is_not_removed(tmp_path, monkeypatch, capsys):
    """Not even with --yes: its aggregator writes there."""
    monkeypatch.chdir(tmp_path)
    facts = {"state": "running", "ended": None}
    run = store_run(tmp_path / "traceml_runs" / "going", Job(steps=20), facts=facts, state="running")
    with StoreWriter(run / STORE_NAME) as writer:
        writer.put_meta("aggregator", {"host": "another", "pid": 1})

    assert cli.main(["runs", "rm", "going", "--yes"]) == 3
    told = capsys.readouterr().err
    assert "is still running" in told
    assert "`traceml sync --ended` ends it" in told
    assert run.exists()


@pytest.mark.parametrize("name", ["report.json", "store.db"])
def test_a_folder_of_another_program_is_not_removed(three, tmp_path, capsys, name):
    """Its file has the name of a run's: neither by hand, nor as one of the old runs."""
    own = three[0].parent / "coverage"
    own.mkdir()
    (own / name).write_text('{"covered": 0.9}')
    for given in (str(own), "coverage"):
        assert cli.main(["runs", "rm", given, "--yes"]) == 3
        assert "may not be a run's folder" in capsys.readouterr().err

    assert cli.main(["runs", "--prune", "--keep", "0"]) == 0
    assert [path.name for path in own.iterdir()] == [name]
    assert not any(folder.exists() for folder in three)


def test_commit_and_branch_are_columns(tmp_path, monkeypatch, capsys):
    """The beginning of the commit is shown, all of it is in the JSON, and both are conditions."""
    monkeypatch.chdir(tmp_path)
    for number, branch in enumerate(("main", "faster")):
        run = tmp_path / "traceml_runs" / f"run-{number}"
        store_run(run, Job(steps=20), facts={"started": STARTED + number})
        report = build_report(run)
        report.run.commit, report.run.branch = f"{number}c0ffee" * 5, branch
        report.run.dirty = None if number else True
        save_report(run, report)

    assert cli.main(["runs", "--columns", "id,git.commit,git.branch,git.dirty"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["run", "git.commit", "git.branch", "git.dirty"],
        ["run-1", "1c0ffee1c0", "faster", "-"],
        ["run-0", "0c0ffee0c0", "main", "True"],
    ]

    where = "git.branch=main git.commit~0c0ffee git.dirty=true"
    assert cli.main(["runs", "--where", where, "--json"]) == 0
    [told] = json.loads(capsys.readouterr().out)
    assert [told[name] for name in ("id", "commit", "branch", "dirty")] == ["run-0", "0c0ffee" * 5, "main", True]


def test_logged_parameters_called_commit_and_branch_are_found(tmp_path, monkeypatch, capsys):
    """The fields of the repository do not hide them, in columns, conditions and order."""
    monkeypatch.chdir(tmp_path)
    for number, branch in enumerate(("b", "a")):
        run = tmp_path / "traceml_runs" / f"run-{number}"
        store_run(run, Job(steps=20), facts={"started": STARTED + number})
        report = build_report(run)
        report.run.commit, report.run.branch = "c0ffee", "main"
        report.setup.params = {"commit": 1234567890123 + number, "branch": branch}
        save_report(run, report)

    words = ["runs", "--columns", "id,commit,branch", "--sort", "branch"]
    assert cli.main(words) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [["run", "commit", "branch"], ["run-1", "1234567890124", "a"], ["run-0", "1234567890123", "b"]]

    assert cli.main([*words, "--where", "branch=b", "--json"]) == 0
    [told] = json.loads(capsys.readouterr().out)
    assert [told["commit"], told["branch"]] == ["c0ffee", "main"]
    assert told["values"] == {"id": "run-0", "commit": 1234567890123, "branch": "b"}


def test_an_action_behind_options_is_told_its_place(capsys):
    """As for a misplaced option of `traceml`; what else is wrong is told as ever."""
    assert cli.main(["runs", "--runs-dir", "r", "rm", "over"]) == 2
    assert "rm comes before options: traceml runs rm" in capsys.readouterr().err
    assert cli.main(["runs", "--runs-dir", "r", "over"]) == 2
    assert "unrecognized arguments: over" in capsys.readouterr().err


def test_an_unknown_action_is_told_with_those_there_are(capsys):
    """As a usage error of the command, not of its options."""
    assert cli.main(["runs", "foo"]) == 2
    assert "there is no action 'foo'; there are rm, tag, note, rename, archive" in capsys.readouterr().err
