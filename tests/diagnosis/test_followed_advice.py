"""Advice that is followed gives the promised gain, and is not given where it would give none."""

from __future__ import annotations

import pytest

from tests.diagnosis.followed import FOLLOWED, Followed


@pytest.mark.parametrize("advice", FOLLOWED, ids=lambda advice: advice.name)
def test_what_is_followed_gives_the_promised_gain(advice: Followed) -> None:
    """The training without the cause is played through; three tenths more or less."""
    found = next(each for each in advice.before.findings() if each.kind is advice.kind)

    assert advice.says in found.next
    assert found.speedup_if_fixed > 1.05
    assert advice.before.step_ms() / advice.after.step_ms() == pytest.approx(found.speedup_if_fixed, rel=0.3)


@pytest.mark.parametrize("advice", FOLLOWED, ids=lambda advice: advice.name)
def test_what_is_followed_is_not_advised_again(advice: Followed) -> None:
    """Neither the advice nor its kind for the same part."""
    before = next(each for each in advice.before.findings() if each.kind is advice.kind)

    assert (advice.kind, before.phase) not in [
        (each.kind, each.phase) for each in advice.after.findings() if each.next == before.next
    ]


@pytest.mark.parametrize("advice", FOLLOWED, ids=lambda advice: advice.name)
def test_it_is_not_given_where_it_would_gain_nothing(advice: Followed) -> None:
    """A training that looks alike."""
    assert all(advice.says not in each.next for each in advice.refused.findings())
