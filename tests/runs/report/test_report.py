"""The report on runs that the real writer stored."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from tests.diagnosis.fabricated import Job, adds, rows_of
from tests.runs.fabricated_store import (
    STARTED,
    add_info,
    add_rank,
    add_samples,
    add_user_phase,
    run_facts,
    store_run,
)
from traceml.database.schema import DEVICE_STEPS, HOST, LINES, PROCESS
from traceml.database.source_record import SOURCE, SourceReading
from traceml.database.store.reader import StoreReader
from traceml.database.store.store import StoreWriter
from traceml.errors import StoreError
from traceml.run_folder import STORE_NAME
from traceml.runs.report.report import build_report, save_report
from traceml.runs.rows import run_summary_reader
from traceml.runs.rows.series import read_series

KEYS = {
    "": ["schema", "traceml_version", "run", "verdict", "findings", "steps", "phases", "ranks", "memory", "system",
         "metrics", "hidden_metrics", "trackers", "telemetry"],
    "run": ["id", "name", "project", "attempt", "started", "ended", "duration_s", "state", "world_size", "hosts",
            "command"],
    "verdict": ["kind", "severity", "ranks", "phase", "summary", "next", "evidence", "cost_share", "speedup_if_fixed"],
    "steps": ["count", "mean_ms", "p50_ms", "p95_ms", "p99_ms", "per_second"],
    "telemetry": ["rows_appended", "rows_stored", "rows_lost", "overhead_us_per_step", "overhead_share", "bytes_sent"],
}  # fmt: skip


def report_on(run_dir: Path, **options: Any) -> dict[str, Any]:
    """The report as a reader of its JSON sees it."""
    return build_report(run_dir, **options).to_dict()


def open_store(folder, **facts):
    folder.mkdir(parents=True, exist_ok=True)
    writer = StoreWriter(folder / STORE_NAME)
    writer.put_meta("run", run_facts(id=folder.name, **facts))
    return writer


def test_every_key_of_the_contract_is_there(tmp_path):
    """A run with few facts has the same keys as any other."""
    open_store(tmp_path / "run").close()

    report = report_on(tmp_path / "run")

    for section, keys in KEYS.items():
        assert set(keys) <= set(report[section] if section else report)

    assert report["schema"] == "traceml.report/1"
    assert report["verdict"]["kind"] == "INSUFFICIENT_DATA"
    assert (report["metrics"], report["trackers"]) == ({}, [])


def test_a_straggler_is_the_verdict(tmp_path):
    """The verdict is the first finding, with its numbers."""
    report = report_on(store_run(tmp_path / "run", Job(steps=300), adds("forward", 20, (1,))))

    assert report["verdict"] == report["findings"][0]
    assert (report["verdict"]["kind"], report["verdict"]["ranks"]) == ("COMPUTE_STRAGGLER", [1])
    assert report["steps"]["count"] == 300
    assert report["steps"]["mean_ms"] == pytest.approx(35, rel=0.1)
    assert report["steps"]["per_second"] == pytest.approx(1000 / 35, rel=0.1)
    assert report["run"]["started"] == STARTED
    assert report["run"]["duration_s"] == 10


def test_backward_is_own_work_and_comm_holds_the_waiting(tmp_path):
    """The waiting inside backward is split off by the steps that measured it; the parts add up."""
    report = report_on(store_run(tmp_path / "run", Job(steps=300, callback_every=4), adds("forward", 20, (1,))))
    phases = {phase["phase"]: phase for phase in report["phases"]}
    comm = {entry["rank"]: entry["mean_ms"] for entry in phases["comm"]["by_rank"]}

    assert phases["backward"]["mean_ms"] == pytest.approx(8, rel=0.05)
    assert comm[0] == pytest.approx(21, rel=0.1)
    assert comm[1] < 2
    assert sum(phase["share"] for phase in report["phases"]) == pytest.approx(1)
    assert sum(phase["mean_ms"] for phase in report["phases"]) == pytest.approx(report["steps"]["mean_ms"], rel=0.01)


@pytest.mark.parametrize("bound", [run_summary_reader.MAX_STEP_ROWS, 100])
def test_phases_are_of_the_steps_whose_mean_is_told(tmp_path, bound):
    """A rank that made few steps, slow ones, has its own means; the bars were those of a step of 33 ms, not 14 ms."""
    few = [40, 300]
    with open_store(tmp_path / "run") as writer:
        rows = rows_of(Job(steps=300, grouped=False), adds("other", 40, (0,)), seed=1)
        for rank, count in enumerate(few):
            add_rank(writer, rank, rows[rank][:count])

    report = report_on(tmp_path / "run", max_step_rows=bound)

    assert sum(phase["mean_ms"] for phase in report["phases"]) == pytest.approx(report["steps"]["mean_ms"], rel=1e-4)
    assert sum(phase["share"] for phase in report["phases"]) == pytest.approx(1)
    (other,) = (phase["by_rank"] for phase in report["phases"] if phase["phase"] == "other")
    assert [entry["mean_ms"] for entry in other] == [pytest.approx(40, rel=0.1), pytest.approx(0.3, rel=0.1)]


def test_user_phases_have_their_own_names(tmp_path):
    """A user's phase is a row of the report, and `user` is none."""
    writer = open_store(tmp_path / "run", world_size=1)
    rows = rows_of(Job(ranks=1, steps=100, grouped=False), adds("user", 10))[0]
    stream = add_rank(writer, 0, rows)
    add_user_phase(writer, stream, "augment", 100, 10)
    writer.close()

    report = report_on(tmp_path / "run")
    phases = {phase["phase"]: phase["mean_ms"] for phase in report["phases"]}

    assert phases["augment"] == pytest.approx(10, rel=0.05)
    assert "user" not in phases
    assert (report["verdict"]["kind"], report["verdict"]["phase"]) == ("RESIDUAL_HEAVY", "augment")


def test_a_resumed_training_has_the_steps_of_this_run(tmp_path):
    """Steps are numbered on, and counted from where it resumed."""
    writer = open_store(tmp_path / "run")
    for rank, rows in enumerate(rows_of(Job(steps=100))):
        rows["step"] += 5_000
        add_info(writer, add_rank(writer, rank, rows), kind="resumed", step=5_000, before=5_000)

    writer.close()

    report = report_on(tmp_path / "run")

    assert report["steps"]["count"] == 100
    assert [rank["steps"] for rank in report["ranks"]] == [100, 100]
    assert report["ranks"][0]["exit"]["last_step"] == 5_099


def test_numbers_that_a_script_leaves_out_are_no_speed(tmp_path):
    """It numbers its steps after the first ones: 5,000 numbers passed within one step."""
    writer = open_store(tmp_path / "run")
    for rank, rows in enumerate(rows_of(Job(steps=100))):
        rows["step"][60:] += 5_000
        add_info(writer, add_rank(writer, rank, rows), kind="resumed", step=5_060, before=5_000)

    writer.close()

    steps = report_on(tmp_path / "run")["steps"]

    assert steps["count"] == 100
    assert steps["per_second"] == pytest.approx(1000 / steps["mean_ms"], rel=0.1)


def test_a_number_that_no_step_has_yet_is_not_counted(tmp_path):
    """The script gave it after its last step so far; the second rank has trained on from it."""
    writer = open_store(tmp_path / "run")
    for rank, rows in enumerate(rows_of(Job(steps=100))):
        rows["step"][60:] += 5_000 * rank
        add_info(writer, add_rank(writer, rank, rows), kind="resumed", step=[100, 60][rank] + 5_000, before=5_000)

    writer.close()

    report = report_on(tmp_path / "run")

    assert [rank["steps"] for rank in report["ranks"]] == [100, 100]


def test_a_killed_rank_is_reported_with_all_that_is_known(tmp_path):
    """Signal as a number, last step, open phase; the rank has rows to its end."""
    writer = open_store(tmp_path / "run", state="failed")
    rows = rows_of(Job(steps=100))
    add_rank(
        writer,
        0,
        rows[0],
        state="failed",
        exit={"code": 1, "exception": "RuntimeError", "message": "Connection closed by peer"},
    )
    add_rank(writer, 1, rows[1][:80], state="killed", exit={"signal": 9, "open_phase": "backward", "open_step": 80})
    writer.close()

    report = report_on(tmp_path / "run")
    killed = report["ranks"][1]

    assert (report["verdict"]["kind"], report["verdict"]["ranks"]) == ("RANK_LOST", [1])
    assert report["verdict"]["evidence"]["followed"] == [0]
    assert (killed["state"], killed["exit"]["signal"], killed["exit"]["open_phase"]) == ("killed", 9, "backward")
    assert (killed["steps"], killed["exit"]["last_step"]) == (80, 79)
    assert set(killed["exit"]) == {"code", "signal", "exception", "last_step", "open_phase", "stack"}
    assert report["run"]["state"] == "failed"


def test_the_last_attempt_is_described(tmp_path):
    """After a restart only the last attempt's steps and ranks count."""
    writer = open_store(tmp_path / "run")
    for rank, rows in enumerate(rows_of(Job(steps=200), adds("forward", 30, (0,)))):
        add_rank(writer, rank, rows, attempt=0, state="failed", exit={"code": 1})

    for rank, rows in enumerate(rows_of(Job(steps=60), adds("input_wait", 30, (1,)))):
        add_rank(writer, rank, rows, attempt=1)

    writer.close()
    report = report_on(tmp_path / "run")

    assert report["run"]["attempt"] == 1
    assert report["steps"]["count"] == 60
    assert [rank["state"] for rank in report["ranks"]] == ["finished", "finished"]
    assert (report["verdict"]["kind"], report["verdict"]["ranks"]) == ("INPUT_STRAGGLER", [1])


def test_memory_system_and_telemetry(tmp_path):
    """Samples become peaks and means, growth per step, and the overhead of tracing."""
    writer = open_store(tmp_path / "run", world_size=1)
    stream = add_rank(writer, 0, rows_of(Job(ranks=1, steps=200, grouped=False))[0])
    add_samples(writer, stream, growth=4096)
    writer.close()

    report = report_on(tmp_path / "run")
    memory, host = report["memory"]["by_rank"][0], report["system"]["hosts"][0]

    assert memory["rss_peak_bytes"] == 500 * 2**20 + 195 * 4096
    assert memory["rss_slope_bytes_per_step"] == pytest.approx(4096)
    assert memory["cuda_peak_bytes"] is None
    assert (host["host"], host["cpu_pct"], host["memory_pct"], host["gpus"]) == ("h0", 50.0, 25.0, [])
    assert report["telemetry"]["overhead_us_per_step"] == 4
    assert report["telemetry"]["overhead_share"] == pytest.approx(4 / 14_000, rel=0.1)
    assert report["telemetry"]["bytes_sent"] == 50_000


def test_lost_rows_are_exact(tmp_path):
    """Rows that never arrived are counted: appended rows are stored or lost."""
    writer = open_store(tmp_path / "run", world_size=1)
    rows = rows_of(Job(ranks=1, steps=200, grouped=False))[0]
    stream = add_rank(writer, 0, rows[:100])
    writer.append(stream, "steps", 130, 70, rows[130:].tobytes(), 130, 199)
    writer.close()

    telemetry = report_on(tmp_path / "run")["telemetry"]

    assert (telemetry["rows_stored"], telemetry["rows_lost"], telemetry["rows_appended"]) == (170, 30, 200)


def test_advice_knows_the_loader_and_the_cores(tmp_path):
    """Facts of the loader and the host appear in the advice."""
    writer = open_store(tmp_path / "run", world_size=1)
    stream = add_rank(writer, 0, rows_of(Job(ranks=1, steps=100, grouped=False), adds("input_wait", 20))[0])
    add_samples(writer, stream)
    add_info(writer, stream, kind="loader", dataset="ImageFolder", num_workers=0, in_memory=None)
    writer.close()

    verdict = report_on(tmp_path / "run")["verdict"]

    assert verdict["kind"] == "INPUT_BOUND"
    assert "num_workers=2" in verdict["next"]
    assert "on 8 cores" in verdict["next"]
    assert verdict["evidence"]["dataset"] == "ImageFolder"


def test_a_crowded_host_is_seen_from_the_samples(tmp_path):
    """Waiting for a core, from the process samples, prevents COMM_BOUND and is reported."""
    writer = open_store(tmp_path / "run")
    for rank, rows in enumerate(rows_of(Job(steps=200, comm=10.0))):
        add_samples(writer, add_rank(writer, rank, rows), wait=0.4)

    writer.close()
    verdict = report_on(tmp_path / "run")["verdict"]

    assert verdict["kind"] == "CPU_CONTENTION"
    assert verdict["evidence"]["cpu_wait_share"] == pytest.approx(0.4)
    assert "waited for a CPU core for 40 %" in verdict["summary"]


@pytest.mark.parametrize(
    ("devices", "timed", "expected"),
    [
        (["cpu"], False, None),
        (["mps:0"], False, "mps"),
        (["xpu:1", "cpu"], False, "xpu"),
        (["cuda:0"], False, "cuda"),
        (["cuda:0"], True, None),
        (["meta"], False, None),
    ],
)
def test_an_accelerator_whose_time_is_not_measured_is_named(tmp_path, devices, timed, expected):
    """Phases have CPU time where models are on a device without device times: it is in the report."""
    (tmp_path / "run").mkdir()
    rows = rows_of(Job(ranks=1, steps=60))[0]
    with StoreWriter(tmp_path / "run" / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(world_size=1))
        stream = add_rank(writer, 0, rows)
        for device in devices:
            add_info(writer, stream, kind="model", model="Net", device=device)

        if timed:
            device_rows = np.zeros(60, DEVICE_STEPS.dtype)
            device_rows["step"] = np.arange(60)
            writer.append(stream, DEVICE_STEPS.name, 0, 60, device_rows.tobytes())

    assert report_on(tmp_path / "run")["steps"]["untimed_device"] == expected


@pytest.mark.parametrize("bound", [1_000_000, 1000], ids=["all rows", "blocks of them"])
def test_durations_are_those_of_the_device(tmp_path, bound):
    """A host that runs ahead waits 82 ms for it in each tenth step, after nine of 2 ms: each step takes 10 ms."""
    (tmp_path / "run").mkdir()
    rows = rows_of(Job(ranks=1, steps=4000))[0]
    rows["total_ns"] = np.where(rows["step"] % 10 == 9, 82_000_000, 2_000_000)
    rows["t_end_ns"] = np.cumsum(rows["total_ns"])
    device_rows = np.zeros(4000, DEVICE_STEPS.dtype)
    device_rows["step"], device_rows["total_ns"], device_rows["forward_ns"] = rows["step"], 10_000_000, 9_000_000
    with StoreWriter(tmp_path / "run" / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(world_size=1))
        stream = add_rank(writer, 0, rows)
        writer.append(stream, DEVICE_STEPS.name, 0, 4000, device_rows.tobytes(), 0, 3999)

    steps = report_on(tmp_path / "run", max_step_rows=bound)["steps"]

    assert steps["mean_ms"] == pytest.approx(10, rel=0.01)
    assert (steps["p50_ms"], steps["p99_ms"]) == (pytest.approx(10, rel=0.02), pytest.approx(10, rel=0.02))


def test_a_long_run_is_judged_by_a_sample_and_described_by_all_steps(tmp_path):
    """Beyond the bound the verdict rests on blocks of steps, and the report says so; all figures are of all steps."""
    folder = store_run(tmp_path / "run", Job(steps=2000, callback_every=3), adds("forward", 20, (1,)), seed=1)

    whole, cut = report_on(folder), report_on(folder, max_step_rows=1000)

    assert (whole["steps"]["cut"], cut["steps"]["cut"]) == (False, True)
    assert 300 < cut["steps"]["diagnosed"] <= 500
    assert cut["verdict"]["evidence"]["steps"] == cut["steps"]["diagnosed"]
    assert (cut["verdict"]["kind"], cut["verdict"]["ranks"]) == ("COMPUTE_STRAGGLER", [1])
    assert cut["telemetry"] == whole["telemetry"]
    assert cut["ranks"] == whole["ranks"]
    assert cut["steps"]["count"] == 2000
    assert cut["steps"]["mean_ms"] == pytest.approx(whole["steps"]["mean_ms"], rel=1e-6)
    assert cut["steps"]["per_second"] == whole["steps"]["per_second"]
    for name in ("p50_ms", "p95_ms", "p99_ms"):
        assert cut["steps"][name] == pytest.approx(whole["steps"][name], rel=0.011)

    for mine, expected in zip(cut["phases"], whole["phases"], strict=True):
        assert mine["phase"] == expected["phase"]
        assert mine["mean_ms"] == pytest.approx(expected["mean_ms"], rel=1e-5)
        assert mine["by_rank"][1]["mean_ms"] == pytest.approx(expected["by_rank"][1]["mean_ms"], rel=1e-5)


@pytest.mark.parametrize(("ranks", "steps", "bound"), [(1, 20_000, 4_000), (256, 400, 32_768)])
def test_a_cause_in_the_first_third_is_found(tmp_path, ranks, steps, bound):
    """Waiting for data in the first 35 % of the steps, not in the last ones: SLOWDOWN, with true means."""
    usual = {"input_wait": 1.5, "forward": 20, "backward": 27.5}
    rows = rows_of(Job(ranks=1, steps=steps, grouped=False, own=usual))[0]
    late = rows["step"] < 0.35 * steps
    for name in ("input_wait_ns", "total_ns"):
        rows[name] += np.where(late, 150_000_000, 0)

    rows["t_end_ns"] = np.cumsum(rows["total_ns"])
    writer = open_store(tmp_path / "run", world_size=ranks)
    for rank in range(ranks):
        add_rank(writer, rank, rows)

    writer.close()
    report = report_on(tmp_path / "run", max_step_rows=bound)
    share = {phase["phase"]: phase["share"] for phase in report["phases"]}["input_wait"]
    cost = report["verdict"]["cost_share"]

    assert (report["verdict"]["kind"], report["steps"]["cut"]) == ("SLOWDOWN", True)
    assert report["verdict"]["phase"] == "input_wait"
    assert report["steps"]["diagnosed"] * ranks <= bound
    # The first ten steps are left out.
    assert report["steps"]["mean_ms"] == pytest.approx(rows["total_ns"][10:].mean() / 1e6, rel=1e-5)
    assert report["steps"]["mean_ms"] == pytest.approx(102, rel=0.04)
    assert share == pytest.approx(0.53, abs=0.02)
    assert cost == pytest.approx(0.53, abs=0.05)


def test_a_run_whose_old_rows_were_thinned_is_judged_evenly(tmp_path):
    """No part of the run counts more because more of its rows are left; all figures are still of all steps."""
    rows = rows_of(Job(ranks=2, steps=40_000, grouped=False))
    for of_rank in rows:
        for name in ("input_wait_ns", "total_ns"):
            of_rank[name] += np.where(of_rank["step"] < 14_000, 14_000_000, 0)

    writer = open_store(tmp_path / "run")
    streams = [add_rank(writer, rank, of_rank[:0]) for rank, of_rank in enumerate(rows)]
    for first in range(0, 40_000, 1000):
        for stream, of_rank in zip(streams, rows, strict=True):
            writer.append(stream, "steps", first, 1000, of_rank[first : first + 1000].tobytes(), first, first + 999)

        writer.commit(now_s=first)
        while writer.maintain(1.0, limit_bytes=800_000, now_s=first):
            pass

    writer.close()
    report = report_on(tmp_path / "run")
    total = np.concatenate([of_rank["total_ns"][10:] for of_rank in rows])
    with StoreReader(tmp_path / "run" / STORE_NAME) as reader:
        assert reader.thinned("steps") > 30_000

    assert (report["steps"]["cut"], report["steps"]["count"]) == (True, 40_000)
    assert report["steps"]["mean_ms"] == pytest.approx(total.mean() / 1e6, rel=1e-5)
    waiting = next(finding for finding in report["findings"] if finding["kind"] == "SLOWDOWN")
    assert waiting["cost_share"] == pytest.approx(14 * 0.35 / (total.mean() / 1e6), abs=0.03)
    assert report["telemetry"]["rows_stored"] == 80_000


def test_samples_of_a_long_run_are_thinned_and_their_extremes_exact(tmp_path, monkeypatch):
    """Of many frames of samples some are read; peaks and means are of all."""
    monkeypatch.setattr(run_summary_reader, "_SAMPLE_FRAMES", 64)
    writer = open_store(tmp_path / "run", world_size=1)
    stream = add_rank(writer, 0, rows_of(Job(ranks=1, steps=100, grouped=False))[0])
    rows, host = np.zeros(500, PROCESS.dtype), np.zeros(500, HOST.dtype)
    rows["t_ns"] = host["t_ns"] = np.arange(500) * 10**9
    rows["rss_bytes"], rows["step"] = 10**6 + np.arange(500) * 100, np.arange(500)
    rows["rss_bytes"][333], rows["main_run_ns"], rows["main_wait_ns"] = 10**9, rows["t_ns"], rows["t_ns"] // 4
    host["cpu_pct"], host["memory_used_bytes"], host["memory_total_bytes"] = np.arange(500) % 2 * 50, 1, 4
    for at in range(500):
        writer.append(stream, "process", at, 1, rows[at : at + 1].tobytes())
        writer.append(stream, "host", at, 1, host[at : at + 1].tobytes())
        writer.commit()

    writer.close()
    report, series = report_on(tmp_path / "run"), read_series(tmp_path / "run")
    memory, found = report["memory"]["by_rank"][0], report["system"]["hosts"][0]

    assert memory["rss_peak_bytes"] == 10**9
    assert memory["rss_slope_bytes_per_step"] == pytest.approx(100)
    assert (found["cpu_pct"], found["memory_pct"]) == (25.0, 25.0)
    assert report["verdict"]["evidence"]["cpu_wait_share"] == pytest.approx(0.2)
    assert len(series.memory[0].values) == pytest.approx(64, abs=3)
    assert series.memory[0].seconds[-1] - series.memory[0].seconds[0] == 499


def test_a_running_run_can_be_reported(tmp_path):
    """The store is read while its writer has it open."""
    writer = open_store(tmp_path / "run", state="running", ended=None)
    for rank, rows in enumerate(rows_of(Job(steps=100))):
        add_rank(writer, rank, rows, state="running")

    writer.commit()
    report = report_on(tmp_path / "run")

    assert report["run"]["state"] == "running"
    assert report["run"]["ended"] is None
    assert report["steps"]["count"] == 100
    writer.close()


def test_a_run_that_nobody_keeps_is_lost(tmp_path):
    """A running run whose aggregator is gone is lost; it ended when the store was last written."""
    writer = open_store(tmp_path / "run", state="running", ended=None, world_size=1)
    add_rank(writer, 0, rows_of(Job(ranks=1, steps=50, grouped=False))[0], state="running")
    import socket

    from traceml.clock import boot_id

    writer.put_meta(
        "aggregator", {"pid": 2**22 + 1, "start_ticks": 1, "boot_id": boot_id(), "host": socket.gethostname()}
    )
    writer.close()
    for path in (tmp_path / "run").iterdir():
        os.utime(path, (STARTED + 60, STARTED + 60))

    report = report_on(tmp_path / "run")
    run = report["run"]

    assert run["state"] == "lost"
    assert [rank["state"] for rank in report["ranks"]] == ["lost"]
    assert (run["ended"], run["duration_s"]) == (STARTED + 60, 60)
    assert not any("Wait for more" in finding["next"] for finding in report["findings"])


def test_the_file_is_valid_json_and_appears_whole(tmp_path):
    """The file has no NaN and is written atomically, without other files left."""
    folder = store_run(tmp_path / "run", Job(steps=50))

    path = save_report(folder, build_report(folder))
    report = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    assert report["run"]["id"] == "run"
    assert not list(folder.glob(".report.json-*"))


def test_a_missing_store_is_reported(tmp_path):
    """Without a store there is no report."""
    with pytest.raises(StoreError, match="no run's store"):
        report_on(tmp_path)


def test_steps_are_counted_from_the_rows_of_the_rank_that_got_furthest(tmp_path):
    """A rank that ended early does not shorten the run."""
    writer = open_store(tmp_path / "run")
    rows = rows_of(Job(steps=300))
    add_rank(writer, 0, rows[0])
    add_rank(writer, 1, rows[1][:120])
    writer.close()

    report = report_on(tmp_path / "run")

    assert report["steps"]["count"] == 300
    assert [rank["steps"] for rank in report["ranks"]] == [300, 120]
    assert np.allclose([len(phase["by_rank"]) for phase in report["phases"]], 2)


def test_a_finding_names_the_line(tmp_path):
    """From the store's rows and names: file, line and function are in the report."""
    writer = open_store(tmp_path / "run", world_size=1)
    stream = add_rank(writer, 0, rows_of(Job(ranks=1, steps=100, grouped=False), adds("other", 30))[0])
    for number, text in ((7, "/home/me/train.py:23 update_metric"), (8, "/home/me/train.py:9 forward")):
        writer.append(stream, "names", writer.next_seq(stream, "names"), 1, msgpack.packb({"id": number, "name": text}))

    rows = np.zeros(2, LINES.dtype)
    rows["phase"], rows["line_id"], rows["library_id"], rows["samples"] = [-1, 2], [7, 8], -1, [70, 30]
    writer.append(stream, "lines", 0, 2, rows.tobytes())
    writer.close()

    report = report_on(tmp_path / "run")

    assert report["verdict"]["evidence"]["function"] == "update_metric"
    assert [(line["phase"], line["line"], line["samples"]) for line in report["lines"]] == [
        ("other", 23, 70), ("forward", 9, 30),
    ]  # fmt: skip


@pytest.mark.parametrize(("state", "is_unknown"), [("lost", True), ("running", True), ("lost", False)])
def test_losses_of_a_host_out_of_reach_are_unknown(tmp_path, state, is_unknown):
    """What a rank appended after its host was lost is not known: no number is told, unless it still runs."""
    writer = open_store(tmp_path / "run", world_size=1)
    add_rank(writer, 0, rows_of(Job(ranks=1, steps=50, grouped=False))[0], state=state, total_unknown=is_unknown)
    writer.close()

    telemetry = report_on(tmp_path / "run")["telemetry"]

    assert telemetry["rows_stored"] == 50
    assert telemetry["rows_lost"] == (None if state == "lost" and is_unknown else 0)
    assert (telemetry["rows_appended"] is None) == (state == "lost" and is_unknown)


def test_the_source_of_a_run_is_in_its_report(tmp_path):
    """Commit and branch are those that the process read; without git itself nobody knows of uncommitted changes."""
    with open_store(tmp_path / "run") as writer:
        stream = add_rank(writer, 0, rows_of(Job(steps=5))[0])
        add_info(writer, stream, kind="process", git={"commit": "c0ffee", "branch": "main"})

    run = report_on(tmp_path / "run")["run"]
    assert [run["commit"], run["branch"], run["dirty"]] == ["c0ffee", "main", None]


def test_what_was_read_of_the_source_is_in_the_report(tmp_path):
    """Uncommitted changes, packages and variables, and why there are none."""
    git = {"commit": "c0ffee", "dirty": True, "remote": "host:repo", "diff": "-a\n+b", "diff_truncated": True}
    environment = {"packages": "numpy==2.3.1\ntorch==2.9", "variables": {"RANK": "0"}}
    with open_store(tmp_path / "run") as writer:
        add_rank(writer, 0, rows_of(Job(steps=5))[0])
        writer.event(SOURCE, SourceReading(1, {"git": git, "environment": environment}, "late").to_event())

    report = report_on(tmp_path / "run")
    assert [report["run"]["commit"], report["run"]["dirty"]] == ["c0ffee", True]
    assert report["source"] == {
        "remote": "host:repo", "diff": "-a\n+b", "diff_truncated": True,
        "packages": {"numpy": "2.3.1", "torch": "2.9"}, "variables": {"RANK": "0"},
        "not_read": "reading took too long",
    }  # fmt: skip


def test_a_run_outside_a_repository_has_no_source(tmp_path):
    """There is no commit, and a value that is no text is none."""
    with open_store(tmp_path / "run") as writer:
        stream = add_rank(writer, 0, rows_of(Job(steps=5))[0])
        add_info(writer, stream, kind="process", git={"commit": 7})

    run = report_on(tmp_path / "run")["run"]
    assert [run["commit"], run["branch"], run["dirty"]] == [None, None, None]
