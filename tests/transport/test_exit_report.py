"""Exit reports on the wire, and on the page that describes it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from traceml.transport.exit_report import ExitReport


def test_a_report_is_sent_without_what_is_not_known() -> None:
    """An unknown value is no key; what is known comes back as it was."""
    report = ExitReport(rank=3, pid=7, exitcode=-9, oom="host", stopped=True)

    assert report.to_message() == {"rank": 3, "pid": 7, "exitcode": -9, "oom": "host", "stopped": True}
    assert ExitReport.from_message(report.to_message()) == report
    assert ExitReport.from_message({"rank": 3, "exitcode": 0, "time": None, "new": 1}) == ExitReport(rank=3, exitcode=0)


@pytest.mark.parametrize("message", [None, [], {"rank": 0, "exitcode": "x"}, {"exitcode": True}, {"oom": "elsewhere"}])
def test_a_report_of_wrong_types_is_ignored(message: object) -> None:
    """The command takes the others."""
    assert ExitReport.from_message(message) is None


def test_the_page_of_the_protocol_has_all_keys() -> None:
    """Other launchers find there what the aggregator reads."""
    page = (Path(__file__).parents[2] / "docs" / "wire.md").read_text()
    rows = page.partition("### Exit reports")[2].partition("\n## ")[0].splitlines()

    keys = [key for row in rows if row.startswith("| `") for key in re.findall(r"`(\w+)`", row.split("|")[1])]

    assert sorted(keys) == sorted(ExitReport.__struct_fields__)
