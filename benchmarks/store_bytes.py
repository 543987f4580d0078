"""How many bytes a rank's step takes on the wire and in the store, and what compressing and committing cost.

    python benchmarks/store_bytes.py [--ranks 50] [--steps 4000] [--per-frame 5 20 100] [--sigma 0.05 0.5] [--json FILE]

Durations are log-normal in whole nanoseconds, seven parts of the step are not zero, and each rank's noise is its own:
real durations are as incompressible. The store is measured after its close, pages and indexes included; an empty one
takes a fixed size (nine pages), which is printed apart and contained in the bytes per row.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sqlite3
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traceml.database.schema import STEPS, pack_bits
from traceml.database.store.reader import StreamIdentity
from traceml.database.store.store import StoreWriter
from traceml.transport.framing import rows_frame

MEANS_NS = {
    "input_wait_ns": 400_000,
    "h2d_ns": 150_000,
    "forward_ns": 3_000_000,
    "backward_ns": 6_000_000,
    "optimizer_ns": 900_000,
    "comm_ns": 250_000,
    "backward_own_ns": 4_500_000,
}
FRAMES_PER_COMMIT = 100


def step_rows(steps: int, sigma: float, random: np.random.Generator) -> NDArray[np.void]:
    """Return a rank's step rows as its recorder would have appended them."""
    rows = np.zeros(steps, STEPS.dtype)
    rows["step"] = np.arange(steps)
    for name, mean_ns in MEANS_NS.items():
        rows[name] = mean_ns * random.lognormal(0.0, sigma, steps)

    parts = [name for name in MEANS_NS if name != "backward_own_ns"]
    rows["total_ns"] = sum(rows[name] for name in parts) + 300_000 * random.lognormal(0.0, sigma, steps)
    rows["t_end_ns"] = 10**15 + int(random.integers(0, 10**12)) + np.cumsum(rows["total_ns"])
    rows["bits"] = [pack_bits(1, 4, 17 * step) for step in range(steps)]
    return rows


def measure(ranks: int, steps: int, per_frame: int, sigma: float, seed: int) -> dict[str, Any]:
    """Write all ranks' rows into a store of its own, and return bytes and times per row."""
    random = np.random.default_rng(seed)
    data = [step_rows(steps, sigma, random).tobytes() for _ in range(ranks)]
    wire = 0
    commits: list[float] = []
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store.db"
        with StoreWriter(path) as writer:
            streams = [writer.stream(StreamIdentity(rank, 0, "host", rank, 0)) for rank in range(ranks)]
            waiting = 0
            for first in range(0, steps, per_frame):
                n = min(per_frame, steps - first)
                for stream, rows in zip(streams, data, strict=True):
                    part = rows[first * STEPS.row_bytes : (first + n) * STEPS.row_bytes]
                    wire += len(rows_frame("steps", first, n, part))
                    writer.append(stream, "steps", first, n, part, first, first + n - 1)

                waiting += ranks
                # A tick ends with every round of frames, or later when there are few: one frame per rank and tick.
                if waiting >= min(FRAMES_PER_COMMIT, ranks):
                    commits.append(timed_commit(writer))
                    waiting = 0

        cpu_s = time.process_time() - started
        with contextlib.closing(sqlite3.connect(path)) as database:
            (blobs,) = database.execute("SELECT sum(length(data)) FROM frames").fetchone()

        size = path.stat().st_size

    total = ranks * steps
    return {
        "ranks": ranks,
        "steps": steps,
        "rows_per_frame": per_frame,
        "sigma": sigma,
        "row_bytes": STEPS.row_bytes,
        "wire_bytes_per_row": round(wire / total, 2),
        "blob_bytes_per_row": round(blobs / total, 2),
        "store_bytes_per_row": round(size / total, 2),
        "cpu_us_per_frame": round(cpu_s * 1e6 / (total / per_frame), 1),
        "commit_ms_p50": round(statistics.median(commits), 2),
        "commit_ms_max": round(max(commits), 2),
    }


def empty_bytes() -> int:
    """Return the size of a store without rows."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store.db"
        StoreWriter(path).close()
        return path.stat().st_size


def timed_commit(writer: StoreWriter) -> float:
    """Commit and return the milliseconds it took."""
    started = time.perf_counter()
    writer.commit()
    return (time.perf_counter() - started) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=50)
    parser.add_argument("--steps", type=int, default=4000, help="steps of each rank")
    parser.add_argument("--per-frame", type=int, nargs="+", default=[5, 20, 100], help="rows per frame")
    parser.add_argument("--sigma", type=float, nargs="+", default=[0.05, 0.5], help="noise of the durations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()

    results = []
    rows = arguments.ranks * arguments.steps
    print(f"{rows} rows of {STEPS.row_bytes} bytes; an empty store is {empty_bytes()} bytes")
    print("rows/frame  sigma   wire B/row  blob B/row  store B/row   CPU us/frame   commit ms p50 / max")
    for per_frame in arguments.per_frame:
        for sigma in arguments.sigma:
            got = measure(arguments.ranks, arguments.steps, per_frame, sigma, arguments.seed)
            results.append(got)
            print(
                f"{per_frame:10d}  {sigma:5.2f}  {got['wire_bytes_per_row']:11.2f} {got['blob_bytes_per_row']:11.2f} "
                f"{got['store_bytes_per_row']:12.2f}  {got['cpu_us_per_frame']:13.1f}   "
                f"{got['commit_ms_p50']:13.2f} / {got['commit_ms_max']:.2f}"
            )

    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
