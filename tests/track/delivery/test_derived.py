"""Values made from the run itself: right, and the same however the frames come."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tests.diagnosis.fabricated import Job, adds, rows_of
from traceml.database.schema import DEVICE_STEPS, GPU, HOST, PROCESS, STEPS, StepFlag, pack_bits
from traceml.database.store.reader import Frame, StreamIdentity, StreamRecord
from traceml.track.delivery.derived import DerivedMetrics
from traceml.track.plugins.metric import Metric
from traceml.track.tracker_state import DerivedState

STARTED_S = 1_700_000_000
S = 10**9


def stream(rank: int = 0, attempt: int = 0) -> StreamRecord:
    # Its monotonic clock began when the run did.
    number = 1000 * attempt + rank + 1
    return StreamRecord(number, StreamIdentity(rank, attempt, "h", 1, 1), {"clock": [0, STARTED_S * S]})


def frames(table: Any, rows: Any, size: int, rank: int = 0, attempt: int = 0) -> list[tuple[Frame, StreamRecord]]:
    parts, of = [rows[start : start + size] for start in range(0, len(rows), size)], stream(rank, attempt)
    return [
        (
            Frame(
                id=number,
                stream=of.id,
                table=table.name,
                seq=0,
                n=len(part),
                first_step=-1,
                last_step=-1,
                data=part.tobytes(),
            ),
            of,
        )
        for number, part in enumerate(parts)
    ]


def derive(given: list[tuple[Frame, StreamRecord]], interval_s: float = 1.0, **options: Any) -> list[Metric]:
    """Take frames by a new object each, whose state has been through JSON: as processes do that are killed."""
    state: DerivedState = {}
    found: list[Metric] = []
    for frame, of in given:
        found += DerivedMetrics(state, interval_s, STARTED_S, **options).take(frame, of)
        state = json.loads(json.dumps(state))

    return found + DerivedMetrics(state, interval_s, STARTED_S, **options).finish()


def named(rows: list[Metric], name: str) -> list[float]:
    return [row.value for row in rows if row.name == name]


JOB = Job(ranks=1, steps=300)


def test_step_time_and_shares_are_those_of_the_steps() -> None:
    (rows,) = rows_of(JOB)
    found = derive(frames(STEPS, rows, 50), interval_s=1000)

    (step_ms,) = named(found, "traceml/step_ms")
    assert step_ms == pytest.approx(rows["total_ns"].mean() / 1e6)
    shares = {row.name: row.value for row in found if "/share/" in row.name}
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["traceml/share/forward"] == pytest.approx(rows["forward_ns"].sum() / rows["total_ns"].sum())
    assert {row.step for row in found} == {299}
    assert found[0].timestamp == pytest.approx(STARTED_S + rows["t_end_ns"][-1] / S)


def test_the_speed_does_not_count_the_start_up() -> None:
    """The first steps come half a minute after the run began."""
    (rows,) = rows_of(JOB)
    rows["t_end_ns"] += 30 * S
    found = derive(frames(STEPS, rows, 50), interval_s=1000)

    assert named(found, "traceml/steps_per_s") == [pytest.approx(1e3 / named(found, "traceml/step_ms")[0], rel=0.01)]


def test_intervals_are_of_the_runs_own_clock_and_cover_all_steps() -> None:
    (rows,) = rows_of(JOB)
    found = derive(frames(STEPS, rows, 7), interval_s=1.0)

    speeds, times = named(found, "traceml/steps_per_s"), [r.timestamp for r in found if r.name == "traceml/steps_per_s"]
    begun = [STARTED_S, *times[:-1]]
    counted = sum(speed * (end - start) for speed, start, end in zip(speeds, begun, times, strict=True))
    assert len(speeds) >= 4
    assert counted == pytest.approx(300)


@pytest.mark.parametrize("size", [1, 13, 300])
def test_frames_may_be_cut_anywhere(size: int) -> None:
    (rows,) = rows_of(JOB)

    assert derive(frames(STEPS, rows, size)) == derive(frames(STEPS, rows, 40))


def test_goodput_leaves_out_waiting_for_data_and_saving_and_what_is_not_in_steps() -> None:
    (rows,) = rows_of(JOB, adds("input_wait", 10.0), adds("checkpoint", 5.0))
    found = derive(frames(STEPS, rows, 50), interval_s=1000)

    useful = rows["total_ns"] - rows["input_wait_ns"] - rows["checkpoint_ns"]
    assert named(found, "traceml/goodput") == [pytest.approx(useful.sum() / rows["t_end_ns"][-1])]


def test_the_wall_time_is_divided_without_remainder() -> None:
    """The shares of a rank's two attempts, 10 s apart."""
    (rows,) = rows_of(JOB, adds("checkpoint", 5.0))
    again = rows.copy()
    again["t_end_ns"] += rows["t_end_ns"][-1] + 10 * S
    ended_s = again["t_end_ns"][-1] / S
    found = derive([*frames(STEPS, rows, 50), *frames(STEPS, again, 50, attempt=1)], interval_s=1000)

    shares = {row.name.removeprefix("traceml/time/"): row.value for row in found if "/time/" in row.name}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["restart"] == pytest.approx(10 / ended_s, rel=0.01)
    assert shares["checkpoint"] == pytest.approx(2 * rows["checkpoint_ns"].sum() / S / ended_s, rel=1e-3)


def test_steps_that_an_attempt_repeats_do_not_count_twice() -> None:
    (rows,) = rows_of(JOB)
    again = rows.copy()
    again["t_end_ns"] += rows["t_end_ns"][-1]
    once = derive(frames(STEPS, rows, 50), interval_s=1000)
    twice = derive([*frames(STEPS, rows, 50), *frames(STEPS, again, 50)], interval_s=1000)

    assert named(twice, "traceml/goodput") == [pytest.approx(named(once, "traceml/goodput")[0] / 2, rel=1e-6)]


def test_a_restarted_job_tells_its_restarts_and_repeated_steps() -> None:
    """The second attempt makes all steps again, or goes on from a checkpoint of 100 steps and counts from 0."""
    (rows,) = rows_of(JOB)
    again = rows.copy()
    again["t_end_ns"] += rows["t_end_ns"][-1]
    first, second = frames(STEPS, rows, 50), frames(STEPS, again, 50, attempt=1)

    values = {row.name: row.value for row in derive([*first, *second], interval_s=1000)}
    alone = {row.name for row in derive(first, interval_s=1000)}

    assert (values["traceml/restarts"], values["traceml/repeated_steps"]) == (1, len(rows))
    assert values["traceml/mtbf_s"] > 0
    assert not {"traceml/restarts", "traceml/mtbf_s"} & alone


def test_ranks_are_put_together() -> None:
    job = Job(ranks=3, steps=100)
    of_ranks = [frames(STEPS, rows, 20, rank) for rank, rows in enumerate(rows_of(job))]
    mixed = [frame for together in zip(*of_ranks, strict=True) for frame in together]
    found = derive(mixed, interval_s=1000)

    totals = np.concatenate([rows["total_ns"] for rows in rows_of(job)])
    assert named(found, "traceml/step_ms") == [pytest.approx(totals.mean() / 1e6)]
    assert {row.rank for row in found} == {0}


def host_rows(count: int) -> Any:
    rows = np.zeros(count, HOST.dtype)
    rows["t_ns"] = np.arange(count) * S
    rows["cpu_pct"] = np.arange(count)
    rows["memory_used_bytes"] = 2**30
    rows["disk_read_bytes"] = np.arange(count) * 1000
    return rows


def test_samples_become_means_and_counters_become_rates() -> None:
    found = derive(frames(HOST, host_rows(20), 3, rank=1), interval_s=10.0)

    assert named(found, "system/cpu_pct") == [4.5, 14.5]
    assert named(found, "system/disk_read_bytes_per_s") == [pytest.approx(1000), pytest.approx(1000)]
    assert {row.rank for row in found} == {1}
    assert [row.step for row in found if row.name == "system/cpu_pct"] == [0, 1]


def test_samples_bear_the_step_of_their_rank() -> None:
    (rows,) = rows_of(JOB)
    process = np.zeros(3, PROCESS.dtype)
    process["t_ns"], process["rss_bytes"] = [1 * S, 2 * S, 3 * S], [100, 200, 300]
    found = derive([*frames(STEPS, rows, 300), *frames(PROCESS, process, 3)], interval_s=1000)

    assert named(found, "system/process/rss_bytes") == [200.0]
    assert {row.step for row in found if row.name.startswith("system/")} == {299}


def test_each_device_has_its_own_names() -> None:
    rows = np.zeros(4, GPU.dtype)
    rows["index"], rows["utilization_pct"] = [0, 1, 0, 1], [10, 90, 20, 70]
    found = derive(frames(GPU, rows, 4), interval_s=1000)

    assert named(found, "system/gpu0/utilization_pct") == [15.0]
    assert named(found, "system/gpu1/utilization_pct") == [80.0]


def test_system_values_can_be_turned_off() -> None:
    assert derive(frames(HOST, host_rows(5), 5), system=False) == []


def device_run() -> tuple[Any, Any]:
    """Return 100 steps with a device: 1 of 10 ms is forward on the CPU, 6 ms on the device."""
    rows, device = np.zeros(100, STEPS.dtype), np.zeros(100, DEVICE_STEPS.dtype)
    rows["step"] = device["step"] = np.arange(100)
    rows["total_ns"], rows["forward_ns"], rows["backward_own_ns"] = 10_000_000, 1_000_000, -1
    rows["t_end_ns"], rows["bits"] = np.cumsum(rows["total_ns"]), pack_bits(1, int(StepFlag.DEVICE), 0)
    device["total_ns"], device["forward_ns"], device["backward_own_ns"] = 10_000_000, 6_000_000, -1
    return rows, device


@pytest.mark.parametrize("size", [1, 13, 100])
def test_device_times_are_joined_to_their_steps_however_late(size: int) -> None:
    rows, device = device_run()
    found = derive([*frames(STEPS, rows, size), *frames(DEVICE_STEPS, device, 7)], interval_s=1000)

    assert named(found, "traceml/share/forward") == [pytest.approx(0.6)]


def test_a_host_that_runs_ahead_says_nothing_of_a_step() -> None:
    """Where it waits for the device in every tenth step, as in `loss.item()`, the share of forward is the device's."""
    rows, device = device_run()
    rows["total_ns"] = np.where(rows["step"] % 10 == 9, 82_000_000, 2_000_000)
    rows["t_end_ns"] = np.cumsum(rows["total_ns"])
    found = derive([*frames(STEPS, rows, 100), *frames(DEVICE_STEPS, device, 100)], interval_s=1000)

    assert named(found, "traceml/share/forward") == [pytest.approx(0.6)]


@pytest.mark.parametrize("announced", [True, False])
def test_steps_without_device_times_have_the_mean_of_the_others(announced: bool) -> None:
    """Lost, or measured on every second step only: no share is of both clocks."""
    rows, device = device_run()
    rows["input_wait_ns"] = 9_000_000
    if not announced:
        rows["bits"][1::2] = pack_bits(1, 0, 0)

    found = derive([*frames(STEPS, rows, 40), *frames(DEVICE_STEPS, device[::2], 10)], interval_s=1000)

    assert named(found, "traceml/share/forward") == [pytest.approx(0.6)]
    assert named(found, "traceml/share/input_wait") == [pytest.approx(0.4)]


def test_without_any_device_times_the_shares_are_those_of_the_cpu() -> None:
    rows, _ = device_run()
    found = derive(frames(STEPS, rows, 40), interval_s=1000)

    assert named(found, "traceml/share/forward") == [pytest.approx(0.1)]


def test_shares_of_an_interval_are_of_the_steps_whose_device_times_came_in_it() -> None:
    rows, device = device_run()
    given = [*frames(STEPS, rows, 20), *frames(DEVICE_STEPS, device, 20)]
    in_turns = [given[place + table] for place in range(5) for table in (0, 5)]
    found = derive(in_turns, interval_s=0.2)

    shares = named(found, "traceml/share/forward")
    assert len(shares) >= 4
    assert shares == pytest.approx([0.6] * len(shares))
