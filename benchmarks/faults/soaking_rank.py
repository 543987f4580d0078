"""Train at full speed in runs that come and go, all in one process, and print a line of counts after each run.

`python soaking_rank.py SECONDS_PER_RUN`: one line of standard input starts a run, and the next one lets it end.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import traceml

LOG_EVERY = 100
BATCHES = torch.randn(64, 4, 8)


def batches(seconds: float) -> Iterator[torch.Tensor]:
    """Yield batches for so long."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        yield from BATCHES


def train(seconds: float) -> tuple[int, int]:
    """Train; return the numbers of steps and of logged values."""
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    step = -1
    for step, x in enumerate(traceml.trace_data(batches(seconds))):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % LOG_EVERY == 0:
            traceml.log_metric("loss", loss.item(), step=step)

    return step + 1, step // LOG_EVERY + 1


def one_run(number: int, seconds: float) -> dict[str, Any]:
    """Trace a training from `init` to `shutdown`; return its counts."""
    recorder = traceml.init(run_id=f"soak-{number}", run_name=f"soak-{number}", quiet=True)
    steps, logged = train(seconds)
    sys.stdin.readline()
    run_dir = recorder.run_dir
    recorder.wait_until_stored(60)  # longer than `shutdown` waits, which leaves the rest to a later aggregator
    traceml.shutdown()
    statistics = recorder.statistics()
    gc.collect()
    return {
        "run_dir": str(run_dir),
        "steps": steps,
        "logged": logged,
        "rows": statistics.rows_appended,
        "reconnects": statistics.reconnects,
        "rss": resident_bytes(),
        "threads": threading.active_count(),
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
    }


def resident_bytes() -> int:
    """Return the memory of this process that is not mapped from files."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def main() -> None:
    torch.set_num_threads(1)
    seconds = float(sys.argv[1])
    for number, _ in enumerate(sys.stdin):
        print(json.dumps(one_run(number, seconds)), flush=True)


if __name__ == "__main__":
    main()
