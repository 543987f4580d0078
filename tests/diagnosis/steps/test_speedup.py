"""The gain of what a finding promises."""

from __future__ import annotations

import pytest

from traceml.diagnosis.steps.speedup import speedup, speedup_of_share


@pytest.mark.parametrize(("share", "gain"), [(0.5, 2.0), (0.9, 10.0), (0.0, 1.0)])
def test_a_share_and_its_time_have_one_gain(share: float, gain: float) -> None:
    assert speedup_of_share(share) == pytest.approx(gain)
    assert speedup(2e6, share * 2e6) == pytest.approx(gain)


def test_no_gain_is_below_one_or_without_bound() -> None:
    """A share is an estimate: it may be below 0, or all of the time."""
    assert speedup_of_share(-0.1) == speedup(2e6, -1e5) == 1.0
    assert speedup_of_share(1.5) == speedup_of_share(1.0) == pytest.approx(100.0)
