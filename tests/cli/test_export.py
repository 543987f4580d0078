"""`traceml export`."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import sys

import pytest

from tests.diagnosis.fabricated import Job
from tests.forked import client as forked
from tests.runs.fabricated_store import store_run
from traceml import cli


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return store_run(tmp_path / "traceml_runs" / "20260101-000000-train-abcd", Job(steps=30))


def test_latest_run_goes_into_the_working_directory(run_dir, tmp_path, capsys):
    """The default output has the run's id, and the next step is printed."""
    assert cli.main(["export", "--format", "perfetto"]) == 0

    told = capsys.readouterr()
    path = tmp_path / "20260101-000000-train-abcd.json"
    assert len(json.loads(path.read_bytes())) > 100
    assert told.out.startswith("20260101-000000-train-abcd.json: ")
    assert "60 steps" in told.out
    assert "https://ui.perfetto.dev" in told.out
    assert told.err == ""


def test_format_goes_by_the_output(run_dir, tmp_path, capsys):
    """The run is given by the end of its id, the format by the extension of the output."""
    assert cli.main(["export", "abcd", "-o", "run.pfw.gz"]) == 0
    assert cli.main(["export", "abcd", "--output", "tables.csv"]) == 0

    assert (tmp_path / "run.pfw.gz").stat().st_size > 100
    assert (tmp_path / "tables.csv" / "steps.csv").read_text().count("\n") == 61
    assert "22 tables" in capsys.readouterr().out


def test_through_a_link(run_dir, tmp_path):
    """The export is written to the target of the link."""
    link = tmp_path / "link.json"
    link.symlink_to("run.json")

    assert cli.main(["export", "abcd", "-o", str(link)]) == 0
    assert link.is_symlink()
    assert json.loads((tmp_path / "run.json").read_bytes())


def test_damage_is_reported_and_the_rest_is_written(run_dir, tmp_path, capsys):
    """Unreadable parts are reported on standard error and by the exit status; the output is written."""
    import sqlite3

    database = sqlite3.connect(run_dir / "store.db")
    database.execute("UPDATE frames SET data = x'ff'")
    database.commit()
    database.close()

    assert cli.main(["export", "--format", "csv"]) == 3
    told = capsys.readouterr()
    assert told.out.startswith("20260101-000000-train-abcd-csv: 22 tables, ")
    assert "traceml export: left out: " in told.err
    assert told.err.endswith("-csv is incomplete: the run's store is damaged. Everything readable was written\n")

    assert cli.main(["export", "--format", "pfw", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["damage"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no format given"),
        (["-o", "x.txt"], "no format has the extension of x.txt: use --format"),
        (["--format", "pfw", "-o", "x.json"], "ends in .pfw.gz or .pfw"),
        (["--format", "xml"], "unknown format xml. Formats: perfetto, pfw, parquet, csv\n"),
        (["--format", "csv", "-o", "store.db"], "store.db is a file"),
        (["--format", "pfw", "-o", "-"], "not standard output"),
    ],
)
def test_wrong_words(run_dir, monkeypatch, capsys, words, said):
    monkeypatch.chdir(run_dir)
    assert cli.main(["export", str(run_dir), *words]) == 2
    assert said in capsys.readouterr().err


def test_a_pipe_is_not_replaced(run_dir, tmp_path, capsys):
    """So it is for a device: a superuser's export to /dev/null took its place."""
    pipe = tmp_path / "run.json"
    os.mkfifo(pipe)
    assert cli.main(["export", str(run_dir), "--format", "perfetto", "-o", str(pipe)]) == 2
    assert "is a folder, pipe or device" in capsys.readouterr().err
    assert pipe.is_fifo()


@pytest.mark.parametrize("name", ["gone/run.json", "gone/run.pfw.gz", "file/tables.csv", "file/x/tables.parquet"])
def test_an_output_that_cannot_be_written(run_dir, tmp_path, capsys, name):
    """The error names the run as it was given, and the way out."""
    (tmp_path / "file").touch()

    assert cli.main(["export", "-o", name]) == 3
    complaint = capsys.readouterr().err
    assert f"cannot write {name}: N" in complaint
    assert "-o" in complaint


def test_unknown_run(run_dir, capsys):
    assert cli.main(["export", "nothing", "--format", "csv"]) == 3
    assert "no run 'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "files"), [(["-o", "run.pfw.gz"], 1), (["--format", "csv"], 21)])
def test_json_tells_what_was_written(run_dir, capsys, words, files):
    """And nothing else: files, rows, and parts that could not be read."""
    assert cli.main(["export", *words, "--json"]) == 0

    told = json.loads(capsys.readouterr().out)
    assert (told["schema"], told["steps"], told["damage"]) == ("traceml.export/1", 60, [])
    assert told["rows"] > 60
    assert len(told["files"]) >= files
    assert told["bytes"] > 100


@pytest.mark.process
@pytest.mark.parametrize("form", ["perfetto", "csv"])
def test_a_terminal_sees_a_bar_that_ends_at_the_end(run_dir, form):
    """On standard error only, which a script may throw away; the path in it is text, not markup."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "traceml", "export", "--format", form, "-o", f"[red]x.{form}.json"]
    environ = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    options = {"stdout": subprocess.PIPE, "stderr": slave, "env": environ, "text": True}
    done = forked.run(command, imports="aggregator", check=True, **options)
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(master, 4096):
            shown += part

    os.close(master)
    assert "Writing [red]x" in shown.decode()
    assert "100%" in shown.decode()
    assert "\x1b" not in done.stdout
