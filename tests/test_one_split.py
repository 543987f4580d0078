"""One split of a step into own work, waiting and device time: the same figures in every outlet."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runs.export.exported import events_in
from tests.runs.fabricated_store import STARTED, add_info, add_rank, run_facts
from traceml.database.schema import DEVICE_STEPS, PHASE_LABELS, STEPS, StepFlag, pack_bits
from traceml.database.store.reader import StoreReader
from traceml.database.store.store import StoreWriter
from traceml.diagnosis.steps.own_work import own_work_of
from traceml.diagnosis.steps.step_split import DEVICE_LABELS
from traceml.run_folder import STORE_NAME
from traceml.runs.export.exporter import export_run
from traceml.runs.live_run import LiveRun
from traceml.runs.report.report import build_report
from traceml.runs.rows.run_summary_reader import read_run_summary
from traceml.runs.rows.series import read_series
from traceml.track.delivery.derived import INPUT_TABLES, DerivedMetrics
from traceml.track.tracker_state import DerivedState

N, PERIOD, MS = 210, 5, 1_000_000
SHARES = Callable[[Path], dict[str, float]]
# Milliseconds of the phases: on the CPU, of the launches on the CPU, and on the device.
CPU = {"input_wait": 5, "h2d": 3, "forward": 20, "backward": 40, "optimizer": 6, "comm": 2, "checkpoint": 1}
LAUNCHES = {"input_wait": 20, "h2d": 1, "forward": 1, "backward": 1, "optimizer": 1, "comm": 1, "checkpoint": 1}
DEVICE = {"h2d": 5, "forward": 25, "backward": 30, "optimizer": 5, "comm": 2}


def pattern(rank: int, most: int) -> np.ndarray[Any, Any]:
    """Return extra time of a rank's steps, with a period of five steps: any ten steps have the same mean."""
    return np.tile(np.random.default_rng(rank).integers(0, most + 1, PERIOD), N // PERIOD) * MS


def step_rows(rank: int, *, device: bool, measured_every: int, timed_every: int) -> np.ndarray[Any, Any]:
    """Return step rows of 110 ms; the pattern adds to waiting for data and to waiting for others."""
    rows = np.zeros(N, STEPS.dtype)
    rows["step"], rows["total_ns"] = np.arange(N), 110 * MS
    for name, ms in (LAUNCHES if device else CPU).items():
        rows[f"{name}_ns"] = ms * MS

    rows["input_wait_ns"] += pattern(rank, 20)
    rows["backward_ns"] += 0 if device else pattern(rank, 10)
    measured = np.arange(N) % measured_every == 0
    rows["backward_own_ns"] = np.where(measured & (not device), 28 * MS, -1)
    rows["t_end_ns"] = np.cumsum(rows["total_ns"])
    timed = np.arange(N) % timed_every == 0
    rows["bits"] = np.where(timed & device, pack_bits(1, int(StepFlag.DEVICE), 0), pack_bits(1, 0, 0))
    return rows


def device_rows(rank: int) -> np.ndarray[Any, Any]:
    """Return device rows of the same steps."""
    rows = np.zeros(N, DEVICE_STEPS.dtype)
    rows["step"], rows["total_ns"], rows["backward_own_ns"] = np.arange(N), 110 * MS, 21 * MS
    for name, ms in DEVICE.items():
        rows[f"{name}_ns"] = ms * MS

    rows["backward_ns"] += pattern(rank + 10, 10)
    return rows


def run_of(folder: Path, *, ranks: int, device: bool, measured_every: int = 1, timed_every: int = 1) -> Path:
    """Write a store; device rows, of some steps, come a frame after the rows of their steps."""
    folder.mkdir()
    with StoreWriter(folder / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(id=folder.name, world_size=ranks))
        for rank in range(ranks):
            rows = step_rows(rank, device=device, measured_every=measured_every, timed_every=timed_every)
            stream = add_rank(writer, rank, rows, clock=[0, int(STARTED * 1e9)], world_size=ranks)
            timed = device_rows(rank)[::timed_every]
            for start in range(0, len(timed), 64) if device else ():
                part = timed[start : start + 64]
                writer.append(stream, DEVICE_STEPS.name, start, len(part), part.tobytes())

    return folder


def run_without_collectives(folder: Path, parallel: str | None) -> Path:
    """Write a store of two ranks in a process group, no step of which has a collective called from Python."""
    folder.mkdir()
    with StoreWriter(folder / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(id=folder.name, world_size=2))
        for rank in range(2):
            rows = step_rows(rank, device=False, measured_every=1, timed_every=1)
            rows["comm_ns"] = 0
            stream = add_rank(writer, rank, rows[:0], clock=[0, int(STARTED * 1e9)], world_size=2)
            add_info(writer, stream, kind="group", group_size=2, backends="cpu:gloo")
            add_info(writer, stream, kind="model", parameters=1000, **({"parallel": parallel} if parallel else {}))
            add_rank(writer, rank, rows)

    return folder


def of_report(run: Path) -> dict[str, float]:
    """Shares in the report."""
    return {phase.phase: phase.share for phase in build_report(run).phases}


def of_live_view(run: Path) -> dict[str, float]:
    """Shares on the live panel and the page."""
    live = LiveRun(run)
    live.refresh()
    return {phase.phase: phase.share for phase in live.report().phases}


def of_charts(run: Path) -> dict[str, float]:
    """Shares over all bins of the chart of phases."""
    series = read_series(run).steps
    weights = np.minimum(series.width, N - series.steps)
    times = {name: float((values * weights).sum()) for name, values in series.phases_ms.items()}
    return {name: value / sum(times.values()) for name, value in times.items()}


def of_tracker(run: Path) -> dict[str, float]:
    """Shares that trackers receive."""
    state: DerivedState = {}
    derived = DerivedMetrics(state, 10_000.0, STARTED)
    with closing(StoreReader(run / STORE_NAME)) as reader:
        streams = {stream.id: stream for stream in reader.streams()}
        metrics = [
            row for frame in reader.frames_of(INPUT_TABLES, 0) for row in derived.take(frame, streams[frame.stream])
        ]

    metrics += derived.finish()
    return {row.name.removeprefix("traceml/share/"): row.value for row in metrics if "/share/" in row.name}


def of_verdict(run: Path) -> dict[str, float]:
    """Shares of own work in the rules' work, which leave out waiting."""
    with closing(StoreReader(run / STORE_NAME)) as reader:
        summary = read_run_summary(reader)

    work = own_work_of(summary.kept.aligned(last=N), summary.facts_builder.build())
    return {name: float(values.mean()) / work.step_ns for name, values in work.parts.items()}


def of_trace(run: Path) -> dict[str, float]:
    """Shares of the slices of an exported trace; where there are device times, those of the device's track."""
    path = export_run(run, "perfetto", run / "trace.json").path
    times: dict[str, float] = {}
    slices = [event for event in events_in(path) if event["ph"] == "X" and event["name"] != "step"]
    drawn = [event for event in slices if event["cat"] in ("device", "comm") and event["tid"] % 10 == 1] or slices
    for event in drawn:
        name = "comm" if event["name"] == "wait" else event["name"]
        times[name] = times.get(name, 0) + event["dur"]

    whole = sum(event["dur"] for event in events_in(path) if event["ph"] == "X" and event["name"] == "step")
    return {name: value / (whole / 2 if drawn is not slices else whole) for name, value in times.items()}


@pytest.mark.parametrize("outlet", [of_live_view, of_charts, of_tracker, of_verdict, of_trace])
@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_outlet_has_the_reports_figures(tmp_path: Path, ranks: int, device: bool, outlet: SHARES) -> None:
    """Alone or in a group, on the CPU or on a device, a phase has one share of the step."""
    run = run_of(tmp_path / "run", ranks=ranks, device=device)
    expected, found = of_report(run), outlet(run)

    assert expected["forward"] == pytest.approx((DEVICE if device else CPU)["forward"] / 110, rel=1e-3)
    assert sum(expected.values()) == pytest.approx(1)
    if outlet is of_verdict:
        expected = {name: share for name, share in expected.items() if name != "comm" or ranks == 1}
    elif outlet is of_trace and device:
        expected = {name: share for name, share in expected.items() if name in DEVICE_LABELS}

    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("outlet", [of_live_view, of_charts, of_tracker, of_verdict, of_trace])
@pytest.mark.parametrize(
    ("parallel", "waits"), [(None, False), ("ddp", True)], ids=["no collectives", "gradients averaged"]
)
def test_ranks_that_call_no_collectives_wait_for_nobody(
    tmp_path: Path, parallel: str | None, waits: bool, outlet: SHARES
) -> None:
    """Backward after the last gradient is own work of the ranks of a group that nothing uses."""
    run = run_without_collectives(tmp_path / "run", parallel)
    expected, found = of_report(run), outlet(run)

    assert (expected.get("comm", 0) > 0.1) == waits
    assert found["backward"] == pytest.approx(expected["backward"], rel=1e-3)
    assert outlet is of_verdict or found.get("comm", 0) == pytest.approx(expected.get("comm", 0), rel=1e-3)


@pytest.mark.parametrize("device", [False, True])
def test_waiting_counts_as_communication_in_a_group_only(tmp_path: Path, device: bool) -> None:
    """A single rank does not wait: all of its backward is own work."""
    alone, group = (of_report(run_of(tmp_path / str(ranks), ranks=ranks, device=device)) for ranks in (1, 2))
    own = 21 if device else 28

    assert alone["comm"] == pytest.approx(2 / 110, rel=1e-3)
    assert group["backward"] == pytest.approx(own / 110, rel=1e-3)
    assert group["comm"] > 2 * alone["comm"]


@pytest.mark.parametrize("outlet", [of_live_view, of_charts, of_tracker, of_verdict])
def test_own_backward_measured_now_and_then_stands_for_all_steps(tmp_path: Path, outlet: SHARES) -> None:
    """If every fifth step measures it, the mean of those counts for the others."""
    run = run_of(tmp_path / "run", ranks=2, device=False, measured_every=PERIOD)

    assert of_report(run)["backward"] == pytest.approx(28 / 110, rel=1e-3)
    assert outlet(run)["backward"] == pytest.approx(28 / 110, rel=1e-3)


@pytest.mark.parametrize("outlet", [of_live_view, of_charts, of_tracker, of_verdict])
def test_device_times_measured_now_and_then_stand_for_all_steps(tmp_path: Path, outlet: SHARES) -> None:
    """If every third step has device times, their mean counts for the others, whose CPU times are only launches."""
    run = run_of(tmp_path / "run", ranks=2, device=True, timed_every=3)
    expected, found = of_report(run), outlet(run)

    for shares in (expected, found):
        assert {name: shares[name] for name in ("h2d", "forward", "optimizer", "backward")} == pytest.approx(
            {"h2d": 5 / 110, "forward": 25 / 110, "optimizer": 5 / 110, "backward": 21 / 110}, rel=1e-3
        )
        assert shares["input_wait"] == pytest.approx(expected["input_wait"], rel=0.03)


def test_phases_of_the_schema_are_those_of_the_report(tmp_path: Path) -> None:
    """No phase column is left out of the split."""
    run = run_of(tmp_path / "run", ranks=1, device=False)

    assert set(of_report(run)) == {*PHASE_LABELS} - {"user"} | {"other"}
