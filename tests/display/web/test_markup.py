"""No text of a run becomes markup or script, in Chromium: on the pages, in report and flame graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import msgpack
import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.diagnosis.fabricated import Job, adds, rows_of
from tests.display.web.conftest import Visit
from tests.display.web.runs import add_metrics
from tests.display.web.test_pages import is_built
from tests.runs.fabricated_store import add_info, add_rank, add_samples, run_facts
from tests.runs.report.test_line_shares import line, report_with
from traceml.database.schema import LINES
from traceml.database.store.store import StoreWriter
from traceml.display.report_files import write_reports
from traceml.renderers.html.flame_page import flame_page
from traceml.run_folder import STORE_NAME
from traceml.runs.remove import remove_run
from traceml.runs.report.report import build_report
from traceml.runs.run_labels import RunLabels, write_labels
from traceml.track.tracker_state import DeliveryPhase, TrackerState

Visits = Callable[..., Visit]
RUN, OTHER = "20251201-000000-markup-0011", "20251202-000000-markup-0012"
_FILE = "<img src=x onerror=window.pwned=1><svg onload=window.pwned=1>'\"{{window.pwned=1}}.log"  # a file has no slash
# Of every way that a text could run as script: elements, the end of a script, of an attribute, of a template.
_CODE = "<iframe>'\"{{window.pwned=1}}<script>window.pwned=1"  # in a line of code a space or a slash ends a part
_SIGNS = (
    '<img src=x onerror="window.pwned=1"><svg onload="window.pwned=1"></svg></script><script>window.pwned=1</script>'
    "<!--'\"><iframe srcdoc='<script>parent.pwned=1</script>'></iframe>{{window.pwned=1}}${window.pwned=1}`[[pwned]]"
)
_MARKUP = """() => {
  const live = "img[src='x'], svg[onload], iframe, [onerror], [onload], [onclick], a[href^='javascript']";
  const made = document.querySelectorAll(live);
  return [window.pwned ?? null, made.length];
}"""


def evil(field: str) -> str:
    """Return a text of a field that would run if it were markup."""
    return f"{field}{_SIGNS}"


def _logged(writer: StoreWriter, stream: int, run_dir: Path) -> None:
    picture = f"{'a' * 64}.svg"
    (run_dir / "artifacts").mkdir()
    (run_dir / "artifacts" / picture).write_text(
        "<svg xmlns='http://www.w3.org/2000/svg'><script>window.pwned=1</script></svg>"
    )
    git = {
        "commit": evil("commit"),
        "branch": evil("branch"),
        "remote": evil("remote"),
        "diff": evil("diff"),
        "dirty": True,
    }
    environment = {"packages": f"torch=={evil('version')}", "variables": {"OMP_X": evil("variable")}}
    for row in (
        {"kind": "experiment", "name": evil("experiment"), "backends": [], "tags": {evil("tag"): evil("value")}},
        {"kind": "params", "params": {evil("param"): evil("paramvalue")}},
        {"kind": "collected", "name": "git", "facts": git},
        {"kind": "collected", "name": "environment", "facts": environment},
        {"kind": "collected", "name": "system", "facts": {"cpu": evil("cpu"), "os": evil("os")}},
        {"kind": "text", "name": evil("textname"), "step": 5, "text": evil("text")},
        {"kind": "image", "name": evil("imagename"), "step": 1, "path": f"artifacts/{picture}"},
        {"kind": "image", "name": "script", "step": 1, "path": "javascript:window.pwned=1"},
        {"kind": "histogram", "name": evil("histogram"), "step": 1, "counts": [1, 5], "edges": [0.0, 1.0, 2.0]},
        {"kind": "artifact", "name": evil("artifact"), "path": f"artifacts/{picture}", "size": 76},
        {"kind": "refused", "name": evil("refusedname"), "what": evil("what"), "why": evil("why")},
    ):  # fmt: skip
        data = msgpack.packb({"t_ns": 10**18, "experiment": 0, **row})
        writer.append(stream, "logged", writer.next_seq(stream, "logged"), 1, data)


def _lines(writer: StoreWriter, stream: int) -> None:
    for number, name in ((900, f"/codefile{_CODE}.py:7 function{_CODE}"), (901, f"/lib/library{_CODE}.py:1 f")):
        named = msgpack.packb({"id": number, "name": name})
        writer.append(stream, "names", writer.next_seq(stream, "names"), 1, named)

    rows = np.zeros(1, LINES.dtype)
    rows["line_id"], rows["library_id"], rows["samples"], rows["watched_ns"], rows["phase"] = 900, 901, 50, 10**9, 2
    writer.append(stream, "lines", 0, 1, rows.tobytes())


def store_markup(run_dir: Path) -> Path:
    """Store a run in which every text is markup."""
    run_dir.mkdir()
    facts = {"name": evil("name"), "command": evil("command"), "project": evil("project"), "hosts": [evil("host")]}
    ended = {"code": 1, "exception": evil("exception"), "message": evil("message"), "stack": evil("stack")}
    with StoreWriter(run_dir / STORE_NAME) as writer:
        writer.put_meta("run", run_facts(id=run_dir.name, state="failed", **facts))
        for rank, rows in enumerate(rows_of(Job(ranks=2, steps=120), adds("forward", 20, (1,)))):
            stream = add_rank(writer, rank, rows, on_host=evil("host"), state="failed", exit=ended)
            add_samples(writer, stream)
            _lines(writer, stream)
            if rank == 0:
                _logged(writer, stream, run_dir)
                add_metrics(writer, stream, {f"{evil('group')}/{evil('metric')}": np.linspace(0, 1, 120)})
                for kind in ("process", "model", "loader", "optimizer"):
                    add_info(
                        writer, stream, kind=kind, argv=[evil("argument")], folder=evil("folder"), model=evil("model")
                    )

        writer.event("alert", {"what": evil("event")})
        writer.event("rank", {"rank": 1, "state": evil("rankstate")})

    (run_dir / "logs").mkdir()
    (run_dir / "logs" / _FILE).write_text(f"{evil('logline')}\nValueError: {evil('logerror')}\n")
    write_labels(run_dir, RunLabels(tags=[evil("label")], note=evil("note"), name=evil("given")))
    state = TrackerState("jsonl", phase=DeliveryPhase.BROKEN, error=evil("trackererror"), target=evil("target"))
    state.experiments = {"0-x": {"id": "1", "url": f"javascript:window.pwned=1//{evil('url')}"}}
    state.save(run_dir)
    write_reports(run_dir)
    return run_dir


@pytest.fixture(scope="module")
def markup(runs_dir: Path) -> Iterator[Path]:
    """Two runs full of markup, one of them without a report."""
    first, second = store_markup(runs_dir / RUN), store_markup(runs_dir / OTHER)
    (second / "report.json").unlink()
    yield first
    for each in (first, second):
        remove_run(each)


def is_harmless(page: Page) -> None:
    """Check that no text has become an element or has run."""
    assert page.evaluate(_MARKUP) == [None, 0]


def test_every_text_of_a_run_is_text_on_its_page(visit: Visits, markup: Path) -> None:
    """Those of the script, its environment, its code, its logs, its exceptions, its trackers, and those of people."""
    for name in (RUN, OTHER):
        page = visit().open(f"/run/{name}")
        is_built(page)
        page.wait_for_selector("#overview dd")
        expect(page.locator("#metrics h3", has_text="metric<img")).to_be_attached()
        for summary in page.locator("#overview summary, #logs summary").all():
            if summary.is_visible():
                summary.click()

        # Beside `details` that are closed by the click; each must be in the document as text.
        fields = (
            "given argument project host exception label note param paramvalue diff branch version variable textname "
            "text imagename histogram artifact refusedname why group metric logline logerror "
            "trackererror event"
        )
        for text in [f"{field}<img src=x" for field in fields.split()] + [
            f"{field}<iframe>" for field in ("codefile", "function", "library")
        ]:
            expect(page.locator("body")).to_contain_text(text)

        page.locator("#metrics canvas").last.hover()
        is_harmless(page)
        page.locator("#log-search").fill("ValueError <img")
        expect(page.locator("#logs pre", has_text="logerror")).to_be_visible()
        page.get_by_label("search parameters").fill(evil("param"))
        is_harmless(page)


def test_texts_are_text_in_the_list_and_in_comparisons(visit: Visits, markup: Path) -> None:
    """Also as columns, groups, conditions and in the dialog before a deletion."""
    page = visit().open("/")
    row = page.locator("tr", has_text=RUN)
    for field in ("given", "label", "note"):
        expect(row).to_contain_text(f"{field}<img src=x")

    page.locator(f'input[data-run="{RUN}"]').check()
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(page.locator("#delete-runs")).to_contain_text(RUN)
    page.locator("#keep-runs").click()
    page.locator("#columns").click()
    page.get_by_role("checkbox", name="param<img").check()
    page.locator("#group").select_option("project")
    expect(page.locator(".groupline", has_text="project: project<img").first).to_be_visible()
    page.locator("#search").fill(f'"{evil("unheard")}"')
    expect(page.locator(".problem")).to_be_visible()
    is_harmless(page)

    page = visit().open(f"/compare/{OTHER}/{RUN}")
    expect(page.locator("body")).to_contain_text("metric<img src=x")
    is_harmless(page)


@pytest.mark.parametrize(
    "place",
    ["/run/{}", "/compare/{}/{}", "/?where={}&sort={}&group={}&columns={}", "/files/{}/report.html", "/nowhere/{}"],
)
def test_texts_of_an_address_are_text(visit: Visits, markup: Path, place: str) -> None:
    """A link that somebody sends runs nothing, whatever it asks for."""
    mine = visit()
    mine.open("/")
    mine.page.goto(f"http://127.0.0.1:{mine.port}{place.replace('{}', quote(evil('sent'), safe=''))}")
    mine.page.wait_for_timeout(300)

    is_harmless(mine.page)


def test_every_text_of_a_run_is_text_in_written_pages(browser: Browser, markup: Path, tmp_path: Path) -> None:
    """In the report and the flame graph, which are opened as files; and if one were not, it would not run."""
    flame = tmp_path / "flame.html"
    flame.write_text(flame_page(build_report(markup)), encoding="utf-8")
    for path, fields in (
        (markup / "report.html", "name host exception stack metric trackererror argument branch param"),
        (flame, "name"),
    ):
        page = browser.new_page()
        page.goto(path.as_uri())
        shown = page.locator("body").evaluate("body => body.textContent")
        titles = page.evaluate("[...document.querySelectorAll('[title]')].map(each => each.title).join(' ')")
        assert [field for field in fields.split() if f"{field}<img src=x" not in shown] == []
        assert [field for field in ("codefile", "library") if f"{field}<iframe>" not in f"{shown}{titles}"] == []
        is_harmless(page)
        assert _scripts_run(page) is False
        page.close()


def test_a_flame_graph_works_under_its_policy(browser: Browser, tmp_path: Path) -> None:
    """Its own script runs: a click enlarges a frame, Escape shows all again."""
    flame = tmp_path / "flame.html"
    flame.write_text(flame_page(report_with(line("forward", 30, 1.0), line("startup", 20, 1.0))), encoding="utf-8")
    page = browser.new_page()
    page.goto(flame.as_uri())
    expect(page.locator(".hidden")).to_have_count(0)
    page.locator("#graph > .frame > button").first.click()
    expect(page.locator(".hidden")).to_have_count(1)
    page.keyboard.press("Escape")
    expect(page.locator(".hidden")).to_have_count(0)
    page.close()


def _scripts_run(page: Page) -> bool:
    """Return whether markup that is added now could run."""
    add = """() => {
      document.body.insertAdjacentHTML("beforeend", "<img src=x onerror='window.ran = true'>");
      const made = document.createElement("script");
      made.textContent = "window.ran = true";
      document.body.append(made);
    }"""
    page.evaluate(add)
    page.wait_for_timeout(300)
    return page.evaluate("window.ran") is True
