"""Fabricated runs that are still running, and a clock for them."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.diagnosis.fabricated import Fault, Job, adds, rows_of
from tests.runs.fabricated_store import add_rank, add_samples, run_facts
from traceml.clock import boot_id, pid_namespace, process_start_ticks
from traceml.database.store.store import StoreWriter
from traceml.run_folder import STORE_NAME

__all__ = ["Clock", "aggregator_facts", "running_run", "series_of"]


class Clock:
    """Monotonic seconds that a test moves."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@contextmanager
def running_run(folder: Path, *faults: Fault, ranks: int = 2, steps: int = 200, **facts: Any) -> Iterator[StoreWriter]:
    """Write a run whose aggregator is this process, and yield its store's writer."""
    folder.mkdir(parents=True)
    of_job = {"state": "running", "ended": None, "started": time.time() - 60, "world_size": ranks}
    with StoreWriter(folder / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(id=folder.name, **{**of_job, **facts}))
        writer.put_meta("aggregator", aggregator_facts(os.getpid()))
        for rank, rows in enumerate(
            rows_of(Job(ranks=ranks, steps=steps), *(faults or (adds("forward", 20, (ranks - 1,)),)))
        ):
            add_samples(writer, add_rank(writer, rank, rows, state="running"))

        writer.commit()
        yield writer


def aggregator_facts(pid: int) -> dict[str, Any]:
    """Return the facts of an aggregator that is a process of this host."""
    here = {"host": socket.gethostname(), "boot_id": boot_id(), "pid_namespace": pid_namespace()}
    return {**here, "pid": pid, "start_ticks": process_start_ticks(pid)}


def series_of(text: str) -> dict[str, float]:
    """Return the samples of an answer in Prometheus' text format, by name and labels."""
    lines = (line for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}
