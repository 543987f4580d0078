"""Bytes of the store of a month, and what keeping it small costs the aggregator.

    python benchmarks/retention.py [--days 30] [--ranks 64 1024 10000] [--json FILE]

Each rank appends a step, a sample of its process and one of torch's memory a second, and telemetry every five seconds.
The store is written by the real writer with the time given to it, so that a month passes in minutes, in two parts:

- `tail`: 64 ranks for 20 minutes, a frame per row, as ranks send them: the steady state of the small frames, and the
  CPU time per frame of storing, and of summing and merging.
- `month`: 2 ranks, a frame per minute, with the limit of the setting `retention` in their proportion: what stays of the
  large frames. Every step is summed, and the sums are compared with those that were written.

Of a large job (above 8,192 ranks times tables) the aggregator holds rows for ten seconds, the ranks samples for a
minute; both parts are measured so, the month with a frame of steps per ten seconds.

Bytes are those of the file, at the largest that it was. For a number of ranks both parts are multiplied: of the
month what the limit allows, and the tail of each rank. The CPU share is of a core, for a step and the samples a second.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store_bytes import step_rows
from traceml.aggregator.active_run import MIN_RETAINED_BYTES
from traceml.database.schema import PROCESS, STEPS, TELEMETRY, TORCH_MEMORY, Table
from traceml.database.store import compaction
from traceml.database.store.reader import StoreReader, StreamIdentity
from traceml.database.store.store import StoreWriter
from traceml.database.store.unframed_rows import FRAME_WAIT_S
from traceml.settings import Config

TAIL_RANKS, TAIL_S = 64, 1200
MONTH_RANKS, FRAME_S, CHUNK_S = 2, 60, 86_400
SAMPLES_S = 60
MERGED_TAILS = compaction._MAX_TAILS
EVERY_S = {STEPS.name: 1, PROCESS.name: 1, TORCH_MEMORY.name: 1, TELEMETRY.name: 5}
TABLES = {table.name: table for table in (STEPS, PROCESS, TORCH_MEMORY, TELEMETRY)}
SECOND_NS = 10**9


def rows_of(table: Table, seconds: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.void]:
    """Return a rank's rows at some seconds of the run, with noise in their low digits."""
    if table is STEPS:
        rows = step_rows(len(seconds), 0.05, random)
        rows["step"] = seconds
        rows["t_end_ns"] = seconds * SECOND_NS + random.integers(0, 10**7, len(seconds))
        return rows

    rows = np.zeros(len(seconds), table.dtype)
    noise = random.integers(0, 10**6, len(seconds))
    rows["t_ns"] = seconds * SECOND_NS + random.integers(0, 10**7, len(seconds))
    for name in table.names:
        if name.endswith("_bytes"):
            rows[name] = 3 * 10**9 + noise // 4096 * 4096
        elif name in ("cpu_ns", "main_run_ns", "main_wait_ns", "sender_cpu_ns", "sampler_ns", "bytes_sent"):
            rows[name] = seconds * 10**6 + noise
        elif name in ("step", "voluntary_switches", "rows_appended"):
            rows[name] = seconds
        elif name in ("threads", "hook_ns_per_step"):
            rows[name] = 40

    return rows


class Run:
    """A store with ranks, and a clock of its own; it may count as one of a large job."""

    def __init__(self, path: Path, ranks: int, frame_s: int, limit_bytes: int | None, *, is_large: bool) -> None:
        compaction._MAX_TAILS = 0 if is_large else MERGED_TAILS
        self.samples_s = max(SAMPLES_S, frame_s) if is_large else frame_s
        self.path, self.frame_s, self.limit_bytes = path, frame_s, limit_bytes
        self.writer = StoreWriter(path)
        self.empty_bytes = path.stat().st_size
        self.streams = [self.writer.stream(StreamIdentity(rank, 0, "host", rank, 0)) for rank in range(ranks)]
        self.random = np.random.default_rng(1)
        self.now_s = 0
        self.largest_bytes = self.total_ns = self.frames = 0
        self.store_s = self.upkeep_s = 0.0

    def advance(self, seconds: int) -> None:
        """Let ranks append rows for a while; the aggregator commits once per frame time and keeps the store."""
        at = np.arange(self.now_s, self.now_s + seconds)
        data = {}
        for stream in self.streams:
            for table, every_s in EVERY_S.items():
                data[stream, table] = rows_of(TABLES[table], at[at % every_s == 0], self.random)

            self.total_ns += int(data[stream, STEPS.name]["total_ns"].sum())

        for begin in range(0, seconds, self.frame_s):
            self._append(data, begin)
            began_s = time.process_time()
            self.writer.commit(float(self.now_s))
            stored_s = time.process_time()
            self.writer.maintain(60.0, limit_bytes=self.limit_bytes, now_s=float(self.now_s))
            self.store_s += stored_s - began_s
            self.upkeep_s += time.process_time() - stored_s
            self.now_s += self.frame_s

        self.largest_bytes = max(self.largest_bytes, self.path.stat().st_size)

    def _append(self, data: dict[Any, NDArray[np.void]], begin: int) -> None:
        frames = []
        for (stream, table), rows in data.items():
            every_s = EVERY_S[table]
            width_s = self.frame_s if table == STEPS.name else self.samples_s
            if (self.now_s + self.frame_s) % width_s:
                continue

            end, now_s = begin + self.frame_s, self.now_s + self.frame_s
            part = rows[-(-(end - width_s) // every_s) : -(-end // every_s)]
            if len(part):
                has_steps = "step" in TABLES[table].index
                steps = (int(part["step"][0]), int(part["step"][-1])) if has_steps else (-1, -1)
                frames.append((stream, table, -(-(now_s - width_s) // every_s), len(part), part.tobytes(), *steps))

        began_s = time.process_time()
        for frame in frames:
            self.writer.append(*frame)

        self.store_s += time.process_time() - began_s
        self.frames += len(frames)

    def check(self) -> tuple[int, int]:
        """Compare the sums with what was written; return the stored and the thinned rows of steps."""
        with StoreReader(self.path) as reader:
            sums = reader.step_sums().values()
            assert sum(int(each.steps.bins["total_ns"].sum()) for each in sums) == self.total_ns
            assert sum(each.count for each in sums) == self.now_s * len(self.streams) == reader.stored(STEPS.name)
            return reader.stored(STEPS.name), reader.thinned(STEPS.name)


def measure_tail(folder: Path, *, is_large: bool) -> dict[str, Any]:
    """Return the bytes of small frames per rank, and microseconds of CPU per frame."""
    run = Run(folder / "store.db", TAIL_RANKS, 1, None, is_large=is_large)
    for _ in range(TAIL_S // 60):
        run.advance(60)

    run.writer.commit(frames_of_all=True)
    run.check()
    run.writer.close()
    return {
        "bytes_per_rank": (run.largest_bytes - run.empty_bytes) / TAIL_RANKS,
        "store_us": 1e6 * run.store_s / run.frames,
        "upkeep_us": 1e6 * run.upkeep_s / run.frames,
        "frames_per_rank_s": run.frames / TAIL_RANKS / TAIL_S,
    }


def measure_month(folder: Path, days: float, limit_per_rank: float, *, is_large: bool) -> dict[str, Any]:
    """Return the bytes per rank of a month, when it had them, and the CPU time of thinning per rank and day."""
    frame_s = round(FRAME_WAIT_S) if is_large else FRAME_S
    run = Run(folder / "store.db", MONTH_RANKS, frame_s, int(limit_per_rank * MONTH_RANKS), is_large=is_large)
    sizes = []
    seconds = max(1, round(days * 86_400 / FRAME_S)) * FRAME_S
    for begin in range(0, seconds, CHUNK_S):
        run.advance(min(CHUNK_S, seconds - begin))
        sizes.append((run.path.stat().st_size - run.empty_bytes) / MONTH_RANKS)

    run.writer.commit(frames_of_all=True)
    stored, thinned = run.check()
    run.writer.close()
    return {
        "bytes_per_rank": max(sizes),
        "sizes": sizes,
        "kept": 1 - thinned / stored,
        "upkeep_s_per_rank_day": run.upkeep_s / MONTH_RANKS / days,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--days", type=float, default=30)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 1024, 10_000])
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    retention_gb = Config().retention
    assert not isinstance(retention_gb, str)

    tails, results = {}, []
    for is_large in sorted({ranks * len(TABLES) > MERGED_TAILS for ranks in options.ranks}):
        with tempfile.TemporaryDirectory() as folder:
            tails[is_large] = tail = measure_tail(Path(folder), is_large=is_large)

        print(
            f"{'large job' if is_large else 'tail'}: {tail['bytes_per_rank'] / 1e3:.0f} kB per rank; CPU per frame of "
            f"a rank: {tail['store_us']:.0f} us to store, {tail['upkeep_us']:.0f} us to sum and merge; "
            f"{tail['frames_per_rank_s']:.2f} frames per rank and second"
        )

    print("| ranks | days | store GB | steps left, all are summed | CPU of a core |\n|---|---|---|---|---|")
    for ranks in options.ranks:
        is_large = ranks * len(TABLES) > MERGED_TAILS
        tail = tails[is_large]
        limit = max(retention_gb * 1e9, ranks * MIN_RETAINED_BYTES) / ranks
        with tempfile.TemporaryDirectory() as folder:
            month = measure_month(Path(folder), options.days, limit, is_large=is_large)

        # What the month has of its own small frames is counted twice.
        size_gb = ranks * (month["bytes_per_rank"] + (0 if is_large else tail["bytes_per_rank"])) / 1e9
        share = ranks * tail["frames_per_rank_s"] * (tail["store_us"] + tail["upkeep_us"]) / 1e6
        results.append({"ranks": ranks, "days": options.days, "gb": size_gb, "cpu_share": share, **month})
        print(
            f"| {ranks:,} | {options.days:g} | {size_gb:.2f} | {100 * month['kept']:.2f} % | {100 * share:.1f} % |",
            flush=True,
        )

    if options.json:
        options.json.write_text(json.dumps({"tails": list(tails.values()), "months": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
