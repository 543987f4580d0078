"""What the web page costs: processor time while it follows a live job, what it does to the job's steps, and how soon it
answers with a thousand simulated ranks.

The viewer is a client that speaks the page's websocket as a browser does and draws nothing: a browser is usually on
another machine, and one that draws on this one would be measured instead. First paint is Chromium's own figure.

python benchmarks/page.py [--blocks N] [--seconds S]
"""

from __future__ import annotations

import argparse
import ast
import http.client
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlencode

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.ingest import Generator, cpu_seconds, start_aggregator

from traceml import load_run
from traceml.display.web.token_middleware import cookie_name, cookie_value
from traceml.supervise.page_process import PageProcess

DEMO = Path(__file__).parents[1] / "src" / "traceml" / "cli" / "demonstration" / "_demo_train.py"
SETTLE_S = 3.0
GOAL_CPU_PCT, GOAL_ANSWER_S, GOAL_PAINT_S, GOAL_LIST_S = 5.0, 1.0, 2.0, 0.5
LISTED = 300


class Viewer:
    """A browser at a page that draws nothing; a context manager."""

    def __init__(self, keeper: PageProcess, path: str) -> None:
        self._port = keeper.port
        self._cookie = f"{cookie_name(keeper.port)}={cookie_value(keeper.token)}"
        self._path = path
        self._over = threading.Event()
        self.drawn = threading.Event()
        self.answered_s = self.drawn_s = float("nan")
        self.received_bytes = 0

    def __enter__(self) -> Self:
        self._began_s = time.monotonic()
        page = self._get()
        self.answered_s = time.monotonic() - self._began_s
        found = re.search(r"query: (\{.*?\}),\s+extraHeaders", page)
        assert found is not None, page[:300]
        self._sock = self._upgrade(
            {name: str(value).replace("True", "true") for name, value in ast.literal_eval(found[1]).items()}
        )
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._sock.close()

    def _get(self) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        connection.request("GET", self._path, headers={"Cookie": self._cookie})
        answer = connection.getresponse()
        assert answer.status == 200, answer.status
        return answer.read().decode()

    def _upgrade(self, query: dict[str, str]) -> socket.socket:
        from wsproto import ConnectionType, WSConnection
        from wsproto.events import Request

        self._socket_connection = WSConnection(ConnectionType.CLIENT)
        document = {"document_id": "benchmark", "tab_id": "benchmark", "old_tab_id": ""}
        words = urlencode({"EIO": "4", "transport": "websocket", **query, **document})
        target = f"/_nicegui_ws/socket.io/?{words}"
        sock = socket.create_connection(("127.0.0.1", self._port), timeout=0.2)
        headers = [(b"cookie", self._cookie.encode())]
        sock.sendall(self._socket_connection.send(Request(f"127.0.0.1:{self._port}", target, extra_headers=headers)))
        return sock

    def _read(self) -> None:
        """Answer pings and count what comes until it is over."""
        from wsproto.events import AcceptConnection, TextMessage

        message = ""
        while not self._over.is_set():
            try:
                data = self._sock.recv(1 << 20)
            except TimeoutError:
                continue

            self._socket_connection.receive_data(data)
            for event in self._socket_connection.events():
                if isinstance(event, AcceptConnection):
                    self._say("40")
                elif isinstance(event, TextMessage):
                    message += event.data
                    if event.message_finished:
                        self._take(message)
                        message = ""

    def _take(self, message: str) -> None:
        self.received_bytes += len(message)
        if message == "2":
            self._say("3")
        elif "tracemlCharts.draw(" in message and not self.drawn.is_set():
            self.drawn_s = time.monotonic() - self._began_s
            self.drawn.set()

    def _say(self, text: str) -> None:
        from wsproto.events import TextMessage

        self._sock.sendall(self._socket_connection.send(TextMessage(text)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=8, help="pairs of blocks, page open and page closed")
    parser.add_argument("--seconds", type=float, default=6.0, help="length of a block")
    options = parser.parse_args()
    passed = [live_job(options.blocks, options.seconds), thousand_ranks(), first_paint()]
    return 0 if all(passed) else 1


def live_job(blocks: int, seconds: float) -> bool:
    """Follow four ranks, the page open in every second block."""
    with tempfile.TemporaryDirectory() as folder, PageProcess(Path(folder), 0) as keeper:
        command = [
            sys.executable,
            "-m",
            "traceml",
            "run",
            "--live",
            "none",
            "--runs-dir",
            folder,
            "--nproc-per-node",
            "4",
        ]
        training = [str(DEMO), "--steps", "1000000", "--fault", "forward", "--rank", "2"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        job = subprocess.Popen([*command, *training], env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)
        try:
            run_id = wait_for_steps(Path(folder))
            spans, cpu_pct = take_turns(keeper, run_id, blocks, seconds)
        finally:
            job.terminate()
            job.wait()

        return tell_live(Path(folder) / run_id, spans, cpu_pct)


def wait_for_steps(folder: Path) -> str:
    """Return the id of the run once it has been training for a while."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        time.sleep(1.0)
        for run in folder.glob("2*"):
            if (run / "store.db").is_file() and len(load_run(run).table("steps")) > 400:
                return run.name

    raise SystemExit("the job did not start")


def take_turns(
    keeper: PageProcess, run_id: str, blocks: int, seconds: float
) -> tuple[dict[bool, list[tuple[int, int]]], list[float]]:
    """Return the (start, end) of open and closed blocks in monotonic nanoseconds, and CPU percent of each open one."""
    spans: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    cpu_pct = []
    for _ in range(blocks):
        assert keeper.pid is not None
        with Viewer(keeper, f"/run/{run_id}") as viewer:
            viewer.drawn.wait(30)
            time.sleep(SETTLE_S)
            before = cpu_seconds(keeper.pid)
            spans[True].append(span(seconds))
            cpu_pct.append(100 * (cpu_seconds(keeper.pid) - before) / seconds)

        time.sleep(25.0 if blocks > 2 else SETTLE_S)  # the page goes on reading for 20 s after the last browser left
        spans[False].append(span(seconds))

    return spans, cpu_pct


def span(seconds: float) -> tuple[int, int]:
    """Wait, and return when that was."""
    began_ns = time.monotonic_ns()
    time.sleep(seconds)
    return began_ns, time.monotonic_ns()


def tell_live(run_dir: Path, spans: dict[bool, list[tuple[int, int]]], cpu_pct: list[float]) -> bool:
    rows = load_run(run_dir).steps()
    rows = rows[rows["rank"] == 0]
    means = {
        is_open: [
            float(rows["total_ns"][(rows["t_end_ns"] >= start) & (rows["t_end_ns"] < end)].mean()) / 1e6
            for start, end in of
        ]
        for is_open, of in spans.items()
    }
    changes = [100 * (a / b - 1) for a, b in zip(means[True], means[False], strict=True)]
    spread = statistics.stdev(changes) / len(changes) ** 0.5 if len(changes) > 1 else float("nan")
    cpu = statistics.mean(cpu_pct)
    print(f"4 live ranks, page open: {cpu:.2f} % of a core (goal {GOAL_CPU_PCT:g} %), most {max(cpu_pct):.2f} %")
    print(
        f"step time, page open over closed, {len(changes)} pairs of blocks: {statistics.mean(changes):+.2f} % "
        f"(standard error {spread:.2f}), closed {statistics.mean(means[False]):.2f} ms"
    )
    return cpu <= GOAL_CPU_PCT


def thousand_ranks() -> bool:
    """Open the page of a run of a thousand simulated ranks that send 20 rows a second each."""
    cores = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0), backlog=4096) as sock:
        aggregator = start_aggregator(sock, Path(folder))
        try:
            generator = Generator(sock.getsockname()[1], 1000, "even")
            generator.connect()
            generator.run(8.0)
            with PageProcess(Path(folder), 0) as keeper:
                assert keeper.pid is not None
                os.sched_setaffinity(keeper.pid, cores)  # the generator has kept itself to one
                return tell_thousand(keeper, generator, next(Path(folder).glob("*/store.db")).parent.name)
        finally:
            aggregator.kill()
            aggregator.wait()


def tell_thousand(keeper: PageProcess, generator: Any, run_id: str) -> bool:
    sending = threading.Thread(target=generator.run, args=(30.0,))
    sending.start()
    with Viewer(keeper, "/"):  # the server has started
        pass

    with Viewer(keeper, f"/run/{run_id}") as first:
        first.drawn.wait(30)
        assert keeper.pid is not None
        time.sleep(SETTLE_S)
        before, cpu = time.monotonic(), cpu_seconds(keeper.pid)
        answers: list[tuple[float, float]] = []
        while sending.is_alive() or not answers:
            with Viewer(keeper, f"/run/{run_id}") as viewer:
                viewer.drawn.wait(30)
                answers.append((viewer.answered_s, viewer.drawn_s))

        cpu_pct = 100 * (cpu_seconds(keeper.pid) - cpu) / (time.monotonic() - before)

    answered, drawn = (statistics.median(each) for each in zip(*answers, strict=True))
    print(
        f"1,000 live ranks: first visit answered in {first.answered_s:.2f} s, its charts in {first.drawn_s:.2f} s; "
        f"the next {len(answers)} in {answered:.2f} s and {drawn:.2f} s, slowest {max(a for a, _ in answers):.2f} s "
        f"(goal {GOAL_ANSWER_S:g} s); {cpu_pct:.1f} % of a core with these visits"
    )
    return max(first.answered_s, *(each for each, _ in answers)) <= GOAL_ANSWER_S


def first_paint() -> bool:
    """Open the page of a run, and the list of many runs, in Chromium with nothing cached, three times each."""
    from playwright.sync_api import sync_playwright

    installed = shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as folder:
        run = store_runs(Path(folder), LISTED)
        with PageProcess(Path(folder), 0) as keeper, Viewer(keeper, f"/run/{run}"), sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])
            passed = [
                tell_paint(browser, keeper.address(), f"list of {LISTED} runs", "a.name:visible", GOAL_LIST_S),
                tell_paint(browser, keeper.address(run), "a run", "h1:visible", GOAL_PAINT_S),
            ]
            browser.close()

    return all(passed)


def store_runs(folder: Path, count: int) -> str:
    """Store runs that differ in their names alone, and return the newest one's."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.diagnosis.fabricated import Job, adds
    from tests.runs.fabricated_store import store_run

    from traceml.runs.report.report import build_report, save_report

    run = store_run(folder / "20260101-000000-run-0000", Job(ranks=4, steps=400), adds("forward", 12, (2,)))
    save_report(run, build_report(run))
    for number in range(1, count):
        shutil.copytree(run, folder / f"20260101-000000-run-{number:04}")

    return f"20260101-000000-run-{count - 1:04}"


def tell_paint(browser: Any, address: str, what: str, shown: str, goal_s: float) -> bool:
    """Open an address three times; tell when something was painted first, and when the element `shown` was there."""
    paints, whole = [], []
    for _ in range(3):
        page = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
        began_s = time.monotonic()
        page.goto(address, wait_until="commit")
        page.wait_for_selector(shown)
        whole.append(time.monotonic() - began_s)
        paint = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 0"
        page.wait_for_function(f"({paint}) > 0")
        paints.append(page.evaluate(paint) / 1e3)
        page.context.close()

    told, complete = (", ".join(f"{each:.2f}" for each in times) for times in (paints, whole))
    print(f"first paint in Chromium, nothing cached, {what}: {told} s (goal {goal_s:g} s), all of it in {complete} s")
    return statistics.median(paints) <= goal_s


if __name__ == "__main__":
    sys.exit(main())
