"""A run as a trace."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest

from tests.runs.export.exported import BOOT_NS, STEPS, S, events_in, innermost, nested, rich_run, slices_by_track
from traceml.runs.export import step_tracks
from traceml.runs.export.exporter import export_run
from traceml.runs.run import Run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return rich_run(tmp_path_factory.mktemp("runs") / "rich")


@pytest.fixture(scope="module")
def perfetto(run_dir):
    path = run_dir.parent / "trace.json"
    exported = export_run(run_dir, "perfetto", path)
    assert exported.damage == ()
    assert exported.steps == 2 * STEPS
    return events_in(path)


@pytest.fixture(scope="module")
def pfw(run_dir):
    export_run(run_dir, "pfw", run_dir.parent / "trace.pfw.gz")
    return events_in(run_dir.parent / "trace.pfw.gz")


REQUIRED = {
    "X": {"name": str, "cat": str, "ts": (int, float), "dur": (int, float), "pid": int, "tid": int, "args": dict},
    "C": {"name": str, "ts": (int, float), "pid": int, "args": dict},
    "i": {"name": str, "ts": (int, float), "pid": int, "tid": int, "s": str},
    "s": {"name": str, "cat": str, "id": int, "ts": (int, float), "pid": int, "tid": int},
    "f": {"name": str, "cat": str, "id": int, "ts": (int, float), "pid": int, "tid": int, "bp": str},
    "M": {"name": str, "pid": int, "tid": int, "args": dict},
}


@pytest.mark.parametrize("form", ["perfetto", "pfw"])
def test_events_keep_to_the_trace_event_format(form, request):
    """Each event has the fields of its kind with the right types; counters have only numbers."""
    events = request.getfixturevalue(form)
    assert {event["ph"] for event in events} == set(REQUIRED)
    for event in events:
        for key, kind in REQUIRED[event["ph"]].items():
            assert isinstance(event[key], kind), (key, event)

        assert event.get("dur", 0) >= 0
        assert event.get("ts", 0) >= 0
        if event["ph"] == "C":
            assert all(isinstance(value, (int, float)) for value in event["args"].values()), event


@pytest.mark.parametrize("form", ["perfetto", "pfw"])
def test_slices_nest(form, request):
    """Phases are inside their steps, and no slice exceeds its parent."""
    tracks = slices_by_track(request.getfixturevalue(form))
    depths = {(each["name"], depth) for tid in (10, 20) for each, depth in nested(tracks[tid])}

    assert {name for name, depth in depths if depth == 1} == {"step"}
    assert {name for name, depth in depths if depth == 2} == {
        "input_wait", "forward", "backward", "wait", "optimizer", "augment", "user", "other",
    }  # fmt: skip
    for tid in (11, 21):
        assert {(each["name"], depth) for each, depth in nested(tracks[tid])} == {
            ("step", 1), ("forward", 2), ("backward", 2),
        }  # fmt: skip


def test_phases_follow_each_other_in_order(perfetto):
    """Inside a step they stand in the order in which a training step does them, without gaps."""
    track = [each for each, depth in nested(slices_by_track(perfetto)[10]) if depth == 2][:8]

    names = [each["name"] for each in track]
    assert names == ["input_wait", "forward", "backward", "wait", "optimizer", "augment", "user", "other"]
    for one, two in pairwise(track):
        assert two["ts"] == pytest.approx(one["ts"] + one["dur"], abs=1e-6)


def test_durations_are_those_of_the_rows(run_dir, perfetto):
    """The sums of slices by name equal those in the store, to the nanosecond."""
    steps = Run(run_dir).steps()
    sums = defaultdict(int)
    for event in perfetto:
        if event["ph"] == "X" and event["tid"] in (10, 20):
            sums[event["name"]] += round(event["dur"] * 1000)

    assert sums["step"] == steps["total_ns"].sum()
    for name in ("input_wait", "forward", "optimizer", "other"):
        assert sums[name] == steps[f"{name}_ns"].sum(), name

    assert sums["augment"] + sums["user"] == steps["user_ns"].sum()
    assert sums["backward"] + sums["wait"] == steps["backward_ns"].sum()
    measured = steps["backward_own_ns"] >= 0
    assert sums["wait"] == (steps["backward_ns"] - steps["backward_own_ns"])[measured].sum()


def test_arrows_lead_from_the_slow_rank(perfetto):
    """Measured waiting has an arrow from rank 1 to rank 0's wait; never back in time."""
    tracks = slices_by_track(perfetto)
    ends = defaultdict(dict)
    for event in perfetto:
        if event["ph"] in "sf":
            ends[event["id"]][event["ph"]] = event

    assert len(ends) == STEPS // 4
    assert Counter((pair["s"]["pid"], pair["f"]["pid"]) for pair in ends.values()) == {(2, 1): STEPS // 4}
    for pair in ends.values():
        assert pair["s"]["ts"] <= pair["f"]["ts"]
        assert innermost(tracks[20], pair["s"]["ts"]) in ("wait", "backward")
        assert innermost(tracks[10], pair["f"]["ts"]) == "wait"


def test_hosts_lie_on_one_time_line(pfw):
    """Different monotonic and wall clocks of a host do not move its events."""
    steps = {
        pid: [e["ts"] for e in pfw if e["ph"] == "X" and e["name"] == "step" and e["pid"] == pid] for pid in (1, 2)
    }
    apart_us = np.abs(np.array(steps[1][:STEPS]) - np.array(steps[2][:STEPS]))
    assert apart_us.max() < 100_000

    losses = [e["ts"] for e in pfw if e["ph"] == "C" and e["name"] == "loss"]
    assert sorted(losses) == [BOOT_NS // 1000] * 2 + [(BOOT_NS + 2 * S) // 1000] * 2


def test_processes_are_named(perfetto):
    names = {e["pid"]: e["args"] for e in perfetto if e["ph"] == "M" and e["name"] == "process_name"}

    assert {pid: args["name"] for pid, args in names.items()} == {
        1: "rank 0 (h0)", 2: "rank 1 (h1)", 1_000_000: "host h0", 1_000_001: "host h1", 1_000_002: "host aggregator",
    }  # fmt: skip
    assert (names[2]["rank"], names[2]["host"], names[2]["os_pid"]) == (1, "h1", 101)


def test_counters_and_marks(perfetto):
    """Memory, CPU, devices and metrics are counters; events and values that are not numbers are instants."""
    counters = {(e["pid"], e["name"]) for e in perfetto if e["ph"] == "C"}
    marks = {e["name"]: e for e in perfetto if e["ph"] == "i"}

    of_rank = {(1, name) for name in ("memory", "cpu", "device 0 memory", "loss")}
    assert of_rank | {(1_000_000, "cpu"), (1_000_000, "memory"), (1_000_000, "gpu 0")} <= counters
    assert {"grad is nan", "warning", "text note", "verdict COMPUTE_STRAGGLER"} <= set(marks)
    assert marks["text note"]["args"]["text"] == 'hello, "world"\nü'
    assert marks["verdict COMPUTE_STRAGGLER"]["s"] == "g"


def test_device_steps_are_complete(perfetto):
    """Also those of steps that waited for their user phases to the end."""
    steps = [event["args"]["step"] for event in perfetto if event.get("cat") == "device" and event["name"] == "step"]

    assert sorted(steps) == sorted([*range(STEPS)] * 2)


def test_blocks_of_any_size_give_the_same_trace(run_dir, perfetto, tmp_path, monkeypatch):
    """Rows that wait for rows of another table, or of another rank, are written as in one block."""
    monkeypatch.setattr(step_tracks, "_MAX_ROWS", 70)
    monkeypatch.setattr(step_tracks, "_CELLS", 100)
    export_run(run_dir, "perfetto", tmp_path / "blocks.json")

    assert comparable(events_in(tmp_path / "blocks.json")) == comparable(perfetto)


def comparable(events):
    """Return events without their numbers, which depend on their order; arrows as pairs of ends."""
    ends = defaultdict(list)
    plain = []
    for event in events:
        text = json.dumps({key: value for key, value in event.items() if key != "id"}, sort_keys=True)
        if event["ph"] in "sf":
            ends[event["id"]].append(text)
        else:
            plain.append(text)

    return Counter(plain), Counter("".join(sorted(each)) for each in ends.values())


def test_many_ranks(tmp_path):
    """Every step of every rank is there, and each rank that was released has its arrow."""
    run_dir = rich_run(tmp_path / "many", ranks=40, steps=60, user_ms=0)
    exported = export_run(run_dir, "perfetto", tmp_path / "many.json.gz")
    events = events_in(exported.path)

    assert sum(e["ph"] == "X" and e["name"] == "step" and e["cat"] == "step" for e in events) == 2400
    assert sum(e["ph"] == "f" for e in events) == 15 * 39
