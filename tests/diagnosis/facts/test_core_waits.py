"""Waiting of main threads for a core, in training."""

from __future__ import annotations

import numpy as np
import pytest

from traceml.database.schema import PROCESS
from traceml.diagnosis.facts.core_waits import CoreWaits, medians_of_others, ranks_without_core

MS = 10**6


def rows(*readings):
    """Return rows of (time, run, wait) in milliseconds and the open step."""
    made = np.zeros(len(readings), PROCESS.dtype)
    for row, (t_ms, run_ms, wait_ms, step) in zip(made, readings, strict=True):
        row["t_ns"], row["main_run_ns"], row["main_wait_ns"], row["step"] = t_ms * MS, run_ms * MS, wait_ms * MS, step

    return made


def test_the_start_of_the_ranks_is_left_out():
    """Waiting while all ranks import torch is no property of training; rows may come in any number of frames."""
    waits = CoreWaits()
    waits.add(0, rows((0, 0, 0, -1), (1000, 500, 500, -1), (2000, 1000, 900, 0)))
    waits.add(0, rows((2500, 1300, 1000, 30), (3000, 1600, 1100, 60)))
    waits.add(0, rows((3500, 1700, 1500, -1)))

    assert waits.of_wall_time() == {0: pytest.approx(0.2)}
    assert waits.of_ready_time() == {0: pytest.approx(0.25)}


def test_a_short_training_falls_back_to_the_whole_run():
    """Without two readings in training, the share of ready time is that of the run, and that of wall time not known."""
    waits = CoreWaits()
    waits.add(3, rows((0, 0, 0, -1), (1000, 600, 200, 5)))

    assert waits.of_ready_time() == {3: pytest.approx(0.25)}
    assert waits.of_wall_time() == {}


def test_a_second_of_training_is_not_mixed_with_the_imports_before():
    """A rank that had its core ran and waited for 193 ms in it, and for 11 s before: rank 1 "used 45x its CPU time"."""
    waits = CoreWaits()
    waits.add(0, rows((0, 0, 0, -1), (10_857, 2566, 8604, -1)))
    waits.add(0, rows((11_486, 2700, 8810, 42), (11_984, 2816, 8819, 120), (12_480, 2881, 8822, 156)))
    waits.add(0, rows((12_527, 2897, 8822, -1)))

    assert waits.of_ready_time() == {0: pytest.approx(12 / 193)}
    assert waits.of_wall_time() == {0: pytest.approx(12 / 994)}


def test_a_main_thread_that_sleeps_while_it_trains_is_not_judged_by_its_imports():
    """As where a device computes: it ran for 20 ms."""
    waits = CoreWaits()
    waits.add(0, rows((0, 0, 0, -1), (9000, 3000, 5000, 0), (9500, 3010, 5000, 9), (10_000, 3020, 5000, 18)))

    assert waits.of_ready_time() == {}


def test_the_open_step_is_that_of_the_newest_readings():
    """Between steps, as after the last one, none is open."""
    waits = CoreWaits()
    assert waits.open_step == -1

    waits.add(0, rows((0, 0, 0, -1), (1000, 600, 200, 5)))
    waits.add(1, rows((1000, 600, 200, 4)))
    assert waits.open_step == 5

    waits.add(0, rows((2000, 900, 300, -1)))
    waits.add(1, rows((2000, 900, 300, -1)))
    assert waits.open_step == -1


def test_nothing_is_known_of_a_rank_without_readings():
    """As where an attempt ended before its first one."""
    waits = CoreWaits()
    waits.add(0, rows())

    assert waits.of_ready_time() == waits.of_wall_time() == waits.observed_s() == {}


def test_a_rank_without_steps_is_not_compared_with_those_that_train():
    """The main thread of a parameter server has next to nothing to do, and waits for a core most of that time."""
    waits = CoreWaits()
    waits.add(0, rows((0, 0, 0, -1), (9000, 60, 300, -1)))

    assert waits.of_ready_time() == {0: pytest.approx(300 / 360)}

    waits.add(1, rows((0, 0, 0, -1), (1000, 500, 500, 0), (9000, 6500, 2500, 90)))

    assert waits.of_ready_time() == {1: pytest.approx(0.25)}


def test_the_step_in_which_a_job_hangs_is_left_out() -> None:
    """It waits for no core for a minute, which says nothing about the steps before; a long step that ends counts."""
    waits = CoreWaits()
    waits.add(0, rows((0, 0, 0, 0), (1000, 400, 500, 30)))
    assert waits.of_wall_time() == {0: pytest.approx(0.5)}

    waits.add(0, rows((2000, 800, 1000, 60), (3000, 810, 1010, 61), (4000, 810, 1010, 61), (63_000, 811, 1011, 61)))
    assert waits.of_wall_time() == {0: pytest.approx(0.5)}
    assert waits.of_ready_time() == {0: pytest.approx(5 / 9)}

    waits.add(0, rows((64_000, 812, 1012, 62)))
    assert waits.of_wall_time() == {0: pytest.approx(1012 / 64_000)}


def test_what_a_script_does_after_its_loop_is_left_out() -> None:
    """Rank 0 evaluates for longer than it has trained, without a core: its steps had one."""
    waits = CoreWaits()
    trained = (0, 0, 0, -1), (1000, 500, 0, 0), (2000, 1400, 100, 50), (3000, 2300, 200, 99)
    waits.add(0, rows(*trained, (4000, 2400, 1100, 99), (9000, 2900, 5600, 99), (9500, 2950, 6000, -1)))
    waits.add(1, rows(*trained, (9000, 2400, 300, 100), (9500, 2450, 400, -1)))

    assert waits.of_ready_time()[0] == pytest.approx(200 / 2000)
    assert waits.observed_s() == {0: 2.0, 1: 8.0}


def test_too_little_is_not_known():
    """A single reading has no share, and neither has a short time."""
    waits = CoreWaits()
    waits.add(0, rows((0, 0, 0, 0)))
    waits.add(1, rows((0, 0, 0, 0), (100, 50, 50, 9)))
    waits.add(2, rows())

    assert waits.of_ready_time() == {}
    assert waits.of_wall_time() == {}


@pytest.mark.parametrize("count", [*range(2, 9), 100, 101])
def test_the_median_of_the_others_is_that_without_the_rank(count):
    """It is the same as computed for each rank by itself, also with equal shares."""
    shares = dict(enumerate(np.random.default_rng(count).integers(0, 4, count) / 8))

    assert medians_of_others(shares) == {
        rank: np.median([share for other, share in shares.items() if other != rank]) for rank in shares
    }


def test_a_rank_without_others_has_no_median():
    """A single rank is compared with nobody."""
    assert medians_of_others({}) == medians_of_others({3: 0.5}) == {}
    assert ranks_without_core({3: 0.5}) == frozenset()


@pytest.mark.parametrize(
    ("shares", "without_core"),
    [
        ({0: 0.01, 1: 0.2, 2: 0.01, 3: 0.02}, {1}),
        ({0: 0.01, 1: 0.2, 2: 0.01, 3: 0.2}, {1, 3}),
        ({0: 0.4, 1: 0.4, 2: 0.4}, set()),  # all wait alike
        ({0: 0.01, 1: 0.14}, set()),  # too little
        ({0: 0.1, 1: 0.19}, set()),  # less than twice the other's
    ],
)
def test_ranks_that_wait_more_than_others_lack_a_core(shares, without_core):
    """A share of 15 %, twice the others', is what lacks."""
    assert ranks_without_core(shares) == without_core


def test_waiting_before_the_first_step_is_that_of_the_start_up():
    """The kernel counts from the start of the process; a restarted rank does not count."""
    waits = CoreWaits()
    waits.add(0, rows((0, 0, 200, -1), (1000, 500, 3000, -1), (2000, 1000, 3900, 0)))
    waits.add(0, rows((9000, 100, 7000, -1)))
    waits.add(1, rows((0, 0, 1000, -1)))

    assert waits.of_start_up_s() == pytest.approx((0.25, 2.0))


def test_waiting_that_the_kernel_does_not_count_is_none():
    """It says -1 then."""
    waits = CoreWaits()
    unknown = rows((0, 0, 0, -1))
    unknown["main_wait_ns"] = -1
    waits.add(0, unknown)

    assert waits.of_start_up_s() == (0.0, 0.0)
