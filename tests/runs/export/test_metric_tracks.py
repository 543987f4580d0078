"""Logged values in a trace: every value is there, whatever the sizes of blocks."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from tests.runs.export.exported import BOOT_NS, S, add_stream, comparable, events_in
from tests.runs.fabricated_store import run_facts
from traceml.database.schema import METRICS
from traceml.database.store.store import StoreWriter
from traceml.run_folder import STORE_NAME
from traceml.runs.export import event_blocks, sample_tracks
from traceml.runs.export.exporter import export_run

NAMES = {1: "loss", 2: '100 % "ü"', 3: "grad/norm"}
SHIFT_NS = 3600 * S  # by which the second rank's wall clock is wrong


def logged(seed: int, count: int = 300) -> Any:
    """Return rows of values of every kind; the number 9 has no name."""
    random = np.random.default_rng(seed)
    rows = np.zeros(count, METRICS.dtype)
    rows["t_ns"] = BOOT_NS + np.sort(random.integers(0, 100 * S, count)) + seed * SHIFT_NS
    rows["step"], rows["name_id"] = np.arange(count) - 5, random.choice([1, 2, 3, 9], count)
    rows["value"] = random.choice([0.1, -3.0, 1e-9, 1e300, math.nan, math.inf, -math.inf], count)
    return rows


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of two ranks that logged values, in frames of 7 rows."""
    folder = tmp_path / "run"
    folder.mkdir()
    with StoreWriter(folder / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(id="run", world_size=2))
        streams = [add_stream(writer, rank, f"h{rank}", wall_ns=BOOT_NS + rank * SHIFT_NS) for rank in range(2)]
        for stream in streams:
            for place, (number, name) in enumerate(NAMES.items()):
                writer.append(stream, "names", place, 1, msgpack.packb({"id": number, "name": name}))

        for start in range(0, 300, 7):  # frames of both in turns
            for rank, stream in enumerate(streams):
                part = logged(rank)[start : start + 7]
                writer.append(stream, METRICS.name, start, len(part), part.tobytes())

    return folder


def expected() -> Counter[str]:
    """Return the events of all rows, each made by itself, as text."""
    events: Counter[str] = Counter()
    for rank in range(2):
        for t_ns, step, number, value, *_ in logged(rank).tolist():
            name, at_ns = NAMES.get(number, f"(name {number})"), t_ns - rank * SHIFT_NS
            event = {"cat": "metric", "pid": rank + 1, "tid": 10 * (rank + 1) + 3, "ts": (at_ns - BOOT_NS) / 1000}
            if math.isfinite(value):
                event |= {"name": name, "ph": "C", "args": {"value": value}}
            else:
                args = {"metric": name, "step": step, "value": str(value)}
                event |= {"name": f"{name} is {value}", "ph": "i", "s": "t", "args": args}

            events[json.dumps(event, sort_keys=True)] += 1

    return events


def found(path: Path) -> Counter[str]:
    metrics = (event for event in events_in(path) if event.get("cat") == "metric")
    return comparable(metrics)


@pytest.mark.parametrize(("waiting", "block"), [(1, 1), (50, 16), (32_768, 16_384)])
def test_every_value_is_an_event(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waiting: int, block: int
) -> None:
    """Finite values are counters, others instants with the step, at the time of the aggregator's clock."""
    monkeypatch.setattr(event_blocks, "_MAX_ROWS", waiting)
    monkeypatch.setattr(sample_tracks, "_METRIC_BLOCK", block)
    result = export_run(run_dir, "perfetto", tmp_path / "out.json")

    assert not result.damage
    assert found(result.path) == expected()


def test_values_of_a_counter_are_in_order(run_dir: Path, tmp_path: Path) -> None:
    """A value stays before those that were logged after it, as viewers join them by lines."""
    export_run(run_dir, "pfw", tmp_path / "out.pfw")
    times: dict[tuple[int, str], list[int]] = {}
    for event in events_in(tmp_path / "out.pfw"):
        if event["ph"] == "C":
            times.setdefault((event["pid"], event["name"]), []).append(event["ts"])

    assert len(times) == 2 * 4
    assert all(each == sorted(each) for each in times.values())
