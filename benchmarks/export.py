"""`traceml export` of a million steps, or logged values: time, CPU time and memory of the whole process.

python benchmarks/export.py [--steps 1000000] [--values 1000000] [--repeat 3]

The runs are written by the real writer, in frames of 4,096 rows: one rank, and four ranks with waiting inside backward,
whose arrows are drawn; and one rank that logged values under ten names. Exports and the floor alternate. The floor only
compresses the same text. Every step and value must be in the file; the spans of a phase, and the values, must add up to
the rows. `--steps 0` or `--values 0` leaves a part out.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.diagnosis.fabricated import Job, adds, rows_of
from tests.runs.fabricated_store import run_facts

from traceml.database.schema import METRICS
from traceml.database.store.reader import StreamIdentity
from traceml.database.store.store import StoreWriter
from traceml.run_folder import STORE_NAME

FRAME = 4096
SUFFIXES = {"pfw": "pfw.gz", "perfetto": "json.gz"}
FLOOR = """
import sys, zlib
from traceml.traces.writer.sinks import compressor
compress = compressor()
text = open(sys.argv[1], 'rb').read()
for at in range(0, len(text), 1 << 20):
    compress(text[at : at + (1 << 20)])
"""
# A process of its own, as a child's peak is at least the size of its parent.
MEASURE = """
import json, resource, subprocess, sys, time
began = time.perf_counter()
said = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, text=True, check=True).stdout
took, usage = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
cpu_s, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
print(json.dumps({"s": took, "cpu_s": cpu_s, "peak": peak, "said": said}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--values", type=int, default=1_000_000)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    print(" ranks    format       s   CPU s  peak MB       events  file MB  floor CPU s")
    for ranks in (1, 4) if options.steps else ():
        with tempfile.TemporaryDirectory() as folder:
            run, forward_ns = write_run(Path(folder) / "run", ranks, options.steps // ranks)
            for form in SUFFIXES:
                found = measure(run, form, options.repeat, lambda text, expected=forward_ns: check(text, expected))
                print(_line(ranks, form, found), flush=True)

    if options.values:
        print(" logged values")
        measure_values(options.values, options.repeat)

    return 0


def measure_values(count: int, repeat: int) -> None:
    """Print a line for each format of a run that logged values."""
    with tempfile.TemporaryDirectory() as folder:
        run, total = write_values(Path(folder) / "run", count)
        for form in SUFFIXES:
            found = measure(run, form, repeat, lambda text: check_values(text, count, total))
            print(_line(1, form, found), flush=True)

        for form in ("parquet", "csv"):
            export = [sys.executable, "-m", "traceml", "export", str(run), "--format", form, "-o", f"{run}-{form}"]
            found = middle_of([timed([*export, "--json"]) for _ in range(repeat)])
            size = sum(file.stat().st_size for file in Path(f"{run}-{form}").iterdir())
            print(_line(1, form, {**found, "bytes": size, "floor_s": float("nan")}), flush=True)


def write_values(folder: Path, count: int) -> tuple[Path, float]:
    """Write a run that logged values; return its folder and their sum."""
    folder.mkdir()
    random = np.random.default_rng(0)
    rows = np.zeros(count, METRICS.dtype)
    rows["t_ns"] = 1_700_000_000 * 10**9 + np.arange(count) * 10**6
    rows["step"], rows["name_id"], rows["value"] = np.arange(count) // 10, np.arange(count) % 10, random.random(count)
    with StoreWriter(folder / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(world_size=1))
        stream = writer.stream(StreamIdentity(0, 0, "h0", 100, 7, ""), state="finished")
        for number in range(10):
            writer.append(stream, "names", number, 1, msgpack.packb({"id": number, "name": f"layer.{number}/norm"}))

        for start in range(0, count, FRAME):
            part = rows[start : start + FRAME]
            writer.append(stream, METRICS.name, start, len(part), part.tobytes())

    return folder, float(rows["value"].sum())


def check_values(text: Path, count: int, total: float) -> None:
    """Compare the counters in the trace with the rows."""
    found = [float(value) for value in re.findall(rb'"args":{"value":([^}]+)', text.read_bytes())]
    if len(found) != count or abs(sum(found) - total) > 1e-6 * total:
        raise SystemExit(f"{len(found)} values in the trace sum to {sum(found)}, {count} in the rows to {total}")


def write_run(folder: Path, ranks: int, steps: int) -> tuple[Path, int]:
    """Write a run; return its folder and its nanoseconds of forward."""
    folder.mkdir()
    job = Job(ranks=ranks, steps=min(steps, 20_000), grouped=ranks > 1)
    forward_ns = 0
    with StoreWriter(folder / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(world_size=ranks))
        of_ranks = rows_of(job, adds("forward", 3.0, (ranks - 1,)))
        identities = [StreamIdentity(rank, 0, "h0", 100 + rank, 7, "") for rank in range(ranks)]
        streams = [writer.stream(identity, state="finished") for identity in identities]
        length_ns = max(int(rows["t_end_ns"][-1]) for rows in of_ranks)
        for start in range(0, steps, FRAME):
            for stream, rows in zip(streams, of_ranks, strict=True):
                numbers = np.arange(start, min(start + FRAME, steps))
                part = rows[numbers % len(rows)].copy()
                part["step"], part["t_end_ns"] = numbers, part["t_end_ns"] + numbers // len(rows) * length_ns
                forward_ns += int(part["forward_ns"].sum())
                writer.append(stream, "steps", start, len(part), part.tobytes(), start, int(numbers[-1]))

    return folder, forward_ns


def measure(run: Path, form: str, repeat: int, check_text: Callable[[Path], None]) -> dict[str, float]:
    """Return medians of several exports of a run, whose text is checked."""
    path = run.parent / f"out.{SUFFIXES[form]}"
    text = run.parent / "text"
    export = [sys.executable, "-m", "traceml", "export", str(run), "--format", form, "-o", str(path), "--json"]
    exported, floors = [], []
    for _ in range(repeat):
        exported.append(timed(export))
        text.write_bytes(gzip.decompress(path.read_bytes()))
        floors.append(timed([sys.executable, "-c", FLOOR, str(text)])["cpu_s"])

    check_text(text)
    return {**middle_of(exported), "bytes": path.stat().st_size, "floor_s": statistics.median(floors)}


def middle_of(exported: list[dict[str, Any]]) -> dict[str, float]:
    """Return medians of several exports, and the events or rows that the last one wrote."""
    middle = {key: statistics.median(each[key] for each in exported) for key in exported[0] if key != "said"}
    return {**middle, "events": json.loads(exported[-1]["said"])["rows"]}


def timed(command: list[str]) -> dict[str, Any]:
    """Return seconds, seconds of CPU, peak memory and output of a process."""
    done = subprocess.run([sys.executable, "-c", MEASURE, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command}: {done.stderr}")

    return dict(json.loads(done.stdout))


def check(text: Path, forward_ns: int) -> None:
    """Compare the durations in the trace with the rows: microseconds are rounded down at both ends."""
    found = re.findall(rb'"name":"forward".*?"dur":([0-9.]+)', text.read_bytes())
    if abs(sum(map(float, found)) * 1000 - forward_ns) > 1000 * len(found):
        raise SystemExit(f"forward takes {sum(map(float, found))} us in the trace, {forward_ns / 1000} us in the rows")


def _line(ranks: int, form: str, found: dict[str, float]) -> str:
    return (
        f"{ranks:>6} {form:>9} {found['s']:>7.2f} {found['cpu_s']:>7.2f} {found['peak'] / 1e6:>8.0f} "
        f"{int(found['events']):>12,} {found['bytes'] / 1e6:>8.1f} {found['floor_s']:>12.2f}"
    )


if __name__ == "__main__":
    sys.exit(main())
