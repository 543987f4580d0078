"""Steps in a bounded number of bins."""

from __future__ import annotations

import numpy as np
import pytest

from tests.diagnosis.fabricated import Job, adds, window_of
from traceml.diagnosis.steps.aligned_steps import AlignedSteps
from traceml.diagnosis.steps.step_split import PHASES
from traceml.runs.rows.bins import StepBins


def _window(total_ms, first=0, ranks=1):
    total = np.broadcast_to(np.asarray(total_ms, float) * 1e6, (ranks, len(total_ms)))
    times = {phase: np.zeros_like(total) for phase in PHASES} | {"forward": total}
    own = np.full_like(total, np.nan)
    steps = np.arange(first, first + len(total_ms))
    return AlignedSteps(ranks=np.arange(ranks), steps=steps, times=times, total=total, backward_own=own)


def _taken(window):
    bins = StepBins()
    bins.take(window)
    return bins


def test_percentiles_are_right_to_one_percent():
    """Percentiles of the histogram are those of the values, from microseconds to minutes."""
    random = np.random.default_rng(0)
    for scale_ms in (0.02, 5.0, 60_000.0):
        times = scale_ms * random.lognormal(0, 0.5, 200)
        bins = _taken(_window(times))

        found = [values[0] / 1e6 for values in bins.percentiles_ns((0.5, 0.95, 0.99), joined=256)]

        assert found == pytest.approx(np.quantile(times, (0.5, 0.95, 0.99), method="inverted_cdf"), rel=0.011)
        assert bins.longest_ns(256)[0] / 1e6 == pytest.approx(times.max())


def test_a_long_run_is_covered_from_its_first_step():
    """Ten thousand steps fit, in order, and none is counted twice or left out."""
    bins = StepBins()
    for first in range(0, 10_000, 1_000):
        assert bins.take(_window(np.full(1_000, 1.0 + first / 1_000), first))

    steps, longest = bins.steps(1), bins.longest_ns(1) / 1e6
    assert bins.used <= bins.bins
    assert steps[0] == 0
    assert steps[-1] + bins.width > 9_999
    assert bins.counts(1).sum() == 10_000
    assert longest == pytest.approx(1.0 + np.minimum(steps + bins.width - 1, 9_999) // 1_000)


def test_the_same_steps_are_taken_once():
    """A window that overlaps earlier ones adds only its new steps."""
    bins = _taken(_window(np.ones(100)))

    assert bins.take(_window(np.ones(100))) is False
    assert bins.take(_window(np.ones(100), first=50)) is True
    assert bins.counts(1).sum() == 150


def test_parts_add_up_to_the_step_with_waiting_taken_out_of_backward():
    """As in the report, backward is own work, and the waiting in it counts as communication."""
    window = window_of(Job(steps=400, callback_every=4), adds("forward", 20, (1,)))
    bins = _taken(window)

    phases = bins.phases_ns(256)
    work = bins.work_ns(256)[:, 0] / 1e6

    assert sum(values[0] for values in phases.values()) == pytest.approx(window.total.mean(), rel=0.001)
    assert phases["comm"][0] / 1e6 == pytest.approx(11, rel=0.15)
    assert work[1] - work[0] == pytest.approx(20, rel=0.05)


def test_a_rank_that_comes_later_has_no_work_before():
    """Where a rank has no rows its work is unknown, which is not zero."""
    bins = _taken(_window(np.ones(10)))
    bins.take(_window(np.ones(10), first=10, ranks=2))

    work = bins.work_ns(10)

    assert np.isnan(work[1, 0])
    assert work[1, 1] == pytest.approx(1e6)


def test_nothing_was_taken():
    """Without steps there are empty answers, and no errors."""
    bins = StepBins()

    assert bins.used == 0
    assert len(bins.steps(1)) == 0
    assert [len(values) for values in bins.percentiles_ns((0.5,), 1)] == [0]
    assert bins.phases_ns(1) == {}
    assert bins.work_ns(1).shape == (0, 0)
