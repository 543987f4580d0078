"""Step times on a device from those of a host that may run ahead of it."""

from __future__ import annotations

import numpy as np
import pytest

from traceml.diagnosis.steps.step_split import step_times_on_device

MS = 1_000_000


def runs_ahead(steps: int = 100) -> np.ndarray:
    """Return host times of a loop that launches nine steps in 2 ms each, and waits for the device in the tenth."""
    times = np.full(steps, 2 * MS, np.float32)
    times[9::10] = 82 * MS
    return times


def one_block(steps: int = 100) -> np.ndarray:
    """Return which of consecutive steps begins a block: the first one."""
    return np.arange(steps) == 0


def measured(total: np.ndarray, every: int, device_ns: float) -> tuple[np.ndarray, np.ndarray]:
    """Return device times of every n-th step, and which have them."""
    found = np.zeros(total.shape, bool)
    found[:, ::every] = True
    return np.where(found, device_ns, 0).astype(np.float32), found


def test_each_rank_is_paced_by_its_own_device() -> None:
    """One host runs ahead of a device of 10 ms per step, another waits for its device in each step."""
    total = np.stack([runs_ahead(), np.full(100, 10 * MS, np.float32)])
    times = step_times_on_device(total, *measured(total, 4, 10 * MS), one_block())

    assert times == pytest.approx(10 * MS, rel=0.02)


def test_a_host_that_does_not_run_ahead_keeps_its_times() -> None:
    """Launches limit the steps: those that are not measured are as long as on the host, also a pause of it."""
    total = np.random.default_rng(0).uniform(1.8 * MS, 2.2 * MS, (1, 100)).astype(np.float32)
    total[0, 37] = 100 * MS
    device, found = measured(total, 4, 0)
    device[found] = total[found]

    assert np.array_equal(step_times_on_device(total, device, found, one_block()), total)


def test_measured_steps_have_what_was_measured() -> None:
    """Whatever the host says of them."""
    total = runs_ahead()[None]
    device, found = measured(total, 2, 0)
    device[found] = np.linspace(8 * MS, 12 * MS, found.sum())

    times = step_times_on_device(total, device, found, one_block())

    assert np.array_equal(times[found], device[found])
    assert times[~found] == pytest.approx(10 * MS, rel=0.1)


def test_no_steps_are_no_times() -> None:
    """A window without steps, as of ranks that have none in common."""
    empty = np.empty((2, 0), np.float32)

    assert step_times_on_device(empty, empty, np.empty((2, 0), bool), one_block(0)).shape == (2, 0)


@pytest.mark.parametrize("blocks", [[0], [0, 20, 40, 60, 80], [0, 7, 13, 50]], ids=["whole", "of 20", "uneven"])
def test_a_block_begins_as_far_behind_as_its_first_wait_shows(blocks: list[int]) -> None:
    """Steps that are read of a long run are blocks of it, and a live window begins anywhere."""
    total = np.roll(runs_ahead(), -4)[None]  # the first wait is in the sixth step, for ten
    begins = np.isin(np.arange(100), blocks)
    times = step_times_on_device(total, *measured(total, 4, 10 * MS), begins)

    assert times.max() <= 10.1 * MS


def test_a_host_that_is_ahead_all_the_time_says_nothing_of_the_steps() -> None:
    """It has launched 60 steps, and has not waited yet: those without device times are as long as the others."""
    total = np.full((1, 60), 2 * MS, np.float32)
    times = step_times_on_device(total, *measured(total, 6, 13 * MS), one_block(60))

    assert times == pytest.approx(13 * MS, rel=0.01)
