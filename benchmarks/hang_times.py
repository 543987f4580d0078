"""Time from a fault to the sentence about it, size of a rank's flight file, and what each detector in a rank costs.

    python benchmarks/hang_times.py [--kinds sleep held ...] [--ranks 2] [--timeout 10] [--rounds 2]

Jobs of `accuracy/shapes/hangs.py` hang after their 60th step. The time is taken by a command of `on_finding`, which
gets the finding at once, from the end of the last step of any rank. The detectors run on the recorder's thread of a
training of this process: their CPU time is divided by its steps.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from traceml.database.flight.flight_folders import default_folder, find_flights
from traceml.database.flight.postmortem import flight_identity
from traceml.database.store.reader import StoreReader
from traceml.run_folder import STORE_NAME

SHAPE = Path(__file__).parent / "accuracy" / "shapes" / "hangs.py"
KINDS = ("sleep", "held", "stopped", "worker", "pipe", "file_lock", "skip", "uneven", "barrier")
NOTE = """#!{python}
import json, sys
from pathlib import Path
from traceml.clock import monotonic_ns
now, finding = monotonic_ns(), json.load(sys.stdin)
if "HANG" in json.dumps(finding):
    Path({path!r}).with_suffix(".new").write_text(str(now))
    Path({path!r}).with_suffix(".new").rename({path!r})
"""
WAIT_S = 180.0
TRAINING_S = 20.0


def seconds_to_sentence(kind: str, ranks: int, timeout_s: float, folder: Path) -> tuple[float, list[tuple[int, int]]]:
    """Return the seconds from the last step of a job to the finding, and sizes and memory of its flight files."""
    told, note = folder / "told", folder / "note.py"
    note.write_text(NOTE.format(python=sys.executable, path=str(told)))
    note.chmod(0o755)
    environ = {
        **os.environ,
        "TRACEML_HANG_TIMEOUT": str(timeout_s), "TRACEML_ON_FINDING": str(note), "TRACEML_ON_FINDING_AFTER": "0",
    }  # fmt: skip
    command = [sys.executable, "-m", "traceml", "run", "--runs-dir", str(folder), "--nproc-per-node", str(ranks)]
    with subprocess.Popen(
        [*command, str(SHAPE), kind],
        cwd=folder, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    ) as job:  # fmt: skip
        try:
            until_s = time.monotonic() + WAIT_S
            while not told.exists() and time.monotonic() < until_s:
                time.sleep(0.05)

            if not told.exists():
                sys.exit(f"no sentence about {kind} within {WAIT_S:.0f} s; its run is in {folder}")

            run = (folder / "latest").resolve()
            with StoreReader(run / STORE_NAME) as reader:
                last_ns = int(reader.rows("steps")["t_end_ns"].max())

            return (int(told.read_text()) - last_ns) / 1e9, flight_bytes(run)
        finally:
            job.send_signal(signal.SIGINT)
            try:
                job.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(job.pid, signal.SIGKILL)


def flight_bytes(run: Path) -> list[tuple[int, int]]:
    """Return size and memory of the flight file of each rank of a run, in bytes."""
    paths = [path for path in find_flights(default_folder()) if flight_identity(path).get("run_dir") == str(run)]
    return [(path.stat().st_size, 512 * path.stat().st_blocks) for path in paths]


class Costs:
    """CPU time of functions of the recorder's thread, by name."""

    def __init__(self) -> None:
        self.total_ns: dict[str, int] = defaultdict(int)
        self.calls: dict[str, int] = defaultdict(int)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does the same and is counted."""

        def call(*args: Any) -> Any:
            began_ns = time.thread_time_ns()
            try:
                return function(*args)
            finally:
                self.total_ns[name] += time.thread_time_ns() - began_ns
                self.calls[name] += 1

        return call


def detector_costs(folder: Path) -> tuple[Costs, int]:
    """Train, and return what each detector cost, and the steps."""
    import torch

    import traceml
    from traceml.recorder.line_sampler import LineSampler
    from traceml.recorder.recorder_thread import RecorderThread
    from traceml.recorder.stop_meter import StopMeter

    costs, register = Costs(), RecorderThread.every_turn
    named: dict[Any, Callable[..., Any]] = {}

    def every_turn(self: RecorderThread, function: Callable[[bool], None]) -> None:
        owner = getattr(function, "__self__", function)
        register(self, named.setdefault(function, costs.timed(type(owner).__name__, function)))

    RecorderThread.every_turn = every_turn  # type: ignore[method-assign]
    LineSampler.sample = costs.timed("LineSampler", LineSampler.sample)  # type: ignore[method-assign]
    StopMeter.turn = costs.timed("StopMeter", StopMeter.turn)  # type: ignore[method-assign]
    traceml.init(local=True, runs_dir=folder, quiet=True)
    torch.set_num_threads(1)
    net = torch.nn.Linear(64, 64)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    steps, until_s = 0, time.monotonic() + TRAINING_S
    while time.monotonic() < until_s:
        optimizer.zero_grad()
        net(torch.ones(8, 64)).square().mean().backward()
        optimizer.step()
        steps += 1

    traceml.shutdown()
    return costs, steps


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=10.0, help="hang_timeout, seconds")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    sizes: list[tuple[int, int]] = []
    print(f"| hang, {options.ranks} ranks, hang_timeout {options.timeout:g} s | median | worst |\n|---|---|---|")
    for kind in options.kinds:
        taken = []
        for _ in range(options.rounds):
            with tempfile.TemporaryDirectory() as folder:
                seconds, found = seconds_to_sentence(kind, options.ranks, options.timeout, Path(folder))
                taken.append(seconds)
                sizes += found

        print(f"| {kind} | {statistics.median(taken):.1f} s | {max(taken):.1f} s |", flush=True)

    if sizes:
        size, memory = (max(each) / 1e6 for each in zip(*sizes, strict=True))
        print(f"\nflight file of a rank: {size:.1f} MB, of which {memory:.1f} MB are in memory after 60 steps")

    with tempfile.TemporaryDirectory() as folder:
        costs, steps = detector_costs(Path(folder))

    print(f"\n| detector, {steps / TRAINING_S:,.0f} steps/s | calls | CPU per call | per step |\n|---|---|---|---|")
    for name, total_ns in sorted(costs.total_ns.items(), key=lambda item: -item[1]):
        calls = costs.calls[name]
        print(f"| {name} | {calls} | {total_ns / calls / 1e3:.1f} us | {total_ns / steps / 1e3:.3f} us |")


if __name__ == "__main__":
    main()
