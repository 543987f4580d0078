"""Steps that count, and those that an attempt repeats."""

from __future__ import annotations

import numpy as np
import pytest

from traceml.database.schema import STEPS
from traceml.database.store.summaries import sum_rows
from traceml.diagnosis.facts.run_time import useful_time

S = 10**9


def steps(count: int, first: int = 0) -> np.ndarray:
    """Bins of steps of one second, of which 0.1 s wait for data and 0.1 s save."""
    rows = np.zeros(count, STEPS.dtype)
    rows["step"], rows["total_ns"] = first + np.arange(count), S
    rows["input_wait_ns"] = rows["checkpoint_ns"] = S // 10
    rows["t_end_ns"] = (1 + np.arange(count)) * S
    (sums,) = sum_rows(STEPS.name, rows if count else np.zeros(1, STEPS.dtype)).values()
    return sums.bins if count else sums.bins[:0]


@pytest.mark.parametrize(
    ("attempts", "expected"),
    [
        ([(steps(30), 0, 0)], (24.0, 30, 0.0, 0)),
        ([(steps(30), 0, 0), (steps(30), 0, 0)], (24.0, 30, 30.0, 30)),
        ([(steps(30), 0, 0), (steps(40), 20, 0)], (48.0, 60, 10.0, 10)),
        ([(steps(30), 0, 0), (steps(40, 20), 20, 0)], (48.0, 60, 10.0, 10)),  # it counts on by itself
        ([(steps(30), 0, 0), (steps(0), 20, 0), (steps(40), 30, 0)], (56.0, 70, 0.0, 0)),
        ([(steps(30), 0, 4 * S), (steps(40, 29), 29, 0)], (52.0, 69, 0.0, 0)),  # step 29 failed, and was made again
        ([], (0.0, 0, 0.0, 0)),
    ],
)
def test_each_step_counts_once(attempts: list[tuple[np.ndarray, int, int]], expected: tuple[float, ...]) -> None:
    """Starting over repeats all, a checkpoint those after it."""
    found = useful_time(attempts)

    assert (found.productive_s, found.productive_steps, found.repeated_s, found.repeated_steps) == pytest.approx(
        expected
    )
