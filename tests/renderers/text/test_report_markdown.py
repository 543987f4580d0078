"""Reports as Markdown."""

from __future__ import annotations

from pathlib import Path

import msgspec

from tests.diagnosis.fabricated import Job, adds
from tests.runs.fabricated_store import store_run
from traceml.renderers.text.report_markdown import report_markdown
from traceml.runs.report.report import build_report


def test_verdict_and_tables(tmp_path: Path) -> None:
    """The verdict is first; each table has a line for its columns and one for each phase and rank."""
    report = build_report(store_run(tmp_path / "a", Job(ranks=3), adds("forward", 20.0, (1,))))
    shown = report_markdown(report).splitlines()

    assert shown[0].startswith("**COMPUTE_STRAGGLER: Rank 1 is slow in forward")
    assert any(line.startswith("Next: ") for line in shown)
    assert "| phase | mean | share |" in shown
    assert {line.split(" | ")[0] for line in shown if line[2:3].isdigit()} == {"| 0", "| 1", "| 2"}
    tables = [line for line in shown if line.startswith("|")]
    (ranks,) = (line for line in tables if line.startswith("| rank |"))
    assert {line.count("|") for line in tables[tables.index(ranks) :]} == {ranks.count("|")}


def test_one_rank_has_no_table_of_ranks(tmp_path: Path) -> None:
    """It would repeat the phases."""
    assert "| rank |" not in report_markdown(build_report(store_run(tmp_path / "a", Job(ranks=1))))


def test_what_the_figures_rest_on_is_said(tmp_path: Path) -> None:
    """As on the card and the page: times that are not the device's, and ranks that sent nothing."""
    report = build_report(store_run(tmp_path / "a", Job(ranks=2)))
    assert "No data" not in report_markdown(report)

    report.steps.untimed_device, report.run.world_size = "mps", 3
    shown = report_markdown(report)

    assert "Device times: not measured on mps; phases show CPU time" in shown
    assert "No data from rank 2 (of 3)" in shown


def test_many_ranks_are_counted(tmp_path: Path) -> None:
    """A pull request is no place for a thousand lines; the slow one is among those that are shown."""
    shown = report_markdown(build_report(store_run(tmp_path / "a", Job(ranks=20), adds("forward", 20.0, (18,)))))

    assert "| 18 |" in shown
    assert "4 more ranks in the report" in shown


def test_texts_of_the_user_stay_text(tmp_path: Path) -> None:
    """A phase or an error with signs of Markdown or HTML opens no cell, link or tag."""
    report = build_report(store_run(tmp_path / "a", Job()))
    report.verdict = msgspec.structs.replace(report.verdict, summary="<img src=x> [a](http://b)")
    report.phases[0].phase = "load|<b>"
    shown = report_markdown(report)

    assert "\\<img src=x\\> \\[a\\](http://b)" in shown
    assert "load\\|\\<b\\>" in shown
    assert "<b>" not in shown
