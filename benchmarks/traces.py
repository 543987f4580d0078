"""Reading traces: total duration by name, each result from a fresh process, next to dftracer-utils, duckdb and json.

    python benchmarks/traces.py [--events 2000000] [--rounds 5] [--only NAME ...] [--json FILE]

Files are generated from a seed, and every result is compared with their content. `members` is a .pfw.gz of 4 MiB gzip
members, `single` the same text as one member, `large` five times as many events, `decimals` with times of six decimals,
`metadata` with a line of metadata per event, `zst` as one zstd frame, `profiler` an export of torch.profiler
as JSON and compressed, `python` a tenth of `members`, with and without the scanner in C. Programs alternate within a
run; times are medians from start to exit, CPU times include all threads, sizes are peak resident memory. The page cache
is warm, and every program keeps its compiled modules, as an installed one has them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from peers import environment

PEER = "dftracer-utils==0.0.14"
DUCKDB = "duckdb==1.4.1"
MEMBER_BYTES = 4 * 1024 * 1024
NAMES = ["read", "write", "open64", "close", "lseek64", "xstat64", "fopen64", "fread", "mkdir", "numpy.open", "forward"]
OPERATORS = ["aten::mm", "aten::add_", "aten::empty", "aten::copy_", "cudaLaunchKernel", "void at::native::kernel<4>"]

Answer = dict[str, tuple[int, float]]  # count and sum of durations in microseconds, by name

ASK_PEER = """
import json, sys
from dftracer.utils import TraceViewer
found = TraceViewer([sys.argv[1]]).group_by("name").agg("count", "sum:dur").collect().to_dict()
print(json.dumps({n: [c, d] for n, c, d in zip(found["name"], found["count"], found["sum_dur"])}))
"""
ASK_DUCKDB = """
import duckdb, json, sys
duckdb.sql("SET enable_progress_bar = false")  # it goes to the standard output
rows = duckdb.sql(f'''SELECT name, count(*), sum(dur) FROM read_json('{sys.argv[1]}', format='newline_delimited',
    columns={{name: 'VARCHAR', dur: '{sys.argv[2]}', ph: 'VARCHAR'}}) {sys.argv[3]} GROUP BY name''').fetchall()
print(json.dumps({n: [c, float(d)] for n, c, d in rows}))
"""
ASK_JSON = """
import collections, gzip, json, sys
data = open(sys.argv[1], "rb").read()
events = json.loads(gzip.decompress(data) if data[:2] == b"\\x1f\\x8b" else data)["traceEvents"]
found = collections.defaultdict(lambda: [0, 0])
for event in events:
    if event["ph"] == "X":
        found[event["name"]][0] += 1
        found[event["name"]][1] += event["dur"]
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True)
class Asker:
    """A program under test.

    Args:
        name: shown.
        command: its command line.
        before: prepares each round.
    """

    name: str
    command: list[str]
    before: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class Taken:
    """Cost of one result: seconds, CPU time of all threads, peak resident memory; and whether it was right."""

    s: float
    cpu_s: float
    mib: float
    right: bool


def main() -> int:
    options = _options()
    cases: dict[str, Callable[[Path, int], tuple[Path, Answer, list[Asker]]]] = {
        "members": members,
        "single": single,
        "large": large,
        "decimals": decimals,
        "metadata": metadata,
        "zst": zst,
        "profiler": profiler,
        "profiler_gz": profiler_gz,
        "python": python,
    }
    results = {}
    print("| file | asked | s | CPU s | peak MiB | times ours | answer |\n|---|---|---|---|---|---|---|")
    for name in options.only or cases:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TRACEML_CACHE_DIR"] = str(Path(folder, "cache"))
            path, truth, askers = cases[name](Path(folder), options.events)
            results[name] = compare(name, path, truth, askers, options.rounds)

    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))

    return 0 if all(row["right"] for rows in results.values() for row in rows if row["name"].startswith("ours")) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=2_000_000, help="in `members`; others follow from it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="members, single, large, decimals, metadata, zst, profiler, ..."
    )
    parser.add_argument("--json", type=Path, help="also write the results here")
    return parser.parse_args()


def compare(case: str, path: Path, truth: Answer, askers: list[Asker], rounds: int) -> list[dict[str, Any]]:
    """Run all programs in turn, and print their costs."""
    taken: dict[str, list[Taken]] = {asker.name: [] for asker in askers}
    for _ in range(rounds):
        for asker in askers:
            asker.before()
            taken[asker.name].append(_timed(asker.command, truth))

    rows: list[dict[str, Any]] = []
    for name, each in taken.items():
        row = {"name": name, "s": statistics.median(one.s for one in each), "right": all(one.right for one in each),
               "cpu_s": statistics.median(one.cpu_s for one in each), "mib": max(one.mib for one in each)}  # fmt: skip
        rows.append(row)
        print(f"| {case}, {path.stat().st_size / 1e6:.0f} MB | {name} | {row['s']:.2f} | {row['cpu_s']:.2f} "
              f"| {row['mib']:.0f} | {row['s'] / rows[0]['s']:.1f} x | {'right' if row['right'] else 'wrong'} |",
              flush=True)  # fmt: skip

    return rows


def _timed(command: list[str], truth: Answer) -> Taken:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL, env=environ)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        right = process.returncode == 0 and _is_right(output.read(), truth)
        return Taken(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, right)


def _is_right(output: bytes, truth: Answer) -> bool:
    try:
        found = json.loads(output)
    except ValueError:
        return False

    if "groups" in found:
        found = {group["name"]: (group["count"], group["sum_us"]) for group in found["groups"]}

    same_counts = {name: count for name, (count, _) in found.items()} == {n: c for n, (c, _) in truth.items()}
    return same_counts and all(abs(total - truth[name][1]) <= 1e-8 * total for name, (_, total) in found.items())


def members(folder: Path, events: int) -> tuple[Path, Answer, list[Asker]]:
    """A typical file of dftracer."""
    path, truth = folder / "trace.pfw.gz", dict[str, tuple[int, float]]()
    _write_members(path, _posix_lines(events, truth))
    index = path.with_name(".dftindex")
    peer = [str(environment(PEER) / "python"), "-c", ASK_PEER, str(path)]
    forget_index = lambda: shutil.rmtree(index, ignore_errors=True)  # noqa: E731
    return path, truth, [
        *_ours(path),
        Asker("dftracer-utils, cold", peer, forget_index),
        Asker("dftracer-utils, indexed", peer),
        _duckdb(path),
    ]  # fmt: skip


def single(folder: Path, events: int) -> tuple[Path, Answer, list[Asker]]:
    """The same text in one gzip member, which cannot be decompressed from the middle."""
    path, truth = folder / "trace.pfw.gz", dict[str, tuple[int, float]]()
    with gzip.open(path, "wb", compresslevel=6) as file:
        for block in _blocks(_posix_lines(events, truth), MEMBER_BYTES):
            file.write(block)

    peer = [str(environment(PEER) / "python"), "-c", ASK_PEER, str(path)]
    forget_index = lambda: shutil.rmtree(path.with_name(".dftindex"), ignore_errors=True)  # noqa: E731
    return path, truth, [*_ours(path), Asker("dftracer-utils, cold", peer, forget_index)]


def large(folder: Path, events: int) -> tuple[Path, Answer, list[Asker]]:
    """Five times as many events."""
    small, truth, _ = members(folder, events)
    path = folder / "large.pfw.gz"
    with path.open("wb") as file:
        for _ in range(5):
            file.write(small.read_bytes())

    small.unlink()
    peer = [str(environment(PEER) / "python"), "-c", ASK_PEER, str(path)]
    forget_index = lambda: shutil.rmtree(path.with_name(".dftindex"), ignore_errors=True)  # noqa: E731
    whole = {name: (5 * count, 5 * total) for name, (count, total) in truth.items()}
    return path, whole, [
        *_ours(path),
        Asker("dftracer-utils, cold", peer, forget_index),
        _duckdb(path),
    ]  # fmt: skip


def decimals(folder: Path, events: int) -> tuple[Path, Answer, list[Asker]]:
    """Times of six decimals, as tracers with a clock in nanoseconds and a float write them."""
    path, truth = folder / "trace.pfw.gz", dict[str, tuple[int, float]]()
    _write_members(path, _posix_lines(events, truth, finer=6))
    return path, truth, [*_ours(path), _duckdb(path, of_time="DOUBLE")]


def metadata(folder: Path, events: int) -> tuple[Path, Answer, list[Asker]]:
    """Each event behind the name of a file, as dftracer writes it once per file."""
    path, truth = folder / "trace.pfw.gz", dict[str, tuple[int, float]]()
    _write_members(path, _posix_lines(events, truth, named=True))
    return path, truth, [*_ours(path), _duckdb(path, where="WHERE ph = 'X'")]


def zst(folder: Path, events: int) -> tuple[Path, Answer, list[Asker]]:
    """The text of `members` as one zstd frame."""
    path, truth = folder / "trace.pfw.zst", dict[str, tuple[int, float]]()
    with path.open("wb") as file, zstandard.ZstdCompressor(3).stream_writer(file) as packed:
        for block in _blocks(_posix_lines(events, truth), MEMBER_BYTES):
            packed.write(block)

    return path, truth, [*_ours(path), _duckdb(path)]


def profiler(folder: Path, events: int) -> tuple[Path, Answer, list[Asker]]:
    """An export of torch.profiler: pretty-printed, times with fractions."""
    path, truth = folder / "trace.json", dict[str, tuple[int, float]]()
    with path.open("wb") as file:
        file.writelines(_blocks(_profiler_text(events * 2 // 5, truth), MEMBER_BYTES))

    return path, truth, [*_ours(path), Asker("json", [sys.executable, "-c", ASK_JSON, str(path)])]


def profiler_gz(folder: Path, events: int) -> tuple[Path, Answer, list[Asker]]:
    """The same, compressed as by torch.profiler."""
    plain, truth, _ = profiler(folder, events)
    path = folder / "trace.json.gz"
    with plain.open("rb") as source, gzip.open(path, "wb", compresslevel=6) as file:
        shutil.copyfileobj(source, file)

    plain.unlink()
    return path, truth, [*_ours(path), Asker("json", [sys.executable, "-c", ASK_JSON, str(path)])]


def python(folder: Path, events: int) -> tuple[Path, Answer, list[Asker]]:
    """The gain of the scanner in C."""
    path, truth, askers = members(folder, events // 10)
    ours = askers[0]
    return path, truth, [ours, Asker("ours, cold, no C", ["env", "TRACEML_NATIVE=0", *ours.command], ours.before)]


def _write_members(path: Path, lines: Iterable[str]) -> None:
    with path.open("wb") as file:
        for block in _blocks(lines, MEMBER_BYTES):
            file.write(gzip.compress(block, 6, mtime=0))


def _duckdb(path: Path, of_time: str = "BIGINT", where: str = "") -> Asker:
    """Ask DuckDB, which is told the type of a time, and which rows are events."""
    return Asker("duckdb", [str(environment(DUCKDB) / "python"), "-c", ASK_DUCKDB, str(path), of_time, where])


def _ours(path: Path) -> list[Asker]:
    command = [str(Path(sys.executable).with_name("traceml")), "analyze", str(path), "--by", "name", "--json"]
    forget = lambda: shutil.rmtree(os.environ["TRACEML_CACHE_DIR"], ignore_errors=True)  # noqa: E731
    return [Asker("ours, cold", command, forget), Asker("ours, repeated", command)]


def _blocks(lines: Iterable[str], size: int) -> Iterator[bytes]:
    """Yield lines in blocks of about `size` bytes."""
    block, held = list[str](), 0
    for line in lines:
        block.append(line)
        held += len(line)
        if held >= size:
            yield "".join(block).encode()
            block, held = [], 0

    if block:
        yield "".join(block).encode()


def _count(truth: Answer, name: str, duration: float) -> None:
    count, total = truth.get(name, (0, 0))
    truth[name] = (count + 1, total + duration)


def _posix_lines(events: int, truth: Answer, *, finer: int = 0, named: bool = False) -> Iterator[str]:
    """Yield lines as dftracer writes them, about 190 bytes each.

    Args:
        events: number of events.
        truth: filled with the answer.
        finer: decimals of their times.
        named: whether a line of metadata precedes each event.
    """
    chance = random.Random(1)
    ts = 1795155070260249
    for number in range(events):
        ts += chance.randrange(30)
        name, duration = NAMES[chance.randrange(len(NAMES))], chance.randrange(5000)
        fraction = f".{chance.randrange(10**finer):0{finer}}" if finer else ""
        _count(truth, name, float(f"{duration}{fraction}"))
        if named:
            yield (
                f'{{"id":{number},"name":"FH","cat":"dftracer","pid":16000,"tid":16000,"ph":"M",'
                f'"args":{{"name":"/data/train/part-{number:09}.npz","value":"{number:016x}"}}}}\n'
            )

        yield (
            f'{{"id":{number + 1},"name":"{name}","cat":"POSIX","pid":{16000 + number % 4},"tid":{16000 + number % 16},'
            f'"ts":{ts}{fraction},"dur":{duration}{fraction},"ph":"X","args":{{"hhash":"6882804a826580cd",'
            f'"fhash":"{number % 200:016x}","size":{chance.randrange(1 << 20)}}}}}\n'
        )


def _profiler_text(events: int, truth: Answer) -> Iterator[str]:
    """Yield the text of an export, about 250 bytes an event."""
    chance = random.Random(2)
    yield '{\n  "schemaVersion": 1,\n  "deviceProperties": [\n  ],\n  "displayTimeUnit": "ms",\n  "traceEvents": [\n'
    ts = 4329119917120_000
    for number in range(events):
        ts += chance.randrange(9000)
        name, duration_ns = OPERATORS[chance.randrange(len(OPERATORS))], chance.randrange(200_000)
        duration = f"{duration_ns // 1000}.{duration_ns % 1000:03}"
        _count(truth, name, float(duration))
        yield (
            f'  {{\n    "ph": "X", "cat": "cpu_op", "name": "{name}", "pid": 31449, "tid": {31449 + number % 3},\n'
            f'    "ts": {ts // 1000}.{ts % 1000:03}, "dur": {duration},\n    "args": {{\n      "External id": {number},'
            f'"Record function id": 0, "Ev Idx": {number}, "Input Dims": [[4, 8], []]\n    }}\n  }},\n'
        )

    yield '  {\n    "ph": "i", "s": "g", "name": "Record Window End", "pid": "", "tid": "", "ts": 43291.788\n  }\n'
    yield '  ],\n  "traceName": "trace.json"\n}\n'


if __name__ == "__main__":
    sys.exit(main())
