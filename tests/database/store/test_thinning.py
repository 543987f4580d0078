"""Rows that stay of an old part of a run: spread evenly, the same for all ranks, each level within the one before."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from traceml.database.schema import LINES, LOSSES
from traceml.database.store.thinning import BLOCK_STEPS, kept, sample_blocks, thinned_rows
from traceml.diagnosis.facts.numerics import LossHistory


@pytest.mark.parametrize("level", range(8))
def test_each_level_halves_and_is_part_of_the_one_before(level: int) -> None:
    """Thinning again never needs a row that is gone."""
    numbers = np.arange(100_000)
    now, before = kept(numbers, level), kept(numbers, max(level - 1, 0))
    assert not np.any(now & ~before)
    assert np.count_nonzero(now) == pytest.approx(len(numbers) / 2**level, rel=0.01)


@pytest.mark.parametrize("level", range(1, 8))
@pytest.mark.parametrize("period", [2, 4, 10, 16, 100])
def test_what_stays_is_even_and_not_in_step_with_a_period(level: int, period: int) -> None:
    """No long gap is left, and events of any period are kept in their proportion."""
    numbers = np.arange(1_000_000)
    chosen = numbers[kept(numbers, level)]
    assert np.diff(chosen).max() <= 4 * 2**level
    shares = np.bincount(chosen % period, minlength=period) / len(chosen)
    np.testing.assert_allclose(shares, 1 / period, rtol=0.25)


@pytest.mark.parametrize(("first", "last"), [(0, 63), (0, 1_000_000), (70, 9_000), (5_000_000, 5_100_000)])
@pytest.mark.parametrize("steps", [1, 640, 12_800, 10_000_000])
def test_sample_is_spread_over_the_run_and_bounded(first: int, last: int, steps: int) -> None:
    """Ranges are whole blocks within the run, in order, no more than asked for, and reach all of it."""
    ranges = sample_blocks(first, last, steps)
    sizes = [end - begin + 1 for begin, end in ranges]
    assert sum(sizes) <= max(steps, BLOCK_STEPS)
    assert sum(sizes) >= min(steps // BLOCK_STEPS * BLOCK_STEPS, last - first + 1) - 2 * BLOCK_STEPS
    assert all(begin % BLOCK_STEPS == 0 or begin == first for begin, _ in ranges)
    assert all(before[1] < after[0] - 1 for before, after in pairwise(ranges))
    if steps >= 640:
        quarters = {4 * (begin - first) // (last - first + 1) for begin, _ in ranges}
        assert quarters == {0, 1, 2, 3} or sum(sizes) == last - first + 1


def test_samples_survive_thinning() -> None:
    """A sample consists of blocks that stay at the level that leaves about as many."""
    ranges = sample_blocks(0, 1_000_000, 64 * 100)
    blocks = np.concatenate([np.arange(begin // 64, end // 64 + 1) for begin, end in ranges])
    assert len(blocks) == 100
    assert kept(blocks, 7).all()


def test_nonsensical_range_is_sampled_too() -> None:
    """A step counter that jumped far needs no memory by its distance."""
    ranges = sample_blocks(0, 2**62, 6_400)
    assert len(ranges) == 100


@pytest.mark.parametrize("bad", [slice(400, 400), slice(400, 1_000), slice(0, 1_000), slice(300, 700)])
def test_thinned_losses_tell_the_same_about_losses_that_are_not_finite(bad: slice) -> None:
    """The step since which they are not, and the last finite one, however often they are thinned."""
    rows = np.zeros(1_000, LOSSES.dtype)
    rows["t_ns"], rows["step"], rows["loss"] = np.arange(1_000) * 50_000_000, np.arange(1_000), np.arange(1_000) / 7
    rows["loss"][bad] = np.nan
    left, told = rows, []
    for level in range(6):
        left = thinned_rows("losses", left, level)
        history = LossHistory()
        history.add(0, left)
        told.append(history.first())

    assert told == told[:1] * 6
    assert len(left) < 100


def test_counts_of_lines_are_added_up() -> None:
    """Sampled lines keep their exact totals by line, phase and library, in the order of their last rows."""
    random = np.random.default_rng(3)
    rows = np.zeros(1_000, LINES.dtype)
    for name in ("phase", "line_id", "library_id"):
        rows[name] = random.integers(-1, 3, len(rows))
    rows["samples"] = random.integers(1, 50, len(rows))
    rows["t_ns"] = rows["step"] = np.arange(len(rows))

    left = thinned_rows("lines", rows, 3)
    assert len(left) == 4**3
    assert (np.diff(left["t_ns"]) > 0).all()
    for each in left:
        same = np.all([rows[name] == each[name] for name in ("phase", "line_id", "library_id")], axis=0)
        assert each["samples"] == rows["samples"][same].sum()
        assert each["t_ns"] == rows["t_ns"][same].max()

    assert thinned_rows("lines", left, 4).tolist() == left.tolist()
