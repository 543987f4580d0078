"""The report as one HTML file."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import msgpack
import pytest
from msgspec import structs
from playwright.sync_api import sync_playwright

from tests.diagnosis.fabricated import Job, adds, rows_of
from tests.renderers.reports import healthy
from tests.runs.fabricated_store import add_info, add_rank, add_samples, run_facts, store_run
from tests.runs.rows.test_metric_series import log
from tests.system import chromium
from traceml.database.store.reader import StoreReader
from traceml.database.store.store import StoreWriter
from traceml.diagnosis.findings import Finding
from traceml.diagnosis.kinds import Kind
from traceml.renderers.html.report_page import inline_html, report_page, run_line, verdict_card
from traceml.renderers.views import run_view
from traceml.run_folder import STORE_NAME
from traceml.runs.about import about_run
from traceml.runs.report.report import full_report
from traceml.runs.rows.run_summary_reader import read_run_summary
from traceml.runs.rows.series import SeriesFollower

_EVIL = "<img src=x onerror=alert(1)>\"'&"


class _Page(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(self.texts)


def page_of(run_dir, of=report_page, **bounds):
    """Return the page of a run."""
    with StoreReader(run_dir / STORE_NAME) as reader:
        summary = read_run_summary(reader, **bounds)
        follower = SeriesFollower()
        follower.take(summary, reader)
        about = (about_run(reader),) if of is report_page else ()
        return of(full_report(summary, reader, run_dir), follower.series(summary), *about)


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    """A run in which every name is markup."""
    folder = tmp_path_factory.mktemp("evil")
    with StoreWriter(folder / STORE_NAME) as writer:
        facts = {"name": _EVIL, "command": _EVIL, "hosts": [_EVIL], "id": _EVIL, "state": _EVIL}
        writer.put_meta("run", run_facts(**facts))
        for rank, rows in enumerate(rows_of(Job(steps=120), adds("forward", 20, (1,)))):
            ended = {"code": 1, "exception": _EVIL, "stack": _EVIL}
            stream = add_rank(writer, rank, rows, state="failed", exit=ended)
            add_samples(writer, stream)
            log(writer, stream, [_EVIL], [1.0, 2.0])
            add_info(writer, stream, kind="process", argv=[_EVIL], folder=_EVIL, python=_EVIL)

    return _Page(page_of(folder))


def test_everything_stands_on_the_page(tmp_path):
    """The page has verdict, evidence, numbers, charts, ranks and the facts to repeat the run."""
    run = store_run(tmp_path / "run", Job(steps=200), adds("forward", 20, (1,)))

    page = _Page(page_of(run))

    assert "COMPUTE_STRAGGLER" in page.text
    assert "Rank 1 is slow in forward" in page.text
    for title in ("Charts", "Phases", "Ranks", "Environment, and how to repeat the run", "Slow ranks"):
        assert title in page.texts
    assert "train.py --lr 1" in page.text
    assert page.tags.count("svg") >= 4
    assert page.open == []


def test_parameters_are_shown_as_they_were_logged(tmp_path):
    """None is a value, unlike a fact that is not known; nested names are joined, as on the page."""
    run = store_run(tmp_path / "run", Job(steps=60))
    with StoreWriter(run / STORE_NAME) as writer:
        row = {"kind": "params", "params": {"note": None, "optimizer": {"lr": 0.1}}}
        writer.append(1, "logged", writer.next_seq(1, "logged"), 1, msgpack.packb(row))

    assert "note None, optimizer.lr 0.1" in _Page(page_of(run)).texts


@pytest.mark.parametrize(("names", "undrawn"), [(12, None), (13, 1), (600, 588)])
def test_metrics_without_a_chart_are_counted(tmp_path, names, undrawn):
    """Each once, however many ranks log it."""
    run = store_run(tmp_path / "run", Job(ranks=2, steps=60))
    with StoreWriter(run / STORE_NAME) as writer:
        for stream in (1, 2):
            log(writer, stream, [f"layer_{number}" for number in range(names)], [1.0, 2.0])

    texts = _Page(page_of(run)).texts

    assert ("metrics not drawn" in texts) is (undrawn is not None)
    if undrawn is not None:
        assert texts[texts.index("metrics not drawn") + 1] == str(undrawn)


def test_a_missing_rank_is_reported(tmp_path):
    """The note is under the table of ranks."""
    run = store_run(tmp_path / "run", Job(steps=60), facts={"world_size": 3})

    assert "No data from rank 2 (of 3)." in _Page(page_of(run)).texts


@pytest.mark.parametrize("of", [report_page, inline_html])
def test_what_a_long_runs_verdict_rests_on_is_reported(tmp_path, of):
    """Page and notebook say of how many steps the verdict is; charts cover all of them, without gaps."""
    run = store_run(tmp_path / "run", Job(steps=2000))
    said = "Verdict from 310 of 2,000 steps, spread over the run; means are of all steps."

    page = page_of(run, of, max_step_rows=640)

    assert said in page
    assert said not in page_of(run, of)
    assert _Page(page).tags.count("svg") == _Page(page_of(run, of)).tags.count("svg")


def test_what_a_run_calls_itself_is_text(evil):
    """No name opens a tag; each is shown as text."""
    assert {"img", "script", "iframe", "object"}.isdisjoint(evil.tags)
    assert not [name for name, _ in evil.attributes if name.startswith("on")]
    assert evil.text.count(_EVIL) >= 6
    assert evil.open == []


def test_it_needs_nothing_from_outside(evil, tmp_path):
    """No script, and nothing that a browser would fetch."""
    page = page_of(store_run(tmp_path / "run", Job(steps=60)))

    assert not re.search(r"<script|<link|@import|url\(|(?:src|href)=|https?://", page)
    assert not [value for name, value in evil.attributes if name in ("src", "href")]


def test_it_is_light_dark_and_prints(tmp_path):
    """The colors follow the system; print is always light."""
    page = page_of(store_run(tmp_path / "run", Job(steps=60)))

    assert "@media screen and (prefers-color-scheme:dark)" in page
    assert "@media print" in page
    assert "size:A4" in page


def test_a_run_without_steps_has_a_page(tmp_path):
    """The verdict says that data is missing; there is no chart, as nothing is known of the run's time either."""
    page = _Page(page_of(store_run(tmp_path / "run", Job(steps=0))))

    assert "INSUFFICIENT_DATA" in page.text
    assert page.tags.count("svg") == 0


def test_a_thousand_ranks_stay_readable(tmp_path):
    """The slowest and some others have rows, the rest is counted, and the file stays small."""
    page = page_of(store_run(tmp_path / "run", Job(ranks=1000, steps=30), adds("forward", 20, (617,))))

    assert len(page) < 400_000
    assert "968 more ranks in report.json" in page
    assert ">617</td>" in page


def test_hosts_that_are_not_listed_are_counted() -> None:
    """The line below the title has the first hosts."""
    view = run_view(structs.replace(healthy(), run=structs.replace(healthy().run, hosts=[*"abcdefg"])))

    line, *_ = run_line(view)

    assert " · a, b, c, d and 3 more · " in line


def test_a_rank_that_died_has_its_last_words(evil):
    """Its exception is in the table, its stack below."""
    assert any(text.startswith("failed with") for text in evil.texts)
    assert "Stacks of failed ranks" in evil.texts


@pytest.fixture(scope="module")
def browser():
    """A real Chromium without a network."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.process
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_without_a_network(browser, tmp_path, width):
    """On a large and a small screen there is no request, no error, no script and no overflow."""
    (tmp_path / "report.html").write_text(page_of(store_run(tmp_path / "run", Job(ranks=8, steps=200))))
    context = browser.new_context(viewport={"width": width, "height": 800}, offline=True, color_scheme="dark")
    tab, asked, said = context.new_page(), [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: said.append(message.text))

    tab.goto(f"file://{tmp_path / 'report.html'}")

    assert asked == [f"file://{tmp_path / 'report.html'}"]
    assert said == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.locator("figure svg").count() >= 4
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(13, 19, 27)"
    context.close()


@pytest.mark.process
def test_it_prints_light_on_a_few_sheets(browser, tmp_path):
    """Printed from a dark screen it is light, and no table is cut at the edge."""
    (tmp_path / "report.html").write_text(page_of(store_run(tmp_path / "run", Job(ranks=8, steps=200))))
    context = browser.new_context(viewport={"width": 703, "height": 1000}, color_scheme="dark")  # A4 less its margins
    tab = context.new_page()
    tab.goto(f"file://{tmp_path / 'report.html'}")

    tab.emulate_media(media="print")

    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.evaluate("document.documentElement.scrollWidth") <= 703
    assert len(re.findall(rb"/Type\s*/Page\b", tab.pdf(prefer_css_page_size=True))) <= 4
    context.close()


@pytest.mark.process
def test_the_error_of_a_rank_is_read_from_the_left(browser, tmp_path):
    """It has the width of the card, its lines stay apart, and the page is not wider for it."""
    stack = "  File 'train.py', line 3, in load\n    open(path)"
    ended = {"code": 1, "exception": f"FileNotFoundError: /{'data' * 80}", "stack": stack}
    with StoreWriter(tmp_path / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(world_size=1, state="failed"))
        add_rank(writer, 0, rows_of(Job(ranks=1, steps=60))[0], state="failed", exit=ended)

    tab = browser.new_page(viewport={"width": 900, "height": 800})
    tab.set_content(page_of(tmp_path))

    shown = tab.locator(".verdict dd")
    align = shown.evaluate_all(
        "all => Object.fromEntries(all.map(one => [one.innerText, getComputedStyle(one).textAlign]))"
    )
    assert tab.evaluate("document.documentElement.scrollWidth") <= 900
    assert [align[text] for text in (ended["exception"], stack, "1")] == ["left", "left", "right"]
    tab.close()


def test_commands_in_advice_are_code():
    """Not between backticks, which are for terminals; a text of the script stays text."""
    finding = Finding(
        kind=Kind.HANG, severity="critical", summary="It waits in `f<b>` now.", next="`traceml stacks` and ` alone"
    )

    shown = verdict_card(finding)

    assert "<p>It waits in <code>f&lt;b&gt;</code> now.</p>" in shown
    assert "<b>Next</b><code>traceml stacks</code> and ` alone</p>" in shown
