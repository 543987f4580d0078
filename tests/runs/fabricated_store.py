"""Stores of fabricated runs, written by the real writer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from tests.diagnosis.fabricated import Fault, Job, rows_of
from traceml.database.schema import HOST, PROCESS, TELEMETRY, USER_PHASES
from traceml.database.store.reader import StreamIdentity
from traceml.database.store.store import StoreWriter
from traceml.run_folder import STORE_NAME

STARTED = 1_700_000_000.0


def run_facts(**changed: Any) -> dict[str, Any]:
    """Return the facts that an aggregator writes of a run that has finished."""
    return {
        "id": "20260101-000000-train-abcd", "name": "train", "project": "default", "command": "train.py --lr 1",
        "world_size": 2, "attempt": 0, "started": STARTED, "ended": STARTED + 10, "state": "finished",
        "hosts": ["h0"], **changed,
    }  # fmt: skip


def add_rank(
    writer: StoreWriter, rank: int, rows: np.ndarray[Any, Any], *, attempt: int = 0, on_host: str = "h0", **facts: Any
) -> int:
    """Add a rank with its step rows; return its stream."""
    stream = writer.stream(StreamIdentity(rank, attempt, on_host, 100 + rank, 7, ""), **{"state": "finished", **facts})
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        ends = int(part["step"][0]), int(part["step"][-1])
        writer.append(stream, "steps", start, len(part), part.tobytes(), *ends)

    return stream


def add_user_phase(writer: StoreWriter, stream: int, name: str, steps: int, ms: float) -> None:
    """Add a user's phase to each step (its time must be in the step rows' user_ns)."""
    named = msgpack.packb({"id": 3, "name": name})
    writer.append(stream, "names", writer.next_seq(stream, "names"), 1, named)
    rows = np.zeros(steps, USER_PHASES.dtype)
    rows["step"], rows["name_id"], rows["ns"], rows["count"] = np.arange(steps), 3, int(ms * 1e6), 1
    writer.append(stream, "user_phases", writer.next_seq(stream, "user_phases"), steps, rows.tobytes())


def add_info(writer: StoreWriter, stream: int, **row: Any) -> None:
    """Add a row to the info log."""
    writer.append(stream, "info", writer.next_seq(stream, "info"), 1, msgpack.packb(row))


def add_samples(writer: StoreWriter, stream: int, *, samples: int = 40, growth: int = 0, wait: float = 0.0) -> None:
    """Add process, host and telemetry samples, one per five steps.

    Args:
        writer: the store.
        stream: of which rank.
        samples: how many.
        growth: bytes of memory per step.
        wait: share of the main thread's ready time without a core.
    """
    at = np.arange(samples)
    process = np.zeros(samples, PROCESS.dtype)
    process["t_ns"], process["step"] = at * 10**9, at * 5
    process["rss_bytes"] = 500 * 2**20 + process["step"] * growth
    process["main_run_ns"], process["main_wait_ns"] = at * 10**9 * (1 - wait), at * 10**9 * wait
    writer.append(stream, "process", 0, samples, process.tobytes())
    host = np.zeros(samples, HOST.dtype)
    host["t_ns"], host["cores"], host["cpu_pct"] = at * 10**9, 8, 50.0
    host["memory_used_bytes"], host["memory_total_bytes"] = 4 * 2**30, 16 * 2**30
    writer.append(stream, "host", 0, samples, host.tobytes())
    telemetry = np.zeros(1, TELEMETRY.dtype)
    telemetry["rows_appended"], telemetry["bytes_sent"], telemetry["hook_ns_per_step"] = 500, 50_000, 4_000
    writer.append(stream, "telemetry", 0, 1, telemetry.tobytes())


def store_run(
    folder: Path, job: Job, *faults: Fault, facts: dict[str, Any] | None = None, seed: int = 0, **of_ranks: Any
) -> Path:
    """Write a whole run and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with StoreWriter(folder / STORE_NAME) as writer:
        writer.put_meta("run", {**run_facts(id=folder.name, world_size=job.ranks), **(facts or {})})
        for rank, rows in enumerate(rows_of(job, *faults, seed=seed)):
            add_rank(writer, rank, rows, **of_ranks)

    return folder


def run_with_batches(folder: Path, samples: int, **own: float) -> Path:
    """Write a run of a rank whose steps have `samples` each, and phases of these milliseconds; return its folder."""
    folder.mkdir()
    with StoreWriter(folder / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(id=folder.name, world_size=1))
        job = Job(ranks=1, steps=300, grouped=False)
        rows = rows_of(replace(job, own={**job.own, **own}), seed=samples)[0]
        rows["samples"], rows["elements"] = samples, samples * 32
        stream = add_rank(writer, 0, rows)
        add_info(writer, stream, kind="model", t_ns=1, model="Net", parameters=10)
        add_info(writer, stream, kind="input", t_ns=2, dtype="torch.float32", dimensions=4, tokens=False)
        add_info(writer, stream, kind="loader", t_ns=3, batch_size=samples)

    return folder
