"""Time and memory of the report of long runs, in the process that writes it.

    python benchmarks/long_runs.py [--runs 64x7 1024x1] [--retention 1.0] [--keep FOLDER] [--json FILE]

A run of RANKSxDAYS has steps of a second, and a sample of each process per second. In its first 35 % each step waits
half a second for data. The real writer stores it, in frames of an hour, sums and thins it as the aggregator does, with
the default of the setting `retention` (GB, or `off`).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store_bytes import step_rows
from traceml.database.schema import PROCESS, STEPS, pack_bits
from traceml.database.store.reader import StreamIdentity
from traceml.database.store.store import StoreWriter
from traceml.run_folder import STORE_NAME

HOUR = 3600
S, MS = 10**9, 10**6
WAIT_SHARE, WAIT_NS = 0.35, 500 * MS
KINDS = 16  # ranks repeat the noise of these


def steps_of_an_hour(random: np.random.Generator) -> NDArray[np.void]:
    """Return a rank's steps of about a second."""
    rows = step_rows(HOUR, 0.1, random)
    rows["forward_ns"] += S - rows["total_ns"]
    rows["total_ns"], rows["bits"] = S, pack_bits(1, 0)
    return rows


def samples_of_an_hour(random: np.random.Generator) -> NDArray[np.void]:
    """Return samples of a process that computes on one core and waits a little for it."""
    rows = np.zeros(HOUR, PROCESS.dtype)
    at = np.arange(HOUR)
    rows["t_ns"], rows["step"] = at * S, at
    rows["rss_bytes"] = 4 * 2**30 + random.integers(0, 2**20, HOUR) * 4096
    for name, share in (("cpu_ns", 1.1), ("main_run_ns", 0.95), ("main_wait_ns", 0.01)):
        rows[name] = np.cumsum(random.lognormal(0, 0.1, HOUR) * share * S)

    rows["threads"] = 40
    for name in ("voluntary_switches", "involuntary_switches", "minor_faults"):
        rows[name] = np.cumsum(random.integers(0, 200, HOUR))

    return rows


def write(run_dir: Path, ranks: int, hours: int, retention_bytes: int | None) -> int:
    """Write a run and return the bytes of its store."""
    random = np.random.default_rng(0)
    kinds = [(steps_of_an_hour(random), samples_of_an_hour(random)) for _ in range(KINDS)]
    run_dir.mkdir(parents=True)
    facts = {
        "id": run_dir.name,
        "world_size": ranks,
        "started": 1.7e9,
        "ended": 1.7e9 + hours * HOUR,
        "state": "finished",
    }
    with StoreWriter(run_dir / STORE_NAME) as writer:
        writer.put_meta("run", {**facts, "state": "finished"})
        streams = [
            writer.stream(StreamIdentity(rank, 0, f"h{rank // 8}", rank, 7), state="finished") for rank in range(ranks)
        ]
        for hour in range(hours):
            parts = [hour_of(steps, samples, hour, hours) for steps, samples in kinds]
            for rank, stream in enumerate(streams):
                for table, data in zip((STEPS, PROCESS), parts[rank % KINDS], strict=True):
                    writer.append(stream, table.name, hour * HOUR, HOUR, data, hour * HOUR, hour * HOUR + HOUR - 1)

            now_s = 1e6 + hour * HOUR
            writer.commit(now_s=now_s)
            while writer.maintain(1.0, limit_bytes=retention_bytes, now_s=now_s):
                pass

    return (run_dir / STORE_NAME).stat().st_size


def hour_of(steps: NDArray[np.void], samples: NDArray[np.void], hour: int, hours: int) -> tuple[bytes, bytes]:
    """Return the rows of one hour of the run."""
    steps, samples = steps.copy(), samples.copy()
    steps["step"] += hour * HOUR
    steps["t_end_ns"] = (steps["step"] + 1) * S
    late = steps["step"] < WAIT_SHARE * hours * HOUR
    steps["input_wait_ns"] += np.where(late, WAIT_NS, 0)
    steps["forward_ns"] -= np.where(late, WAIT_NS, 0)
    for name in ("t_ns", "step", "cpu_ns", "main_run_ns", "main_wait_ns"):
        samples[name] += samples[name][-1] * hour

    return steps.tobytes(), samples.tobytes()


def report(run_dir: Path) -> tuple[float, float, float]:
    """Write both reports in a process, as the aggregator does; return seconds, CPU seconds, megabytes at the peak."""
    command = [sys.executable, "-m", "traceml.display.report_main", "0"]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps({"run_dir": str(run_dir), "page": None}).encode() + b"\n")
    process.stdin.close()
    answer = json.loads(process.stdout.read())
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert "path" in answer, answer
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def measure(folder: Path, ranks: int, days: float, retention_gb: float | None, rounds: int) -> dict[str, Any]:
    """Return the figures of one run."""
    run_dir, hours = folder / f"{ranks}x{days:g}", round(days * 24)
    began = time.perf_counter()
    size = None if retention_gb is None else int(retention_gb * 1e9)
    if not run_dir.exists():
        # Elsewhere: the memory of this process at a start counts as a peak of the process that is started.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            pool.submit(write, run_dir, ranks, hours, size).result()

    written_s = time.perf_counter() - began
    measured = [report(run_dir) for _ in range(rounds)]
    found = json.loads((run_dir / "report.json").read_text())
    return {
        "ranks": ranks,
        "days": days,
        "store_mb": round((run_dir / STORE_NAME).stat().st_size / 1e6),
        "written_s": round(written_s),
        "report_s": round(min(seconds for seconds, _, _ in measured), 2),
        "cpu_s": round(min(cpu_s for _, cpu_s, _ in measured), 2),
        "peak_mb": round(max(peak for _, _, peak in measured)),
        "steps": found["steps"]["count"],
        "diagnosed": found["steps"]["diagnosed"],
        "mean_ms": found["steps"]["mean_ms"],
        "verdict": found["verdict"]["kind"],
        "cost_share": found["verdict"]["cost_share"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=["64x7", "1024x1"], metavar="RANKSxDAYS")
    parser.add_argument("--retention", default="1.0", help="gigabytes, or off")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="write the runs to this folder, or measure those that are there")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    retention = None if arguments.retention == "off" else float(arguments.retention)
    with tempfile.TemporaryDirectory() as folder:
        results = []
        print("   ranks   days   store MB   report s    CPU s   peak MB   diagnosed of steps     mean ms   verdict")
        for ranks, days in (run.split("x") for run in arguments.runs):
            got = measure(arguments.keep or Path(folder), int(ranks), float(days), retention, arguments.rounds)
            results.append(got)
            print(
                f"{got['ranks']:8d} {got['days']:6g} {got['store_mb']:10d} {got['report_s']:10.2f} {got['cpu_s']:8.2f} "
                f"{got['peak_mb']:9d} "
                f"{got['diagnosed']:9d} of {got['steps']:8d} {got['mean_ms']:9.1f}   {got['verdict']} "
                f"({got['cost_share']:.0%} of step time)",
                flush=True,
            )

    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
