"""The first steps of a job as recorded and without stragglers, as a trace for Perfetto."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from traceml.whatif.operations import COMPUTE, TRANSFERS, JobTrace, Times
from traceml.whatif.simulation import Simulator

__all__ = ["write_timeline"]

_STEPS = 10
_GAP = 1.1  # steps of the ideal job begin this much later than the longest one lasts
_LANES = ("compute", "pipeline", "collectives")
_OTHER_COMPUTE = ("gc", "optimizer")


def write_timeline(simulator: Simulator, path: Path) -> int:
    """Write the first ten steps, one process for each data-parallel rank as recorded and one as simulated.

    Args:
        path: a JSON file in Chrome's trace format; compressed if it ends in `.gz`.

    Returns:
        Number of operations written.
    """
    count = 0
    with gzip.open(path, "wt", 6) if path.suffix == ".gz" else path.open("w") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        file.write(",\n".join(map(json.dumps, _names(simulator.job))))
        for event in _events(simulator):
            file.write(",\n" + json.dumps(event))
            count += 1

        file.write("\n]}\n")

    return count


def _events(simulator: Simulator) -> Iterator[dict[str, Any]]:
    job = simulator.job
    ends = simulator.ends_s(np.zeros((1, len(job.operations), len(job.dp_ranks)), bool))[:, 0]
    ideal = np.broadcast_to(simulator.ideal_s[:, None, None], ends.shape)
    begin_s = job.start_s.min(axis=(0, 1))
    starts_s = np.arange(len(job.steps)) * ends.max() * _GAP
    recorded = job.start_s - begin_s + _recorded_begins(job, begin_s)
    yield from _process(job, 0, recorded, job.duration_s)
    yield from _process(job, len(job.dp_ranks), ends - ideal + starts_s, ideal)


def _recorded_begins(job: JobTrace, begin_s: Times) -> Times:
    """Return when each step begins; a trace whose steps all begin at 0 gets them one after the other."""
    lengths = job.step_times_s()
    if (np.diff(begin_s) > 0).all():
        return np.asarray(begin_s - begin_s[0])

    return np.asarray(np.arange(len(lengths)) * lengths.max() * _GAP)


def _process(job: JobTrace, first_pid: int, start_s: Times, duration_s: Times) -> Iterator[dict[str, Any]]:
    for index, operation in enumerate(job.operations):
        for place in range(len(job.dp_ranks)):
            for number, step in enumerate(job.steps[:_STEPS]):
                yield {
                    "ph": "X",
                    "name": operation.kind,
                    "cat": _LANES[_lane(operation.kind)],
                    "pid": first_pid + place,
                    "tid": operation.stage * len(_LANES) + _lane(operation.kind),
                    "ts": round(1e6 * float(start_s[index, place, number]), 3),
                    "dur": round(1e6 * float(duration_s[index, place, number]), 3),
                    "args": {"step": step, "micro_batch": operation.micro_batch, "chunk": operation.chunk},
                }


def _lane(kind: str) -> int:
    return 0 if kind in (*COMPUTE, *_OTHER_COMPUTE) else 1 if kind in TRANSFERS else 2


def _names(job: JobTrace) -> Iterator[dict[str, Any]]:
    for first_pid, words in ((0, "recorded"), (len(job.dp_ranks), "without stragglers")):
        for place, dp_rank in enumerate(job.dp_ranks):
            pid = first_pid + place
            yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": f"dp rank {dp_rank}, {words}"}}
            for stage in job.stages:
                for lane, label in enumerate(_LANES):
                    yield {
                        "ph": "M",
                        "name": "thread_name",
                        "pid": pid,
                        "tid": stage * len(_LANES) + lane,
                        "args": {"name": f"stage {stage}, {label}"},
                    }
