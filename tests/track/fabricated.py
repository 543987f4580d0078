"""Runs in which something was logged, written by the real writer without a rank."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from tests.forked import client as forked
from tests.runs.fabricated_store import run_facts
from traceml.database.schema import METRICS
from traceml.database.store.reader import StreamIdentity
from traceml.database.store.store import StoreWriter
from traceml.run_folder import STORE_NAME
from traceml.track.tracker_state import TrackerState

START_NS = 1_700_000_000 * 10**9


class LoggedRun:
    """A run's store that a test writes into."""

    def __init__(self, path: Path, **facts: Any) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self.writer = StoreWriter(path / STORE_NAME)
        self.writer.put_meta("run", run_facts(id=path.name, world_size=1, **facts))
        self._streams: dict[int, int] = {}
        self._names: dict[tuple[int, str], int] = {}
        self.clock_ns = START_NS

    def stream(self, rank: int = 0) -> int:
        if rank not in self._streams:
            identity = StreamIdentity(rank, 0, "h0", 100 + rank, 7, "")
            self._streams[rank] = self.writer.stream(identity, state="finished", clock=[0, START_NS])

        return self._streams[rank]

    def experiment(self, backends: Sequence[str], number: int = 0, *, rank: int = 0, **row: Any) -> None:
        self.row(
            "experiment", number, rank=rank, **{"name": "exp", "project": "tests", "backends": list(backends), **row}
        )

    def row(self, kind: str, number: int = 0, *, rank: int = 0, **row: Any) -> None:
        stream = self.stream(rank)
        data = msgpack.packb({"kind": kind, "t_ns": self.clock_ns, "experiment": number, **row})
        self.writer.append(stream, "logged", self.writer.next_seq(stream, "logged"), 1, data)

    def metrics(
        self, values: Mapping[str, Sequence[float]], number: int = 0, *, rank: int = 0, first_step: int = 0
    ) -> None:
        """Log series, interleaved by step, in frames of at most 1,000 rows."""
        stream = self.stream(rank)
        rows = [(step, name, value) for name, series in values.items() for step, value in enumerate(series, first_step)]
        rows.sort(key=lambda row: row[0])
        ids = np.array([self._name(stream, name) for _, name, _ in rows])
        table = np.zeros(len(rows), METRICS.dtype)
        table["t_ns"] = self.clock_ns + np.arange(len(rows)) * 1_000_000
        table["step"], table["name_id"] = [row[0] for row in rows], ids
        table["value"], table["experiment"] = [row[2] for row in rows], number
        self.clock_ns += len(rows) * 1_000_000
        for start in range(0, len(table), 1000):
            part = table[start : start + 1000]
            seq = self.writer.next_seq(stream, "metrics")
            self.writer.append(stream, "metrics", seq, len(part), part.tobytes())
            self.writer.commit()

    def end(self, state: str = "finished") -> Path:
        """Say that the run is over."""
        self.writer.put_meta("run", run_facts(id=self.path.name, world_size=1, state=state))
        self.writer.close()
        return self.path

    def _name(self, stream: int, name: str) -> int:
        known = self._names.get((stream, name))
        if known is None:
            known = self._names[stream, name] = len(self._names)
            row = msgpack.packb({"id": known, "name": name})
            self.writer.append(stream, "names", self.writer.next_seq(stream, "names"), 1, row)

        return known


def deliver(run_dir: Path, backend: str, *more: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a delivery process to its end."""
    words, environment = [str(run_dir), backend, *more], {**os.environ, **environ}
    with delivering(*words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        out, err = process.communicate(timeout=240)

    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def delivering(run_dir: str, backend: str, *more: str, **options: Any) -> forked.Popen:
    """Start a delivery process, which has imported a tracker's library already if that is large.

    It has the priority of the tests: beside them, one of the lowest priority would take minutes.
    """
    command = [sys.executable, "-m", "traceml.track.delivery", run_dir, backend, "--nice", "0", *more]
    imports = backend if backend in forked.TRACKERS else "aggregator"
    return forked.Popen(command, imports=imports, forks=backend == "aim", **options)  # Aim starts Alembic


def state_of(run_dir: Path, backend: str = "jsonl") -> TrackerState:
    return TrackerState.load(run_dir, backend)
