"""Resident memory at the end of a rank: the last sample, the peak, and steady growth up to the end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from traceml.diagnosis.facts.memory_growth import EndMemory, MemoryTail

MIB = 1 << 20


def at_end(sizes_mib: Sequence[float], *, before: int = 0, trained: bool = False) -> EndMemory | None:
    """One sample a second; the first `before` of them before the first step."""
    tail = MemoryTail()
    seconds = np.arange(len(sizes_mib))
    for second, size in zip(seconds.tolist(), sizes_mib, strict=True):
        row = np.array([second * 10**9]), np.array([int(size * MIB)])
        tail.add(*row, np.array([second >= before]))

    return tail.at_end(trained=trained)


def test_growth_is_reported_per_minute() -> None:
    """10 MiB a second are 600 a minute."""
    end = at_end([100 + 10 * second for second in range(30)])

    assert end == EndMemory(390 * MIB, 390 * MIB, 600 * MIB)


def test_growth_may_have_begun_late() -> None:
    """A flat minute, and then a leak."""
    end = at_end([100] * 40 + [100 + 50 * second for second in range(12)])

    assert end is not None
    assert end.per_minute_bytes == pytest.approx(3000 * MIB, rel=0.2)


@pytest.mark.parametrize("sizes", [[100] * 30, [100] * 29 + [900], [500] * 10 + [300] * 10, [100, 900]])
def test_a_jump_and_a_flat_line_have_no_rate(sizes: list[float]) -> None:
    """Nothing grew steadily."""
    end = at_end(sizes)

    assert end is not None
    assert end.per_minute_bytes is None


def test_loading_before_the_first_step_is_no_growth() -> None:
    """Imports and data sets fill memory once."""
    end = at_end([50 * second for second in range(10)] + [500, 500, 501], before=10)

    assert end is not None
    assert (end.per_minute_bytes or 0) < 40 * MIB
    assert end.peak_bytes == 501 * MIB


def test_a_death_while_loading_tells_that_growth() -> None:
    """There is no other."""
    end = at_end([50 * second for second in range(10)], before=99)

    assert end is not None
    assert end.per_minute_bytes == 3000 * MIB


def test_a_training_too_short_for_a_sample_has_not_grown_by_what_was_loaded_before() -> None:
    """41 steps in 30 ms."""
    end = at_end([50 * second for second in range(10)], before=99, trained=True)

    assert end == EndMemory(450 * MIB, 450 * MIB, None)
