"""The run that others are compared with."""

from __future__ import annotations

import pytest

from tests.diagnosis.fabricated import Job, adds
from tests.runs.fabricated_store import STARTED, store_run
from traceml.errors import RunNotFoundError
from traceml.run_folder import STORE_NAME
from traceml.runs.baseline import find_baseline, find_compared
from traceml.runs.find import describe_run
from traceml.runs.report.report import build_report, save_report
from traceml.runs.run_labels import RunLabels, write_labels


@pytest.fixture
def runs(tmp_path):
    """A healthy run, a later slow one, one of another project, and the newest."""
    facts = [{}, {}, {"project": "other"}, {"name": "night"}]
    faults = [[], [adds("forward", 9, (1,))], [], []]
    made = []
    for number, (changed, fault) in enumerate(zip(facts, faults, strict=True)):
        times = {"started": STARTED + 100 * number, "ended": STARTED + 100 * number + 10}
        folder = store_run(tmp_path / f"run-{number}", Job(steps=100), *fault, facts={**times, **changed}, seed=number)
        save_report(folder, build_report(folder))
        made.append(folder)

    return made


def test_the_last_healthy_run_of_the_project(runs, tmp_path):
    """Neither one with a warning, nor one of another project, nor the run itself."""
    assert describe_run(runs[1]).severity in ("warning", "critical")
    assert find_baseline("last-healthy", [runs[3]], tmp_path) == runs[0]


def test_without_a_healthy_run_there_is_no_baseline(runs, tmp_path):
    """The error says how many runs there are, and what to do."""
    with pytest.raises(RunNotFoundError, match=r"of 0 earlier runs of project 'other'.*--baseline RUN"):
        find_baseline("last-healthy", [runs[2]], tmp_path)
    with pytest.raises(RunNotFoundError, match="of 0 earlier runs"):
        find_baseline("last-healthy", [runs[0]], tmp_path)  # later ones are no baseline of it
    wide = store_run(tmp_path / "wide", Job(ranks=4, steps=40), facts={"started": STARTED + 900})
    with pytest.raises(RunNotFoundError, match="with as many ranks"):
        find_baseline("last-healthy", [wide], tmp_path)
    with pytest.raises(RunNotFoundError, match="several projects: default, other"):
        find_baseline("last-healthy", [runs[1], runs[2]], tmp_path)


def test_a_tag_a_name_or_a_run(runs, tmp_path):
    """The newest run with the tag, else with the name; ids are runs."""
    write_labels(runs[0], RunLabels(tags=["baseline"]))
    write_labels(runs[1], RunLabels(tags=["baseline"]))

    assert find_baseline("baseline", [runs[3]], tmp_path) == runs[1]
    assert find_baseline("night", [runs[0]], tmp_path) == runs[3]
    assert find_baseline("run-2", [runs[3]], tmp_path) == runs[2]
    with pytest.raises(RunNotFoundError, match=r"no baseline 'nobody'.*No other run has this tag or name"):
        find_baseline("nobody", [runs[3]], tmp_path)


def test_reports_without_runs(runs, tmp_path):
    """A report of which the store is gone is found as a file and as a folder, and counts as healthy."""
    (runs[0] / STORE_NAME).unlink()

    assert find_compared(str(runs[0] / "report.json"), tmp_path) == runs[0] / "report.json"
    assert find_compared(str(runs[1] / "report.json"), tmp_path) == runs[1]
    assert describe_run(runs[0]).state == "finished"
    assert find_baseline("last-healthy", [runs[3]], tmp_path) == runs[0]
    assert find_baseline("last-healthy", [runs[3] / "report.json"], tmp_path) == runs[0]
