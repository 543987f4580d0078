"""Fabricated run with rows in every table, and readers of its exports."""

from __future__ import annotations

import gzip
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from tests.diagnosis.fabricated import Job, adds, rows_of
from tests.runs.fabricated_store import add_info, add_samples, add_user_phase, run_facts
from traceml.database.schema import (
    DEVICE_STEPS,
    EPOCHS,
    EVALS,
    FINGERPRINTS,
    GPU,
    LIMITS,
    LINES,
    LOADER_WORKERS,
    LOSSES,
    METRICS,
    PAUSES,
    TORCH_MEMORY,
    StepFlag,
)
from traceml.database.store.reader import StreamIdentity
from traceml.database.store.store import StoreWriter
from traceml.run_folder import STORE_NAME

S = 10**9
BOOT_NS = 1_700_000_000 * S
STEPS = 120


def rich_run(folder: Path, *, ranks: int = 2, steps: int = STEPS, user_ms: float = 1.0, **facts: Any) -> Path:
    """Write a run: rank 1 is slow in forward, on another host whose wall clock is wrong by an hour."""
    folder.mkdir(parents=True, exist_ok=True)
    job = Job(ranks=ranks, steps=steps, callback_every=4)
    job = Job(ranks=ranks, steps=steps, callback_every=4, own={**job.own, "user": user_ms} if user_ms else job.own)
    with StoreWriter(folder / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(id=folder.name, world_size=ranks, **facts))
        for rank, rows in enumerate(rows_of(job, adds("forward", 20.0, (1,)))):
            rows["t_end_ns"] += rank * 50 * S  # each host has its own monotonic clock
            wall = BOOT_NS + rank * 3600 * S
            stream = add_stream(writer, rank, f"h{rank}", boot_ns=rank * 50 * S, wall_ns=wall)
            _fill(writer, stream, rows, wall, user_ms)

        writer.event("verdict", {"verdict": {"kind": "COMPUTE_STRAGGLER"}})

    return folder


def _fill(writer: StoreWriter, stream: int, rows: Any, wall_ns: int, user_ms: float) -> None:
    rows["bits"] |= int(StepFlag.DEVICE) << 16
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        ends = int(part["step"][0]), int(part["step"][-1])
        writer.append(stream, "steps", start, len(part), part.tobytes(), *ends)

    if user_ms:
        add_user_phase(writer, stream, "augment", len(rows), user_ms / 2)

    add_info(writer, stream, kind="warning", t_ns=int(rows["t_end_ns"][0]), text="look out")
    add_samples(writer, stream)
    _append(writer, stream, EVALS.name, EVALS.dtype, step=50, t_end_ns=int(rows["t_end_ns"][49]), ns=5_000, batches=2)
    ends = rows["t_end_ns"].tolist()
    _append(writer, stream, EPOCHS.name, EPOCHS.dtype, step=40, t_end_ns=ends[40], ns=9_000, create_ns=4)
    device = np.zeros(len(rows), DEVICE_STEPS.dtype)
    device["step"], device["total_ns"], device["forward_ns"] = rows["step"], 9_000_000, 4_000_000
    device["backward_ns"], device["backward_own_ns"] = 5_000_000, -1
    writer.append(stream, "device_steps", 0, len(device), device.tobytes())
    at_ns = int(rows["t_end_ns"][0])
    _append(writer, stream, GPU.name, GPU.dtype, t_ns=at_ns, utilization_pct=50.0, memory_used_bytes=7)
    _append(writer, stream, TORCH_MEMORY.name, TORCH_MEMORY.dtype, t_ns=at_ns, allocated_bytes=5, reserved_bytes=6)
    _append(writer, stream, LOADER_WORKERS.name, LOADER_WORKERS.dtype, t_ns=at_ns, workers=2)
    _append(writer, stream, LIMITS.name, LIMITS.dtype, t_ns=at_ns, resource=0, used=30, limit=1024)
    _append(writer, stream, LINES.name, LINES.dtype, t_ns=at_ns, phase=-1, line_id=12, library_id=-1, samples=9)
    _append(writer, stream, LOSSES.name, LOSSES.dtype, t_ns=at_ns, step=3, loss=0.5)
    _append(writer, stream, FINGERPRINTS.name, FINGERPRINTS.dtype, step=3, fingerprint=77)
    _append(writer, stream, PAUSES.name, PAUSES.dtype, t_end_ns=at_ns, step=3, ns=2_000_000, count=1, line_id=12)
    for number, name in ((10, "loss"), (11, "grad"), (12, "/x/train.py:3 main")):
        named = msgpack.packb({"id": number, "name": name})
        writer.append(stream, "names", writer.next_seq(stream, "names"), 1, named)

    metrics = np.zeros(3, METRICS.dtype)
    metrics["t_ns"], metrics["step"], metrics["name_id"] = wall_ns + np.arange(3) * S, [0, 1, 2], [10, 11, 10]
    metrics["value"] = [0.5, np.nan, 0.25]
    writer.append(stream, "metrics", 0, 3, metrics.tobytes())
    text = msgpack.packb({"kind": "text", "name": "note", "t_ns": wall_ns, "text": 'hello, "world"\nü', "step": 1})
    writer.append(stream, "logged", 0, 1, text)


def _append(writer: StoreWriter, stream: int, table: str, dtype: Any, **values: Any) -> None:
    row = np.zeros(1, dtype)
    for name, value in values.items():
        row[name] = value

    writer.append(stream, table, 0, 1, row.tobytes())


def add_stream(
    writer: StoreWriter, rank: int, host: str, *, attempt: int = 0, boot_ns: int = 0, wall_ns: int = BOOT_NS
) -> int:
    """Add a finished stream of a rank; its clock read `boot_ns` at `wall_ns`, which may be wrong."""
    return writer.stream(
        StreamIdentity(rank, attempt, host, 100 + rank, 7, ""), state="finished",
        clock=[boot_ns, wall_ns], clock_offset_ns=BOOT_NS - boot_ns, clock_rtt_ns=1000,
    )  # fmt: skip


def comparable(events: Iterable[dict[str, Any]]) -> Counter[str]:
    """Return events without their numbers, as text."""
    return Counter(json.dumps({k: v for k, v in each.items() if k != "id"}, sort_keys=True) for each in events)


def events_in(path: Path) -> list[dict[str, Any]]:
    """Return all events of an exported trace."""
    data = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
    return json.loads(data) if ".json" in path.name else [json.loads(line) for line in data.splitlines()]


def slices_by_track(events: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """Return complete events by track, in the order of a viewer: by beginning, the longer first."""
    tracks = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            tracks[event["tid"]].append(event)

    return {tid: sorted(track, key=lambda each: (each["ts"], -each["dur"])) for tid, track in tracks.items()}


def nested(track: list[dict[str, Any]]) -> list[tuple[dict[str, Any], int]]:
    """Return each slice with its depth; a slice that leaves the one around it is an error."""
    open_until: list[float] = []
    result = []
    for each in track:
        end = each["ts"] + each["dur"]
        while open_until and open_until[-1] <= each["ts"] + 1e-6:
            open_until.pop()

        assert not open_until or end <= open_until[-1] + 1e-3, f"{each} leaves the slice around it"
        open_until.append(end)
        result.append((each, len(open_until)))

    return result


def innermost(track: list[dict[str, Any]], ts: float) -> str | None:
    """Return the name of the innermost slice at a moment, to which Perfetto binds an arrow."""
    around = [each for each in track if each["ts"] <= ts < each["ts"] + each["dur"]]
    return min(around, key=lambda each: each["dur"])["name"] if around else None
