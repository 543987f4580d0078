"""The timeline of a simulated job, as Perfetto reads it."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest

from tests.whatif.generated_job import GeneratedJob, slow_worker
from traceml.whatif.ideal_timeline import write_timeline
from traceml.whatif.simulation import Simulator
from traceml.whatif.trace_loading import load_job


@pytest.mark.parametrize("chunks", [1, 2])
def test_no_slice_overlaps_another_one_of_its_track(chunks, tmp_path):
    """Perfetto drops a slice that ends after the one in which it begins; transfers of two kinds are open at once."""
    job = GeneratedJob(chunks=chunks, steps=2, seconds=slow_worker).run()
    for row in job.rows:
        if row["optype"] == "forward-compute" and row["seq_id"]:
            row["start_ts"] -= 3e-5  # as clocks have it: before the one before has ended

    simulator = Simulator(load_job(*job.write(tmp_path)))
    count = write_timeline(simulator, tmp_path / "steps.json")
    events = json.loads((tmp_path / "steps.json").read_text())["traceEvents"]
    tracks = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            end = round(1000 * event["ts"]) + round(1000 * event["dur"])
            tracks[event["pid"], event["tid"]].append((round(1000 * event["ts"]), -end))

    assert count == sum(map(len, tracks.values())) == 2 * len(job.rows)
    for slices in tracks.values():
        open_ = []
        for begin, end in sorted(slices):
            open_ = [each for each in open_ if each > begin]
            assert all(-end <= each for each in open_)
            open_.append(-end)


def test_slices_have_their_times(tmp_path):
    """What ends in time is not cut."""
    job = GeneratedJob(steps=1).run()
    write_timeline(Simulator(load_job(*job.write(tmp_path))), tmp_path / "steps.json")
    events = json.loads((tmp_path / "steps.json").read_text())["traceEvents"]
    recorded = [event for event in events if event["ph"] == "X" and event["pid"] < job.dp]

    assert sum(event["dur"] for event in recorded) == pytest.approx(1e6 * sum(row["duration"] for row in job.rows))
