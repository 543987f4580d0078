"""The typed report: what is written is read back, and damage is an error."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import pytest

from tests.renderers.reports import REPORTS, slow_rank
from traceml.cli.assistants.json_documents import document_schema
from traceml.errors import StoreError
from traceml.runs.json_document import read_keys
from traceml.runs.report.report_types import Report, ReportSummary, read_report

SCHEMA_FILE = Path(__file__).parents[3] / "docs" / "schemas" / "report-1.json"


@pytest.mark.parametrize("name", REPORTS)
def test_a_written_report_is_read_back(tmp_path, name):
    """Reading loses nothing."""
    made = REPORTS[name]()
    path = tmp_path / "report.json"
    path.write_text(made.to_json())

    assert read_report(path) == made
    summary = read_keys(path, ReportSummary)
    assert summary is not None
    assert (summary.verdict, summary.steps) == (made.verdict, made.steps)
    assert read_report(path).to_json() == path.read_text()


def test_unknown_keys_and_kinds_are_accepted(tmp_path):
    """A newer traceml may add keys and kinds of finding."""
    data = slow_rank().to_dict()
    data["verdict"] |= {"kind": "SOME_NEW_KIND", "more": 1}
    data["time"] = {"wall_s": 1.0}

    assert msgspec.convert(data, Report).verdict.kind == "SOME_NEW_KIND"


def test_keys_of_later_versions_may_be_absent():
    """A report of an older version has fewer keys."""
    data = slow_rank().to_dict()
    for key in ("hidden_metrics", "trackers", "system", "telemetry"):
        del data[key]

    assert msgspec.convert(data, Report).trackers == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": ', r"report\.json is not a report: Input data was truncated"),
        ("[]", r"Expected `object`, got `array`"),
        ('{"schema": "traceml.report/2"}', r"has the schema 'traceml.report/2', this traceml reads"),
        ('{"schema": "other/1"}', r"Invalid enum value 'other/1' - at `\$\.schema`"),
        ('{"schema": "traceml.report/1"}', r"missing required field `run`"),
        (b'{"schema": "traceml.report/1", "x": "\xff"}', r"report\.json is not a report: "),
    ],
)
def test_a_damaged_report_names_file_and_key(tmp_path, text, message):
    """The error says which file, and what is wrong with it."""
    path = tmp_path / "report.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())

    with pytest.raises(StoreError, match=message):
        read_report(path)
    assert read_keys(path, ReportSummary) is None


def test_the_schema_in_the_docs_is_the_types():
    """After a change on purpose: `UPDATE_SNAPSHOTS=1 pytest tests/runs/report/test_report_types.py`."""
    if os.environ.get("UPDATE_SNAPSHOTS"):
        SCHEMA_FILE.write_text(json.dumps(document_schema("report"), indent=2) + "\n")

    assert json.loads(SCHEMA_FILE.read_text()) == json.loads(json.dumps(document_schema("report")))
