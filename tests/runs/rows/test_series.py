"""A run over its steps and over time."""

from __future__ import annotations

import numpy as np
import pytest

from tests.diagnosis.fabricated import Job, adds, rows_of
from tests.runs.fabricated_store import add_rank, add_samples, run_facts, store_run
from traceml.database.store.store import StoreWriter
from traceml.errors import StoreError
from traceml.run_folder import STORE_NAME
from traceml.runs.live_run import LiveRun
from traceml.runs.report.report import build_report
from traceml.runs.rows.run_summary_reader import read_run_summary
from traceml.runs.rows.series import read_series


def test_phases_over_the_run_agree_with_the_report(tmp_path):
    """Charts and report have the same means."""
    run = store_run(tmp_path / "run", Job(steps=400), adds("forward", 20, (1,)))

    series, report = read_series(run), build_report(run).to_dict()

    assert report["phases"]
    for phase in report["phases"]:
        # The report leaves the first ten steps out.
        assert np.nanmean(series.steps.phases_ms[phase["phase"]]) == pytest.approx(phase["mean_ms"], rel=0.05, abs=0.01)


def test_charts_of_a_long_run_are_of_all_steps(tmp_path, monkeypatch):
    """Means and longest steps are exact, percentiles are of the sample, and no bin is empty."""
    run = store_run(tmp_path / "run", Job(steps=4000), adds("forward", 20, (1,), every=50))
    whole = read_series(run)
    monkeypatch.setattr(read_run_summary, "__defaults__", (2000,))
    long = read_series(run)

    assert len(long.steps) == 63
    assert np.nanmax(long.steps.max_ms) == pytest.approx(np.nanmax(whole.steps.max_ms))
    assert np.nanmax(long.steps.p99_ms) <= np.nanmax(long.steps.max_ms)
    assert not np.isnan(long.steps.p50_ms).any()
    assert np.nanmean(long.steps.p50_ms) == pytest.approx(np.nanmean(whole.steps.p50_ms), rel=0.05)
    for name, values in whole.steps.phases_ms.items():
        assert np.average(long.steps.phases_ms[name]) == pytest.approx(np.average(values), rel=0.02), name


def test_the_straggler_stands_out_on_the_heat_map(tmp_path):
    """The slow rank's row is far above the others' in every bin from the step on where it became slow."""
    slow_late = rows_of(Job(ranks=8, steps=200), adds("forward", 20, (5,)))
    usual = rows_of(Job(ranks=8, steps=200))
    with StoreWriter(tmp_path / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(world_size=8))
        for rank in range(8):
            rows = np.concatenate([usual[rank][:100], slow_late[rank][100:]])
            add_rank(writer, rank, rows)

    heat = read_series(tmp_path).heat
    late = heat.steps >= 100

    assert heat.ranks == tuple((rank, rank) for rank in range(8))
    assert (heat.excess[5, late] > 0.4).all()
    assert (np.delete(heat.excess, 5, axis=0) < 0.2).all()
    assert (heat.excess[:, heat.steps + heat.width <= 100] < 0.2).all()


def test_a_thousand_ranks_fit_and_the_slow_one_is_not_averaged_away(tmp_path):
    """Rows stand for groups of ranks, each for its slowest; percentiles are those of all."""
    run = store_run(tmp_path / "run", Job(ranks=1000, steps=30), adds("forward", 20, (617,)))

    series = read_series(run)
    slowest = int(np.nanmean(series.heat.excess, axis=1).argmax())
    first, last = series.heat.ranks[slowest]

    assert len(series.heat.ranks) <= 128
    assert first <= 617 <= last
    assert series.heat.ranks[-1][1] == 999


def test_a_live_run_and_the_same_run_read_at_once_agree(tmp_path):
    """A run that is followed while it grows has the same series as one that is read at once."""
    rows = rows_of(Job(steps=320), adds("forward", 20, (1,)))
    live, late = LiveRun(tmp_path), LiveRun(tmp_path)
    with StoreWriter(tmp_path / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(state="running", ended=None))
        streams = [add_rank(writer, rank, of_rank[:64], state="running") for rank, of_rank in enumerate(rows)]
        for start in range(64, 320, 16):
            for stream, of_rank in zip(streams, rows, strict=True):
                part = of_rank[start : start + 16]
                writer.append(stream, "steps", start, len(part), part.tobytes(), start, start + len(part) - 1)

            writer.commit()
            live.refresh()
            live.series()
            if start > 160:
                late.refresh()
                late.series()

        followed, joined, whole = live.series(), late.series(), read_series(tmp_path)

    for series in (followed, joined):
        assert series.steps.steps.tolist() == whole.steps.steps.tolist()
        assert series.steps.p95_ms == pytest.approx(whole.steps.p95_ms)
        assert series.steps.phases_ms["forward"] == pytest.approx(whole.steps.phases_ms["forward"], rel=1e-4)
        assert series.heat.work_ms == pytest.approx(whole.heat.work_ms, rel=1e-4)

    live.close()
    late.close()


def test_a_new_attempt_starts_over(tmp_path):
    """The series is of the last attempt, whose steps count from 0 again."""
    rows = rows_of(Job(ranks=1, steps=100, grouped=False))[0]
    with StoreWriter(tmp_path / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(state="running", ended=None, world_size=1))
        add_rank(writer, 0, rows, state="failed")
        writer.commit()
        live = LiveRun(tmp_path)
        live.refresh()
        before = live.series()
        add_rank(writer, 0, rows[:40], attempt=1, state="running")
        writer.commit()
        live.refresh()
        after = live.series()

    assert (before.attempt, after.attempt) == (0, 1)
    assert before.steps.steps[-1] >= 60
    assert after.steps.steps[-1] < 40
    live.close()


def test_a_rank_that_is_missing_leaves_the_others(tmp_path):
    """World size 3, two ranks came: both are drawn."""
    run = store_run(tmp_path / "run", Job(steps=60), facts={"world_size": 3})

    assert read_series(run).heat.ranks == ((0, 0), (1, 1))


def test_samples_are_lines_over_time(tmp_path):
    """Memory by rank and load by host, in seconds since the start, at most a few hundred points each."""
    with StoreWriter(tmp_path / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(world_size=1))
        stream = add_rank(writer, 0, rows_of(Job(ranks=1, steps=60, grouped=False))[0])
        add_samples(writer, stream, samples=1000, growth=2**20)

    series = read_series(tmp_path)

    assert len(series.memory[0].values) <= 250
    assert series.memory[0].values[-1] > series.memory[0].values[0]
    assert series.cpu[0].label == "h0"
    assert set(series.cpu[0].values.tolist()) == {50.0}
    assert series.host_memory[0].values[0] == pytest.approx(25.0)
    assert np.all(np.diff(series.memory[0].seconds) > 0)


def test_seconds_count_from_the_start_of_the_run(tmp_path):
    """With a rank's clock, its samples lie where the run's start puts them."""
    clock = [10**9, round(run_facts()["started"] * 1e9) + 5 * 10**9]
    with StoreWriter(tmp_path / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(world_size=1))
        stream = add_rank(writer, 0, rows_of(Job(ranks=1, steps=60, grouped=False))[0], clock=clock)
        add_samples(writer, stream, samples=3)

    assert read_series(tmp_path).memory[0].seconds.tolist() == pytest.approx([4.0, 5.0, 6.0], abs=1e-3)


def test_a_run_without_steps_has_empty_series(tmp_path):
    """A run without rows is no error."""
    with StoreWriter(tmp_path / STORE_NAME) as writer:
        writer.put_meta("run", run_facts())

    series = read_series(tmp_path)

    assert len(series.steps) == 0
    assert series.heat.ranks == ()
    assert series.metrics == ()


def test_a_damaged_store_says_so(tmp_path):
    """The error names the path of a store that cannot be read."""
    (tmp_path / STORE_NAME).write_bytes(b"garbage" * 1000)

    with pytest.raises(StoreError, match=STORE_NAME):
        read_series(tmp_path)
