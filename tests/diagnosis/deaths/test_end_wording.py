"""Words for the end of a rank, in short."""

from __future__ import annotations

import msgspec
import pytest

from traceml.diagnosis.deaths.end_wording import end_summary
from traceml.runs.report.report_types import RankSection


@pytest.mark.parametrize(
    ("rank", "says"),
    [
        ({"state": "finished"}, None),
        ({"state": "running"}, None),
        ({"state": "lost"}, "lost"),
        ({"state": "failed", "exit": {"code": 3, "last_step": -1}}, "failed with exit code 3"),
        ({"state": "failed", "exit": {"code": 1, "exception": "ValueError: x\n y"}}, "failed with ValueError: x"),
        ({"state": "failed", "exit": {"code": 1, "exception": "KeyboardInterrupt"}}, "stopped with KeyboardInterrupt"),
    ],
)
def test_the_end_of_a_rank_in_short(rank, says):
    """Only a rank that ended badly has a text."""
    assert end_summary(msgspec.convert({"rank": 0, **rank}, RankSection).ended) == says
