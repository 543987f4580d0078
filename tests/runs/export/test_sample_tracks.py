"""Samples in a trace: every one is there, whatever the sizes of frames and blocks."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runs.export.exported import S, add_stream, comparable, events_in
from tests.runs.fabricated_store import run_facts
from traceml.database.schema import GPU, HOST, PROCESS, TORCH_MEMORY, Table
from traceml.database.store.store import StoreWriter
from traceml.run_folder import STORE_NAME
from traceml.runs.export import event_blocks, sample_tracks
from traceml.runs.export.exporter import export_run

HOSTS = ("a", "a", "b")
GPU_FIELDS = ("utilization_pct", "memory_used_bytes", "temperature_c", "power_w", "sm_clock_mhz")


def sampled(table: Table, rank: int, count: int = 60) -> Any:
    """Return rows of a rank; some have the time of the one before, and some numbers are unknown."""
    random = np.random.default_rng(rank)
    rows = np.zeros(count, table.dtype)
    for name in rows.dtype.names:
        rows[name] = random.integers(0, 10**9, count)
        if rows[name].dtype.kind == "f":
            rows[name] = random.choice([0.1, 33.3, 100.0, -1.0, math.nan], count)

    rows["t_ns"] = np.sort(random.integers(0, 50, count)) * S
    for name in {"cpu_ns"} & set(rows.dtype.names):
        rows[name] = np.cumsum(rows[name])
    for name in {"device", "index"} & set(rows.dtype.names):
        rows[name] = random.integers(0, 3, count)

    return rows


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of two ranks on one host and one on another, in frames of 7 rows."""
    folder = tmp_path / "run"
    folder.mkdir()
    with StoreWriter(folder / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(id="run", world_size=3))
        for rank, host in enumerate(HOSTS):
            stream = add_stream(writer, rank, host)
            for table in (PROCESS, TORCH_MEMORY, HOST, GPU):
                rows = sampled(table, rank)
                for start in range(0, len(rows), 7):
                    part = rows[start : start + 7]
                    writer.append(stream, table.name, start, len(part), part.tobytes())

    return folder


def expected() -> Counter[str]:
    """Return the events of all rows, each made by itself, as text."""
    events: Counter[str] = Counter()

    def count(pid: int, name: str, row: Any, args: dict[str, Any]) -> None:
        tid = pid * 10 + (3 if pid < 1_000_000 else 0)
        event = {"cat": "sample", "name": name, "ph": "C", "pid": pid, "tid": tid, "ts": int(row["t_ns"]) / 1000}
        if all(math.isfinite(value) and value >= 0 for value in args.values()):
            events[json.dumps(event | {"args": args}, sort_keys=True)] += 1

    for rank, host in enumerate(HOSTS):
        of_rank, of_host = rank + 1, 1_000_000 + "ab".index(host)
        before = None
        for row in sampled(PROCESS, rank):
            count(of_rank, "memory", row, {"rss_bytes": int(row["rss_bytes"])})
            if before is not None and row["t_ns"] > before["t_ns"]:
                share = int(row["cpu_ns"] - before["cpu_ns"]) / int(row["t_ns"] - before["t_ns"])
                count(of_rank, "cpu", row, {"pct_of_a_core": round(100 * share, 2)})

            before = row

        for row in sampled(TORCH_MEMORY, rank):
            args = {name: int(row[name]) for name in ("allocated_bytes", "reserved_bytes")}
            count(of_rank, f"device {row['device']} memory", row, args)

        for row in sampled(GPU, rank):
            for name in GPU_FIELDS:
                count(of_host, f"gpu {row['index']}", row, {name: row[name].item()})

        for row in sampled(HOST, rank) if rank != 1 else ():  # rank 0 speaks for its host
            count(of_host, "cpu", row, {"cpu_pct": row["cpu_pct"].item()})
            count(of_host, "memory", row, {"memory_used_bytes": int(row["memory_used_bytes"])})

    return events


@pytest.mark.parametrize(("waiting", "block"), [(1, 1), (50, 16), (32_768, 4096)])
def test_every_sample_is_an_event(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waiting: int, block: int
) -> None:
    """Known numbers are counters; those of one counter of a rank are in order, as viewers join them by lines."""
    monkeypatch.setattr(event_blocks, "_MAX_ROWS", waiting)
    monkeypatch.setattr(sample_tracks, "_BLOCK", block)
    result = export_run(run_dir, "perfetto", tmp_path / "out.json")
    samples = [event for event in events_in(result.path) if event.get("cat") == "sample"]
    times: dict[tuple[int, str, str], list[float]] = {}
    for event in samples:
        times.setdefault((event["pid"], event["name"], *event["args"]), []).append(event["ts"])

    assert not result.damage
    assert comparable(samples) == expected()
    ranks = {key: each for key, each in times.items() if key[0] < 1_000_000}
    assert ranks
    assert all(each == sorted(each) for each in ranks.values())


def test_a_restarted_rank_speaks_for_its_host_again(tmp_path: Path) -> None:
    """Its earlier attempt did, in another stream."""
    folder = tmp_path / "run"
    folder.mkdir()
    with StoreWriter(folder / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(id="run", attempt=1))
        for attempt in (0, 1):
            rows = np.zeros(5, HOST.dtype)
            rows["t_ns"] = (np.arange(5) + 10 * attempt) * S
            writer.append(add_stream(writer, 0, "a", attempt=attempt), HOST.name, 0, len(rows), rows.tobytes())

        writer.commit()

    result = export_run(folder, "perfetto", tmp_path / "out.json")

    cpu = [event for event in events_in(result.path) if event.get("cat") == "sample" and event["name"] == "cpu"]
    assert len(cpu) == 10
