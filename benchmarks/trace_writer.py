"""Cost of a span of `traceml.traces.Writer` to its program, next to dftracer's.

    python benchmarks/trace_writer.py [--rounds 5] [--spans 200000] [--no-peer] [--json FILE]

Each round is a process that calls an empty function, decorated and plain, and then finishes the file: `span` is the
added duration of a call (while the writer's thread runs), `all told` is CPU time of the whole process per span, until
the file is complete. Our rounds and the peer's alternate. Every event must be in the file.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from peers import environment

PEER = "dftracer==2.2.0"
LOOP = """
import json, sys, time
count, folder = int(sys.argv[1]), sys.argv[2]

def plain():
    pass

{setup}

def block(function):
    start = time.perf_counter_ns()
    for _ in range(count):
        function()
    return (time.perf_counter_ns() - start) / count

before = [block(plain) for _ in range(3)]
began = time.process_time_ns()
took = block(traced)
{finish}
told = (time.process_time_ns() - began) / count
print(json.dumps({{"span_ns": took - min(before), "all_told_ns": told - min(before)}}))
"""
OURS = {
    "decorator": ("traced = trace.trace()(plain)", "trace.close()"),
    "with": (
        "def traced():\n    with trace.span('plain'):\n        pass\n",
        "trace.close()",
    ),
    "with two arguments": (
        "def traced():\n    with trace.span('plain', cat='io', size=4096, path='a.bin'):\n        pass\n",
        "trace.close()",
    ),
}
OPEN = "from traceml import traces\ntrace = traces.Writer(folder + '/trace.pfw.gz')\n"
DFTRACER = (
    "from dftracer.python import dftracer, dft_fn\n"
    "log = dftracer.initialize_log(logfile=folder + '/trace', data_dir=folder, process_id=-1)\n"
    "traced = dft_fn('app').log(plain)\n"
)


def run(python: Path, setup: str, finish: str, spans: int, **environ: str) -> dict[str, Any]:
    """Run one process; return its times and the number of spans in its file."""
    with tempfile.TemporaryDirectory() as folder:
        code = LOOP.format(setup=setup, finish=finish)
        done = subprocess.run(
            [str(python), "-c", code, str(spans), folder], env={**os.environ, **environ},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        times: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        files = [path for path in Path(folder).iterdir() if ".pfw" in path.name]
        text = b"".join(gzip.decompress(path.read_bytes()) for path in files)
        return {**times, "events": text.count(b"plain"), "bytes": sum(path.stat().st_size for path in files)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--spans", type=int, default=200_000)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    ways: dict[str, tuple[Path, str, str, dict[str, str]]] = {
        name: (Path(sys.executable), OPEN + setup, finish, {}) for name, (setup, finish) in OURS.items()
    }
    if not options.no_peer:
        python = environment(PEER) / "python"
        ways[PEER] = (python, DFTRACER, "log.finalize()", {"DFTRACER_ENABLE": "1", "DFTRACER_INC_METADATA": "1"})

    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, (python, setup, finish, environ) in ways.items():
            found[name].append(run(python, setup, finish, options.spans, **environ))

    result = {name: _summary(rounds) for name, rounds in found.items()}
    for name, figures in result.items():
        print(
            f"{name:20} span {figures['span_ns'] / 1e3:6.2f} us   all told {figures['all_told_ns'] / 1e3:6.2f} us CPU"
            f"   {figures['bytes'] / options.spans:5.1f} B per span   {figures['events']:,} of {options.spans:,} spans"
        )

    if PEER in result:
        ratio = result[PEER]["all_told_ns"] / result["decorator"]["all_told_ns"]
        print(f"ratio: {PEER} takes {ratio:.1f} x the CPU time of ours, decorated function against decorated function")

    if options.json:
        options.json.write_text(json.dumps(result, indent=2))


def _summary(rounds: list[dict[str, Any]]) -> dict[str, float]:
    return {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}


if __name__ == "__main__":
    main()
