"""Fabricated samples of loader workers."""

from __future__ import annotations

import numpy as np

from traceml.database.schema import LOADER_WORKERS
from traceml.diagnosis.facts.worker_history import WorkerHistory

SECONDS = 60


def worker_rows(
    workers: int, *, busy: float = 0.5, waited: float = 0.0, cores: int = 4, pid: int = 100, start: int = 0
) -> np.ndarray:
    """Return a row per second of some workers, each of which computes and waits for a core for a share of the time."""
    seconds = np.arange(SECONDS)
    rows = np.zeros(SECONDS, LOADER_WORKERS.dtype)
    rows["t_ns"], rows["step"] = (start + seconds) * 1e9, (start + seconds) * 10
    rows["workers"], rows["cores"], rows["pid"] = workers, cores, pid
    rows["cpu_ns"], rows["wait_ns"] = seconds * busy * workers * 1e9, seconds * waited * workers * 1e9
    rows["private_bytes"] = rows["anonymous_bytes"] = -1
    return rows


def watched(workers: int, *, busy: float = 0.5, waited: float = 0.0, cores: int = 4) -> WorkerHistory:
    """Return the history of one loader's workers."""
    history = WorkerHistory()
    history.add(0, worker_rows(workers, busy=busy, waited=waited, cores=cores))
    return history
