"""Finding, listing and pruning runs."""

from __future__ import annotations

import json
import os
import sqlite3
from contextlib import closing, suppress
from shutil import copytree

import msgpack
import pytest

import traceml
from tests.diagnosis.fabricated import Job, adds, rows_of
from tests.renderers.reports import finding
from tests.runs.fabricated_store import STARTED, add_rank, run_facts, store_run
from traceml.database.store.store import StoreWriter
from traceml.database.store.store_file import STORE_VERSION
from traceml.errors import ArgumentTypeError, RunNotFoundError
from traceml.run_folder import RELAY_NAME, STORE_NAME
from traceml.runs.find import describe_run, find_run, list_runs
from traceml.runs.live_run import LiveRun
from traceml.runs.remove import prune, remove_run
from traceml.runs.report.report import build_report, save_report
from traceml.runs.run_labels import add_tags, change_labels, remove_tags


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Three runs, of which the second is running."""
    folder = tmp_path_factory.mktemp("written")
    for number, state in enumerate(("finished", "running", "failed")):
        ended = None if state == "running" else STARTED + number + 5
        facts = {"started": STARTED + number, "ended": ended, "state": state}
        store_run(folder / f"2026010{number}-000000-train-000{number}", Job(steps=30), facts=facts)

    return folder


@pytest.fixture
def runs(written, tmp_path):
    """A copy of these runs."""
    return copytree(written, tmp_path, dirs_exist_ok=True)


def test_the_latest_is_where_the_link_points(runs):
    """`latest` wins over dates; without the link the newest run is taken."""
    assert find_run(None, runs).name.endswith("0002")
    (runs / "latest").symlink_to("20260100-000000-train-0000")

    assert find_run(None, runs).name.endswith("0000")
    assert find_run("latest", runs).name.endswith("0000")


@pytest.mark.parametrize("text", ["20260101-000000-train-0001", "0001", "20260101"])
def test_a_run_is_found_by_its_id_or_a_part(runs, text):
    """The whole id, its four letters, or its beginning."""
    assert find_run(text, runs) == (runs / "20260101-000000-train-0001").resolve()


def test_a_run_is_found_by_its_folder(runs, tmp_path_factory):
    """A path works wherever runs are."""
    folder = store_run(tmp_path_factory.mktemp("elsewhere") / "x", Job(steps=30))

    assert find_run(folder, runs) == folder.resolve()
    assert find_run(folder / "store.db", runs) == find_run(folder / "report.json", runs) == folder.resolve()


def test_a_run_is_found_by_a_name_of_its_own(runs):
    """That of the start, or a later one. A name of several runs is refused, and an id goes first."""
    for number, name in ((3, "sweep"), (4, "sweep"), (5, "before"), (6, "0001")):
        facts = {"started": STARTED + number, "ended": STARTED + number + 5, "state": "finished", "name": name}
        store_run(runs / f"2026010{number}-000000-train-000{number}", Job(steps=30), facts=facts)

    change_labels(runs / "20260102-000000-train-0002", lambda labels: setattr(labels, "name", "after"))

    assert find_run("before", runs).name.endswith("0005")
    assert find_run("after", runs).name.endswith("0002")
    assert find_run("0001", runs).name == "20260101-000000-train-0001"
    with pytest.raises(RunNotFoundError, match=r"'sweep' matches 2 runs .*-0004, .*-0003\. Give the id"):
        find_run("sweep", runs)
    with pytest.raises(RunNotFoundError, match=r"no run 'befor': .* Did you mean 'before'\?"):
        find_run("befor", runs)


@pytest.mark.parametrize(("setting", "project"), [("default", "digits"), ("vision", "vision")])
def test_what_an_experiment_names_is_listed(tmp_path, setting, project):
    """Its tags after those that people gave; its project where no setting names one. Pruning keeps given tags only."""
    facts = {"started": STARTED, "ended": STARTED + 5, "state": "finished", "project": setting}
    folder = tmp_path / "20260101-000000-train-0001"
    folder.mkdir()
    row = {"kind": "experiment", "name": "trial", "project": "digits", "tags": {"goal": "speed", "small": ""}}
    with StoreWriter(folder / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(**facts))
        stream = add_rank(writer, 0, rows_of(Job(steps=30))[0])
        writer.append(stream, "logged", writer.next_seq(stream, "logged"), 1, msgpack.packb(row))

    save_report(folder, build_report(folder))
    (listed,) = list_runs(tmp_path)
    assert (listed.project, listed.tags) == (project, ["goal=speed", "small"])

    change_labels(folder, lambda labels: add_tags(labels, ["baseline", "small"]))
    assert list_runs(tmp_path)[0].tags == ["baseline", "small", "goal=speed"]
    assert not prune(tmp_path, keep=0)
    change_labels(folder, lambda labels: remove_tags(labels, ["baseline", "small"]))
    assert [info.id for info in prune(tmp_path, keep=0)] == [folder.name]


def test_what_fits_several_runs_is_refused(runs):
    """The error shows which."""
    with pytest.raises(RunNotFoundError, match="matches 3 runs"):
        find_run("2026", runs)


def test_what_is_not_there_is_reported_with_what_is(runs, tmp_path):
    """A wrong id, an empty folder, no folder."""
    with pytest.raises(RunNotFoundError, match=r"'zzz'.*20260102-000000-train-0002"):
        find_run("zzz", runs)

    (tmp_path / "empty").mkdir()
    with pytest.raises(RunNotFoundError, match="contains no runs"):
        find_run(None, tmp_path / "empty")

    with pytest.raises(RunNotFoundError, match=r"there is no folder .*--runs-dir"):
        find_run(None, tmp_path / "nothing")


def test_a_folder_of_runs_in_place_of_a_run_is_told(runs, tmp_path_factory):
    """`traceml report RUNS_DIR`: the runs of another folder would not be listed."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    newest = runs / "20260102-000000-train-0002"

    for runs_dir in (runs, elsewhere):
        with pytest.raises(
            RunNotFoundError, match=f"{runs} is no run but a folder of them: name one, such as {newest}"
        ):
            find_run(str(runs), runs_dir)

    with pytest.raises(RunNotFoundError, match="it is not the folder of a run"):
        find_run(str(elsewhere), runs)


def test_a_file_is_no_folder_of_runs(tmp_path):
    """An empty list would say that there are no runs, which is not known."""
    (tmp_path / "file").touch()

    with pytest.raises(RunNotFoundError, match=r"/file is no folder of runs: name one with --runs-dir"):
        list_runs(tmp_path / "file")


def test_a_text_that_is_too_long_for_a_name_is_no_run(runs):
    """The system's error about its length would not say which runs there are."""
    with pytest.raises(RunNotFoundError, match="20260102-000000-train-0002"):
        find_run("x" * 5000, runs)


def test_a_list_tells_state_and_verdict(runs):
    """The newest first, with the facts of each."""
    save_report(runs / "20260102-000000-train-0002", build_report(runs / "20260102-000000-train-0002"))
    (runs / "20260103-broken").mkdir()
    (runs / "20260103-broken" / "store.db").write_bytes(b"no database at all" * 100)

    infos = {info.id[-4:]: info for info in list_runs(runs)}

    assert [infos[end].state for end in ("0000", "0001", "0002", "oken")] == [
        "finished",
        "running",
        "failed",
        "damaged",
    ]
    assert infos["0002"].verdict == "HEALTHY"
    assert infos["0000"].verdict is None
    assert (infos["0001"].duration_s, infos["0002"].duration_s) == (None, 5)
    assert infos["0000"].size_bytes > 0


def test_a_list_tells_a_store_of_another_version_from_a_damaged_one(tmp_path):
    """The state says whether a newer or an older traceml reads it."""
    for name, version in (("later", STORE_VERSION + 1), ("earlier", 0), ("current", STORE_VERSION)):
        run = store_run(tmp_path / name, Job(steps=20))
        with closing(sqlite3.connect(run / STORE_NAME)) as database:
            database.execute(f"PRAGMA user_version={version}")

    states = {info.id: info.state for info in list_runs(tmp_path)}

    assert states == {"later": "newer", "earlier": "older", "current": "finished"}


@pytest.mark.parametrize("has_report", [True, False])
def test_a_damaged_run_has_the_facts_of_its_report(has_report, tmp_path):
    """A half copied run of two ranks was listed with one rank, beside the speed of two, and at the list's end."""
    run = store_run(tmp_path / "half", Job(ranks=2, steps=200))
    if has_report:
        save_report(run, build_report(run))

    whole = describe_run(run)
    (run / STORE_NAME).write_bytes(b"no database at all" * 100)
    found = describe_run(run)

    assert found.state == "damaged"
    known = (found.world_size, found.name, found.started, found.duration_s)
    assert known == ((2, whole.name, whole.started, whole.duration_s) if has_report else (1, "half", None, None))


def test_a_list_has_the_severity_of_the_verdict(tmp_path):
    """The severity is that of the finding, from the report or from the verdict so far, not a guess by its kind."""
    ended = store_run(tmp_path / "ended", Job(steps=200), adds("input_wait", 30))
    save_report(ended, build_report(ended))
    running = tmp_path / "running"
    running.mkdir()
    with StoreWriter(running / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(state="running", ended=None))
        writer.event("verdict", {"findings": [finding("INPUT_BOUND", severity="warning").to_dict()]})

    infos = {info.id: (info.verdict, info.severity) for info in list_runs(tmp_path)}

    assert infos == {"ended": ("INPUT_BOUND", "critical"), "running": ("INPUT_BOUND", "warning")}


def test_a_verdict_of_another_version_spoils_no_list(tmp_path):
    """A run whose verdict cannot be read is listed without one."""
    with_later_words = tmp_path / "later"
    with_later_words.mkdir()
    with StoreWriter(with_later_words / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(state="running", ended=None))
        writer.event("verdict", {"findings": [finding("INPUT_BOUND").to_dict() | {"severity": "fatal"}]})

    assert [(info.id, info.verdict) for info in list_runs(tmp_path)] == [("later", None)]
    live = LiveRun(with_later_words)
    live.refresh()  # nor a screen
    assert live.findings == []
    live.close()


def test_pruning_keeps_the_newest_and_the_running(runs):
    """Old runs are removed, except running ones."""
    (runs / "latest").symlink_to("20260100-000000-train-0000")

    removed = prune(runs, keep=1)

    assert [info.id[-4:] for info in removed] == ["0000"]
    assert sorted(info.id[-4:] for info in list_runs(runs)) == ["0001", "0002"]
    assert (runs / "latest").readlink().name == "20260102-000000-train-0002"


def test_pruning_keeps_what_the_center_is_missing(runs):
    """Its center was away when it ended: the next aggregator sends it."""
    unsent, sent = ({"address": "center:29765", "sent": each, "safe": 0} for each in (False, True))
    (runs / "20260100-000000-train-0000" / RELAY_NAME).write_text(json.dumps(unsent))
    assert prune(runs, keep=1) == []

    (runs / "20260100-000000-train-0000" / RELAY_NAME).write_text(json.dumps(sent))
    assert [info.id[-4:] for info in prune(runs, keep=1)] == ["0000"]


def test_the_latest_points_at_the_newest_run_that_is_left(runs):
    """Without one there is no link; one that points elsewhere stays."""
    (runs / "latest").symlink_to("20260102-000000-train-0002")

    for removed, left in (("0000", "0002"), ("0002", "0001"), ("0001", None)):
        remove_run(next(runs.glob(f"*-train-{removed}")))
        assert (runs / "latest").is_symlink() == (left is not None)
        assert left is None or (runs / "latest").readlink().name.endswith(left)


@pytest.mark.needs("root")
def test_pruning_leaves_runs_of_other_users(runs):
    """They share the folder, and may remove what is in it: one's number of runs to keep is not another's."""
    os.chown(runs / "20260100-000000-train-0000", 12345, -1)

    assert prune(runs, keep=0) != []

    assert sorted(info.id[-4:] for info in list_runs(runs)) == ["0000", "0001"]


@pytest.mark.needs("root")
def test_a_link_of_another_user_is_not_the_latest(runs):
    """Only its owner can replace it in a folder like /tmp: for others it points at an old run."""
    (runs / "latest").symlink_to("20260100-000000-train-0000")
    os.chown(runs / "latest", 12345, -1, follow_symlinks=False)

    assert find_run(None, runs).name.endswith("0002")


def test_a_run_is_removed_while_a_page_reads_it(runs, monkeypatch):
    """SQLite makes files beside a store that is opened, here just before the empty folder would be removed."""
    run = list_runs(runs)[0].path
    rmdir = os.rmdir

    def opened_before(*folder, **options):
        with suppress(FileNotFoundError):
            (run / f"{STORE_NAME}-shm").touch()

        rmdir(*folder, **options)

    monkeypatch.setattr(os, "rmdir", opened_before)
    remove_run(run)

    assert sorted(path.name[-4:] for path in runs.iterdir()) == ["0000", "0001"]


@pytest.mark.parametrize("given", [5, 1.5, ["a"]])
def test_what_is_no_path_is_an_error_of_the_package(given):
    for call in (traceml.load_run, traceml.runs, traceml.sync):
        with pytest.raises(ArgumentTypeError, match="must be a string or a path, not"):
            call(given)
