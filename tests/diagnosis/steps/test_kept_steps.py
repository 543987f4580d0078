"""The ring of step rows, and which steps are aligned."""

from __future__ import annotations

import numpy as np
import pytest

from tests.diagnosis.fabricated import MS, Job, rows_of, window_of
from traceml.database.schema import DEVICE_STEPS, EVALS, STEPS, USER_PHASES, StepFlag, pack_bits
from traceml.diagnosis.steps.kept_steps import KeptSteps, slots_for


def some_rows(first: int, count: int, total: int = 10_000_000) -> np.ndarray:
    rows = np.zeros(count, STEPS.dtype)
    rows["step"] = np.arange(first, first + count)
    rows["total_ns"], rows["forward_ns"], rows["backward_own_ns"] = total, total // 2, -1
    rows["bits"] = pack_bits(1, 0, 9)
    return rows


def put(kept: KeptSteps, rank: int, rows: np.ndarray) -> None:
    kept.scatter(np.full(len(rows), rank), rows)


def test_ranks_align_on_the_steps_that_all_have():
    """The newest step is the one which the slowest rank has ended."""
    kept = KeptSteps(128)
    put(kept, 0, some_rows(0, 80))
    put(kept, 1, some_rows(0, 70))

    aligned = kept.aligned(last=30)

    assert aligned.ranks.tolist() == [0, 1]
    assert aligned.steps.tolist() == list(range(40, 70))


def test_steps_with_closures_are_known_by_rank():
    """A slot that a later step takes has no flag of the step before."""
    kept = KeptSteps(32)
    rows = some_rows(0, 60)
    rows["bits"][[10, 50]] = pack_bits(1, int(StepFlag.CLOSURES), 9)
    put(kept, 0, rows)
    put(kept, 1, some_rows(0, 60))

    aligned = kept.aligned(last=30)

    assert aligned.steps[aligned.closures[0]].tolist() == [50]
    assert not aligned.closures[1].any()
    assert aligned.select(aligned.steps > 50).closures.shape == (2, 9)


def test_the_first_steps_are_left_out():
    """Set-up steps do not count, and fewer of them are left out where little would remain."""
    kept = KeptSteps(128)
    put(kept, 0, some_rows(0, 60))
    short = KeptSteps(128)
    put(short, 0, some_rows(0, 25))

    assert kept.aligned().steps[0] == 10
    assert short.aligned().steps[0] == 5


@pytest.mark.parametrize(
    ("step_ms", "ranks", "steps"),
    [(1, 1, 1_024), (20, 1, 500), (100, 1, 200), (1, 100, 655), (1, 1_000, 65), (50, 5_000, 32)],
)
def test_the_newest_steps_are_those_of_ten_seconds(step_ms: int, ranks: int, steps: int) -> None:
    """Within bounds: 200 steps at least and 1,024 at most, and with many ranks fewer, to cost no more."""
    kept = KeptSteps(slots_for(ranks), ranks)
    rows = some_rows(0, 1_200 if ranks < 1_000 else 100, step_ms * 1_000_000)
    kept.scatter(np.repeat(np.arange(ranks), len(rows)), np.tile(rows, ranks))

    assert len(kept.aligned()) == steps


def test_many_ranks_in_one_write():
    """Rows of many ranks go in by one call, and each rank's newest row is known."""
    kept = KeptSteps(128)
    ranks = np.repeat(np.arange(500), 20)
    rows = np.concatenate([some_rows(0, 20)] * 500)
    rows["t_end_ns"] = ranks * 1000 + rows["step"]

    kept.scatter(ranks, rows)

    assert kept.latest[:500].tolist() == [19] * 500
    assert kept.end_ns[7] == 7019
    assert kept.aligned(skip_first=0).total.shape[0] == 500


def test_memory_is_bounded_at_ten_thousand_ranks():
    """Ten thousand ranks fit into 150 MB, and their arrays are small."""
    kept = KeptSteps(slots_for(10_000), 10_000)

    assert sum(each.nbytes for each in vars(kept).values() if isinstance(each, np.ndarray)) < 150e6
    assert kept.slots >= 128


def test_a_rank_that_ended_is_not_waited_for():
    """When a rank has ended, the others' steps go on being compared."""
    kept = KeptSteps(128)
    put(kept, 0, some_rows(0, 100))
    put(kept, 1, some_rows(0, 40))
    kept.end(1)

    aligned = kept.aligned()

    assert aligned.ranks.tolist() == [0]
    assert aligned.steps[-1] == 99


def test_a_rank_that_ends_a_moment_before_the_others_is_compared():
    """Without it, the last verdict of a job with a slow rank would be that no rank is late."""
    kept = KeptSteps(128)
    put(kept, 0, some_rows(0, 100))
    put(kept, 1, some_rows(0, 100))
    kept.end(1)
    assert kept.aligned().ranks.tolist() == [0, 1]

    put(kept, 0, some_rows(100, 1))
    assert kept.aligned().ranks.tolist() == [0]


def test_when_all_have_ended_the_common_steps_count():
    """At the end of a run, the steps that all ranks had are returned."""
    kept = KeptSteps(128)
    for rank, count in enumerate((60, 58)):
        put(kept, rank, some_rows(0, count))
        kept.end(rank)

    assert kept.aligned().steps[-1] == 57


@pytest.mark.parametrize(("steps", "ranks", "last"), [(20, [0], 99), (30, [0, 1], 29)])
def test_when_all_have_ended_one_that_ended_long_before_is_left_out(steps, ranks, last):
    """Else a rank without data, or one that left by os._exit, would hide what the others' steps cost."""
    kept = KeptSteps(256)
    for rank, count in enumerate((100, steps)):
        put(kept, rank, some_rows(0, count))
        kept.end(rank)

    assert kept.aligned().ranks.tolist() == ranks
    assert kept.aligned().steps[-1] == last


def test_a_rank_left_far_behind_is_named_and_not_waited_for():
    """A silent rank does not stop the diagnosis of the others."""
    kept = KeptSteps(128)
    put(kept, 0, some_rows(0, 100))
    put(kept, 1, some_rows(0, 100))
    put(kept, 2, some_rows(0, 20))

    aligned = kept.aligned()

    assert aligned.ranks.tolist() == [0, 1]
    assert aligned.missing_ranks == (2,)


def test_a_rank_that_starts_again_leaves_nothing_behind():
    """After a restart from step 0 old rows are not mistaken for new ones."""
    kept = KeptSteps(128)
    put(kept, 0, some_rows(0, 100))
    put(kept, 0, some_rows(0, 30, total=5_000_000))

    aligned = kept.aligned(skip_first=0)

    assert aligned.steps.tolist() == list(range(30))
    assert float(aligned.total.mean()) == pytest.approx(5e6)


def test_a_rank_that_is_cleared_keeps_no_time_beside_its_steps():
    """A step of the new process has no phase of the user that only the process before it had there."""
    kept, augment = KeptSteps(128), np.zeros(60, USER_PHASES.dtype)
    augment["step"], augment["ns"] = np.arange(60), MS
    put(kept, 0, some_rows(0, 60))
    kept.scatter_user(0, augment, {0: "augment"})
    kept.clear(0)
    put(kept, 0, some_rows(0, 60))

    assert not kept.aligned().user["augment"].any()


def test_rows_that_were_lost_are_no_steps():
    """A step counts only where every rank has it; a rank that lost most of its rows is left out."""
    kept = KeptSteps(128)
    put(kept, 0, some_rows(0, 60))
    put(kept, 1, np.delete(some_rows(0, 60), [30, 31]))
    put(kept, 2, some_rows(0, 60)[::4])
    put(kept, 2, some_rows(59, 1))

    aligned = kept.aligned()

    assert aligned.ranks.tolist() == [0, 1]
    assert aligned.missing_ranks == (2,)
    assert not {30, 31} & set(aligned.steps.tolist())


def test_the_parts_add_up_to_the_step():
    """`other` is the rest of the total."""
    window = window_of(Job(ranks=3))

    whole = np.sum(list(window.times.values()), axis=0)

    assert np.allclose(whole, window.total, rtol=1e-5)


def test_own_backward_and_waiting_are_told_apart():
    """Waiting is known for the steps that measured it, and NaN for the others."""
    window = window_of(Job(callback_every=4))

    assert window.measured.sum() == pytest.approx(len(window) / 4, abs=1)
    assert np.isnan(window.wait[:, ~window.measured]).all()
    assert (window.wait[:, window.measured] > 0).all()


def test_user_phases_are_found_by_name():
    """A rank's ids become names, and only rows of the same step count."""
    kept = KeptSteps(128)
    for rank, name_id in ((0, 4), (1, 9)):
        rows = some_rows(0, 40)
        rows["user_ns"] = 2_000_000
        put(kept, rank, rows)
        user = np.zeros(40, USER_PHASES.dtype)
        user["step"], user["name_id"], user["ns"] = np.arange(40), name_id, 2_000_000
        kept.scatter_user(rank, user, {name_id: "augment"})

    aligned = kept.aligned()

    assert list(aligned.user) == ["augment"]
    assert aligned.user["augment"].mean() == pytest.approx(2e6)


def test_device_times_take_the_place_of_what_the_cpu_saw():
    """On CUDA the CPU measures launches; its waiting counts only while the device is idle."""
    kept = KeptSteps(128)
    rows = some_rows(0, 40, total=20_000_000)
    rows["forward_ns"], rows["input_wait_ns"] = 1_000_000, 18_000_000
    put(kept, 0, rows)
    device = np.zeros(40, DEVICE_STEPS.dtype)
    device["step"], device["forward_ns"], device["backward_ns"] = np.arange(40), 5_000_000, 10_000_000
    device["total_ns"], device["backward_own_ns"] = 20_000_000, -1
    kept.scatter_device(np.zeros(40, np.int64), device)

    aligned = kept.aligned()

    assert aligned.device
    assert aligned.times["forward"].mean() == pytest.approx(5e6)
    assert aligned.times["input_wait"].mean() == pytest.approx(5e6)
    assert np.sum(list(aligned.times.values()), axis=0).mean() == pytest.approx(20e6, rel=1e-5)


def device_rows(steps: np.ndarray, forward_ns: int) -> np.ndarray:
    rows = np.zeros(len(steps), DEVICE_STEPS.dtype)
    rows["step"], rows["forward_ns"], rows["backward_ns"], rows["backward_own_ns"] = steps, forward_ns, MS, MS // 2
    rows["total_ns"] = max(2 * MS, forward_ns + MS)
    return rows


@pytest.mark.parametrize("interval", [1, 2, 4])
def test_steps_of_a_host_that_runs_ahead_are_those_of_the_device(interval: int) -> None:
    """It launches nine steps in 2 ms each, and waits 82 ms for the device in the tenth: each step takes 10 ms."""
    kept = KeptSteps(256)
    rows = some_rows(0, 200, total=2 * MS)
    rows["total_ns"][9::10] = 82 * MS
    put(kept, 0, rows)
    device = device_rows(np.arange(0, 200, interval), 6 * MS)
    device["total_ns"], device["backward_ns"] = 10 * MS, 3 * MS
    kept.scatter_device(np.zeros(len(device), np.int64), device)

    aligned = kept.aligned()

    assert aligned.total.mean() == pytest.approx(10 * MS, rel=0.01)
    assert aligned.total.max() < 12 * MS
    assert aligned.times["other"].mean() == pytest.approx(MS, rel=0.05)


def test_a_pause_of_the_host_stays_a_long_step() -> None:
    """It launches short steps that the device does at once, and works 100 ms in a step that is not measured."""
    kept = KeptSteps(256)
    rows = some_rows(0, 200, total=2 * MS)
    rows["total_ns"][37::50] = 100 * MS
    put(kept, 0, rows)
    kept.scatter_device(np.zeros(50, np.int64), device_rows(np.arange(0, 200, 4), MS // 2))

    aligned = kept.aligned()

    assert np.flatnonzero(aligned.total[0] > 50 * MS).tolist() == [each - 10 for each in (37, 87, 137, 187)]


def test_a_pause_of_a_host_that_runs_ahead_is_what_the_device_waits() -> None:
    """It runs ahead by nine steps of 10 ms, and pauses 100 ms after it has waited for the device."""
    kept = KeptSteps(256)
    rows = some_rows(0, 200, total=2 * MS)
    rows["total_ns"][9::10] = 82 * MS
    rows["total_ns"][49::50] = 182 * MS
    put(kept, 0, rows)
    device = device_rows(np.arange(0, 200, 2), 6 * MS)
    device["total_ns"] = 10 * MS
    kept.scatter_device(np.zeros(100, np.int64), device)

    aligned = kept.aligned()

    assert np.flatnonzero(aligned.total[0] > 50 * MS).tolist() == [each - 10 for each in (49, 99, 149, 199)]


def test_steps_without_device_times_have_the_mean_of_the_others():
    """Of short steps some are timed: no mean is of both clocks, and a short step is not overfull."""
    kept = KeptSteps(128)
    rows = some_rows(0, 80, total=2 * MS)
    rows["forward_ns"], rows["h2d_ns"], rows["input_wait_ns"] = MS // 10, MS // 10, 2 * MS
    rows["total_ns"][41] = MS // 2
    put(kept, 0, rows)
    timed = np.arange(0, 80, 4)
    device = device_rows(timed, MS)
    device["forward_ns"] = np.where(timed % 8 == 0, MS // 2, 3 * MS // 2)  # 1 ms on average
    device["backward_ns"], device["backward_own_ns"] = MS // 2, MS // 4
    kept.scatter_device(np.zeros(len(device), np.int64), device)

    aligned = kept.aligned(skip_first=8)
    usual = aligned.select(aligned.steps != 41)

    assert aligned.device
    assert usual.times["forward"].mean() == pytest.approx(MS, rel=0.02)
    assert usual.times["h2d"].max() == 0
    assert usual.times["backward"].mean() == pytest.approx(MS // 2)
    assert aligned.own_mean[0] == pytest.approx(MS // 4)
    assert np.sum(list(aligned.times.values()), axis=0) == pytest.approx(aligned.total, rel=1e-5)


def test_device_times_are_used_if_every_rank_has_some():
    """If one rank has none, all ranks are compared by the CPU's times."""
    kept = KeptSteps(128, 2)
    for rank in range(2):
        put(kept, rank, some_rows(0, 40))

    kept.scatter_device(np.zeros(40, np.int64), device_rows(np.arange(40), MS))
    one = kept.aligned()
    kept.scatter_device(np.ones(1, np.int64), device_rows(np.array([33]), 2 * MS))
    both = kept.aligned()

    assert not one.device
    assert one.times["forward"].mean() == pytest.approx(5 * MS)
    assert both.device
    assert both.times["forward"].mean(axis=1) == pytest.approx([MS, 2 * MS])


def test_one_ranks_steps_can_be_asked_for():
    """`held` returns the steps of one rank, independent of the others."""
    kept = KeptSteps(128)
    for rank, rows in enumerate(rows_of(Job(steps=50))):
        put(kept, rank, rows[: 50 - 20 * rank])

    assert len(kept.held(0)) == 50
    assert len(kept.held(1)) == 30


def put_evaluation(kept: KeptSteps, rank: int, step: int, *spent_ms: float) -> None:
    rows = np.zeros(len(spent_ms), EVALS.dtype)
    rows["step"], rows["ns"] = step, [ms * MS for ms in spent_ms]
    kept.scatter_evaluation(rank, rows)


@pytest.mark.parametrize("waits_in", ["comm_ns", "backward_ns"])
def test_waiting_for_the_evaluation_of_others_is_no_time_of_a_step(waits_in: str):
    """Rank 0 evaluates before step 50 for 300 ms, rank 1 for 100 ms: its other waiting of 200 ms is left out."""
    rows = some_rows(0, 80)
    rows["backward_ns"] = rows["backward_own_ns"] = 2 * MS
    waits = rows.copy()
    waits[waits_in][50] += 200 * MS
    waits["total_ns"][50] += 200 * MS
    waits["backward_own_ns"][50] = -1
    kept = KeptSteps(128)
    put_evaluation(kept, 0, 50, 250.0, 50.0)
    put_evaluation(kept, 1, 50, 100.0)
    put(kept, 0, rows)
    put(kept, 1, waits)

    aligned = kept.aligned()

    assert aligned.total == pytest.approx(10 * MS)
    assert aligned.times["backward"] == pytest.approx(2 * MS, rel=1e-3)
    assert aligned.times["comm"].sum() == 0
    assert aligned.named_times()["other"] == pytest.approx(3 * MS, rel=1e-3)


def test_ranks_that_do_not_wait_keep_their_steps():
    """Rank 0 evaluates alone, but the others never wait for it."""
    kept = KeptSteps(128)
    put(kept, 0, some_rows(0, 80))
    put(kept, 1, some_rows(0, 80))
    put_evaluation(kept, 0, 50, 300.0)

    assert kept.aligned().total == pytest.approx(10 * MS)


def test_a_script_that_only_evaluates_has_no_steps():
    """It applies a trained model to data: its rows are those of an evaluation before a step that never comes."""
    kept = KeptSteps(128)
    put_evaluation(kept, 0, 0, 300.0)

    assert len(kept.aligned()) == 0
