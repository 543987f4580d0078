"""Which steps of a long run are read."""

from __future__ import annotations

import numpy as np
import pytest

from tests.diagnosis.fabricated import Job
from tests.runs.fabricated_store import store_run
from traceml.database.schema import STEPS
from traceml.database.store.reader import StoreReader
from traceml.run_folder import STORE_NAME
from traceml.runs.rows import step_ranges as module
from traceml.runs.rows.step_ranges import spread_ranges, step_ranges


def of(ranges):
    """Return all steps, which are ascending and distinct."""
    steps = np.concatenate([np.arange(first, last + 1) for first, last in ranges])
    assert (np.diff(steps) > 0).all()
    return steps


@pytest.mark.parametrize("first", [0, 900_001])
@pytest.mark.parametrize(
    ("steps", "places", "reach"),
    [(640, None, 0), (10_000, None, 0), (640, 6, 2000), (1000, 9, 2000), (20_000, 150, 5000)],
)
def test_ranges_are_spread_evenly_over_the_run(first, steps, places, reach):
    """Each tenth of a run of 100,000 steps has its share of them; the bound is kept."""
    found = of(spread_ranges(first, first + 99_999, steps, places, reach))

    assert 0.5 * steps <= len(found) <= steps
    assert found[0] >= first
    assert found[-1] < first + 100_000
    parts = np.bincount((found - first) * 3 // 100_000, minlength=3) / len(found)
    assert parts.tolist() == pytest.approx([1 / 3] * 3, abs=0.12)


def test_few_rows_are_taken_from_many_places():
    """Of few steps parts of blocks are read; steps in them are consecutive."""
    ranges = spread_ranges(0, 99_999, 512)

    assert len(ranges) == 32
    assert {last - first + 1 for first, last in ranges} == {16}


def test_places_are_few_where_reading_takes_long(tmp_path, monkeypatch):
    """The number of places is what can be read in time; the steps of a place are near each other, in few frames."""
    folder = store_run(tmp_path / "run", Job(steps=6400))
    with StoreReader(folder / STORE_NAME) as reader:
        usual = step_ranges(reader, [STEPS], 2, 0, 6399, 1280)
        monkeypatch.setattr(module, "_FRAME_S", 1.0)
        slow = step_ranges(reader, [STEPS], 2, 0, 6399, 1280)

    assert len(usual) == 32
    assert {first // 1600 for first, _ in slow} == {0, 1, 2, 3}
    assert max(last % 1600 for _, last in slow) < 900
    assert len(of(usual)) == 640
    assert 0.75 * 640 < len(of(slow)) <= 640
