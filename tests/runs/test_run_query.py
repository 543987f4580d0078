"""Conditions and order of a list of runs."""

from __future__ import annotations

import json

import pytest

from tests.diagnosis.fabricated import Job
from tests.runs.fabricated_store import STARTED, store_run
from traceml.errors import UsageError
from traceml.runs.find import list_runs
from traceml.runs.report.report import build_report, save_report
from traceml.runs.report.report_types import MetricSection
from traceml.runs.run_labels import RunLabels, write_labels
from traceml.runs.run_query import RunFields, select_runs, sort_runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs: with lr 0.1 and 0.01, and one without a report."""
    folder = tmp_path_factory.mktemp("runs")
    for number, (name, lr, state) in enumerate(
        (("a", 0.1, "finished"), ("b", 0.01, "failed"), ("c", None, "finished"))
    ):
        facts = {"started": STARTED + number, "state": state, "name": name}
        run = store_run(folder / f"run-{name}", Job(steps=40), facts=facts)
        if lr is not None:
            report = build_report(run)
            report.setup.params = {"lr": lr, "opt": "Adam W", "size_bytes": 5, "betas": "(0.9, 0.999)"}
            report.metrics = {"loss": MetricSection(last=10 * lr)}
            save_report(run, report)

    write_labels(folder / "run-b", RunLabels(tags=["baseline", "night"], note="slow disk"))
    return [RunFields(info) for info in list_runs(folder)]


@pytest.mark.parametrize(
    ("conditions", "found"),
    [
        ("lr<0.1", "b"),
        ("lr<=0.1 tag:baseline", "b"),
        ("lr=0.10", "a"),
        ("lr==0.1 state==finished", "a"),
        ("lr!=0.1", "cb"),
        ("loss>0.5", "a"),
        ("state=failed", "b"),
        ("state=FINISHED", "ca"),
        ("!tag:baseline", "ca"),
        ("tags=Night", "b"),
        ("tags!=baseline", "ca"),
        ("tags=", "ca"),
        ("opt~adam", "ba"),
        ("opt='Adam W'", "ba"),
        ("note~disk", "b"),
        ("started>1970-01-02", "cba"),
        ("started<1970-01-02T12:30", ""),
        ("base", "b"),
        ("run-", "cba"),
        ("steps>=40, ranks=2, name=a", "a"),
        ("betas='(0.9, 0.999)' name=b", "b"),
        ("note='full,  disk'", ""),
        ("steps>=40 and ranks=2 AND name=a", "a"),
        ("", "cba"),
    ],
)
def test_conditions(runs, conditions, found):
    """Numbers are compared as numbers, all terms must hold, and a run without the value meets only `!=`."""
    assert "".join(run.info.name for run in select_runs(runs, conditions)) == found


@pytest.mark.parametrize(
    ("conditions", "what"),
    [
        ("rl<1", "no run has .* 'rl'"),
        ("steps<", "^condition steps< has no value"),
        ("==", "no name before =="),
        ("ranks>x", "compares numbers with 'x'"),
        ("a='b", "No closing quotation"),
        ("steps>1 OR name=a", "a run must meet all conditions; there is no OR"),
        ("a or b", "there is no OR"),
    ],
)
def test_conditions_that_cannot_be_understood(runs, conditions, what):
    """A misspelt name is an error, not an empty list. It has no option in it: the page and `mcp` show it, too."""
    with pytest.raises(UsageError, match=what):
        select_runs(runs, conditions)


def test_a_name_that_earlier_terms_left_out_is_known(runs):
    """The first term leaves only a run without `lr`: the second is still a condition."""
    assert select_runs(runs, "name=c lr<1") == []


def test_names_in_json_are_fields_unless_logged(runs):
    """A script's own `size_bytes` is what it logged."""
    assert [run.value("world_size") for run in runs] == [run.value("ranks") for run in runs] == [2, 2, 2]
    assert select_runs(runs, "duration_s>=0") == runs
    assert [run.value("size_bytes") for run in runs] == [runs[0].value("size"), 5, 5]


def test_order(runs):
    """By value, those without one last, either way."""
    assert [run.info.name for run in sort_runs(runs, "lr")] == ["b", "a", "c"]
    assert [run.info.name for run in sort_runs(runs, "lr", reverse=True)] == ["a", "b", "c"]
    assert [run.info.name for run in sort_runs(runs, "name")] == ["a", "b", "c"]
    with pytest.raises(UsageError, match="no run has"):
        sort_runs(runs, "rl")


def test_record_has_the_columns(runs):
    """Facts of the list, and values by name."""
    record = runs[1].record(["lr", "loss"])

    assert (record.id, record.tags, record.values) == ("run-b", ["baseline", "night"], {"lr": 0.01, "loss": 0.1})
    assert json.loads((runs[1].info.path / "report.json").read_text())["steps"]["mean_ms"] == record.step_ms
