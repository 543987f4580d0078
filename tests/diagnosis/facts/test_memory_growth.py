"""Curves that grow, and those that only look so."""

from __future__ import annotations

import numpy as np
import pytest

from traceml.diagnosis.facts.memory_growth import MAX_POINTS, MemoryCurve

MB = 1 << 20


def curve(values, *, steps_each: int = 20, seconds_each: float = 0.5, parts: int = 5) -> MemoryCurve:
    """Return the curve of samples that arrive in some parts."""
    found = MemoryCurve()
    numbers = np.arange(len(values))
    for part in np.array_split(numbers, parts):
        found.add(part * steps_each, (part * seconds_each * 1e9).astype(np.int64), np.asarray(values)[part])

    return found


def noise(count: int, size: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, size, count)


COPYING = np.random.default_rng(3).random(900) < 0.5  # a longer array takes the place of the one before
STEADY = {
    "4 MB in each step": 500 * MB + np.arange(60) * 80 * MB,
    "noise, and peaks of evaluation": 500 * MB + np.arange(200) * 2 * MB + abs(noise(200, 0.5 * MB))
    + np.where(np.arange(200) % 17 == 0, 300 * MB, 0),
    "slow, over many samples": 800 * MB + np.arange(4000) * 0.05 * MB + abs(noise(4000, 0.2 * MB)),
    "in jumps, each tenth sample": 500 * MB + np.arange(300) // 10 * 8 * MB,
    "in 14 epochs": 500 * MB + np.arange(300) // 20 * 8 * MB,
    "in 17 epochs": 500 * MB + np.arange(300) * 17 // 300 * 8 * MB,
    "in 14 epochs, while pages come and go": 500 * MB + np.arange(300) // 20 * 8 * MB + noise(300, 0.02 * MB),
    "by copies, of which there is one at a time": 500 * MB + np.arange(120) * 3 * MB * (1 + COPYING[:120]),
    "by copies, over many samples": 500 * MB + np.arange(900) * 0.4 * MB * (1 + COPYING),
}  # fmt: skip
LEVEL = {
    "level": np.full(100, 500 * MB),
    "noise": 500 * MB + noise(300, 20 * MB),
    "peaks of evaluation, each larger": 500 * MB
    + np.where(np.arange(200) % 20 == 0, np.arange(200) * 10 * MB, 0),
    "an allocator's cache that fills": 500 * MB + 400 * MB * (1 - np.exp(-np.arange(200) / 20)),
    "a cache that fills ever more slowly": 2000 * MB - 1500 * MB * np.exp(-np.arange(300) / 100) + noise(300, MB / 2),
    "a cache that filled in the first half": 500 * MB + np.minimum(np.arange(200), 100) * 4 * MB,
    "a cache that has filled lately": 500 * MB + np.minimum(np.arange(200), 160) * 4 * MB + noise(200, 0.5 * MB),
    "a saw: the collector frees": 500 * MB + np.arange(300) % 40 * 10 * MB,
    "less than counts": 500 * MB + np.arange(100) * 0.2 * MB,
    "a jump in each quarter": 500 * MB + np.arange(200) // 40 * 100 * MB,
    "six jumps": 500 * MB + np.arange(240) // 30 * 50 * MB,
    "copies of what stays as large": 500 * MB + 200 * MB * COPYING[:300],
    "copies of what is dropped in each epoch": 500 * MB + np.arange(240) % 60 * 5 * MB * (1 + COPYING[:240]),
    "one jump": 500 * MB + (np.arange(100) > 50) * 500 * MB,
    "too few samples": 500 * MB + np.arange(8) * 80 * MB,
    "an epoch's lists, freed at its end": 500 * MB + np.arange(240) % 60 * 5 * MB,
    "those of two long epochs": 500 * MB + np.arange(240) % 125 * 5 * MB,
    "a late cache that has filled": 500 * MB + np.clip(np.arange(300) - 150, 0, 60) * 4 * MB,
    "a late jump": 500 * MB + (np.arange(300) > 250) * 200 * MB + noise(300, 0.5 * MB),
    "late jumps in each evaluation": 500 * MB + np.maximum(np.arange(300) - 200, 0) // 25 * 60 * MB,
}  # fmt: skip


@pytest.mark.parametrize("name", STEADY)
def test_steady_growth_is_found(name):
    """Also with noise, with peaks, and thinned to few samples."""
    growth = curve(STEADY[name]).growth()

    assert growth is not None
    assert growth.steady
    floor = np.minimum.accumulate(STEADY[name][::-1])[::-1]
    per_sample = np.polyfit(np.arange(len(floor)), floor, 1)[0]
    assert growth.bytes_per_step == pytest.approx(per_sample / 20, rel=0.2)
    assert growth.bytes_per_s == pytest.approx(per_sample / 0.5, rel=0.2)


@pytest.mark.parametrize("begins", [0, 130, 200])
def test_a_leak_is_found_with_the_step_at_which_it_begins(begins):
    """Over the whole run a late one does not rise in each quarter; the step does not depend on what was looked at."""
    found = curve(500 * MB + np.maximum(np.arange(300) - begins, 0) * 4 * MB + noise(300, 0.5 * MB))
    growth = found.growth()

    assert growth is not None
    assert growth.steady
    assert growth.bytes_per_step == pytest.approx(4 * MB / 20, rel=0.1)
    whole = found.since_it_began(growth)
    assert abs(whole.since_step - max(20 * begins, 20)) <= 20 * 8  # of samples that stand for four each
    assert whole.grown_bytes == pytest.approx((299 - begins) * 4 * MB, rel=0.1)


@pytest.mark.parametrize("name", LEVEL)
def test_look_alikes_are_not_steady(name):
    """Caches that fill, peaks that pass, what the collector frees, and growth too small to count."""
    growth = curve(LEVEL[name]).growth()

    assert growth is None or not growth.steady


def test_jumps_at_any_time_are_not_steady():
    """Twelve of any size in each of 100 runs: stairs come evenly."""
    random = np.random.default_rng(1)
    for _ in range(100):
        at, sizes = random.integers(0, 240, 12), random.exponential(40 * MB, 12)
        growth = curve(500 * MB + (np.arange(240)[:, None] >= at) @ sizes).growth()

        assert growth is None or not growth.steady


def test_what_is_dropped_after_the_last_step_does_not_hide_growth():
    """At its end a script drops what it held: the newest samples are lower, at the same step."""
    found = curve(500 * MB + np.arange(60) * 8 * MB)
    found.add(np.array([1181, 1181, 1181]), np.array([30, 31, 32]) * 10**9, np.array([980, 600, 480]) * MB)

    growth = found.growth()
    assert growth is not None
    assert growth.steady


def test_growth_over_few_steps_is_not_steady():
    """The history of an optimizer fills in that many; slow steps are few in the same time."""
    values = 500 * MB + np.arange(40) * 4 * MB
    quick, slow = (curve(values, steps_each=1, seconds_each=each).growth() for each in (0.2, 2.0))

    assert quick is not None
    assert not quick.steady
    assert slow is not None
    assert slow.steady


def test_growth_that_ends_is_withdrawn():
    """While a cache fills it looks like a leak; when it is full, it no longer does."""
    values = 500 * MB + np.minimum(np.arange(300), 100) * 4 * MB

    assert curve(values[:90]).growth().steady
    assert not curve(values[:180]).growth().steady


def test_few_samples_are_kept_of_a_long_run():
    """They cover the run evenly."""
    found = curve(np.arange(100_000) * MB, parts=1000)

    assert MAX_POINTS // 2 <= len(found.points) <= MAX_POINTS + 1
    assert found.points[0, 0] == 0
    assert np.ptp(np.diff(found.points[:-1, 0])) <= np.median(np.diff(found.points[:, 0]))


def test_another_process_of_the_rank_begins_anew():
    """Steps that count from 0 again belong to a restarted rank."""
    found = curve(np.full(100, 900 * MB))
    found.add(np.arange(5), np.arange(5), np.full(5, MB))

    assert found.points[:, 2].tolist() == [MB] * 5


def test_samples_before_the_first_step_do_not_count():
    """Start-up is no training."""
    found = MemoryCurve()
    found.add(np.array([-1, -1, 0]), np.arange(3), np.array([1, 2, 3]))

    assert found.points.tolist() == [[0, 2, 3]]
