"""Start, end and duration of a run, by the monotonic clock."""

from __future__ import annotations

import time
from pathlib import Path

from traceml.clock import SteadyClock
from traceml.database.schema import PROCESS
from traceml.database.store.store_file import last_written_s
from traceml.run_folder import STORE_NAME
from traceml.runs.rows.digest import Digest

__all__ = ["run_times"]


def run_times(digest: Digest, state: str, run_dir: Path) -> tuple[float | None, float | None, float | None]:
    """Return (started, ended, duration): epoch seconds and seconds; a running run has not ended.

    Args:
        digest: the run, as far as it was read.
        state: its state now.
        run_dir: its folder.
    """
    started, ended = digest.run.get("started"), digest.run.get("ended")
    if ended is None and state != "running":  # the process that would have noted it is gone
        ended = _last_row_s(digest) or last_written_s(run_dir / STORE_NAME)

    if started is None:
        return None, ended, None

    clock = SteadyClock.from_facts(digest.run.get("clock"))
    now = time.time() if clock is None else clock.now_s()
    if ended is not None:
        ended = max(ended, started)  # the wall clock may have been set

    return started, ended, max((now if ended is None else ended) - started, 0.0)


def _last_row_s(digest: Digest) -> float | None:
    """Return the date of the last step or sample of the ranks on the aggregator's host; None without any."""
    clock = SteadyClock.from_facts(digest.run.get("clock"))
    if clock is None:
        return None

    ends = digest.kept.end_ns
    stamps = []
    for rank, stream in digest.ranks.items():
        if stream.facts.get("boot_id") == clock.boot:
            sample = digest.samples.last(PROCESS.name, rank)
            stamps += [] if sample is None else [int(sample["t_ns"])]
            stamps += [int(ends[rank])] if rank < len(ends) else []

    latest = max(stamps, default=0)
    return clock.epoch_s(latest) if latest > clock.mono_ns else None
