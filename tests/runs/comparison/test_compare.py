"""Two runs side by side."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest

from tests.diagnosis.fabricated import Job, adds, rows_of
from tests.runs.fabricated_store import add_info, add_rank, add_samples, run_facts, run_with_batches, store_run
from traceml.database.store.store import StoreWriter
from traceml.errors import StoreError
from traceml.run_folder import STORE_NAME
from traceml.runs.comparison.compare import compare_runs, compare_sides
from traceml.runs.comparison.compared_run import read_compared
from traceml.runs.report.report import build_report
from traceml.runs.report.report_types import TimePart, TimeSection
from traceml.runs.rows.run_summary_reader import read_run_summary


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    return store_run(tmp_path_factory.mktemp("a") / "healthy", Job(steps=300), seed=1)


def test_a_slower_run_is_named_with_phase_and_rank(healthy, tmp_path):
    """A straggler of 5 ms: the step is slower by that, it is real, and the rank and its phase are there."""
    slow = store_run(tmp_path / "slow", Job(steps=300), adds("forward", 5, (1,)), seed=2)

    found = compare_runs(healthy, slow).to_dict()
    mean = found["step_time"]["mean"]

    assert found["outcome"] == "slower"
    assert found["comparable"] is True
    assert mean["b_ms"] - mean["a_ms"] == pytest.approx(4.6, abs=0.6)
    assert mean["low"] < mean["change"] < mean["high"]
    assert found["ranks"][1]["phase"] == "forward"
    assert found["ranks"][1]["b_work_ms"] - found["ranks"][1]["a_work_ms"] == pytest.approx(5, rel=0.1)
    assert abs(found["ranks"][0]["change"]) < 0.05
    assert found["verdict"]["b"] == "COMPUTE_STRAGGLER"
    assert found["verdict"]["changed"] is True


def test_long_runs_are_compared_by_all_steps(tmp_path, monkeypatch):
    """The means are those of the reports; which steps the test of significance rests on is said."""
    runs = [
        store_run(tmp_path / name, Job(steps=4000), *faults, seed=seed)
        for seed, (name, faults) in enumerate([("a", []), ("b", [adds("forward", 5, (1,))])])
    ]
    monkeypatch.setattr(read_run_summary, "__defaults__", (2000,))

    found = compare_runs(*runs).to_dict()
    reports = [build_report(run, 2000).to_dict() for run in runs]

    mean = found["step_time"]["mean"]
    assert (mean["a_ms"], mean["b_ms"]) == tuple(report["steps"]["mean_ms"] for report in reports)
    assert mean["low"] < mean["change"] < mean["high"]
    assert found["outcome"] == "slower"
    assert "A is long: 982 of its 4,000 steps, spread over the run, are compared" in found["remarks"]


def test_a_faster_run_is_faster(healthy, tmp_path):
    """The same pair the other way round."""
    slow = store_run(tmp_path / "slow", Job(steps=300), adds("forward", 5, (1,)), seed=2)

    assert compare_runs(slow, healthy).to_dict()["outcome"] == "faster"


def test_no_step_takes_less_than_no_time(tmp_path):
    """Where few steps vary much the interval is wide, but no bound claims that a step takes no time or less."""
    first, second = (
        store_run(tmp_path / name, Job(steps=64), adds("forward", 900, (0,), every=16), seed=seed)
        for seed, name in enumerate(("a", "b"))
    )

    times = compare_runs(first, second).step_time

    assert all(row.low > -1.0 for _, row in times.items() if row.low is not None)
    assert all(row.low <= row.change <= row.high for _, row in times.items() if row.low is not None)
    assert times.mean.high - times.mean.low > 0.3


def test_two_runs_of_the_same_job_do_not_differ(healthy, tmp_path):
    """Other noise is no change."""
    again = store_run(tmp_path / "again", Job(steps=300), seed=9)

    found = compare_runs(healthy, again).to_dict()

    assert found["outcome"] == "same"
    assert found["step_time"]["mean"]["real"] is False
    assert found["verdict"]["changed"] is False


def test_other_world_sizes_are_no_comparison(healthy, tmp_path):
    """The numbers are reported, and that they are not comparable."""
    wide = store_run(tmp_path / "wide", Job(ranks=4, steps=300), seed=2)

    found = compare_runs(healthy, wide).to_dict()

    assert found["comparable"] is False
    assert found["outcome"] == "unknown"
    assert found["step_time"]["mean"]["change"] == pytest.approx(0, abs=0.1)
    assert {found["step_time"][name][what] for name in ("mean", "p99") for what in ("p", "low", "high", "real")} == {
        None
    }
    assert "2 ranks" in found["obstacles"][0]
    assert found["ranks"][3]["a_work_ms"] is None


@pytest.mark.parametrize(
    ("before", "after", "remark"),
    [
        (range(2), range(2), None),
        (range(1), range(1, 2), "hosts: gpu0 in A, gpu1 in B"),
        (range(4), range(100), "hosts of one run only: none in A, gpu4, gpu5, gpu6, gpu7 and 92 more in B"),
        (range(64), range(1, 65), "hosts of one run only: gpu0 in A, gpu64 in B"),
    ],
)
def test_hosts_of_one_run_only_are_named(tmp_path, before: range, after: range, remark: str | None) -> None:
    """Jobs have hundreds of hosts, most of them in common."""
    first, second = (read_compared(store_run(tmp_path / name, Job(steps=60))) for name in "ab")
    first.report.run.hosts, second.report.run.hosts = ([f"gpu{host}" for host in hosts] for hosts in (before, after))

    said = [each for each in compare_sides(first, second).remarks if "hosts" in each]

    assert said == ([] if remark is None else [remark])


def test_other_models_are_no_comparison(tmp_path):
    """Another model is not comparable; another batch size is a remark. Of an unknown model nothing is said."""
    for name, parameters, batch in (("a", 10, 32), ("b", 20, 64)):
        (tmp_path / name).mkdir()
        with StoreWriter(tmp_path / name / STORE_NAME) as writer:
            writer.put_meta("run", run_facts(id=name, world_size=1))
            stream = add_rank(writer, 0, rows_of(Job(ranks=1, steps=200, grouped=False))[0])
            facts = {"parameters": parameters, "parallel": None if name == "a" else "ddp", "compiled": name == "a"}
            add_info(writer, stream, kind="model", model="Net", dtype="torch.float32", **facts)
            add_info(writer, stream, kind="loader", batch_size=batch)

    found = compare_runs(tmp_path / "a", tmp_path / "b").to_dict()

    assert found["obstacles"] == ["the models differ: parameters 10 in A, 20 in B"]
    assert {"batch size: 32 in A, 64 in B", "parallelism: none in A, ddp in B", "torch.compile: yes in A, no in B"} <= {
        *found["remarks"]
    }

    unknown = compare_runs(tmp_path / "a", store_run(tmp_path / "c", Job(ranks=1, steps=200, grouped=False)))
    assert "torch.compile" not in " ".join(unknown.to_dict()["remarks"])


@pytest.mark.parametrize(("forward_ms", "outcome", "change"), [(10.0, "faster", -0.29), (33.0, "slower", 0.53)])
def test_steps_with_other_batches_are_compared_by_sample(tmp_path, forward_ms, outcome, change):
    """Steps of twice the samples take 1.4x and 3.1x as long: samples take less and more."""
    runs = [
        run_with_batches(tmp_path / name, samples, forward=forward)
        for name, samples, forward in (("a", 16, 4.0), ("b", 32, forward_ms))
    ]

    found = compare_runs(*runs)

    assert found.outcome == outcome
    assert found.step_time.mean.change > 0.3
    assert found.judged is found.sample_time
    assert found.sample_time.change == pytest.approx(change, abs=0.03)
    assert found.sample_time.a_ms == pytest.approx(found.step_time.mean.a_ms / 16, rel=1e-3)
    assert found.remarks == ["samples in a step: 16 in A, 32 in B; the time per sample is compared"]


def test_all_phases_of_larger_batches_are_seen_alike_by_sample(tmp_path):
    """Where each phase takes half as long again per sample, the machine may be the difference."""
    slow = {name: 3 * ms for name, ms in Job().own.items()}

    found = compare_runs(run_with_batches(tmp_path / "a", 16), run_with_batches(tmp_path / "b", 32, **slow))

    assert found.outcome == "unknown"
    assert "phases are slower, as when the machine was under different load" in found.obstacles[0]


def test_a_smaller_last_batch_is_the_same_work(tmp_path):
    """Steps of 64 and of 62 samples in the mean are compared as they are."""
    found = compare_runs(run_with_batches(tmp_path / "a", 64), run_with_batches(tmp_path / "b", 62))

    assert found.sample_time is None
    assert found.judged is found.step_time.mean


@pytest.mark.parametrize(("seconds", "is_told"), [(3.0, True), (0.1, False)])
def test_evaluation_is_not_in_the_step_time(tmp_path, seconds, is_told):
    """A run of 300 steps that evaluates for 3 s does so for 10 ms per step; a tenth of a second is not worth a note."""
    first, second = (
        read_compared(store_run(tmp_path / name, Job(steps=300), seed=seed)) for seed, name in enumerate("ab")
    )
    first.report.time, second.report.time = (
        TimeSection(
            wall_s=10.0, parts=[TimePart("steps", 10.0 - evaluated, 0.0), TimePart("evaluation", evaluated, 0.0)]
        )
        for evaluated in (0.0, seconds)
    )

    found = compare_sides(first, second)

    told = "not in the step time: evaluation, 0 us per step in A, 10.0 ms in B"
    assert found.outcome == "same"
    assert (told in found.remarks) == is_told
    assert found.b.time == second.report.time


@pytest.mark.parametrize(("in_steps_s", "is_told"), [(9.0, False), (4.0, True)])
def test_waiting_for_the_first_batch_of_an_epoch_is_in_the_step_time(tmp_path, in_steps_s, is_told):
    """Workers that start anew make some steps long; what is between epochs beside that makes none longer."""
    first, second = (
        read_compared(store_run(tmp_path / name, Job(steps=300), seed=seed)) for seed, name in enumerate("ab")
    )
    for side, seconds in ((first, 6.0), (second, 0.0)):
        side.report.steps.mean_ms = (in_steps_s + 1.0) / 300 * 1e3 if seconds else side.report.steps.mean_ms
        steps_s = 4.0 if seconds else side.report.steps.mean_ms * 0.3
        side.report.time = TimeSection(
            wall_s=10.0, parts=[TimePart("steps", steps_s, 0.0), TimePart("between_epochs", seconds, 0.0)]
        )

    found = compare_sides(first, second)

    assert ("not in the step time: between epochs, 16.7 ms per step in A, 0 us in B" in found.remarks) is is_told
    assert any("between epochs" in each for each in found.remarks) is is_told


def test_too_few_steps_are_said(healthy, tmp_path):
    """With ten steps, or none, there is no result."""
    short = store_run(tmp_path / "short", Job(steps=12))
    empty = store_run(tmp_path / "empty", Job(steps=0))

    assert compare_runs(healthy, short).to_dict()["outcome"] == "unknown"
    found = compare_runs(empty, healthy).to_dict()
    assert found["outcome"] == "unknown"
    assert found["comparable"] is False
    assert "A has no complete steps" in found["obstacles"]
    assert found["step_time"]["mean"]["a_ms"] is None
    assert found["phases"] == []  # those of A are not known, which is not 0 ms


def test_memory_is_compared_by_its_highest_peak(tmp_path):
    """Peaks over all ranks, and their change."""
    for name, growth in (("a", 0), ("b", 2**20)):
        (tmp_path / name).mkdir()
        with StoreWriter(tmp_path / name / STORE_NAME) as writer:
            writer.put_meta("run", run_facts(id=name, world_size=1))
            stream = add_rank(writer, 0, rows_of(Job(ranks=1, steps=200, grouped=False))[0])
            add_samples(writer, stream, growth=growth)

    memory = compare_runs(tmp_path / "a", tmp_path / "b").to_dict()["memory"]

    assert memory["rss_peak_bytes"] == {"a": 500 * 2**20, "b": 695 * 2**20, "change": pytest.approx(0.39)}
    assert memory["cuda_peak_bytes"]["change"] is None


def test_a_busy_machine_is_said(tmp_path):
    """Ranks that had to wait for a core in one of the runs alone may have been slow because of others."""
    for name, wait in (("a", 0.02), ("b", 0.4)):
        (tmp_path / name).mkdir()
        with StoreWriter(tmp_path / name / STORE_NAME) as writer:
            writer.put_meta("run", run_facts(id=name, world_size=1))
            stream = add_rank(writer, 0, rows_of(Job(ranks=1, steps=200, grouped=False))[0])
            add_samples(writer, stream, wait=wait)

    found = compare_runs(tmp_path / "a", tmp_path / "b").to_dict()

    assert found["b"]["core_wait_share"] == pytest.approx(0.4)
    assert any("for 2 % of the time that they had work in A, 40 % in B" in remark for remark in found["remarks"])


def test_a_run_that_goes_on_is_compared_as_far_as_it_is(healthy, tmp_path):
    """A remark says that it has not finished."""
    going = store_run(tmp_path / "going", Job(steps=100), facts={"state": "running", "ended": None}, state="running")

    assert any("B is running" in remark for remark in compare_runs(healthy, going).to_dict()["remarks"])


def test_it_is_json(healthy, tmp_path):
    """All numbers are valid JSON, also where values are missing."""
    empty = store_run(tmp_path / "empty", Job(steps=0))

    text = json.dumps(compare_runs(healthy, empty).to_dict(), allow_nan=False)

    assert json.loads(text)["schema"] == "traceml.compare/1"


def test_a_run_is_the_same_as_itself_by_its_path(tmp_path):
    """As on the page that compares, also where it is too short to be judged."""
    short = store_run(tmp_path / "short", Job(steps=8))

    assert compare_runs(short, short).outcome == "same"


def test_a_damaged_run_says_which(healthy, tmp_path):
    """The path of the store that cannot be read is in the error."""
    (tmp_path / STORE_NAME).write_bytes(np.random.default_rng(0).bytes(5000))

    with pytest.raises(StoreError, match=str(tmp_path)):
        compare_runs(healthy, tmp_path).to_dict()


def test_the_same_code_twice_is_no_difference(tmp_path):
    """Twenty pairs of healthy runs: none is called slower or faster."""
    runs = [read_compared(store_run(tmp_path / f"run{seed}", Job(steps=200), seed=seed)) for seed in range(21)]

    outcomes = [compare_sides(a, b).outcome for a, b in pairwise(runs)]

    assert set(outcomes) <= {"same", "unknown"}


def test_a_slow_phase_of_15_percent_is_found(healthy, tmp_path):
    """3 ms more in forward of a step of 20 ms on all ranks, in each of five pairs."""
    mean_ms = compare_runs(healthy, store_run(tmp_path / "same", Job(steps=300), seed=8)).step_time.mean.a_ms
    slow = [
        store_run(tmp_path / f"slow{seed}", Job(steps=300), adds("forward", 0.15 * mean_ms), seed=seed)
        for seed in range(10, 15)
    ]

    found = [compare_runs(healthy, run).step_time.mean for run in slow]

    assert all(mean.real and mean.low < 0.15 < mean.high for mean in found)


def test_a_slower_machine_is_not_called_a_change_of_the_code(healthy, tmp_path):
    """Every phase takes 20 % longer, as under load of others: no outcome, and the reason is there."""
    loaded = store_run(tmp_path / "loaded", Job(steps=300).scaled(1.2), seed=3)

    found = compare_runs(healthy, loaded)

    assert found.outcome == "unknown"
    assert found.step_time.mean.real is True
    assert "large phases are slower, as when the machine was under different load" in found.obstacles[0]
