"""Words for ends of ranks."""

from __future__ import annotations

import msgspec
import pytest

from traceml.renderers.words import end_of_rank
from traceml.runs.report_types import RankSection


@pytest.mark.parametrize(
    ("rank", "says"),
    [
        ({"state": "finished"}, None),
        ({"state": "running"}, None),
        ({"state": "lost"}, "lost"),
        ({"state": "failed", "exit": {"code": 3, "last_step": -1}}, "failed with exit status 3"),
        ({"state": "failed", "exit": {"code": 1, "exception": "ValueError: x\n y"}}, "failed with ValueError: x"),
    ],
)
def test_end_of_rank(rank, says):
    """Only a rank that ended badly has a text."""
    assert end_of_rank(msgspec.convert({"rank": 0, **rank}, RankSection)) == says
