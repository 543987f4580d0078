"""Time and memory of `traceml whatif`, for jobs of growing size, and for a published trace if one is given.

    python benchmarks/whatif.py [--steps 44 440] [--trace TRACE.parquet --meta META.yaml --expected RESULT.json]

The jobs have 16 workers (data-parallel 4, pipeline 4) and 32 micro-batches, one worker twice as slow. The published
traces of "Understanding Stragglers in Large Model Training Using What-if Analysis" (OSDI 2025) come with their results
(`blocking_slowdown`, `blocking_decompose_by_*`), from which the largest relative difference is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.whatif.generated_job import GeneratedJob, usual_s

GROUPS = ("optype", "dp_rank", "stage")


def slow_worker(kind: str, dp_rank: int, stage: int, step: int, micro_batch: int) -> float:
    """Return the times of a job whose worker of data-parallel rank 0, stage 0 computes twice as long."""
    factor = 2 if "compute" in kind and (dp_rank, stage) == (0, 0) else 1
    return factor * usual_s(kind, dp_rank, stage, step, micro_batch)


def generated(steps: int, folder: Path) -> tuple[int, Path, Path]:
    """Write a job's trace; return its operations and the paths of trace and layout."""
    job = GeneratedJob(dp=4, pp=4, micro_batches=32, steps=steps, seconds=slow_worker).run()
    return len(job.rows), *job.write(folder)


def analyzed(trace: Path, meta: Path) -> tuple[dict[str, Any], float, float]:
    """Return the result, seconds and peak MB of a process that analyzes a trace."""
    command = [sys.executable, "-m", "traceml", "whatif", str(trace), "--meta", str(meta), "--json"]
    begun = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)

    seconds = time.perf_counter() - begun
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")

    return json.loads(output), seconds, usage.ru_maxrss * 1024 / 1e6


def largest_difference(result: dict[str, Any], expected: dict[str, Any]) -> float:
    """Return the largest relative difference between a result and the published one."""
    pairs = [(result["slowdown"], expected["blocking_slowdown"])]
    for group in GROUPS:
        published = expected.get(f"blocking_decompose_by_{group}") or {}
        pairs += [(result[f"by_{group}"][name], score) for name, score in published.items()]

    return max(abs(ours / theirs - 1) for ours, theirs in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[44, 440])
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--meta", type=Path)
    parser.add_argument("--expected", type=Path)
    options = parser.parse_args()

    print(f"{'trace':<20} {'operations':>11} {'seconds':>8} {'peak MB':>8} {'slowdown':>9}  worst worker explains")
    for steps in options.steps:
        with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, get_context("spawn")) as other:
            # In a process of its own: a child's peak memory is at least that of the process that starts it.
            operations, trace, meta = other.submit(generated, steps, Path(folder)).result()
            show(f"generated, {steps} steps", operations, *analyzed(trace, meta))

    if options.trace:
        result, seconds, peak_mb = analyzed(options.trace, options.meta)
        show(options.trace.stem, -1, result, seconds, peak_mb)
        if options.expected:
            difference = largest_difference(result, json.loads(options.expected.read_text()))
            print(f"largest difference from the published result: {difference:.1e}")


def show(name: str, operations: int, result: dict[str, Any], seconds: float, peak_mb: float) -> None:
    count = f"{operations:,}" if operations >= 0 else "-"
    times = f"{seconds:>8.2f} {peak_mb:>8.0f}"
    print(f"{name:<20} {count:>11} {times} {result['slowdown']:>9.3f}  {result['worker_share']:.2f}")


if __name__ == "__main__":
    main()
