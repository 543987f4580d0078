"""Data source of the page, also for runs that change while they are read."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from tests.diagnosis.fabricated import Job, rows_of
from tests.display.web.runs import add_rank_rows, rewrite
from tests.runs.fabricated_store import add_rank, run_facts, store_run
from traceml.database.store.store import StoreWriter
from traceml.database.store.store_file import STORE_VERSION
from traceml.display.web.run_sources import RunSource, is_run_id
from traceml.run_folder import STORE_NAME
from traceml.runs.report.report import build_report, save_report

RUN = "20260101-000000-train-abcd"


@pytest.fixture
def run_dir(tmp_path):
    """A finished run."""
    return store_run(tmp_path / RUN, Job(ranks=2, steps=60))


@pytest.fixture
def follow():
    """Follow runs; all are closed at the end."""
    opened = []

    def start(run_dir, **options):
        opened.append(RunSource(run_dir, **options))
        return opened[-1]

    yield start
    for source in opened:
        source.close()


def test_a_finished_run_is_read_once_and_reported_once(run_dir, follow):
    """The page shows the report on disk, so that they cannot disagree."""
    save_report(run_dir, build_report(run_dir))
    report = json.loads((run_dir / "report.json").read_text())
    report["verdict"]["summary"] = "as it was written"
    (run_dir / "report.json").write_text(json.dumps(report))
    source = follow(run_dir, themes={"light"})

    state = source.read()

    assert state.view.report.verdict.summary == "as it was written"
    assert state.view.report.run.state == "finished"
    assert {"steps", "phases", "heat", "ranks"} <= set(state.charts.of("light"))
    assert [source.read() for _ in range(3)].count(None) >= 2


def test_a_run_that_comes_later_is_found(tmp_path, follow):
    source = follow(tmp_path / RUN)

    state = source.read()
    assert (state.exists, state.view, state.problem) == (False, None, "")
    assert source.read() is None
    (tmp_path / RUN).mkdir()
    assert source.read().exists
    store_run(tmp_path / RUN, Job(ranks=2, steps=60))
    assert source.read().view.report.steps.count == 60


def test_new_rows_move_a_running_run_on(tmp_path, follow):
    rows = rows_of(Job(ranks=1, steps=90, grouped=False))[0]
    with StoreWriter(tmp_path / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(state="running", ended=None, world_size=1))
        stream = add_rank(writer, 0, rows[:50], state="running")
        writer.commit()
        source = follow(tmp_path)
        assert source.read().view.report.steps.count == 50
        add_rank_rows(writer, stream, rows[50:], 50)
        writer.commit()

        assert source.read().view.report.steps.count == 90


def test_silence_is_reported_and_ends(tmp_path, follow):
    """A run without new data is silent until the next row."""
    now_s = 100.0
    rows = rows_of(Job(ranks=1, steps=90, grouped=False))[0]
    with StoreWriter(tmp_path / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(state="running", ended=None, world_size=1))
        stream = add_rank(writer, 0, rows[:50], state="running")
        writer.commit()
        source = follow(tmp_path, clock=lambda: now_s)
        assert source.read().silent_s is None
        now_s += 6.0
        assert source.read().silent_s >= 6.0
        add_rank_rows(writer, stream, rows[50:], 50)
        writer.commit()

        assert source.read().silent_s is None


def test_a_store_that_cannot_be_read_is_tried_again(run_dir, follow):
    rewrite(run_dir / STORE_NAME, "PRAGMA user_version=0")
    source = follow(run_dir)

    assert "this traceml reads" in source.read().problem
    assert source.read() is None or source.read() is None
    rewrite(run_dir / STORE_NAME, f"PRAGMA user_version={STORE_VERSION}")
    assert source.read().problem == ""


def test_garbage_is_no_crash(run_dir, follow):
    (run_dir / STORE_NAME).write_bytes(os.urandom(20_000))

    assert "damaged" in follow(run_dir).read().problem or "no" in follow(run_dir).read().problem


def test_a_folder_that_goes_while_it_is_shown_keeps_its_last_state(run_dir, follow):
    source = follow(run_dir)
    source.read()
    (run_dir / STORE_NAME).unlink()
    assert "store of this run was removed" in source.read().problem
    shutil.rmtree(run_dir)
    state = source.read()

    assert "folder of this run was removed" in state.problem
    assert state.view.report.steps.count == 60


def test_another_store_in_the_same_place_is_read_from_its_beginning(run_dir, follow):
    source = follow(run_dir)
    source.read()
    shutil.rmtree(run_dir)
    store_run(run_dir, Job(ranks=2, steps=40))

    assert source.read().view.report.steps.count == 40


def test_a_report_without_a_store_is_shown(run_dir, follow):
    save_report(run_dir, build_report(run_dir))
    (run_dir / STORE_NAME).unlink()

    source = follow(run_dir)
    state = source.read()
    assert source.read() is None
    assert "store of this run is gone" in state.problem
    assert state.view.report.steps.count == 60
    assert "ranks" in state.charts.of("dark")


def test_a_report_beside_a_damaged_store_is_shown(run_dir, follow):
    """`traceml report` shows it, too: the verdict of a run is worth more than its file's fault."""
    save_report(run_dir, build_report(run_dir))
    whole = (run_dir / STORE_NAME).read_bytes()
    (run_dir / STORE_NAME).write_bytes(whole[:5000])

    source = follow(run_dir)
    state = source.read()
    assert source.read() is None
    assert state.problem.startswith("cannot read the run's store")
    assert state.problem.endswith("; this page shows its report.")
    assert state.view.report.steps.count == 60
    (run_dir / STORE_NAME).write_bytes(whole)
    assert source.read().problem == ""


def test_logs_are_shown_from_their_end(run_dir, follow):
    """The last whole lines of long files are shown; invalid bytes are replaced."""
    logs = run_dir / "logs" / "host"
    logs.mkdir(parents=True)
    (logs / "0.log").write_bytes(b"x" * 40_000 + b"\nthe last line \xff\n")
    (run_dir / "logs" / "aggregator.log").write_text("")

    tails = {tail.name: tail for tail in follow(run_dir).read().logs}

    assert tails["host/0.log"].text == "the last line \ufffd\n"
    assert tails["host/0.log"].cut
    assert not tails["aggregator.log"].cut


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a\\b", ".hidden", "a\0b"])
def test_what_leaves_the_folder_is_no_run(name):
    assert not is_run_id(name)


def test_what_people_name_their_runs_is_one():
    assert is_run_id("20260101-000000-<b>x y-é-abcd")
