"""Fabricated memory of ranks, hosts and devices."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.diagnosis.facts.watched_workers import worker_rows
from traceml.database.schema import HOST, PROCESS, TORCH_MEMORY
from traceml.diagnosis.facts.job_facts_builder import JobFactsBuilder
from traceml.diagnosis.facts.memory_growth import MemoryHistory
from traceml.diagnosis.facts.trainings.models_and_loaders import LoaderFacts

MB, GB = 1 << 20, 1 << 30


def processes(
    history: MemoryHistory, rss: Any, *, rank: int = 0, steps_each: int = 20, seconds_each: float = 1.0
) -> MemoryHistory:
    """Add samples of a rank's resident memory."""
    rows = np.zeros(len(rss), PROCESS.dtype)
    rows["t_ns"], rows["step"] = np.arange(len(rss)) * seconds_each * 1e9, np.arange(len(rss)) * steps_each
    rows["rss_bytes"] = rss
    history.process_rows(rank, rows)
    return history


def host(history: MemoryHistory, used_bytes: int, total_bytes: int = 16 * GB, *, rank: int = 0) -> MemoryHistory:
    """Add samples of a host's memory, which stays as it is."""
    rows = np.zeros(20, HOST.dtype)
    rows["memory_used_bytes"], rows["memory_total_bytes"] = used_bytes, total_bytes
    history.host_rows(rank, rows)
    return history


def device(
    history: MemoryHistory,
    allocated: Any,
    *,
    rank: int = 0,
    total_bytes: int = 80 * GB,
    peak_bytes: int | None = None,
    retries: int = 0,
    pinned: Any = -1,
) -> MemoryHistory:
    """Add samples of a rank's device."""
    rows = np.zeros(len(allocated), TORCH_MEMORY.dtype)
    rows["t_ns"], rows["step"] = np.arange(len(rows)) * 1e9, np.arange(len(rows)) * 20
    rows["allocated_bytes"], rows["total_bytes"] = allocated, total_bytes
    rows["peak_allocated_bytes"] = max(allocated) if peak_bytes is None else peak_bytes
    rows["alloc_retries"], rows["pinned_bytes"] = retries, pinned
    history.device_rows(rank, rows)
    return history


def growing(start: int = 900 * MB, each: int = 80 * MB, count: int = 60) -> Any:
    """Return samples that grow by 4 MB per step: 20 steps and 80 MB each."""
    return start + np.arange(count) * each


def leaking(used_bytes: int = 4 * GB) -> dict[str, Any]:
    """Return the facts of a rank whose resident memory grows by 80 MB a second on a host of 16 GB."""
    total = 16 * GB if used_bytes > 4 * GB else 4096 * GB
    return {"memory": host(processes(MemoryHistory(), growing()), used_bytes, total), "hosts": {0: "h"}}


def device_leak() -> MemoryHistory:
    """Return the memory of two ranks of which the second leaks."""
    return device(device(MemoryHistory(), [8 * GB] * 60), growing(8 * GB), rank=1)


def growing_workers(
    *, copies: bool = True, objects: bool = True, start_method: str = "fork", number: int = 0
) -> dict[str, Any]:
    """Return the facts of 8 loader workers that grow by 40 MB a minute each, by copies or by new memory."""
    rows = worker_rows(8)
    rows["loader"] = number
    grown = np.arange(len(rows)) * 8 * 40 * MB // 60
    rows["private_bytes"] = 80 * MB + grown
    rows["anonymous_bytes"] = 900 * MB + (0 if copies else grown)
    builder = JobFactsBuilder()
    builder.worker_rows(0, rows)
    held = ({"path": "Listing.files", "type": "list", "count": 1_500_000, "of": "str"},) if objects else ()
    loader = LoaderFacts(num_workers=8, start_method=start_method, objects=held, number=number)
    first = LoaderFacts(dataset="Images", num_workers=2, start_method="fork", number=0)
    loaders = {0: (first, loader) if number else (loader,)}
    return {"memory": builder.memory, "workers": builder.workers, "loader": loaders[0][0], "loaders": loaders}


def full_host() -> dict[str, Any]:
    """Return the facts of a host with 1 of 16 GB left."""
    return {"memory": host(processes(MemoryHistory(), [9 * GB] * 60), 15 * GB), "hosts": {0: "h"}}


def full_device() -> MemoryHistory:
    """Return the memory of a device that was once full."""
    return device(MemoryHistory(), [40 * GB] * 60, peak_bytes=78 * GB, retries=12)


def uneven_devices() -> MemoryHistory:
    """Return the memory of four ranks of which the first needs 1.7 times that of the others."""
    history = MemoryHistory()
    for rank in range(4):
        device(history, [(71 if rank == 0 else 42) * GB] * 60, rank=rank)

    return history
