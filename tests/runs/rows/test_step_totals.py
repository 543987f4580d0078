"""Exact figures of all steps, from sums, against those from the rows."""

from __future__ import annotations

import numpy as np
import pytest

from tests.diagnosis.fabricated import MS, Job, adds, rows_of
from traceml.database.schema import DEVICE_STEPS, PHASE_COLUMNS, STEPS, USER_PHASES, StepFlag, pack_bits
from traceml.database.store.summaries import MAX_BINS, StepSums, sum_rows
from traceml.diagnosis.steps.kept_steps import KeptSteps
from traceml.runs.rows.bins import StepBins
from traceml.runs.rows.step_totals import SetUpSums, step_totals

NAMES = {0: {4: "augment"}, 1: {9: "augment", 10: "load"}}


def tables(*, device=False, steps=700):
    """Return each rank's rows by table: user phases of two names, and device times of most steps."""
    found = []
    for rank, rows in enumerate(rows_of(Job(steps=steps, callback_every=3), adds("user", 5), adds("forward", 9, (1,)))):
        user = np.zeros(steps, USER_PHASES.dtype)
        user["step"], user["name_id"] = np.arange(steps), (4 if rank == 0 else np.where(np.arange(steps) % 2, 9, 10))
        user["ns"] = rows["user_ns"] // 2
        of_rank = {STEPS.name: rows, USER_PHASES.name: user}
        if device:
            rows["bits"] = pack_bits(1, int(StepFlag.DEVICE), 0)
            timed = np.zeros(steps - 5, DEVICE_STEPS.dtype)
            timed["step"], timed["forward_ns"] = np.arange(steps - 5), rows["forward_ns"][: steps - 5] // 2
            timed["backward_ns"], timed["backward_own_ns"] = 3 * MS, 2 * MS
            of_rank[DEVICE_STEPS.name] = timed

        found.append(of_rank)

    return found


def totals_of(ranks):
    return step_totals(
        {
            rank: StepSums.of({table: sum_rows(table, rows)[0] for table, rows in of_rank.items()})
            for rank, of_rank in enumerate(ranks)
        },
        NAMES,
    )


def window_of(ranks):
    kept = KeptSteps(1024, len(ranks))
    for rank, of_rank in enumerate(ranks):
        kept.scatter(np.full(len(of_rank["steps"]), rank), of_rank["steps"])
        kept.scatter_user(rank, of_rank["user_phases"], NAMES[rank])
        if DEVICE_STEPS.name in of_rank:
            device = of_rank[DEVICE_STEPS.name]
            kept.scatter_device(np.full(len(device), rank), device)

    return kept.aligned(last=1024, skip_first=0)


@pytest.mark.parametrize("grouped", [True, False])
def test_means_by_phase_and_rank_are_those_of_the_rows(grouped):
    """Own backward, waiting, the user's phases by name and the rest: all as from the rows."""
    ranks = tables()
    expected, found = window_of(ranks).mean_split(grouped=grouped), totals_of(ranks).mean_split(grouped=grouped)

    assert set(found) == set(expected)
    for name, means in expected.items():
        assert found[name] == pytest.approx(means, rel=1e-5, abs=1), name


def test_device_times_replace_those_of_the_cpu():
    """The device's phases are the device's, also where the newest device rows have not arrived; parts add up."""
    ranks = tables(device=True)
    totals = totals_of(ranks)
    means = totals.mean_split(grouped=False)

    assert means["forward"] == pytest.approx(window_of(ranks).mean_split(grouped=False)["forward"], rel=0.02)
    assert means["backward"] == pytest.approx([3 * MS, 3 * MS], rel=1e-6)
    assert sum(means.values()) == pytest.approx(totals.total.sum(axis=1) / 700, rel=1e-6)


def test_mean_and_quantiles_are_of_all_ranks():
    """The mean is exact, quantiles are accurate to one percent."""
    ranks = tables()
    totals, times = totals_of(ranks), np.concatenate([of_rank["steps"]["total_ns"] for of_rank in ranks])

    assert totals.mean_ns == pytest.approx(times.mean(), rel=1e-12)
    assert totals.quantiles_ns((0.5, 0.99)) == pytest.approx(np.quantile(times, (0.5, 0.99)).tolist(), rel=0.011)
    assert totals.latest.tolist() == [699, 699]


@pytest.mark.parametrize("before", [0, 5_000], ids=["from_0", "resumed"])
def test_set_up_can_be_left_out(before):
    """Without the first ten steps the figures are those of the other steps."""
    ranks = tables()
    for of_rank in ranks:
        for rows in of_rank.values():
            rows["step"] += before

        of_rank["steps"]["total_ns"][:10] += int(5000 * MS)
        of_rank["steps"]["forward_ns"][:10] += int(5000 * MS)

    set_up = SetUpSums(before)
    for table in (STEPS, USER_PHASES):
        set_up.take(table, {rank: of_rank[table.name].tobytes() for rank, of_rank in enumerate(ranks)})

    rest = totals_of(ranks).without(set_up.totals(NAMES))
    later = totals_of([{table: rows[10:] for table, rows in of_rank.items()} for of_rank in ranks])

    assert rest.mean_ns == pytest.approx(later.mean_ns)
    assert rest.quantiles_ns((0.5, 0.999)) == pytest.approx(later.quantiles_ns((0.5, 0.999)))
    for name, means in later.mean_split(grouped=True).items():
        assert rest.mean_split(grouped=True)[name] == pytest.approx(means, rel=1e-6, abs=1), name


def test_bins_from_sums_are_those_of_the_rows():
    """Charts of a long run have the means and the longest steps of all of its steps, and go on with new ones."""
    first = [{table: rows[rows["step"] < 600] for table, rows in of_rank.items()} for of_rank in tables()]
    whole, partly = StepBins(5000), StepBins(2)
    window = window_of(tables())
    whole.take(window)
    partly.take_totals(totals_of(first), window.select(window.steps % 128 < 64).select(slice(None, 320)))
    partly.take(window.select(window.steps >= 600))

    assert partly.width == whole.width
    assert partly.steps(1).tolist() == whole.steps(1).tolist()
    assert partly.longest_ns(1).tolist() == pytest.approx(whole.longest_ns(1).tolist())
    assert partly.work_ns(1) == pytest.approx(whole.work_ns(1), rel=1e-4)
    for name, means in whole.phases_ns(1).items():
        assert partly.phases_ns(1)[name] == pytest.approx(means, rel=1e-4), name


def test_a_rank_without_steps_is_left_out():
    """A rank that only logged has no row."""
    ranks = tables()
    sums = {rank: StepSums.of({"steps": sum_rows("steps", of_rank["steps"])[0]}) for rank, of_rank in enumerate(ranks)}

    totals = step_totals({**sums, 7: StepSums.of({})}, {})

    assert totals.ranks.tolist() == [0, 1]
    assert set(PHASE_COLUMNS) >= {f"{name}_ns" for name in totals.times if name != "other"}


def test_ranks_far_apart_have_wider_bins() -> None:
    """Where one rank alone called `set_step`, arrays would have a bin for each step between: 1.4 GB for 5 million."""
    ranks = tables(steps=40)
    for rows in ranks[0].values():
        rows["step"] += 5_000_000

    totals = totals_of(ranks)

    assert totals.count.shape[1] <= MAX_BINS
    assert totals.count.sum(axis=1).tolist() == [40, 40]
    assert totals.total.sum() == sum(rows["steps"]["total_ns"].sum() for rows in ranks)
