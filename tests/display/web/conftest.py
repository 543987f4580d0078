"""One page server, one Chromium, and runs of all kinds, for all tests of the page."""

from __future__ import annotations

import http.client
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, BrowserContext, Error, Page, Request, expect, sync_playwright

from tests.diagnosis.fabricated import Job, adds, rows_of
from tests.display.web.runs import NASTY, add_logged, add_metrics, add_rank_rows, rewrite
from tests.runs.fabricated_store import add_rank, add_samples, run_facts, store_run
from tests.runs.report.test_restarts import FINE, RAISED, attempt, store
from tests.system import chromium
from traceml.database.store.store import StoreWriter
from traceml.diagnosis.facts.job_facts import JobFacts
from traceml.diagnosis.ruleset import diagnose
from traceml.diagnosis.steps.kept_steps import KeptSteps
from traceml.run_folder import STORE_NAME
from traceml.runs.remove import remove_run
from traceml.runs.report.report import build_report, save_report
from traceml.supervise.page_process import PageProcess

_PATIENCE_MS = 90_000  # where the machine is busy; what is there at once is seen at once
expect.set_options(timeout=_PATIENCE_MS)


@pytest.fixture(scope="package")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a straggler, a faster run, many ranks, and every kind of damaged run."""
    folder = tmp_path_factory.mktemp("runs")
    slow = store_run(folder / "20260105-000000-slow-0001", Job(ranks=4, steps=300), adds("forward", 12, (2,)))
    with StoreWriter(slow / STORE_NAME) as writer:
        add_samples(writer, 1)
        add_logged(writer, 1, slow)
        add_metrics(writer, 1, {"train/loss": np.linspace(2, 0.1, 300), f"val {NASTY}": np.linspace(0, 1, 300)})

    store_run(folder / "20260104-000000-fast-0002", Job(ranks=4, steps=300))
    store_run(folder / "20260103-000000-many-0003", Job(ranks=1000, steps=80), adds("forward", 9, (412,)))
    named = {"name": NASTY, "command": NASTY, "project": NASTY, "hosts": [NASTY]}
    store_run(folder / "20260102-000000-<b>nasty<-0004", Job(ranks=2, steps=60), facts=named)
    for each in folder.iterdir():
        save_report(each, build_report(each))

    _store_odd_runs(folder)
    return folder


def _store_odd_runs(folder: Path) -> None:
    with store(folder / "20260101-000000-again-0009") as writer:
        attempt(writer, 0, 30, 100, FINE, RAISED)
        attempt(writer, 1, 50, 141, FINE, FINE)

    older = store_run(folder / "20260101-000000-older-0005", Job(ranks=1, steps=20, grouped=False))
    rewrite(older / STORE_NAME, "PRAGMA user_version=0")
    damaged = store_run(folder / "20260101-000000-damaged-0006", Job(ranks=2, steps=300))
    content = bytearray((damaged / STORE_NAME).read_bytes())
    content[8192 : len(content) // 2] = os.urandom(len(content) // 2 - 8192)
    (damaged / STORE_NAME).write_bytes(content)
    halved = store_run(folder / "20260101-000000-halved-0007", Job(ranks=2, steps=60))
    save_report(halved, build_report(halved))
    (halved / STORE_NAME).unlink()
    empty = folder / "20260101-000000-empty-0008"
    empty.mkdir()
    with StoreWriter(empty / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(id=empty.name, name="empty", state="failed"))

    store_run(folder / "20260101-000000-alone-0010", Job(ranks=1, steps=60))
    partial = folder / "20260101-000000-partial-0009"
    partial.mkdir()
    with StoreWriter(partial / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(id=partial.name, name="partial", world_size=3))
        of_0, of_1 = rows_of(Job(ranks=2, steps=60))
        add_rank(writer, 0, of_0)
        add_rank(writer, 1, of_1, state="failed", exit={"exception": f"FileNotFoundError: /{'data' * 80}"})


@pytest.fixture(scope="package")
def page_process(runs_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageProcess]:
    """The page, served as `serve --web` does, with the files of tokens in a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))
        with PageProcess(runs_dir, 0, nice=0) as page_process:
            connection = http.client.HTTPConnection("127.0.0.1", page_process.port, timeout=60)
            connection.request("GET", "/")  # it waits in the socket's backlog until it is served
            assert connection.getresponse().status == 401
            connection.close()
            yield page_process


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Headless Chromium; tests without it come first, since its event loop would block asyncio in them."""
    with sync_playwright() as playwright:
        names = "--host-resolver-rules=MAP *.example 127.0.0.1"  # of other sites, and of one that rebinds its name
        no_gpu = ["--disable-gpu", "--disable-gpu-compositing", "--disable-software-rasterizer"]
        arguments = ["--no-sandbox", *no_gpu, names]
        browser = playwright.chromium.launch(executable_path=chromium(), args=arguments)
        yield browser
        browser.close()


class Tabs:
    """Tabs of the browser that tests use in turn: a new one fetches and compiles the page's scripts anew.

    Args:
        browser: of the tests.
        origin: of the page, whose storage is cleared after each test.
    """

    def __init__(self, browser: Browser, origin: str) -> None:
        self._browser, self._origin = browser, origin
        self._contexts: dict[str, BrowserContext] = {}
        self._idle: dict[BrowserContext, list[Page]] = {}
        self._used_once: set[Page] = set()

    def take(self, script: str = "", **options: object) -> Page:
        """Return an empty tab of a profile with these options, which no other test uses.

        Args:
            script: runs before those of each page; such a tab is used once.
            options: of `Browser.new_context`.
        """
        if (key := repr(sorted(options.items()))) not in self._contexts:
            context = self._browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
            context.set_default_timeout(_PATIENCE_MS)
            self._contexts[key], self._idle[context] = context, []

        context = self._contexts[key]
        page = context.new_page() if script or not self._idle[context] else self._idle[context].pop()
        if script:
            page.add_init_script(script)
            self._used_once.add(page)

        return page

    def give_back(self, pages: list[Page]) -> None:
        """Empty the tabs of a test and forget what they have stored.

        None is closed: Chromium may never close a tab that navigates.
        """
        for page in pages:
            self._empty(page)
            page.context.clear_cookies()
            if page not in self._used_once:
                self._idle[page.context].append(page)

    def close(self) -> None:
        """Close all profiles."""
        for context in self._contexts.values():
            context.close()

    def _empty(self, page: Page) -> None:
        if page.url.startswith(self._origin):
            page.evaluate("sessionStorage.clear()")

        page.mouse.move(0, 0)
        page.goto("about:blank")
        session = page.context.new_cdp_session(page)
        clear = {"origin": self._origin, "storageTypes": "local_storage,indexeddb,service_workers"}
        session.send("Storage.clearDataForOrigin", clear)
        session.detach()


class Visit:
    """A tab of a browser; records requests to other hosts and errors of scripts."""

    def __init__(self, page: Page, page_process: PageProcess) -> None:
        self._page_process = page_process
        self.page = page
        self.context = page.context
        self.foreign: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", self._note_request)
        self.page.on("pageerror", self._note_error)

    def end(self) -> None:
        """Record no more."""
        self.page.remove_listener("request", self._note_request)
        self.page.remove_listener("pageerror", self._note_error)

    @property
    def port(self) -> int:
        """The page's port."""
        return self._page_process.port

    def open(self, path: str = "/", *, token: bool = True) -> Page:
        """Go to an address, with the token."""
        place, mark, section = path.partition("#")
        query = f"?token={self._page_process.token}" if token else ""
        self.page.goto(f"http://127.0.0.1:{self._page_process.port}{place}{query}{mark}{section}")
        return self.page

    def _note_request(self, request: Request) -> None:
        if not request.url.startswith((f"http://127.0.0.1:{self._page_process.port}/", "data:", "blob:")):
            self.foreign.append(request.url)

    def _note_error(self, error: Error) -> None:
        self.errors.append(str(error))


@pytest.fixture(scope="package")
def tabs(browser: Browser, page_process: PageProcess) -> Iterator[Tabs]:
    """The tabs that tests use in turn."""
    kept = Tabs(browser, f"http://127.0.0.1:{page_process.port}")
    yield kept
    kept.close()


@pytest.fixture
def visit(tabs: Tabs, page_process: PageProcess) -> Iterator[Callable[..., Visit]]:
    """Open pages; none may have sent a request to another host or had a script error."""
    visits: list[Visit] = []

    def start(*, script: str = "", **options: object) -> Visit:
        """Open a tab; with a script that runs before those of each page, one of its own."""
        visits.append(Visit(tabs.take(script, **options), page_process))
        return visits[-1]

    yield start
    for each in visits:
        each.end()

    tabs.give_back([each.page for each in visits])
    for each in visits:
        assert each.foreign == []
        assert each.errors == []


class LiveJob:
    """A running run, written by this process."""

    def __init__(self, folder: Path) -> None:
        self.id = folder.name
        folder.mkdir()
        self._rows = rows_of(Job(ranks=4, steps=400), adds("forward", 12, (1,)))
        self._done = 0
        self._kept = KeptSteps(512)
        self._writer = StoreWriter(folder / STORE_NAME)
        facts = run_facts(id=self.id, name="live", state="running", started=time.time(), ended=None, world_size=4)
        self._writer.put_meta("run", facts)
        self._streams = [
            add_rank(self._writer, rank, rows[:0], state="running") for rank, rows in enumerate(self._rows)
        ]
        self._writer.commit()

    def train(self, steps: int) -> None:
        """Append steps of all ranks."""
        for rank, (stream, rows) in enumerate(zip(self._streams, self._rows, strict=True)):
            new = rows[self._done : self._done + steps]
            add_rank_rows(self._writer, stream, new, self._done)

            self._kept.scatter(np.full(len(new), rank), new)

        self._done += steps
        told = [finding.to_dict() for finding in diagnose(self._kept.aligned(), JobFacts(world_size=4))]
        self._writer.event("verdict", {"verdict": told[0], "findings": told, "step": self._done - 1})
        self._writer.commit()

    def log(self, name: str, values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> None:
        """Log values of the first rank, one per step."""
        add_metrics(self._writer, self._streams[0], {name: values})
        self._writer.commit()

    def end(self) -> None:
        """End the run."""
        facts = run_facts(id=self.id, name="live", started=time.time() - 5, ended=time.time(), world_size=4)
        self._writer.put_meta("run", facts)
        self._writer.commit()

    def close(self) -> None:
        """Close the store."""
        self._writer.close()


@pytest.fixture
def live_job(runs_dir: Path) -> Iterator[LiveJob]:
    """A running run without rows."""
    folder = runs_dir / "20260106-000000-live-0010"
    job = LiveJob(folder)
    yield job
    job.close()
    remove_run(folder)


@pytest.fixture
def kill_page(page_process: PageProcess) -> Iterator[Callable[[], None]]:
    """Return a function that kills the page's process, as an OOM kill would; other tests get a new one."""

    def kill() -> None:
        assert page_process.pid is not None
        os.kill(page_process.pid, signal.SIGKILL)

    yield kill
    while not page_process.running:
        page_process.restart_if_dead()
        time.sleep(0.05)
