"""Plain words for verdicts."""

from __future__ import annotations

import msgspec
import pytest

from tests.renderers.reports import finding
from traceml.renderers.words import end_of_rank, headline, ranks_text, signal_name
from traceml.runs.report_types import RankSection


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (finding("HEALTHY"), "Nothing holds this run back"),
        (
            finding("INPUT_STRAGGLER", ranks=[1], phase="input_wait", cost_share=0.846),
            "Rank 1 is slow in loading data: the others wait, 85 % of step time",
        ),
        (
            finding("STRAGGLER", ranks=[1, 3], phase="augment", cost_share=0.3),
            "Ranks 1 and 3 are slow in 'augment': the others wait, 30 % of step time",
        ),
        (finding("INPUT_BOUND", cost_share=0.4), "Training waits for data: 40 % of step time"),
        (finding("COMPUTE_BOUND", phase="backward"), "The model's own compute limits this run, most of it in backward"),
        (
            finding("RESIDUAL_HEAVY", phase="other", cost_share=0.4),
            "40 % of step time goes to code outside the known phases",
        ),
        (
            finding("RANK_LOST", ranks=[1], phase="forward", evidence={"signal": 9, "step": 37}),
            "Rank 1 ended by SIGKILL at step 37, in forward",
        ),
        (
            finding("RANK_LOST", ranks=[0], evidence={"exception": "ValueError: no\nmore"}),
            "Rank 0 ended by ValueError",
        ),
        (finding("RANK_LOST", ranks=[2], evidence={"code": 3}), "Rank 2 ended with exit status 3"),
        (finding("RANK_LOST"), "A rank ended"),
        (finding("SOME_NEW_KIND", ranks=[2], phase="comm"), "Some new kind on rank 2, in comm"),
    ],
)
def test_headline(verdict, words):
    """Each kind, also one that is not known here, has a plain sentence with rank, phase and share."""
    assert headline(verdict) == words


def test_ranks_text():
    """Ranks are listed up to four."""
    assert ranks_text([3]) == "rank 3"
    assert ranks_text([1, 3, 5]) == "ranks 1, 3 and 5"
    assert ranks_text(list(range(16))) == "ranks 0, 1, 2, 3 and 12 more"


def test_signal_name():
    """Signals have names; a number without one stays a number."""
    assert (signal_name(9), signal_name(250)) == ("SIGKILL", "signal 250")


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
    """A rank that ended well says nothing; others say how."""
    assert end_of_rank(msgspec.convert({"rank": 0, **rank}, RankSection)) == says
