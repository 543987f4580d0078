"""Words for the end of a rank, in short."""

from __future__ import annotations

import msgspec
import pytest

from traceml.diagnosis.deaths.end_wording import end_summary, end_text, step_text, whereabouts
from traceml.diagnosis.facts.ends import RankExit
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


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"signal": 15, "stopped": True}, "ended with ValueError: no at a.py:3 main"),
        ({"signal": 11}, "was killed by signal 11 (SIGSEGV)"),
        ({"signal": 11, "exception": None}, "was killed by signal 11 (SIGSEGV) in C code called at a.py:3 main"),
    ],
)
def test_the_place_of_an_exception_is_not_that_of_the_signal(more: dict[str, object], says: str) -> None:
    """Its launcher ends a rank that is failing, and one that has failed may crash at its end."""
    known = {"exception": "ValueError: no", "file": "a.py", "line": 3, "function": "main", "stack": "…"}

    assert end_text(RankExit(**{"rank": 0, "state": "killed", **known, **more}), None, many=False) == says


def test_steps_have_the_separators_of_the_headline() -> None:
    """Else the number of a training that has resumed would not be found in the summary."""
    assert step_text(RankExit(rank=0, state="failed", last_step=1959, open_step=1960)) == ", in step 1,960"


def test_ranks_that_were_elsewhere_are_counted_beyond_three() -> None:
    """Three places are listed."""
    exits = [RankExit(rank=rank, state="killed", open_phase="forward") for rank in range(5)]

    assert whereabouts(exits[:3]).endswith("rank 2 was in forward")
    assert whereabouts(exits).endswith("rank 2 was in forward, 2 more are not listed")
