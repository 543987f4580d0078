"""An evaluation that runs for some seconds is reported while it runs."""

from __future__ import annotations

import pytest

from traceml.database.info_kinds import InfoKind
from traceml.recorder.no_progress import long_evaluation
from traceml.recorder.no_progress.long_evaluation import LongEvaluation

S = 10**9


@pytest.mark.parametrize(
    ("evaluating", "reported"),
    [
        ([True] * 5, []),
        ([True] * 20, [5]),
        ([True] * 4 + [False] + [True] * 4, []),
        ([True] * 8 + [False] + [True] * 8, [5, 14]),
    ],
)
def test_a_long_evaluation_is_reported_once(
    monkeypatch: pytest.MonkeyPatch, evaluating: list[bool], reported: list[int]
) -> None:
    """Once five seconds have passed in it, with the time of its begin: its row may end before that was noticed."""
    times: list[tuple[InfoKind, int, int]] = []
    now = 0
    watch = LongEvaluation(lambda kind, *, since_ns: times.append((kind, now, since_ns // S - 100)))
    for now, is_evaluating in enumerate(evaluating):
        monkeypatch.setattr(long_evaluation, "monotonic_ns", lambda: 100 * S + now * S)  # noqa: B023 - called at once
        watch(is_evaluating=is_evaluating)

    assert times == [(InfoKind.EVALUATING, at, at - 5) for at in reported]
