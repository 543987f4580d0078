"""Words for ends of ranks."""

from __future__ import annotations

import msgspec
import pytest

from traceml.renderers.words import end_of_rank, restarts_text
from traceml.runs.report.report_types import RankSection, RestartSection


@pytest.mark.parametrize(
    ("rank", "says"),
    [
        ({"state": "finished"}, None),
        ({"state": "running"}, None),
        ({"state": "lost"}, "lost"),
        ({"state": "failed", "exit": {"code": 3, "last_step": -1}}, "failed with exit code 3"),
        ({"state": "failed", "exit": {"code": 1, "exception": "ValueError: x\n y"}}, "failed with ValueError: x"),
    ],
)
def test_end_of_rank(rank, says):
    """Only a rank that ended badly has a text."""
    assert end_of_rank(msgspec.convert({"rank": 0, **rank}, RankSection)) == says


@pytest.mark.parametrize(
    ("restarts", "text"),
    [
        ([(30, 12.0)], "Restarted once: rank 1, RuntimeError at step 30 (lost 12 s)"),
        ([(None, None)], "Restarted once: rank 1, RuntimeError before the first step"),
        (
            [(1, 1.0), (2000, 2.0)],
            (
                "Restarted twice: rank 1, RuntimeError at step 1 (lost 1.0 s); "
                "rank 1, RuntimeError at step 2,000 (lost 2.0 s)"
            ),
        ),
        (
            [(1, None), (2, None), (3, None), (4, None)],
            (
                "Restarted 4 times: last rank 1, RuntimeError at step 2; rank 1, RuntimeError at step 3; "
                "rank 1, RuntimeError at step 4"
            ),
        ),
    ],
)
def test_restarts_in_words(restarts, text):
    """The newest three are told, each with rank, reason, step and time."""
    sections = [
        RestartSection(attempt=number, ranks=[1], reason="RuntimeError", step=step, lost_s=lost)
        for number, (step, lost) in enumerate(restarts)
    ]
    assert restarts_text(sections) == text
