"""Traces of ranks merged on one time line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runs.export.exported import events_in
from tests.runs.fabricated_store import add_rank, run_facts
from traceml.database.schema import STEPS, StepFlag, pack_bits
from traceml.database.store.reader import StoreReader
from traceml.database.store.store import StoreWriter
from traceml.errors import TraceMLError
from traceml.run_folder import STORE_NAME
from traceml.runs.export.exporter import export_run
from traceml.runs.export.operator_trace import ProfiledRank, steps_stored, write_profile
from traceml.runs.export.top_operators import CallSamples

MS = 10**6
EPOCH_NS = 1_700_000_000 * 10**9  # of the aggregator's clock, at the start of the profile
# The wall clock of rank 1's host is 5 s fast, and its monotonic clock began at another time.
MONO_NS = {0: 50 * 10**9, 1: 900 * 10**9}
FAST_NS = {0: 0, 1: 5 * 10**9}
FIRST, STEP_MS = 100, 10


def _rows(rank: int, last: int) -> np.ndarray[Any, Any]:
    """Steps of 10 ms; profiled ones, which begin with the profile, take 20 ms."""
    rows = np.zeros(last + 1, STEPS.dtype)
    rows["step"] = np.arange(last + 1)
    rows["total_ns"] = np.where(rows["step"] < FIRST, STEP_MS * MS, 2 * STEP_MS * MS)
    rows["forward_ns"], rows["backward_ns"], rows["backward_own_ns"] = 3 * MS, 4 * MS, -1
    rows["t_end_ns"] = MONO_NS[rank] + np.cumsum(rows["total_ns"]) - FIRST * STEP_MS * MS
    rows["bits"] = np.where(rows["step"] < FIRST - 1, 1, pack_bits(1, int(StepFlag.PROFILED)))
    return rows


def _trace(rank: int) -> bytes:
    """A trace as torch writes it: dates of the rank's own wall clock, one operator 2 ms after the start."""
    base_ns = 1_600_000_000 * 10**9
    began_us = (EPOCH_NS + FAST_NS[rank] - base_ns) / 1000
    pid = 100 + rank

    def span(name: str, category: str, ms: float, dur_ms: float, tid: int = 7) -> dict[str, Any]:
        where = {"ph": "X", "cat": category, "name": name, "pid": pid, "tid": tid}
        return where | {"ts": began_us + ms * 1000, "dur": dur_ms * 1000, "args": {}}

    events = [
        {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": "python"}},
        {"ph": "M", "name": "thread_name", "pid": pid, "tid": 7, "args": {"name": "thread 7"}},
        span("ProfilerStep#100", "user_annotation", 0, 20),
        span("aten::mm", "cpu_op", 2, 3),
        {"ph": "s", "id": 1, "pid": pid, "tid": 7, "ts": began_us, "cat": "ac2g", "name": "ac2g"},
        {"ph": "X", "cat": "kernel", "name": "gemm", "pid": 0, "tid": 7, "ts": began_us + 9000, "dur": 10, "args": {}},
        {"ph": "i", "s": "g", "name": "Record Window End", "pid": "", "tid": "", "ts": began_us},
    ]
    return gzip.compress(json.dumps({"baseTimeNanoseconds": base_ns, "traceEvents": events}).encode())


def _rank(rank: int, data: bytes | None = None) -> ProfiledRank:
    return ProfiledRank(rank, "h0", 100 + rank, FIRST, 2, _trace(rank) if data is None else data, CallSamples())


@pytest.fixture
def store(tmp_path: Path) -> Path:
    with StoreWriter(tmp_path / STORE_NAME) as writer:
        writer.put_meta("run", run_facts())
        for rank in (0, 1):
            offset_ns = EPOCH_NS - MONO_NS[rank]
            clock = [MONO_NS[rank], EPOCH_NS + FAST_NS[rank]]
            stream = add_rank(writer, rank, _rows(rank, FIRST + 1))
            writer.update_stream(stream, clock=clock, clock_offset_ns=offset_ns, clock_rtt_ns=100_000)

        writer.commit()

    return tmp_path / STORE_NAME


def test_ranks_are_on_one_time_line(store: Path, tmp_path: Path) -> None:
    """Clocks that differ are put right, and nothing of two ranks shares a process, a track or a flow."""
    path = tmp_path / "out.json"
    with StoreReader(store) as reader:
        written = write_profile(path, reader, [_rank(0), _rank(1)])

    events = json.loads(path.read_text())["traceEvents"]
    assert written.events == len(events)
    named = {each["pid"]: each["args"]["name"] for each in events if each["name"] == "process_name"}
    assert sorted(named.values()) == ["rank 0 (h0)", "rank 0, device 0", "rank 1 (h0)", "rank 1, device 0"]
    starts = {(named[each["pid"]], each["name"]): each["ts"] for each in events if each["ph"] == "X"}
    for rank in (0, 1):
        own = f"rank {rank} (h0)"
        assert starts[own, "aten::mm"] == pytest.approx(starts["rank 0 (h0)", "aten::mm"], abs=1.0)
        assert starts[own, "step 100"] == pytest.approx(starts[own, "aten::mm"] - 2000, abs=1.0)
        assert starts[own, "backward"] == pytest.approx(starts[own, "step 101"] + 3000, abs=1.0)

    tracks = {each["tid"]: each["pid"] for each in events if each["ph"] == "X"}
    assert len(tracks) == len({(each["pid"], each["tid"]) for each in events if each["ph"] == "X"})
    assert len({each["id"] for each in events if each["ph"] == "s"}) == 2
    assert all(isinstance(each["pid"], int) for each in events)


def test_an_export_marks_profiled_steps(store: Path, tmp_path: Path) -> None:
    """And no others."""
    export_run(store.parent, "perfetto", tmp_path / "run.json")
    steps = [
        each["args"] for each in events_in(tmp_path / "run.json") if each.get("name") == "step" and each["ph"] == "X"
    ]

    assert {each["step"] for each in steps if each.get("profiled")} == {FIRST - 1, FIRST, FIRST + 1}


def test_the_slow_down_is_measured(store: Path, tmp_path: Path) -> None:
    """Against unprofiled steps before; not known without any."""
    with StoreReader(store) as reader:
        written = write_profile(tmp_path / "out.json.gz", reader, [_rank(0)])
        assert steps_stored(reader, [_rank(0)])
        late = ProfiledRank(0, "h0", 100, FIRST + 1, 9, _trace(0), CallSamples())
        assert not steps_stored(reader, [late])

    assert written.slowdown == {0: 2.0}
    assert json.loads(gzip.decompress((tmp_path / "out.json.gz").read_bytes()))["traceEvents"]


@pytest.mark.parametrize("data", [b"", gzip.compress(b"{", mtime=0), gzip.compress(b'{"traceEvents": [3]}', mtime=0)])
def test_a_damaged_trace_is_reported(store: Path, tmp_path: Path, data: bytes) -> None:
    """The rank is named."""
    with StoreReader(store) as reader, pytest.raises(TraceMLError, match="the trace of rank 1 is damaged"):
        write_profile(tmp_path / "out.json", reader, [_rank(1, data)])
