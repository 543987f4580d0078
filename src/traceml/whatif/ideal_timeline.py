"""The first steps of a job as recorded and without stragglers, as a trace for Perfetto."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from traceml.whatif.operations import COMPUTE, TRANSFERS, JobTrace, Times
from traceml.whatif.simulation import Simulator

__all__ = ["write_timeline"]

_STEPS = 10
_GAP = 1.1  # steps of the ideal job begin this much later than the longest one lasts
# Transfers of different kinds are under way at the same time, and Perfetto drops what overlaps on one track.
_LANES = ("compute", *TRANSFERS, "collectives")
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
    operations_of = defaultdict[int, list[int]](list)  # by track
    for index, operation in enumerate(job.operations):
        operations_of[operation.stage * len(_LANES) + _lane(operation.kind)].append(index)

    steps = job.steps[:_STEPS]
    begin_ns, end_ns = (
        np.rint(1e9 * times[:, :, : len(steps)]).astype(np.int64) for times in (start_s, start_s + duration_s)
    )
    for track, indices in operations_of.items():
        for place in range(len(job.dp_ranks)):
            begins = begin_ns[indices, place].ravel().tolist()
            ends = _without_overlaps(begins, end_ns[indices, place].ravel().tolist())
            for number, (begin, end) in enumerate(zip(begins, ends, strict=True)):
                operation = job.operations[indices[number // len(steps)]]
                yield {
                    "ph": "X",
                    "name": operation.kind,
                    "cat": _category(operation.kind),
                    "pid": first_pid + place,
                    "tid": track,
                    "ts": begin / 1000,
                    "dur": (end - begin) / 1000,
                    "args": {
                        "step": steps[number % len(steps)],
                        "micro_batch": operation.micro_batch,
                        "chunk": operation.chunk,
                    },
                }


def _without_overlaps(begins: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Return the ends of slices of one track, cut where a later one begins that ends after them."""
    found, open_ = list(ends), list[int]()
    for number in sorted(range(len(begins)), key=lambda each: (begins[each], -ends[each])):
        open_ = [each for each in open_ if found[each] > begins[number]]
        for each in open_:
            if found[each] < found[number]:
                found[each] = begins[number]

        open_.append(number)

    return found


def _lane(kind: str) -> int:
    return _LANES.index(kind) if kind in TRANSFERS else 0 if _category(kind) == "compute" else len(_LANES) - 1


def _category(kind: str) -> str:
    if kind in TRANSFERS:
        return "pipeline"

    return "compute" if kind in (*COMPUTE, *_OTHER_COMPUTE) else "collectives"


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
