"""The end of a traced job: verdict card and reports."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.diagnosis.fabricated import Job
from tests.runs.fabricated_store import store_run
from traceml.database.flight.flight import FlightFile
from traceml.database.flight.flight_folders import FALLBACK_FOLDER
from traceml.display import report_files
from traceml.errors import TraceMLError
from traceml.run_folder import AGGREGATOR_LOG, STORE_NAME
from traceml.supervise.final_report import load_card, print_final_report


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return store_run(tmp_path / "run", Job(steps=60))


def test_the_name_tells_what_a_report_is(run_dir: Path, tmp_path: Path) -> None:
    """A name that ends in .html takes the page, any other the JSON."""
    for name in ("mine.html", "MINE.HTML", "mine.json", "mine"):
        print_final_report(run_dir, finished=True, program="traceml run", report=tmp_path / name, file=io.StringIO())

    kind = json.loads((tmp_path / "mine.json").read_text())["verdict"]["kind"]
    assert json.loads((tmp_path / "mine").read_text())["verdict"]["kind"] == kind
    for name in ("mine.html", "MINE.HTML"):
        page = (tmp_path / name).read_text()
        assert page.startswith("<!doctype html>")
        assert kind in page


def test_a_quiet_end_prints_only_what_went_wrong(run_dir: Path, tmp_path: Path) -> None:
    """The report is copied, and no card is printed."""
    told = io.StringIO()
    for path in (tmp_path / "mine.json", tmp_path / "gone" / "mine.json"):
        print_final_report(run_dir, finished=True, program="traceml run", report=path, quiet=True, file=told)

    assert (tmp_path / "mine.json").exists()
    assert told.getvalue().startswith(f"traceml run: cannot write {tmp_path / 'gone' / 'mine.json'}: ")
    assert told.getvalue().count("\n") == 1


def test_a_report_that_cannot_be_put_there_is_reported(run_dir: Path, tmp_path: Path) -> None:
    """The verdict is printed all the same, and nothing is raised."""
    for name in ("gone/mine.html", "gone/mine.json"):
        told = io.StringIO()
        print_final_report(run_dir, finished=True, program="traceml run", report=tmp_path / name, file=told)

        assert "HEALTHY" in told.getvalue()
        assert f"traceml run: cannot write {tmp_path / name}: " in told.getvalue()


def test_a_store_that_cannot_be_read_is_reported(run_dir: Path, tmp_path: Path) -> None:
    """Without a verdict there is a line that says why, and where the rest is."""
    (run_dir / STORE_NAME).write_bytes(b"garbage" * 999)
    told = io.StringIO()

    print_final_report(run_dir, finished=False, program="traceml run", report=tmp_path / "mine.html", file=told)

    assert "traceml run: no report of this run: " in told.getvalue()
    assert "aggregator.log may give the reason." in told.getvalue()
    assert not (tmp_path / "mine.html").exists()


def test_a_card_without_a_thread_costs_the_job_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the limit of processes, the supervisor died in the job's last moment, and took its exit status along."""

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    load_card()


@pytest.mark.parametrize("error", [OSError(30, "Read-only file system"), TraceMLError("no rows at all")])
def test_a_report_that_cannot_be_written_is_reported(
    error: Exception, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder became read-only: without the card, nothing else says what its trackers lack."""

    def fail(_run_dir: Path) -> Path:
        raise error

    monkeypatch.setattr("traceml.display.report_files.write_reports", fail)
    told = io.StringIO()

    print_final_report(run_dir, finished=False, program="traceml run", file=told)

    advice = f"`traceml report {run_dir}` shows it; then `traceml sync {run_dir}` delivers to trackers"
    unwritable = f"cannot write its folder {run_dir}: Read-only file system."
    why = unwritable if isinstance(error, OSError) else "no rows at all"
    assert f"traceml run: no report of this run: {why}" in told.getvalue()
    assert (advice in told.getvalue()) is isinstance(error, OSError)


def test_the_last_words_of_the_aggregator_are_shown(run_dir: Path) -> None:
    """The reason is on the screen, not in a file alone."""
    log = run_dir / AGGREGATOR_LOG
    log.parent.mkdir(exist_ok=True)
    log.write_text("earlier\ntraceml serve: the disk is full\n\n")
    told = io.StringIO()

    print_final_report(run_dir, finished=False, program="traceml run", file=told)

    assert "log may give the reason; its last line is\n  traceml serve: the disk is full\n" in told.getvalue()
    assert "earlier" not in told.getvalue()


@pytest.mark.parametrize("has_left", [True, False])
def test_rows_in_memory_are_promised_only_where_there_are_files(run_dir: Path, *, has_left: bool) -> None:
    """Ranks that said bye, or never connected, have left none."""
    if has_left:
        flight = FlightFile.create(run_dir.parent / FALLBACK_FOLDER, {"run_dir": str(run_dir)})
        flight.close(unlink=False)

    told = io.StringIO()
    print_final_report(run_dir, finished=False, program="traceml run", file=told)

    assert "this run is not stored completely" in told.getvalue()
    assert ("What could be saved of the rest" in told.getvalue()) is has_left


def test_the_card_begins_on_a_line_of_its_own(run_dir: Path) -> None:
    """The script may not have ended its last line; a quiet end prints no empty line."""
    told, quiet = io.StringIO("acc 0.9"), io.StringIO()
    told.seek(0, io.SEEK_END)
    print_final_report(run_dir, finished=True, program="traceml run", file=told)
    print_final_report(run_dir, finished=True, program="traceml run", quiet=True, file=quiet)

    assert told.getvalue().startswith("acc 0.9\n─ traceml ")
    assert quiet.getvalue() == ""


def test_a_folder_that_was_moved_is_reported(run_dir: Path) -> None:
    """The rows are where the folder is now: the user learns how to read and deliver them."""
    run_dir.rename(run_dir.with_name("moved"))
    told = io.StringIO()

    print_final_report(run_dir, finished=True, program="traceml run", file=told)

    assert f"its folder {run_dir} was moved or removed while it ran" in told.getvalue()
    assert "`traceml sync FOLDER`" in told.getvalue()


@pytest.mark.parametrize(("others", "words"), [(0, ""), (1, "one more process has a run"), (5, "and 2 more")])
def test_other_trainings_of_the_script_are_named(tmp_path: Path, others: int, words: str) -> None:
    """Not those of other jobs, nor of a job whose name begins alike."""
    key = "20260101-000000-train-abcd"
    run_dir = store_run(tmp_path / key, Job(steps=60), facts={"job": key})
    for number in range(others):
        store_run(tmp_path / f"child-{number}", Job(steps=20), facts={"job": f"{key}#child-{number}"})

    store_run(tmp_path / "another", Job(steps=20), facts={"job": "another"})
    store_run(tmp_path / "alike", Job(steps=20), facts={"job": f"{key}2#alike"})
    told = io.StringIO()
    print_final_report(run_dir, finished=True, program="traceml run", file=told)

    last = told.getvalue().splitlines()[-1]
    assert ("of its own" in last or "of their own" in last) is bool(others)
    assert words in last
    assert ("child-0" in last) is bool(others)
    assert "another," not in last
    assert "alike" not in last


LOADING = """
import sys, threading
from traceml.supervise.final_report import load_card
load_card()
for thread in threading.enumerate():
    if thread.name == "traceml-card":
        thread.join()
before = set(sys.modules)
import traceml.renderers.text.card, traceml.display.other_trainings
print(before >= set(sys.modules))
"""


@pytest.mark.process
def test_what_prints_the_card_is_loaded_before_it_is_asked() -> None:
    assert subprocess.check_output([sys.executable, "-c", LOADING], text=True) == "True\n"


def test_an_error_of_ours_does_not_change_the_status(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Memory that lacks, or a mistake: it is logged, and the command ends with the job's status."""
    monkeypatch.setattr(report_files, "write_reports", raise_memory_error)

    print_final_report(run_dir, finished=False, program="traceml run", file=io.StringIO())

    assert "the verdict cannot be shown" in caplog.text


def raise_memory_error(*_: object) -> None:
    raise MemoryError


def test_a_target_that_takes_nothing_costs_only_the_card(run_dir: Path, tmp_path: Path) -> None:
    """A closed terminal, or a file on a full disk: the copy of the report is written."""
    with contextlib.suppress(OSError), open("/dev/full", "w") as full:  # of its end
        print_final_report(run_dir, finished=True, program="traceml run", report=tmp_path / "mine.json", file=full)

    assert (tmp_path / "mine.json").exists()
