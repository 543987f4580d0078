"""The report's two files."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from tests.diagnosis.fabricated import Job
from tests.runs.fabricated_store import store_run
from traceml.display import report_files
from traceml.display.report_files import refresh_reports, write_page, write_reports
from traceml.errors import StoreError
from traceml.run_folder import STORE_NAME
from traceml.track.tracker_state import DeliveryPhase, TrackerState


@pytest.fixture
def run(tmp_path):
    return store_run(tmp_path / "run", Job(steps=60))


def test_both_files_are_written(run):
    """`report.json` and `report.html` have the same verdict, and no draft is left."""
    path = write_reports(run)

    assert path == run / "report.json"
    assert json.loads(path.read_text())["verdict"]["kind"] in (run / "report.html").read_text()
    assert not [each for each in run.iterdir() if each.name.startswith(".report")]


def test_a_page_that_cannot_be_drawn_takes_nothing_away(run, monkeypatch, caplog):
    """`report.json` is written when the page cannot be drawn, and the error is logged."""
    monkeypatch.setattr(report_files, "report_page", lambda *_: 1 / 0)

    with caplog.at_level(logging.WARNING, "traceml"):
        write_reports(run)

    assert (run / "report.json").exists()
    assert not (run / "report.html").exists()
    assert "ZeroDivisionError" in caplog.text


def test_a_folder_in_the_pages_place_takes_nothing_away(run, caplog):
    """`report.json` is written when the page's path is taken by a folder."""
    (run / "report.html").mkdir()

    write_reports(run)

    assert (run / "report.json").exists()
    assert "report.html" in caplog.text


def test_trackers_that_got_on_are_on_the_page_too(run):
    """After a delivery both files have the new state of the trackers."""
    write_reports(run)
    assert "tracker jsonl" not in (run / "report.html").read_text()
    state = TrackerState("jsonl")
    state.phase, state.delivered = DeliveryPhase.DONE, 12
    state.save(run)

    refresh_reports(run)

    assert json.loads((run / "report.json").read_text())["trackers"][0]["delivered"] == 12
    assert "tracker jsonl" in (run / "report.html").read_text()


def test_a_page_goes_where_it_is_wanted(run, tmp_path):
    """The page of any run goes to any file and replaces an existing one."""
    (tmp_path / "mine.html").write_text("old")

    write_page(run, tmp_path / "mine.html")

    assert (tmp_path / "mine.html").read_text().startswith("<!doctype html>")
    assert not (run / "report.json").exists()


def test_a_page_into_a_pipe_leaves_the_pipe(run, tmp_path):
    """A path that is not a file, like /dev/stdout, is written to, not replaced."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(pipe.read_text)
        write_page(run, pipe)
        assert reading.result().startswith("<!doctype html>")

    assert pipe.is_fifo()


def test_a_page_through_a_link_leaves_the_link(run, tmp_path):
    """The page is written to the target of the link, which may not exist yet."""
    link = tmp_path / "link.html"
    link.symlink_to("mine.html")
    for _ in range(2):
        write_page(run, link)

        assert link.is_symlink()
        assert (tmp_path / "mine.html").read_text().startswith("<!doctype html>")


def test_the_reports_of_a_run_are_not_written_through_a_link(run, tmp_path):
    """A run's folder may come from elsewhere: what a link in it leads to stays as it is."""
    for name in ("report.json", "report.html"):
        (tmp_path / name).write_text("mine")
        (run / name).symlink_to(tmp_path / name)

    write_reports(run)
    TrackerState("jsonl").save(run)
    (run / "report.html").unlink()
    (run / "report.html").symlink_to(tmp_path / "report.html")
    refresh_reports(run)

    for name in ("report.json", "report.html"):
        assert (tmp_path / name).read_text() == "mine"
        assert not (run / name).is_symlink()

    assert "tracker jsonl" in (run / "report.html").read_text()


def test_a_store_from_before_some_tables_has_a_page(run, tmp_path):
    """Tables that an older version did not write are left out."""
    store = sqlite3.connect(run / STORE_NAME)
    with closing(store), store:
        store.execute("DELETE FROM tables WHERE name IN ('metrics', 'logged', 'device_steps', 'gpu')")

    write_page(run, tmp_path / "mine.html")

    assert "Step time" in (tmp_path / "mine.html").read_text()


def test_a_damaged_store_has_no_page(run, tmp_path):
    """The error names the store, and no file appears."""
    (run / STORE_NAME).write_bytes(b"garbage" * 999)

    with pytest.raises(StoreError, match=STORE_NAME):
        write_page(run, tmp_path / "mine.html")

    assert not (tmp_path / "mine.html").exists()


def test_an_ended_run_joins_the_fleet(run, tmp_path, monkeypatch, caplog):
    """With the setting `fleet_dir`; where it cannot be written, the reports are, and the log says so.

    Where its center has the whole run, that one does.
    """
    write_reports(run)
    monkeypatch.setenv("TRACEML_FLEET_DIR", str(tmp_path / "fleet"))
    (run / "upstream.json").write_text("{}")
    write_reports(run)
    assert not (tmp_path / "fleet").exists()

    (run / "upstream.json").unlink()
    write_reports(run)
    assert [path.suffix for path in (tmp_path / "fleet").rglob("*") if path.is_file()] == [".parquet"]

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRACEML_FLEET_DIR", str(tmp_path / "file"))
    assert write_reports(run).exists()
    assert "was not added to the fleet's dataset" in caplog.text
