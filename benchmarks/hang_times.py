"""Time from a fault to the sentence about it, size of a rank's flight file, and what each detector in a rank costs.

    python benchmarks/hang_times.py [--kinds sleep held ...] [--ranks 2] [--timeout 10] [--rounds 2]

Jobs of `accuracy/shapes/hangs.py` hang after their 60th step. Times are from the end of the last step of any rank to
the finding, at a command of `on_finding`, in the live view in a terminal, and on the page in Chromium. The detectors
run on the recorder's thread of a training of this process: their CPU time is divided by its steps.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from playwright.sync_api import sync_playwright

from traceml.clock import monotonic_ns
from traceml.database.flight.flight_folders import default_folder, find_flights
from traceml.database.flight.postmortem import flight_identity
from traceml.database.store.reader import StoreReader
from traceml.diagnosis.findings import Finding
from traceml.run_folder import STORE_NAME
from traceml.supervise.page_process import PageProcess

SHAPE = Path(__file__).parent / "accuracy" / "shapes" / "hangs.py"
KINDS = ("sleep", "held", "stopped", "worker", "pipe", "file_lock", "skip", "uneven", "barrier")
NOTE = """#!{python}
import json, sys
from pathlib import Path
from traceml.clock import monotonic_ns
now, finding = monotonic_ns(), json.load(sys.stdin)["finding"]
if finding["kind"] == "HANG":
    Path({path!r}).with_suffix(".new").write_text(json.dumps([now, finding]))
    Path({path!r}).with_suffix(".new").rename({path!r})
"""
WAIT_S = 180.0
TRAINING_S = 20.0


@dataclass(frozen=True, slots=True)
class Told:
    """Seconds from the last step of a job to its finding, by place, and size and memory of its flight files."""

    command_s: float
    terminal_s: float
    page_s: float
    flights: list[tuple[int, int]]


class Screen:
    """The job's live view in a terminal of its own, and when what was on it."""

    def __init__(self) -> None:
        self._ours, self.theirs = os.openpty()
        termios.tcsetwinsize(self._ours, (50, 120))
        self._shown: list[tuple[int, bytes]] = []
        threading.Thread(target=self._follow, daemon=True).start()

    def seen_ns(self, text: str) -> int:
        """Return when a text was first on it; 0: not yet."""
        all_so_far = b""
        for at_ns, shown in list(self._shown):
            all_so_far = all_so_far[-200:] + shown
            if text.encode() in all_so_far:
                return at_ns

        return 0

    def _follow(self) -> None:
        with suppress(OSError):  # the job has ended
            while data := os.read(self._ours, 1 << 16):
                self._shown.append((monotonic_ns(), data))


def seconds_to_sentence(kind: str, ranks: int, timeout_s: float, folder: Path, browser: Any) -> Told:
    """Let a job hang, and return when that was told where."""
    told, note, screen = folder / "told", folder / "note.py", Screen()
    note.write_text(NOTE.format(python=sys.executable, path=str(told)))
    note.chmod(0o755)
    environ = {
        **os.environ, "TERM": "xterm-256color",
        "TRACEML_HANG_TIMEOUT": str(timeout_s), "TRACEML_ON_FINDING": str(note), "TRACEML_ON_FINDING_AFTER": "0",
    }  # fmt: skip
    command = [sys.executable, "-m", "traceml", "run", "--live", "terminal", "--runs-dir", str(folder)]
    with (
        PageProcess(folder, 0) as page,
        subprocess.Popen(
            [*command, "--nproc-per-node", str(ranks), str(SHAPE), kind],
            cwd=folder, env=environ, stdin=screen.theirs, stdout=screen.theirs, stderr=screen.theirs,
            start_new_session=True,
        ) as job,
    ):  # fmt: skip
        os.close(screen.theirs)
        try:
            latest = folder / "latest"
            wait_until(lambda: (latest / STORE_NAME).exists(), f"no run of {kind}")
            run = latest.resolve()
            tab = browser.new_page()
            tab.goto(page.address(run.name))
            tab.locator(".verdict", has_text=re.compile("HANG")).wait_for(timeout=WAIT_S * 1e3)
            page_ns = monotonic_ns()
            tab.close()
            wait_until(told.exists, f"no finding of {kind}")
            told_ns, finding = json.loads(told.read_text())
            headline = msgspec.convert(finding, Finding).headline[:40]
            wait_until(lambda: screen.seen_ns(headline) > 0, f"'{headline}' is not in the live view")
            with StoreReader(run / STORE_NAME) as reader:
                last_ns = int(reader.rows("steps")["t_end_ns"].max())

            times = (told_ns, screen.seen_ns(headline), page_ns)
            return Told(*((each - last_ns) / 1e9 for each in times), flights=flight_bytes(run))
        finally:
            job.terminate()  # a job that a shell starts in the background ignores SIGINT
            try:
                job.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(job.pid, signal.SIGKILL)


def wait_until(condition: Callable[[], bool], lacking: str) -> None:
    """Wait for a condition; end the program where it does not come."""
    until_s = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > until_s:
            sys.exit(f"{lacking} within {WAIT_S:.0f} s")

        time.sleep(0.05)


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
    from traceml.recorder.lines.line_sampler import LineSampler
    from traceml.recorder.recorder_thread import RecorderThread
    from traceml.recorder.stop_detector import StopDetector

    costs, register = Costs(), RecorderThread.every_cycle
    named: dict[Any, Callable[..., Any]] = {}

    def every_cycle(self: RecorderThread, function: Callable[[bool], None]) -> None:
        owner = getattr(function, "__self__", function)
        register(self, named.setdefault(function, costs.timed(type(owner).__name__, function)))

    RecorderThread.every_cycle = every_cycle  # type: ignore[method-assign]
    LineSampler.sample = costs.timed("LineSampler", LineSampler.sample)  # type: ignore[method-assign]
    StopDetector.poll = costs.timed("StopDetector", StopDetector.poll)  # type: ignore[method-assign]
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
    print(f"hang_timeout {options.timeout:g} s, {options.ranks} ranks: median and worst\n")
    print("| hang | command | live view | page |\n|---|---|---|---|")
    installed = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        for kind in options.kinds:
            taken = []
            for _ in range(options.rounds):
                with tempfile.TemporaryDirectory() as folder:
                    taken.append(seconds_to_sentence(kind, options.ranks, options.timeout, Path(folder), browser))

            sizes += [flight for told in taken for flight in told.flights]
            places = zip(*((told.command_s, told.terminal_s, told.page_s) for told in taken), strict=True)
            cells = [f"{statistics.median(place):.1f}, {max(place):.1f} s" for place in places]
            print(f"| {kind} | {' | '.join(cells)} |", flush=True)

        browser.close()

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
