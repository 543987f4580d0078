"""Blocks of steps that stay spread over a run while it goes on."""

from __future__ import annotations

import numpy as np
import pytest

from tests.diagnosis.fabricated import Job, rows_of
from traceml.database.schema import DEVICE_STEPS, USER_PHASES, StepFlag, pack_bits
from traceml.diagnosis.steps.kept_steps import SpreadSteps

SLOTS = 256


@pytest.mark.parametrize(("steps", "gap"), [(100, 16), (256, 16), (257, 32), (1_000, 64), (4_000, 256)])
@pytest.mark.parametrize("frame", [1, 64, 5_000])
def test_blocks_are_spread_over_all_steps(steps: int, gap: int, frame: int) -> None:
    """They begin at each multiple of the gap, however the rows come, and hold the rows of their steps."""
    rows = rows_of(Job(ranks=2, steps=steps))
    kept = SpreadSteps(SLOTS, 2)
    for first in range(0, steps, frame):
        for rank, of_rank in enumerate(rows):
            part = of_rank[first : first + frame]
            kept.scatter(np.full(len(part), rank), part)

    aligned = kept.aligned(SLOTS)

    assert aligned.steps.tolist() == [step for step in range(10, steps) if step % gap < 16]
    for rank, of_rank in enumerate(rows):
        assert aligned.total[rank].tolist() == pytest.approx(of_rank["total_ns"][aligned.steps].tolist(), rel=1e-6)


def test_blocks_of_a_resumed_run_begin_at_its_first_step() -> None:
    """Its numbers count on from a checkpoint."""
    (rows,) = rows_of(Job(ranks=1, steps=1_000, grouped=False))
    rows["step"] += 5_000
    kept = SpreadSteps(SLOTS, 1)
    kept.numbers.take(0, {"step": 5_000, "before": 5_000})
    for first in range(0, 1_000, 50):
        kept.scatter(np.zeros(50, np.int64), rows[first : first + 50])

    aligned = kept.aligned(SLOTS)
    assert aligned.steps.tolist() == [5_000 + step for step in range(10, 1_000) if step % 64 < 16]


def test_what_comes_beside_the_step_rows_moves_with_them() -> None:
    """User phases come before the rows of their steps, device times after them."""
    steps = np.arange(1_000)
    user, device = np.zeros(1_000, USER_PHASES.dtype), np.zeros(1_000, DEVICE_STEPS.dtype)
    user["step"] = device["step"] = steps
    user["ns"], device["forward_ns"], device["backward_own_ns"] = 1_000 + steps, 5_000_000 + steps, -1
    with_user, with_device = SpreadSteps(SLOTS, 1), SpreadSteps(SLOTS, 1)
    (rows,) = rows_of(Job(ranks=1, steps=1_000, grouped=False))
    for first in range(0, 1_000, 50):
        part = slice(first, first + 50)
        with_user.scatter_user(0, user[part], {0: "augment"})
        for kept in (with_user, with_device):
            kept.scatter(np.zeros(50, np.int64), rows[part])

        with_device.scatter_device(np.zeros(50, np.int64), device[part])

    found = with_device.aligned(SLOTS)
    assert found.times["forward"][0].tolist() == pytest.approx((5_000_000 + found.steps).tolist())
    found = with_user.aligned(SLOTS)
    assert found.user["augment"][0].tolist() == pytest.approx((1_000 + found.steps).tolist())


def test_steps_with_closures_move_with_their_rows() -> None:
    """They are the same steps, wherever their blocks are kept."""
    (rows,) = rows_of(Job(ranks=1, steps=1_000, grouped=False))
    rows["bits"][rows["step"] % 128 < 16] = pack_bits(1, int(StepFlag.CLOSURES), 0)
    kept = SpreadSteps(SLOTS, 1)
    for first in range(0, 1_000, 50):
        kept.scatter(np.zeros(50, np.int64), rows[first : first + 50])

    found = kept.aligned(SLOTS)
    assert found.closures[0].tolist() == (found.steps % 128 < 16).tolist()


def test_a_rank_that_starts_again_has_its_new_steps() -> None:
    """Its earlier rows are gone; the blocks stay as far apart."""
    (rows,) = rows_of(Job(ranks=1, steps=1_000, grouped=False))
    kept = SpreadSteps(SLOTS, 1)
    kept.scatter(np.zeros(1_000, np.int64), rows)
    kept.clear(0)
    kept.scatter(np.zeros(200, np.int64), rows[:200])

    assert kept.aligned(SLOTS).steps.tolist() == [step for step in range(10, 200) if step % 64 < 16]


@pytest.mark.parametrize(("ranks", "slots"), [(0, 1_024), (1, 1_024), (100, 640), (256, 256), (257, None)])
def test_memory_is_bounded(ranks: int, slots: int | None) -> None:
    """More ranks keep fewer steps each; too few would be no history."""
    kept = SpreadSteps.of_run(ranks)

    assert (None if kept is None else kept.slots) == slots


@pytest.mark.parametrize(("more_ms", "is_changed"), [(0.0, False), (10.0, True)])
def test_steps_that_never_changed_are_not_compared(more_ms: float, is_changed: bool) -> None:
    """One of the ranks takes longer from the middle on."""

    def slower(own: dict[str, np.ndarray], _random: np.random.Generator) -> None:
        own["other"][1, 500:] += more_ms

    kept = SpreadSteps(SLOTS, 2)
    for rank, rows in enumerate(rows_of(Job(ranks=2, steps=1_000, grouped=False), slower)):
        kept.scatter(np.full(len(rows), rank), rows)

    assert (kept.changed() is not None) is is_changed
