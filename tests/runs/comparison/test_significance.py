"""Whether a difference of step times is more than chance."""

from __future__ import annotations

import numpy as np
import pytest

from traceml.runs.comparison.significance import ALPHA, autocorrelation_time, block_steps, difference


def _mean(blocks):
    return blocks.mean(axis=1)


def step_times(random, steps, memory, spikes=0.01):
    """Return step times around 20 ms with autocorrelated noise (`memory`) and rare long steps."""
    noise = random.standard_normal(steps + 200) * np.sqrt(1 - memory**2)
    for at in range(1, len(noise)):
        noise[at] += memory * noise[at - 1]

    times = 20 * np.exp(0.1 * noise[200:])
    return times + (random.random(steps) < spikes) * random.exponential(20, steps)


@pytest.mark.parametrize(("memory", "expected"), [(0.0, 1.0), (0.5, 3.0), (0.9, 19.0)])
def test_autocorrelation_time(memory, expected):
    """Noise that remembers a share of the step before depends on itself for (1 + share) / (1 - share) steps."""
    found = [
        autocorrelation_time(step_times(np.random.default_rng(seed), 20_000, memory, spikes=0)) for seed in range(3)
    ]

    assert np.mean(found) == pytest.approx(expected, rel=0.25)


def test_steady_times_do_not_depend_on_each_other():
    """Equal values have no autocorrelation."""
    assert autocorrelation_time(np.full(100, 3.0)) == 1.0


@pytest.mark.parametrize("memory", [0.5, 0.9])
def test_runs_that_are_alike_seldom_differ(memory):
    """Two runs of the same job differ significantly about as often as the level says: 1 % of 100."""
    random = np.random.default_rng(7)
    pairs = [(step_times(random, 1000, memory), step_times(random, 1000, memory)) for _ in range(100)]

    false_alarms = sum(bool(difference(a, b, _mean).real) for a, b in pairs)

    assert false_alarms <= 4  # at a true rate of 1 % more than 4 of 100 come once in 300 tries


def test_a_test_that_ignored_the_memory_would_be_wrong():
    """The same pairs, taken for independent draws, differ in every third case: this is why there are blocks."""
    random = np.random.default_rng(7)
    alarms = 0
    for _ in range(100):
        a, b = step_times(random, 1000, 0.9), step_times(random, 1000, 0.9)
        alarms += abs(b.mean() - a.mean()) > 2.576 * np.sqrt(a.var() / len(a) + b.var() / len(b))

    assert alarms > 25


@pytest.mark.parametrize(("memory", "percent"), [(0.0, 3), (0.5, 5), (0.9, 15)])
def test_a_real_change_is_found(memory, percent):
    """The more the noise remembers, the larger a change has to be; then it is found nearly always."""
    random = np.random.default_rng(3)
    pairs = [(step_times(random, 1000, memory), step_times(random, 1000, memory)) for _ in range(30)]

    found = [difference(a, b * (1 + percent / 100), _mean) for a, b in pairs]

    assert sum(bool(each.real) for each in found) >= 27
    assert np.mean([each.low <= percent / 100 <= each.high for each in found]) > 0.9


def test_too_few_steps_give_no_answer():
    """With fewer than sixteen independent steps there is no p-value."""
    random = np.random.default_rng(0)

    assert block_steps(random.random(10), random.random(500)) is None
    assert difference(random.random(10), random.random(500), _mean).real is None
    assert block_steps(np.linspace(1, 2, 100), np.linspace(1, 2, 100)) is None  # a trend: nothing repeats


def test_the_same_runs_give_the_same_answer():
    """The deals are the same each time, so a gate does not flicker."""
    random = np.random.default_rng(5)
    a, b = step_times(random, 300, 0.5), step_times(random, 300, 0.5) * 1.02

    assert difference(a, b, _mean) == difference(a, b, _mean)
    assert difference(a, a, _mean).p > 0.9


def test_times_without_any_noise():
    """Constant times differ or they do not."""
    same, other = np.full(100, 5.0), np.full(100, 6.0)

    assert difference(same, same, _mean).real is False
    assert difference(same, other, _mean).p < ALPHA


@pytest.mark.parametrize(("removed", "least", "most"), [(True, 0.9, 1.0), (False, 0.0, 0.1)])
def test_long_steps_at_a_distance_are_missed_where_they_are_gone(removed, least, most):
    """Workers that start anew every 50 steps take most of the time: six long steps of 320 are no chance."""
    random = np.random.default_rng(3)
    found = []
    for _ in range(20):
        times = [step_times(random, 320, 0.0) for _ in range(2)]
        for run in times[: 1 if removed else 2]:
            long = np.arange(random.integers(50), 320, 50)
            run[long] += 4000 * np.exp(0.15 * random.standard_normal(len(long)))

        found.append(bool(difference(*times, _mean).real))

    assert least <= np.mean(found) <= most
